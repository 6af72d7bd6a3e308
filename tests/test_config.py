"""The configuration: every shipped file loads, and every mistake gets one clear line."""

import re
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from dllm.config import (
    ConfigError,
    Project,
    RunConfig,
    dataset_files,
    digest,
    download_configs,
    load_project,
    prepare_configs,
    read_config,
    read_yaml,
    run_configs,
    write_when_changed,
)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "workflow"))  # as the Snakefile does

from plan import make_plan  # noqa: E402

CONFIG = ROOT / "config"
OVERLAYS = ("laptop", "paper")


def project(overlay: dict):
    return load_project(CONFIG, {"workdir": "results/test"} | overlay)


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_shipped_config_loads(name):
    loaded = load_project(CONFIG, CONFIG / f"{name}.yaml")
    assert set(run_configs(loaded)) == set(loaded.runs)
    assert all(c.data in prepare_configs(loaded) for c in run_configs(loaded).values())


def test_the_paper_pins_every_download():
    for config in download_configs(load_project(CONFIG, CONFIG / "paper.yaml")).values():
        entry = config.model or config.dataset
        assert entry.hub and len(entry.revision) == 40, config.name


def test_commits_that_one_record_alone_names_say_so_beside_the_pin():
    """Two commits that were corrected once; the second is named by one public record, the first by seven."""
    lines = [line for line in (CONFIG / "models.yaml").read_text().splitlines() if " revision: " in line]
    (sure,) = [line for line in lines if "783d3467f108d28ac0a78d3e41af16ab05cabd8d" in line]
    (doubtful,) = [line for line in lines if "f1b49afd26579c1cd4ef7e00ae88376de63f2878" in line]
    assert "#" not in sure and "one public record names this commit" in doubtful
    models = load_project(CONFIG, CONFIG / "paper.yaml").models
    assert models["llada-moe-7b-instruct"].revision in sure and models["rnd1-base"].revision in doubtful


def test_the_laptop_downloads_nothing():
    for config in download_configs(load_project(CONFIG, CONFIG / "laptop.yaml")).values():
        assert (config.model or config.dataset).hub is None, config.name


def test_both_configurations_hold_the_complete_set_of_the_report():
    for name in OVERLAYS:
        loaded = load_project(CONFIG, CONFIG / f"{name}.yaml")
        corrected = {run for run, entry in loaded.runs.items() if entry.recipe == "corrected"}
        for encoder in ("bert", "roberta", "modernbert"):
            assert {f"{encoder}-base-wikitext", f"{encoder}-large-wikitext"} <= corrected
        for start in ("untuned", "after-wikitext", "after-openwebtext"):
            assert {f"alpaca-{start}", f"alpaca-{start}-published"} <= set(loaded.runs)
        assert {"chat-base", "chat-large", "modernbert-large-openwebtext"} <= corrected
        assert sum(not benchmark.by_name for benchmark in loaded.benchmarks.values()) == 9


