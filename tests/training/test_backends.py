"""Every launch file: two processes train the run that one trains, and go on with it after a kill."""

import importlib.util
import json

import pytest

from dllm.config import AdapterSettings, OptimizerSettings, RunConfig, launch_error, write_when_changed
from dllm.training.trainer import train
from tests.training.conftest import entry_for, make_model, metrics_of, run_config, train_once
from tests.training.launches import launched
from tests.training.test_trainer import assert_same_run, same_weights, weights

TRAINED = """
import sys
from pathlib import Path
import torch.distributed
from dllm.config import RunConfig, read_config
from dllm.training import trainer

workdir, last = Path(sys.argv[1]), sys.argv[-1]
step, destroy = trainer._Run._step, torch.distributed.destroy_process_group

def killed(self, number):
    if self.config.name == "cut" and "--kill" in sys.argv and number == 5:
        raise KeyboardInterrupt
    return step(self, number)

trainer._Run._step = killed
torch.distributed.destroy_process_group = lambda: None  # several runs in the same two processes: starting them is slow
for name in sys.argv[2].split(","):
    try:
        trainer.train(read_config(workdir / f"configs/runs/{name}.yaml", RunConfig), workdir, quiet=True)
    except KeyboardInterrupt:
        pass
    except ValueError as fault:
        print(f"refused {name}: {fault}", file=sys.stderr)
destroy()
"""


def in_two_processes(workdir, launch, configs: list[RunConfig], *options):
    """Train the configs one after the other, in two gloo processes that a shipped launch file describes."""
    (workdir / "trained.py").write_text(TRAINED)
    for config in configs:
        write_when_changed(workdir / f"configs/runs/{config.name}.yaml", config)
    names = ",".join(config.name for config in configs)
    done = launched(workdir, launch, "trained.py", workdir, names, *options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def adapter_run(workdir, name):
    """A LoRA run of a decoder whose mask token is new to it, so that a row of its tied embedding trains, too."""
    entry = entry_for("llama")
    entry = entry.model_copy(update={"mask_token": "<|mask|>", "new": entry.new | {"tie_word_embeddings": True}})
    directory = workdir / "downloads/decoder"
    if not directory.exists():
        make_model(directory, entry_for("llama").model_copy(update={"new": entry.new}))
        path = directory / "tokenizer_config.json"
        path.write_text(path.read_text().replace('"mask_token": "[MASK]"', '"mask_token": null'))
    return run_config(
        name, model=entry, init="decoder", init_path="downloads/decoder", adapter=AdapterSettings(rank=4), steps=4,
        evaluations=2, micro_batch_size=3, optimizer=OptimizerSettings(learning_rate=3e-3),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["ddp", "zero1", "zero2", "zero3", "fsdp"])
def test_two_processes_train_the_run_of_one_and_resume_it(workdir, launch):
    """Losses, gradient norms and weights of the whole curve; the resumed run is the uninterrupted one to the bit."""
    if launch.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install 'dllm[cluster]'")
    settings = {"steps": 6, "evaluations": 3, "eval_rows": 5}
    plain = {"one": run_config("one", **settings), "lora": adapter_run(workdir, "lora-one")}
    for config in plain.values():
        train_once(config, workdir)
    # how a step is laid out moves rounding only, and is where a shard could be missed
    layout = {"micro_batch_tokens": 40, "activation_checkpointing": True}
    two, cut = (run_config(name, **settings, **layout) for name in ("two", "cut"))
    muon = run_config("muon", optimizer=OptimizerSettings(name="muon"))
    configs = {
        "ddp": [adapter_run(workdir, "lora-two"), two],
        "zero1": [two],
        "zero2": [cut, muon, two],
        "zero3": [adapter_run(workdir, "lora-two"), two],
        "fsdp": [cut, muon, adapter_run(workdir, "lora-two"), two],
    }[launch]
    done = in_two_processes(workdir, launch, configs, "--kill")
    assert json.loads((workdir / "runs/two/provenance.json").read_text())["processes"] == 2
    assert_same_run(workdir, "one", "two")
    if muon in configs:
        assert f"refused muon: {launch_error(launch, 'muon')}" in done.stderr
    if any(config.name == "lora-two" for config in configs):
        assert_same_run(workdir, "lora-one", "lora-two")
    if cut not in configs:
        return
    with pytest.raises(ValueError, match=f"its shards were written by {launch}.*, and this is replicated; go on with"):
        train(cut, workdir, quiet=True)
    # the command of the pages, once as people start it: what stands in for it shares all but the interpreters
    config = workdir / "configs/runs/cut.yaml"
    command = ["-m", "dllm", "train", config, "--workdir", workdir, "--quiet"]
    done = launched(workdir, launch, *command, real=launch == "zero2")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "going on from step 4 of 6" in done.stdout
    assert metrics_of(workdir, "cut") == metrics_of(workdir, "two")
    assert same_weights(weights(workdir, "cut"), weights(workdir, "two"))
