import json
from pathlib import Path

import pytest

from dllm.evaluation import task_files
from dllm.evaluation.evaluate import evaluate_benchmark
from dllm.evaluation.task_files import (
    STOCK_DIRECTORIES,
    build_requests,
    leaf_tasks,
    load_tasks,
    pinned,
    stock_root,
    write_files,
)
from tests.hub_layouts import DATASETS, write_dataset

from .echo import evaluation


@pytest.fixture(scope="module")
def stock_index():
    from lm_eval.tasks import TaskManager

    def index(task):
        return TaskManager(include_path=task_files.stock_directories(task), include_defaults=False).task_index

    return index


@pytest.mark.parametrize("task", STOCK_DIRECTORIES)
def test_the_reports_tasks_are_where_lm_eval_keeps_them(task, stock_index):
    index = stock_index(task)
    leaves = list(leaf_tasks(index, task))
    expected = {"mmlu": 57, "mmlu_generative": 57, "bbh": 27, "minerva_math": 7, "ceval-valid": 52, "cmmlu": 67}
    assert len(leaves) == expected.get(task, 1)
    assert all(Path(index[name].yaml_path).is_relative_to(stock_root()) for name in leaves)


@pytest.mark.parametrize("task", ["mmlu", "minerva_math", "gsm8k"])
def test_a_pin_keeps_the_stock_task_and_changes_only_where_the_data_come_from(task, stock_index, tmp_path):
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    commit = "e53f048856ff4f594e959d75785d2c2d37b678ee"
    index = stock_index(task)
    by_revision = write_files(pinned(index, task, None, commit), tmp_path)
    by_snapshot = write_files(pinned(index, task, tmp_path / "snapshot", None), tmp_path)
    directories = [*task_files.stock_directories(task), by_revision]
    rebuilt = TaskManager(include_path=directories, include_defaults=False).task_index
    assert list(leaf_tasks(rebuilt, task)) == list(leaf_tasks(index, task))
    for name in leaf_tasks(rebuilt, task):
        assert Path(rebuilt[name].yaml_path).parent == by_revision
        stock = load_yaml(index[name].yaml_path, resolve_func=False)
        assert load_yaml(by_revision / f"{name}.yaml", resolve_func=False) == stock | {
            "task": name,
            "dataset_kwargs": {**(stock.get("dataset_kwargs") or {}), "revision": commit},
        }
        assert load_yaml(by_snapshot / f"{name}.yaml", resolve_func=False) == stock | {
            "task": name,
            "dataset_path": str(tmp_path / "snapshot"),
        }