@pytest.mark.parametrize(
    ("overlay", "line"),
    [
        ({"runs": {"chat-base": {"lenght": 3}}}, "runs.chat-base.lenght is not a setting. Did you mean 'length'?"),
        ({"runs": {"chat-base": {"layout": "padded"}}}, "runs.chat-base.layout was removed: rows are always packed"),
        (
            {"runs": {"chat-base": {"head_chunk": 64}}},
            "runs.chat-base.head_chunk was removed: a budget of memory decides",
        ),
        ({"runs": {"chat-base": {"length": "long"}}}, "runs.chat-base.length = 'long': input should be a valid int"),
        ({"runs": {"chat-base": {"length": 0}}}, "runs.chat-base.length = 0: input should be greater than 0"),
        (
            {"runs": {"chat-base": {"init": "modernbert-bose"}}},
            "runs.chat-base.init = 'modernbert-bose' is neither a model nor a run. Did you mean 'modernbert-base'?",
        ),
        ({"runs": {"chat-base": {"data": "chatt"}}}, "data = 'chatt' is not a dataset. Did you mean 'chat'?"),
        ({"runs": {"chat-base": {"recipe": "x"}}}, "runs.chat-base.recipe = 'x' is not a recipe."),
        ({"runs": {"chat-base": {"steps": 3}}}, "runs.chat-base: needs exactly one of `epochs` and `steps`"),
        ({"runs": {"chat-base": {"like": "nobody"}}}, "runs.chat-base.like = 'nobody' is no entry of runs."),
        ({"runs": {"a": {"like": "b"}, "b": {"like": "a"}}}, "goes round in a circle"),
        ({"runs": {"a b": {"like": "chat-base"}}}, "runs.a b is not a usable name"),
        ({"runs": {"a" * 81: {"like": "chat-base"}}}, " is not a usable name; allowed: 80 lower-case letters"),
        ({"runs": {7: {"like": "chat-base"}}}, "runs: the name 7 is no text; write it in quotes"),
        ({"models": {False: {"path": "a"}}}, "models: the name False is no text; write it in quotes"),
        ({"models": {"gpt2": {"revision": "main"}}}, "revision = 'main' is not a pinned commit"),
        ({"evaluations": {"gpt2": {"benchmarks": ["mmlv"]}}}, "is not a benchmark. Did you mean 'mmlu'?"),
        ({"evaluations": {"gpt2": {"checkpoint": "gpt3"}}}, "is neither a run nor a model. Did you mean 'gpt2'?"),
        ({"benchmarks": {"mmlu": {"dataset": "mlu-data"}}}, "is not a dataset. Did you mean 'mmlu-data'?"),
        (
            {"runs": {"a": {"like": "chat-base", "algorithm": "mlm", "recipe": "published"}}},
            "has normalisation = 'sequence'; algorithm = 'mlm' allows `token` only",
        ),
        (
            {"speed": {"chat-large": {"questions": "gsm8k/a.jsonl"}}},
            "= 'gsm8k' is not a dataset. Did you mean 'gsm8k",
        ),
        ({"report": {"systems": ["gpt3"]}}, "report.systems = 'gpt3' is not an evaluation. Did you mean 'gpt2'?"),
        ({"report": {"starts": ["gpt2"]}}, "report.starts = 'gpt2' scores 'gpt2', no run; name evaluations of runs"),
        (
            {"datasets": {"w": {"world": "all"}}, "models": {"m": {"new": {}, "tokenizer": "w"}}},
            "models.m.new = {} takes the config of 'w', a dataset; state one, model_type first",
        ),
        ({"models": {"m": {"new": {}}}}, "a `new` model needs `tokenizer`"),
        ({"report": {"chat": [{"run": "x", "label": "y"}]}}, "report.chat.run = 'x' is not a run."),
        ({"experiments": {}}, "experiments is not a setting."),
    ],
)
def test_a_mistake_in_a_config_gets_one_line_with_file_key_and_value(overlay, line):
    with pytest.raises(ConfigError) as caught:
        project(overlay)
    message = str(caught.value)
    assert line in message
    assert message.startswith("overlay: ")
    assert "\n" not in message


def test_the_file_named_in_an_error_is_the_one_that_holds_the_key(tmp_path):
    for path in CONFIG.glob("*.yaml"):
        (tmp_path / path.name).write_text(path.read_text())
    broken = (tmp_path / "experiments.yaml").read_text().replace("epochs: 10", "epochs: ten")
    (tmp_path / "experiments.yaml").write_text(broken)
    with pytest.raises(ConfigError, match=r"experiments.yaml: runs.chat-base.epochs = 'ten'"):
        load_project(tmp_path, tmp_path / "paper.yaml")


