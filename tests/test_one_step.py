"""docs/one_step.py is the training step of the package, and the tutorial shows it as it is."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch

from dllm.core.batch import row_noise
from dllm.data.collate import ResponseEnd, collate, ended_lengths, epoch_batches
from dllm.data.tokens import open_rows
from dllm.models.backbone import TokenNLL
from dllm.models.load import load_backbone
from dllm.objectives.mdlm import MDLM
from tests.training.conftest import workdir  # noqa: F401
from tests.training_loss import training_loss

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "docs" / "one_step.py"


@pytest.mark.parametrize("data", ["text", "alpaca"])
def test_one_step_is_the_step_of_the_objective(workdir, data):  # noqa: F811
    spec = importlib.util.spec_from_file_location("one_step", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    paths = str(workdir / "downloads/toy-model"), str(workdir / f"data/{data}")
    loss, trained = module.one_step(*paths)

    backbone, rows = load_backbone(paths[0]), open_rows(paths[1], "train")
    numbers = epoch_batches(rows.lengths, 8, 42, 0, grouped=False)[0]
    end = ResponseEnd("one", backbone.eos_id) if data == "alpaca" else None
    batch = collate(rows, numbers, ended_lengths(rows, numbers, end, 0), pad_id=backbone.pad_id, end=end)
    noise = row_noise(42, 0, batch.sample_ids, batch.tokens.shape[1])
    targets = float(batch.maskable.sum())
    scores = TokenNLL(backbone).train()
    terms = training_loss(MDLM(), scores, batch, noise, mask_id=backbone.mask_id, denominator=targets)
    terms.loss.backward()
    assert loss == terms.loss.item()
    for (name, ours), plain in zip(trained.named_parameters(), scores.parameters(), strict=True):
        same = ours.grad is plain.grad is None or torch.equal(ours.grad, plain.grad)
        assert same and (ours.grad is None or not torch.equal(ours, plain)), name


def test_it_is_a_command(workdir, monkeypatch, capsys):  # noqa: F811
    paths = [str(workdir / "downloads/toy-model"), str(workdir / "data/text")]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *paths])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out.strip().endswith("nats per token")


def test_the_tutorial_shows_it_as_it_is():
    code = SCRIPT.read_text()
    assert f"```python\n{code}```" in (ROOT / "docs" / "tutorial.md").read_text()
    assert len(code.split("def one_step")[1].splitlines()) <= 40 and len(code.splitlines()) < 50
