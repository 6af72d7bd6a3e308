"""Every setting of the project: what may be written in `config/*.yaml`, and the config of each job.

*Settings* are what functions take, *entries* what a person writes, *jobs* what a command reads: an entry merged,
checked and with every name replaced by a path. This package reads YAML for everybody else and imports no torch, so that
planning and `--help` stay quick.
"""

from dllm.config.entries import (
    HARDWARE,
    NAME,
    REVISION,
    BenchmarkEntry,
    BenchmarkSize,
    CurveEntry,
    DatasetEntry,
    EvaluationEntry,
    ModelEntry,
    Project,
    Rehearsal,
    ReportedEntry,
    ReportEntry,
    RunEntry,
    SampleEntry,
    SpeedEntry,
)
from dllm.config.jobs import (
    DataPart,
    DownloadConfig,
    EvaluationConfig,
    PrepareConfig,
    RunConfig,
    SampleConfig,
    SpeedConfig,
    checkpoint_path,
    digest,
    download_configs,
    download_name,
    download_path,
    evaluation_configs,
    prepare_configs,
    prepared_name,
    run_configs,
    sample_configs,
    schema,
    speed_configs,
    write_when_changed,
    yaml_text,
)
from dllm.config.policy import PolicySettings, PreferenceSettings
from dllm.config.reading import CONFIG_FILES, ConfigError, load_project, read_config, read_yaml
from dllm.config.rehearsal import rehearsed
from dllm.config.rules import launch_error
from dllm.config.settings import (
    DECODING_OPTIONS,
    AdapterSettings,
    EditSampling,
    EditSettings,
    GenerateSettings,
    LikelihoodSettings,
    OptimizerSettings,
    Recipe,
    Resources,
    Scorer,
    Settings,
    checked_options,
    did_you_mean,
    option,
    overlaid,
)
from dllm.config.shape import Shape
from dllm.config.sources import (
    DATA_FILES,
    WEIGHT_FILES,
    checkpoint_directory,
    checkpoint_files,
    content_digest,
    dataset_files,
    merge_first,
)

__all__ = [
    "AdapterSettings", "BenchmarkEntry", "BenchmarkSize", "CONFIG_FILES", "ConfigError", "CurveEntry", "DATA_FILES",
    "DECODING_OPTIONS", "DataPart", "DatasetEntry", "DownloadConfig", "EditSampling", "EditSettings",
    "EvaluationConfig", "EvaluationEntry", "GenerateSettings", "HARDWARE", "LikelihoodSettings", "ModelEntry", "NAME",
    "OptimizerSettings", "PolicySettings", "PreferenceSettings", "PrepareConfig", "Project", "REVISION", "Recipe",
    "Rehearsal", "ReportEntry", "ReportedEntry", "Resources", "RunConfig", "RunEntry", "SampleConfig", "SampleEntry",
    "Scorer", "Settings", "Shape", "SpeedConfig", "SpeedEntry", "WEIGHT_FILES", "checked_options",
    "checkpoint_directory", "checkpoint_files", "checkpoint_path", "content_digest", "dataset_files", "did_you_mean",
    "digest", "download_configs", "download_name", "download_path", "evaluation_configs", "launch_error",
    "load_project",
    "merge_first", "option", "overlaid", "prepare_configs", "prepared_name", "read_config", "read_yaml",
    "rehearsed", "run_configs", "sample_configs", "schema", "speed_configs", "write_when_changed", "yaml_text",
]  # fmt: skip