def test_a_run_started_from_itself_is_refused():
    with pytest.raises(ConfigError, match="circle: a -> b -> a"):
        project({"runs": {"a": {"like": "chat-base", "init": "b"}, "b": {"like": "chat-base", "init": "a"}}})


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: 1e-4\nb: 3\nc: 0.5\nd: 1_000\ne: 45bb4654a4d5aaff24dd11d4781fa46d39bf8c13\nf: '1e-4'\n")
    assert read_yaml(path) == {
        "a": 1e-4, "b": 3, "c": 0.5, "d": 1000, "e": "45bb4654a4d5aaff24dd11d4781fa46d39bf8c13", "f": "1e-4",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n", "holds list, not a mapping"),
        ("", "holds nothing, not a mapping"),
        ("a: 1\na: 2\n", "key 'a' stands twice"),
        ("a: " + "9" * 5000, "x.yaml: not valid YAML: a value cannot be read .Exceeds the limit"),
        ("a: 2026-13-45\n", "x.yaml: not valid YAML: a value cannot be read .month must be in 1..12.; put quotes"),
        ("? [1, 2]\n: 3\n", "x.yaml:1: not valid YAML: a key that is no word"),
        ("[" * 600, "nested too deeply"),
        ("a: " + "[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("\udcff", "is no text in UTF-8"),
    ],
)
def test_an_unreadable_file_gets_one_line(tmp_path, text, line):
    (tmp_path / "x.yaml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=line):
        read_yaml(tmp_path / "x.yaml")


def test_a_missing_file_gets_one_line(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "x.yaml")


def test_a_job_config_survives_the_file(tmp_path):
    for name, config in run_configs(load_project(CONFIG, CONFIG / "laptop.yaml")).items():
        path = write_when_changed(tmp_path / f"{name}.yaml", config)
        assert read_config(path, RunConfig) == config


def test_a_misspelt_key_of_a_job_is_named_rather_than_called_missing(tmp_path):
    config = run_configs(load_project(CONFIG, CONFIG / "laptop.yaml"))["chat-large"]
    path = write_when_changed(tmp_path / "run.yaml", config)
    path.write_text(path.read_text().replace("seed: 42", "sed: 42"))
    with pytest.raises(ConfigError, match="sed is not a setting. Did you mean 'seed'"):
        read_config(path, RunConfig)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"micro_batch_tokens": 23, "length": 24}, "micro_batch_tokens = 23 is smaller than the longest row"),
        ({"steps": None}, "needs exactly one of `epochs` and `steps`"),
        ({"algorithm": "edit_flows"}, "recipe 'corrected' has response_end = 'block'; algorithm = 'edit_flows' allows"),
        ({"optimizer": {"name": "muon"}, "adapter": {}}, "optimizer.name = 'muon' is not for adapters"),
    ],
)
def test_a_job_obeys_the_rules_of_its_entry_and_says_so_in_one_line(tmp_path, changes, line):
    config = run_configs(load_project(CONFIG, CONFIG / "laptop.yaml"))["chat-large"].model_dump(mode="json")
    path = write_when_changed(tmp_path / "run.yaml", config | changes)
    with pytest.raises(ConfigError, match="run.yaml: ") as caught:
        read_config(path, RunConfig)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_file_is_rewritten_only_when_its_content_changes(tmp_path):
    path = write_when_changed(tmp_path / "a.yaml", {"x": 1})
    before = path.stat().st_mtime_ns
    write_when_changed(path, {"x": 1})
    assert path.stat().st_mtime_ns == before
    write_when_changed(path, {"x": 2})
    assert yaml.safe_load(path.read_text()) == {"x": 2}


def test_one_setting_changes_the_digest_of_exactly_its_run():
    before = run_configs(project({}))
    after = run_configs(project({"runs": {"alpaca-after-wikitext": {"optimizer": {"learning_rate": 5e-5}}}}))
    assert [n for n in before if digest(before[n]) != digest(after[n])] == ["alpaca-after-wikitext"]


def test_a_later_overlay_wins(tmp_path):
    (tmp_path / "tiny.yaml").write_text("runs: {chat-base: {seed: 7}}")
    loaded = load_project(CONFIG, CONFIG / "laptop.yaml", tmp_path / "tiny.yaml")
    assert loaded.runs["chat-base"].seed == 7 and loaded.workdir == "results/laptop"


def test_null_in_an_overlay_removes_an_entry():
    assert "gpt2" not in project({"evaluations": {"gpt2": None}}).evaluations


