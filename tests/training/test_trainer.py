"""The training loop: what must not change a run, does not; what a user can get wrong, says so in one line."""

import json
import os
import shutil
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file

from dllm.config import OptimizerSettings, digest, write_when_changed
from dllm.models import heads
from dllm.models.backbone import Backbone
from dllm.provenance import read_record
from dllm.training import trainer
from dllm.training.optimizer import build_optimizers, share_of_peak
from dllm.training.trainer import Interrupted, make_plan, train
from tests.plain_forward import plain_hidden
from tests.training.conftest import entry_for, make_model, metrics_of, run_config, train_once, train_until
from tests.training.launches import launched


def weights(workdir, run):
    return load_file(workdir / "runs" / run / "model" / "model.safetensors")


def same_weights(one, other, tolerance=0.0):
    return all(torch.allclose(one[k], other[k], atol=tolerance, rtol=0) for k in one)


def test_a_run_leaves_weights_metrics_provenance_and_a_record(workdir):
    target = train(run_config(), workdir, quiet=True)
    assert {"config.yaml", "metrics.jsonl", "provenance.json", "model"} == {p.name for p in target.iterdir()}
    rows = metrics_of(workdir, "run")
    assert [row["step"] for row in rows if row["split"] == "eval"] == [0, 2, 4, 6]
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["split"] == "final"
    facts = json.loads((target / "provenance.json").read_text())
    assert facts["seed"] == 1 and facts["data_digest"] == read_record(workdir / "data/alpaca.json")["digest"]
    assert read_record(workdir / "runs/run.json")["inputs"].keys() == {"data/alpaca", "downloads/toy-model"}
    assert not list((workdir / ".work").glob("run-*")), "resumable state goes when the artifact is there"


def test_what_was_evaluated_at_the_last_step_is_not_evaluated_again(workdir, monkeypatch):
    read = []
    parts_of = trainer.evaluation_micro_batches

    def counted(split, config, rows, **settings):
        read.append(len(rows.numbers))
        return parts_of(split, config, rows, **settings)

    monkeypatch.setattr(trainer, "evaluation_micro_batches", counted)
    train(run_config("all"), workdir, quiet=True)
    *_, last, final = metrics_of(workdir, "all")
    every = last["rows"]
    assert read == [every] * 4 and {**last, "split": "final"} == final
    train(run_config("first", eval_rows=5), workdir, quiet=True)
    train(run_config("drawn", recipe={"eval_noise": "drawn"}), workdir, quiet=True)
    # fewer rows, and masks of a step's own, are not what the last evaluation reads
    assert read[4:] == [5, 5, 5, 5, every] + [every] * 5


def test_training_lowers_the_loss(workdir):
    train(run_config(steps=60, optimizer=OptimizerSettings(name="muon", learning_rate=3e-3)), workdir, quiet=True)
    losses = [row["loss"] for row in metrics_of(workdir, "run") if row["split"] == "eval"]
    assert losses[-1] < 0.75 * losses[0]


