"""The order of Python's sets, which differs from process to process, is in no byte of what is made."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIMES = ("wall_seconds", "tokens_per_second", "provenance", "model_seconds")


def overlay(home: Path, work: Path) -> dict:
    """A run of all weights and one of adapters, on a model and a file of this disk."""
    run = {"data": "chats", "length": 48, "steps": 3, "global_batch_size": 8, "launch": "cpu"}
    return {
        "replaces": "all", "workdir": str(work),
        "models": {"toy": {"path": str(home / "toy")}},
        "datasets": {"chats": {"files": [str(home / "chats.jsonl")]}},
        "runs": {"chat": run | {"init": "toy"}, "adapted": run | {"init": "chat", "adapter": {"rank": 2}}},
    }  # fmt: skip


def make_all(home: Path, work: Path) -> None:
    """Download, prepare, train, and score a group of choices and free answers."""
    from dllm.config import download_configs, load_project, prepare_configs, run_configs
    from dllm.data.download import download
    from dllm.data.prepare import prepare
    from dllm.evaluation.evaluate import evaluate_benchmark
    from dllm.training.trainer import train
    from tests.evaluation.echo import evaluation, make_workdir

    project = load_project(ROOT / "config", overlay(home, work))
    for config in download_configs(project).values():
        download(config, work)
    for config in prepare_configs(project).values():
        prepare(config, work)
    for config in run_configs(project).values():
        train(config, work, quiet=True)
    (work / "asked").mkdir()
    make_workdir(work / "asked")
    for task in ("both", "write"):
        places = {"task_directory": "asked/tasks", "data": "asked/data"}
        evaluate_benchmark(evaluation(task, run="adapted", checkpoint="runs/adapted/model", **places), work)


def content(path: Path) -> object:
    """What is in a file, without times."""
    if path.suffix not in (".json", ".jsonl"):
        return path.read_bytes()
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    # as text: the order of keys counts
    return [json.dumps(without_times(json.loads(line))) for line in lines]


def without_times(value: object) -> object:
    return {key: v for key, v in value.items() if key not in TIMES} if isinstance(value, dict) else value


@pytest.mark.slow
def test_two_processes_with_other_hash_seeds_leave_the_same_bytes(tmp_path):
    """This one, whose seed was drawn unless the environment states it, and one of a seed that is not drawn."""
    import torch

    from tests.training.conftest import entry_for, make_model

    torch.set_num_threads(1)
    make_model(tmp_path / "toy", entry_for())
    words = ("cat", "dog", "sun", "moon")
    rows = [{"prompt": f"who likes {a} and {b} ?", "response": f"the {b}"} for a in words for b in words] * 4
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    works = [tmp_path / name / "work" for name in ("here", "there")]
    make_all(tmp_path, works[0])
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
    command = [sys.executable, "-m", "tests.invariants.test_hash_seeds", str(tmp_path), str(works[1])]
    environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    made = []
    for work in works:
        files = [path for path in sorted(work.rglob("*")) if path.is_file() and ".work" not in path.parts]
        made.append({str(p.relative_to(work)): content(p) for p in files if p.name != "provenance.json"})
    assert {"evals/adapted/both.json", "runs/adapted/adapter/adapter_config.json"} <= made[0].keys()
    assert sorted(made[0]) == sorted(made[1])
    assert not [name for name in made[0] if made[0][name] != made[1][name]]


if __name__ == "__main__":
    make_all(Path(sys.argv[1]), Path(sys.argv[2]))