def test_an_overlay_may_state_whole_sections_anew():
    run = {"init": "modernbert-base", "data": "chat", "steps": 1}
    found = project({"replaces": ["runs", "evaluations", "samples", "speed", "report"], "runs": {"one": run}}
                    | {"report": {"title": "one"}})  # fmt: skip
    assert list(found.runs) == ["one"] and not found.evaluations and "modernbert-large" in found.models
    for wrong in (["rnus"], "rnus"):
        with pytest.raises(ConfigError, match="replaces = 'rnus' is no section .* Did you mean 'runs'") as fault:
            project({"replaces": wrong})
        assert "\n" not in str(fault.value)


@pytest.mark.parametrize("overlays", [("laptop", "systems"), ("paper", "systems-paper"), ("leaderboard",)])
def test_the_systems_of_both_sizes_are_planned_whole(overlays):
    plan = make_plan(load_project(CONFIG, *(CONFIG / f"{name}.yaml" for name in overlays)))
    systems = {system.row: system for system in plan.report.systems}
    assert len(systems) >= 8 and set(systems) == set(plan.project.evaluations)
    stages = {run for system in systems.values() for run in system.stages}
    assert set(plan.runs) - stages == {run for run in plan.runs if run.startswith("sums")}  # they learn from rewards
    if "laptop" in overlays:
        assert systems["encoder-edits"].stages == ("encoder-base", "encoder-mdlm", "encoder-edits")
        assert {s.algorithm for s in systems.values()} == {"ar", "mdlm", "hybrid", "bd3lm", "edit_flows", "renoise"}
        assert plan.evaluations["encoder-edits", "facts"].generation.temperature > 0
        assert all(c.dataset is None or c.dataset.hub is None for c in plan.downloads.values())
    else:
        assert {"humaneval-chat", "mbpp"} <= {benchmark for _, benchmark in plan.evaluations}
    if "paper" in overlays:
        for row in ("llada-8b-instruct", "dream-7b-instruct"):  # likelihoods of models that were tuned to answer
            assert {(row, "mmlu"), (row, "mmlu-answered")} <= plan.evaluations.keys()


def test_what_a_row_changes_of_a_sampler_is_checked():
    with pytest.raises(ConfigError, match="evaluations.gpt2.generation: stpes is not a setting. Did you mean 'steps'"):
        project({"evaluations": {"gpt2": {"generation": {"stpes": 3}}}})


STRANGE = [float("inf"), float("-inf"), float("nan"), 1e39, -1e39, 1e-39, 10**20, -(10**20)]


def numeric_settings():
    """(class, its smallest valid content, name) of every setting that is a number."""
    from dllm.config import settings as module

    classes = [found for found in vars(module).values() if isinstance(found, type) and found.__name__ != "Settings"]
    for found in [c for c in classes if issubclass(c, module.Settings)]:
        for name, field in found.model_fields.items():
            if {int, float} & ({field.annotation} | set(get_args(field.annotation))):
                yield found, name


def test_no_number_that_cannot_be_computed_with_is_taken():
    """A strange number is refused, or it is a usual one of that setting (a share of 1e-39, say)."""
    checked = 0
    for model, name in numeric_settings():
        for value in STRANGE:
            try:
                taken = getattr(model.model_validate({name: value}), name)
            except ValueError as error:
                assert "Traceback" not in str(error)
                continue
            checked += 1
            assert 0 <= taken <= 1e-39, f"{model.__name__}.{name} = {value}"
    assert checked < 20


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e39, 10**20])
def test_a_strange_number_in_a_file_is_one_line_with_its_key(value):
    for key in ("learning_rate", "weight_decay"):
        with pytest.raises(ConfigError) as error:
            project({"runs": {"chat-base": {"optimizer": {key: value}}}})
        assert f"runs.chat-base.optimizer.{key}" in str(error.value) and "\n" not in str(error.value)


def test_published_rows_have_all_examples_in_one_turn_and_ours_have_turns():
    from dllm.config import evaluation_configs

    jobs = evaluation_configs(load_project(CONFIG, CONFIG / "paper.yaml"))
    assert jobs["chat-base", "gsm8k"].fewshot_as_multiturn and not jobs["chat-base", "hellaswag"].fewshot_as_multiturn
    assert not jobs["chat-base-published", "gsm8k"].fewshot_as_multiturn
    assert jobs["chat-base-published", "gsm8k"].chat_template and not jobs["gpt2", "gsm8k"].fewshot_as_multiturn