def test_a_stock_task_reads_its_pinned_snapshot(workdir, echo, monkeypatch):
    """lm-eval's own prompt and metric on a local copy in the hub's layout."""
    snapshot = workdir / "gsm8k"
    (snapshot / "main").mkdir(parents=True)
    configs = "configs:\n- config_name: main\n  data_files:\n  - {split: train, path: main/train.jsonl}\n"
    (snapshot / "README.md").write_text(f"---\n{configs}  - {{split: test, path: main/test.jsonl}}\n---\n")
    rows = [{"question": f"what is w{i} w{i + 1}", "answer": f"#### {i}"} for i in range(8)]
    for split in ("train", "test"):
        (snapshot / "main" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = evaluation(
        "gsm8k",
        task_directory=None,
        data="gsm8k",
        shots=2,
        metric="exact_match",
        filter="strict-match",
        further_metrics=["exact_match,flexible-extract"],
    )
    result = evaluate_benchmark(config, workdir)
    assert (result["n"], result["shots"]) == (8, 2)
    row = json.loads((workdir / "evals/echo/gsm8k.samples.jsonl").read_text().splitlines()[0])
    assert row["prompt"].startswith("Question: what is w") and row["prompt"].endswith("w0 w1\nAnswer:")
    assert row["prompt"].count("####") == 2


def test_mmlu_is_asked_for_letters_that_the_model_writes(workdir, echo):
    """All of lm-eval's generative variants read the snapshot that the likelihoods are asked of."""
    write_dataset(workdir / "mmlu", DATASETS["cais/mmlu"])
    shown = {"metric": "exact_match", "filter": "get_response", "shots": 1, "limit": 1}
    config = evaluation("mmlu_generative", task_directory=None, data="mmlu", **shown)
    assert evaluate_benchmark(config, workdir)["n"] == 57
    rows = [json.loads(row) for row in (workdir / "evals/echo/mmlu_generative.samples.jsonl").read_text().splitlines()]
    assert len({row["subtask"] for row in rows}) == 57 and all(row["prompt"].endswith("\nAnswer:") for row in rows)
    assert {row["target"] for row in rows} <= set("ABCD")


class Silent:
    """A model that is asked for prompts only."""

    tokenizer_name = ""


def prompts(config, workdir):
    requests = build_requests(load_tasks(config, workdir), config, Silent())
    return [request.args for kind in requests for request in requests[kind]]


def test_drawn_examples_depend_on_the_seed_only(workdir):
    tasks = load_tasks(evaluation("both", shots=3), workdir)
    first = build_requests(tasks, evaluation("both", shots=3), Silent())["loglikelihood"]
    again = build_requests(tasks, evaluation("both", shots=3), Silent())["loglikelihood"]
    assert [r.args for r in first] == [r.args for r in again]
    assert [r.args for r in first] != prompts(evaluation("both", shots=3, seed=1), workdir)


def test_a_limit_does_not_change_the_first_prompts(workdir):
    few, all_ = (prompts(evaluation("choices", shots=3, limit=n), workdir) for n in (5, None))
    assert few == all_[: len(few)]


def test_shots_of_the_config_replace_the_tasks_own(workdir):
    assert prompts(evaluation("choices", shots=None), workdir) == prompts(evaluation("choices", shots=0), workdir)
    assert prompts(evaluation("choices", shots=1), workdir) != prompts(evaluation("choices", shots=0), workdir)


def test_equal_files_share_a_directory_and_others_do_not(tmp_path):
    first = write_files({"a.yaml": "x"}, tmp_path)
    assert write_files({"a.yaml": "x"}, tmp_path) == first
    other = write_files({"a.yaml": "y"}, tmp_path)
    assert other != first
    assert {path.name for path in tmp_path.iterdir()} == {first.name, other.name}


def test_the_definition_of_a_task_does_not_depend_on_where_its_data_lie(workdir, tmp_path_factory):
    from .echo import make_workdir

    other = make_workdir(tmp_path_factory.mktemp("other"))
    digests = {
        task_files.definition_digest(load_tasks(evaluation("both"), directory)) for directory in (workdir, other)
    }
    assert len(digests) == 1


def test_every_miniature_includes_a_stock_task():
    templates = sorted((task_files.OURS / "miniature").glob("*.yaml"))
    assert templates
    for path in templates:
        text = path.read_text()
        if text.startswith("group:"):
            continue
        include = text.split("include: {LM_EVAL_TASKS}/", 1)[1].splitlines()[0]
        assert (stock_root() / include).is_file(), path.name


def test_what_overrides_lm_evals_files_on_purpose_is_not_told(workdir, caplog):
    pinned_task = evaluation("gsm8k", task="gsm8k", task_directory=None, data="data")
    with pytest.raises(ValueError):
        load_tasks(pinned_task, workdir)  # there is no gsm8k below data/; only what the index says is of interest
    assert "overrides existing task" not in caplog.text


def test_a_task_makes_its_documents_once(workdir, monkeypatch):
    write_dataset(workdir / "math", DATASETS["EleutherAI/hendrycks_math"])
    config = evaluation("minerva_math", task_directory=None, data="math", shots=1, expected_documents=7 * 3)
    task = next(iter(load_tasks(config, workdir)["tasks"].values()))
    first = list(task.eval_docs)
    monkeypatch.setattr(task.config, "process_docs", None)  # which a second time would need
    assert list(task.eval_docs) == first and "answer" in first[0]


def test_a_template_is_compiled_once():
    from lm_eval.utils import apply_template, env

    task_files.compile_templates_once()
    task_files.compile_templates_once()
    before = env.from_string.cache_info().misses
    assert [apply_template("a {{ b }} of c", {"b": i}) for i in (1, 2, 3)] == ["a 1 of c", "a 2 of c", "a 3 of c"]
    assert env.from_string.cache_info().misses == before + 1
