"""What the Slurm executor makes of a rule's resources: the flags of `sbatch`, without submitting anything."""

from pathlib import Path
from types import SimpleNamespace

import yaml
from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from snakemake_executor_plugin_slurm.utils import set_gres_string
from snakemake_executor_plugin_slurm.validation import validate_slurm_extra

from dllm.config import load_project
from tests.workflow.conftest import ROOT
from workflow.plan import make_plan


class Asked(dict):
    """Resources as the executor reads them: keys and attributes."""

    __getattr__ = dict.get


def profile() -> dict:
    """The shipped profile."""
    return yaml.safe_load((ROOT / "slurm/profile.yaml").read_text())


def sbatch(overlays: list[Path], rule: str, name: str, output: str = "log") -> str:
    """The command that submits a job of a configuration."""
    planned = make_plan(load_project(ROOT / "config", *overlays))
    default = {key: value.strip("'") for key, value in profile()["default-resources"].items()}
    job = SimpleNamespace(resources=Asked(default | planned.resources(rule, name)), threads=1)
    validate_slurm_extra(job)
    words = dict.fromkeys(("run_uuid", "comment_str", "account", "partition", "workdir"), "")
    settings = SimpleNamespace(requeue=profile()["slurm-requeue"], no_requeue=False, qos=None, reservation=None)
    return get_submit_command(job, words | {"slurm_logfile": output}, settings) + set_gres_string(job)