def test_published_scores_without_a_column_are_left_out_and_misspelt_ones_are_not():
    loaded = load_project(CONFIG, CONFIG / "paper.yaml", {"benchmarks": {"gsm8k": None}})
    assert "gsm8k" not in loaded.benchmarks and not any("gsm8k" in row.scores for row in loaded.reported.values())
    assert any("mmlu" in row.scores for row in loaded.reported.values())
    with pytest.raises(ConfigError, match="gsm8kk"):
        load_project(CONFIG, {"workdir": "x", "reported": {"gpt2": {"scores": {"gsm8kk": 1}}}})


def test_a_name_that_an_overlay_removed_is_told_with_that_overlay(tmp_path):
    (tmp_path / "less.yaml").write_text("workdir: x\ndatasets: {alpaca: null}\n")
    with pytest.raises(ConfigError, match=r"= 'alpaca' is not a dataset.*less.yaml removes it") as error:
        load_project(CONFIG, CONFIG / "paper.yaml", tmp_path / "less.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("section", [name for name, field in Project.model_fields.items() if "dict" in str(field)])
@pytest.mark.parametrize("base", ["laptop", "paper"])
def test_an_overlay_that_replaces_one_section_is_planned_or_gets_one_line(base, section):
    try:
        make_plan(load_project(CONFIG, CONFIG / f"{base}.yaml", {"replaces": [section]}))
    except ConfigError as error:
        assert section not in ("evaluations", "samples", "speed")
        assert re.fullmatch(r"\S+yaml: [\w.-]+ = '[^']+' is n.*; overlay removes it", str(error))
    else:
        assert section in ("evaluations", "samples", "speed") or (base, section) == ("paper", "benchmarks")


def test_published_scores_are_shown_where_a_row_is_scored():
    mine = {"mine": {"checkpoint": "chat-large", "label": "Mine", "benchmarks": ["mmlu"], "compare": "gpt2"}}
    shown = make_plan(project({"replaces": ["evaluations"], "evaluations": mine})).report.reported
    assert shown and all(set(row.scores) <= {"mmlu"} for row in shown)


@pytest.mark.parametrize(
    ("overlay", "key"),
    [
        ({"report": {"chat": [{"run": "chat-base", "label": label} for label in "ab"]}}, "report.chat"),
        ({"report": {"ablation": [{"run": f"alpaca-{r}", "label": "a"} for r in ("untuned", "after-wikitext")]}},
         "report.ablation"),
        ({"report": {"systems": ["chat-base", "chat-base"]}}, "report.systems"),
        ({"reported": {"mine": {"label": "GPT-2", "source": "b", "scores": {}}}}, "reported"),
    ],
)  # fmt: skip
def test_what_a_report_shows_twice_is_one_line_with_file_and_key(overlay, key):
    with pytest.raises(ConfigError, match=rf"^\S+: {key} shows '.*' twice; keep one of them$"):
        project(overlay)


@pytest.mark.parametrize(
    "names, read",
    [
        (["test.jsonl", "train.jsonl"], ["train.jsonl"]),
        (["chats-train-1.csv", "chats-val.csv", "more.csv"], ["chats-train-1.csv", "more.csv"]),
        (["dev.jsonl", "test.jsonl"], ["dev.jsonl", "test.jsonl"]),  # there is nothing else to learn from
        (["contest.jsonl", "train.jsonl", "trained.jsonl"], ["contest.jsonl", "train.jsonl", "trained.jsonl"]),
    ],
)
def test_of_a_directory_with_files_for_training_those_for_testing_stay_out(tmp_path, names, read):
    for name in names:
        (tmp_path / name).write_text("{}\n")
    assert [path.name for path in dataset_files([str(tmp_path)], tmp_path, "files")] == read
    assert len(dataset_files([f"{tmp_path}/*"], tmp_path, "files")) == len(names), "a pattern says what it wants"