def test_two_equal_runs_are_equal_to_the_bit(workdir):
    for name in ("one", "two"):
        train(run_config(name), workdir, quiet=True)
    assert metrics_of(workdir, "one") == metrics_of(workdir, "two")
    assert same_weights(weights(workdir, "one"), weights(workdir, "two"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_resumes_to_the_same_bits(workdir, optimizer):
    settings = OptimizerSettings(name=optimizer, learning_rate=3e-3)
    train(run_config("whole", optimizer=settings), workdir, quiet=True)
    train_until(run_config("cut", optimizer=settings), workdir, step=3)
    train(run_config("cut", optimizer=settings), workdir, quiet=True)
    assert metrics_of(workdir, "cut") == metrics_of(workdir, "whole")
    assert same_weights(weights(workdir, "cut"), weights(workdir, "whole"))


def test_sigterm_saves_the_step_and_ends_with_a_failure(workdir, monkeypatch):
    train_once(run_config("whole"), workdir)
    step = trainer._Run._step

    def signalled(self, number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    monkeypatch.setattr(trainer._Run, "_step", signalled)
    with pytest.raises(Interrupted) as caught:
        train(run_config("cut"), workdir, quiet=True)
    assert caught.value.code == 143
    assert not (workdir / "runs" / "cut.json").exists()
    monkeypatch.undo()
    train(run_config("cut"), workdir, quiet=True)
    assert same_weights(weights(workdir, "cut"), weights(workdir, "whole"))


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(workdir):
    train_once(run_config("whole"), workdir)
    train_until(run_config("cut"), workdir, step=5)
    (state,) = (workdir / ".work").glob("cut-*")
    newest = max(state.glob("step-*"), key=lambda p: int(p.name[5:]))
    (newest / "model.safetensors").write_bytes(b"torn")
    train(run_config("cut"), workdir, quiet=True)
    assert same_weights(weights(workdir, "cut"), weights(workdir, "whole"))


def test_state_of_another_configuration_is_never_resumed(workdir, monkeypatch):
    monkeypatch.setattr(trainer._Run, "_resume", lambda self: pytest.fail("resumed") if self.state.steps() else 0)
    train(run_config("run"), workdir, quiet=True)
    other = run_config("run", optimizer=OptimizerSettings(learning_rate=1e-3))
    train(other, workdir, quiet=True, replace=True)


def test_a_run_directory_of_another_configuration_is_not_replaced_unasked(workdir):
    train(run_config(), workdir, quiet=True)
    before = read_record(workdir / "runs/run.json")
    with pytest.raises(ValueError, match=r"another configuration \(it differs in seed\); pass --replace"):
        train(run_config(seed=2), workdir, quiet=True)
    with pytest.raises(ValueError, match="finished already"):
        train(run_config(), workdir, quiet=True)
    assert read_record(workdir / "runs/run.json") == before
    train(run_config(seed=2), workdir, quiet=True, replace=True)
    assert read_record(workdir / "runs/run.json") != before


def assert_same_run(workdir, one, other):
    """Equal to rounding: fp32 sums run in another order. AdamW divides by a root of squares, which magnifies rounding
    where a gradient is nearly zero; a step is at most the learning rate, 3e-3, for each weight."""
    for a, b in zip(metrics_of(workdir, one), metrics_of(workdir, other), strict=True):
        assert a.keys() == b.keys() and (a["step"], a["split"]) == (b["step"], b["split"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a.get("tokens") == b.get("tokens") and a.get("targets") == b.get("targets")
        if "nll" in a:
            assert a["nll"] == pytest.approx(b["nll"], rel=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert same_weights(weights(workdir, one), weights(workdir, other), tolerance=5e-4)


@pytest.mark.parametrize("normalisation", ["token", "sequence", "batch"])
@pytest.mark.parametrize("response_end", ["block", "fill", "one"])
def test_the_split_into_micro_batches_does_not_change_a_run(workdir, normalisation, response_end):
    recipe = {"normalisation": normalisation, "response_end": response_end, "extra_blocks": 1}
    if response_end == "fill":
        recipe["extra_blocks"] = 0
    for name, size in (("whole", 8), ("split", 3)):
        train(run_config(name, micro_batch_size=size, steps=2, recipe=recipe), workdir, quiet=True)
    assert_same_run(workdir, "whole", "split")


@pytest.mark.parametrize("algorithm", ["mdlm", "mlm", "ar"])
@pytest.mark.parametrize("data", ["text", "alpaca"])
def test_the_layout_of_a_step_does_not_change_a_run(workdir, algorithm, data, monkeypatch):
    """Down to the final metrics: padding, a token budget, checkpointing and a chunked head move rounding only."""
    entry = entry_for("llama" if algorithm == "ar" else "modernbert")
    make_model(workdir / "downloads" / "other", entry)
    common = {
        "algorithm": algorithm, "model": entry, "init": "other", "init_path": "downloads/other", "data": data,
        "data_path": f"data/{data}", "steps": 3,
    }  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "hidden", plain_hidden)
        train(run_config("plain", **common), workdir, quiet=True)
    monkeypatch.setattr(heads, "logits_at_once", lambda *_: 5)
    changes = {"micro_batch_tokens": 40, "activation_checkpointing": True}
    train(run_config("fast", **changes, **common), workdir, quiet=True)
    assert_same_run(workdir, "plain", "fast")


def test_what_goes_wrong_in_the_input_pipeline_ends_the_run_with_its_line(workdir, monkeypatch):
    parts = trainer.micro_batches

    def damaged(*arguments, **options):
        yield from list(parts(*arguments, **options))[:3]
        raise ValueError("data/alpaca: row 17 is damaged; prepare the data again")

    monkeypatch.setattr(trainer, "micro_batches", damaged)
    with pytest.raises(ValueError, match="row 17 is damaged"):
        train(run_config(), workdir, quiet=True)
    assert not [thread for thread in threading.enumerate() if thread.name == "dllm-input"]
    assert not (workdir / "runs").exists()


def test_the_published_denominator_does_depend_on_the_micro_batch(workdir):
    recipe = {"normalisation": "token", "denominator": "micro_batch", "response_end": "one"}
    for name, size in (("whole", 8), ("split", 3)):
        train(run_config(name, micro_batch_size=size, steps=1, recipe=recipe), workdir, quiet=True)
    losses = [metrics_of(workdir, name)[1]["loss"] for name in ("whole", "split")]
    assert losses[0] != pytest.approx(losses[1], rel=0.2)


def test_fixed_evaluation_noise_gives_one_loss_for_one_model_and_drawn_noise_does_not(workdir):
    frozen = OptimizerSettings(learning_rate=1e-12)
    train(run_config("fixed", optimizer=frozen), workdir, quiet=True)
    train(run_config("drawn", optimizer=frozen, recipe={"eval_noise": "drawn"}), workdir, quiet=True)
    fixed, drawn = (
        [row["loss"] for row in metrics_of(workdir, name) if row["split"] == "eval"] for name in ("fixed", "drawn")
    )
    assert max(fixed) - min(fixed) < 1e-5 < 0.01 < max(drawn) - min(drawn)


def test_bf16_parameters_lose_small_steps_and_fp32_ones_do_not(workdir):
    tiny = OptimizerSettings(learning_rate=1e-5, warmup_share=0.0)
    moved = {}
    start = load_file(workdir / "downloads/toy-model/model.safetensors")
    for dtype in ("fp32", "bf16"):
        train(run_config(dtype, optimizer=tiny, recipe={"parameters": dtype}), workdir, quiet=True)
        after = weights(workdir, dtype)
        key = next(k for k in start if "query.weight" in k)
        large = start[key].abs() > 0.03
        moved[dtype] = (after[key].float() != start[key].to(after[key].dtype).float())[large].float().mean().item()
    assert moved["fp32"] > 0.9 and moved["bf16"] < 0.1


@pytest.mark.parametrize("algorithm", ["mlm", "ar"])
@pytest.mark.parametrize("data", ["text", "alpaca"])
def test_the_other_algorithms_train_on_text_and_on_answers(workdir, algorithm, data):
    entry = entry_for("llama" if algorithm == "ar" else "modernbert")
    make_model(workdir / "downloads" / "other", entry)
    config = run_config(
        algorithm=algorithm, model=entry, init="other", init_path="downloads/other", data=data,
        data_path=f"data/{data}", steps=40, optimizer=OptimizerSettings(name="muon", learning_rate=3e-3),
    )  # fmt: skip
    train(config, workdir, quiet=True)
    losses = [row["loss"] for row in metrics_of(workdir, "run") if row["split"] == "eval"]
    assert losses[-1] < losses[0]


def test_the_plan_of_a_run_does_not_depend_on_the_number_of_devices():
    plans = [make_plan(run_config(), rows=80, ranks=ranks) for ranks in (1, 2, 4)]
    assert len({(p.steps_per_epoch, p.schedule_steps, p.last_step) for p in plans}) == 1


def test_the_schedule_warms_up_and_ends_at_zero():
    shares = [share_of_peak(step, 100, 0.1) for step in range(101)]
    assert shares[0] == pytest.approx(0.1) and shares[9] == shares[10] == 1.0 and shares[100] == pytest.approx(0)
    assert all(a >= b for a, b in zip(shares[10:], shares[11:], strict=False))


def test_muon_takes_the_matrices_inside_layers_and_adamw_the_rest(workdir):
    from dllm.models.load import load_backbone

    model = load_backbone(workdir / "downloads/toy-model").model
    adamw, muon = build_optimizers(model, OptimizerSettings(name="muon", learning_rate=1e-3))
    inside = {id(p) for g in muon.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in inside) == (".layer." in name and parameter.ndim == 2), name
    assert sum(len(g["params"]) for o in (adamw, muon) for g in o.param_groups) == len(list(model.parameters()))


def test_the_last_evaluation_reads_no_more_test_rows_than_it_may(workdir):
    train(run_config("few", test_rows=5, eval_rows=3), workdir, quiet=True)
    train(run_config("all", eval_rows=3), workdir, quiet=True)
    few, every = metrics_of(workdir, "few"), metrics_of(workdir, "all")
    assert few[:-1] == every[:-1] and {row["rows"] for row in few if row["split"] == "eval"} == {3}
    assert few[-1]["rows"] == 5 < every[-1]["rows"] and few[-1]["targets"] < every[-1]["targets"]
    assert 0 < few[-1]["loss"] != every[-1]["loss"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"length": 4096}, "length = 4096 is longer than the model allows"),
        ({"data_path": "data/nothing"}, "data/nothing.json: missing; run the workflow"),
        ({"init_path": "downloads/nothing"}, "downloads/nothing.json: missing"),
    ],
)
def test_unusable_inputs_get_one_line_before_any_work(workdir, changes, line):
    with pytest.raises(ValueError, match=line) as caught:
        train(run_config(**changes), workdir, quiet=True)
    assert "\n" not in str(caught.value)
    assert not (workdir / "runs").exists()


@pytest.mark.parametrize("gone", ["data/alpaca", "downloads/toy-model"])
def test_an_input_that_was_deleted_without_its_record_is_named_with_what_to_delete(workdir, gone):
    shutil.rmtree(workdir / gone)
    with pytest.raises(
        ValueError, match=f"{gone}: missing, although.*; delete .*{gone}.json and run the workflow again"
    ):
        train(run_config(), workdir, quiet=True)


def test_a_failed_second_run_leaves_the_first_artifact_alone(workdir, monkeypatch):
    train(run_config(), workdir, quiet=True)
    before = read_record(workdir / "runs/run.json")
    monkeypatch.setattr(trainer._Run, "_step", lambda self, n: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(run_config(seed=2), workdir, quiet=True, replace=True)
    assert read_record(workdir / "runs/run.json") == before
    assert weights(workdir, "run")


def test_a_diverging_run_says_what_to_lower(workdir):
    with pytest.raises(ValueError, match="lower learning_rate"):
        wild = OptimizerSettings(learning_rate=100, weight_decay=100, clip=1e9)  # every step turns the weights over
        train(run_config(steps=40, optimizer=wild), workdir, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"micro_batch_size": 3}, {"micro_batch_tokens": 30}], ids=["rows", "tokens"])
def test_two_processes_train_the_same_run_as_one(workdir, changes):
    """Data-parallel over gloo: DistributedDataParallel averages gradients, so only rounding may differ."""
    train_once(run_config("one"), workdir)
    config = write_when_changed(workdir / "configs/runs/two.yaml", run_config("two", **changes))
    done = launched(workdir, "ddp", "-m", "dllm", "train", config, "--workdir", workdir, "--quiet")
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((workdir / "runs/two/provenance.json").read_text())
    assert facts["processes"] == 2
    assert_same_run(workdir, "one", "two")


SIGNALLED = """
import os, signal, sys
from pathlib import Path
from dllm.config import RunConfig, read_config
from dllm.training import trainer

step = trainer._Run._step

def signalled(self, number):
    if number == 2 and self.accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, number)

trainer._Run._step = signalled
trainer.train(read_config(sys.argv[1], RunConfig), Path(sys.argv[2]), quiet=True)
"""


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_makes_both_save_the_same_step(workdir):
    train_once(run_config("one"), workdir)
    config = write_when_changed(workdir / "configs/runs/cut.yaml", run_config("cut"))
    (workdir / "signalled.py").write_text(SIGNALLED)
    done = launched(workdir, "ddp", workdir / "signalled.py", config, workdir)
    assert done.returncode != 0 and "143" in done.stderr
    assert not (workdir / "runs" / "cut.json").exists()
    (state,) = (workdir / ".work").glob("cut-*")
    assert (state / "step-3" / "progress.json").exists()
    train(run_config("cut"), workdir, quiet=True)  # goes on, here in one process
    assert_same_run(workdir, "one", "cut")


def test_removed_options_leave_the_digest_of_a_run_as_it_was():
    # written by version 0.1: another digest would train finished runs again, and start killed ones anew
    assert digest(run_config()) == "e756af06186f5fd079e4badd11762cd5bce97a32c0eb8106480b59a530d8bb88"
