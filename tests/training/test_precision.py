"""Hardware without fast bf16: products are computed in fp32, and what was done is said and recorded."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dllm.config import OptimizerSettings
from dllm.core import precision
from dllm.core.precision import WidenedWeights
from dllm.training import devices, optimizer, setup
from dllm.training.optimizer import Muon, orthogonalized
from dllm.training.trainer import train
from tests.training.conftest import metrics_of, run_config


@pytest.fixture
def bf16(monkeypatch):
    """Sets whether the hardware of this test has fast bf16."""

    def pretend(fast: bool) -> None:
        for module in (precision, devices, optimizer, setup):
            monkeypatch.setattr(module, "has_fast_bf16", lambda device: fast)

    return pretend


def three_steps(cls: type, dtype=torch.float32, **settings) -> list[torch.Tensor]:
    """Two matrices after three steps of an optimiser with seeded gradients."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in ((12, 20), (20, 12))]
    stepping = cls(weights, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(dtype)
        stepping.step()
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_without_fast_bf16_is_torchs_muon_with_its_products_in_fp32(bf16, monkeypatch, dtype, nesterov):
    bf16(False)
    ours = three_steps(Muon, dtype, nesterov=nesterov)
    monkeypatch.setattr(
        "torch.optim._muon._zeropower_via_newtonschulz",
        lambda update, coefficients, steps, epsilon: orthogonalized(update.float(), coefficients, steps, epsilon),
    )
    theirs = three_steps(torch.optim.Muon, dtype, nesterov=nesterov)
    # the same operations; torch adds an fp32 update to bf16 weights without rounding it first
    rounding = {"rtol": 0, "atol": 0} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, plain, **rounding)


def test_muon_with_fast_bf16_is_torchs_muon(bf16):
    bf16(True)
    assert all(map(torch.equal, three_steps(Muon), three_steps(torch.optim.Muon)))


def test_orthogonalized_matrices_have_singular_values_near_one():
    matrix = torch.randn(30, 18, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalized(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7))
    assert values.min() > 0.5 and values.max() < 1.5  # what the iteration promises, and no more


@pytest.mark.parametrize("shape", [(32, 32), (32, 48), (24, 96), (96, 24)])
def test_orthogonalized_matrices_are_those_of_the_plain_iteration(shape):
    """Also where the steps are taken on the Gram matrix; the second matrix has singular values from 1 to 1e-6."""
    a, b, c = 3.4445, -4.7750, 2.0315
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    left, values, right = torch.linalg.svd(drawn, full_matrices=False)
    for matrix in (drawn, left @ torch.logspace(0, -6, len(values)).diag() @ right):
        plain = matrix.double() / matrix.double().norm()
        for _ in range(5):
            gram = plain @ plain.T if shape[0] <= shape[1] else plain.T @ plain
            factor = b * gram + c * gram @ gram
            plain = a * plain + (factor @ plain if shape[0] <= shape[1] else plain @ factor)
        ours = orthogonalized(matrix, (a, b, c), 5, 1e-7)
        # singular values near zero are 4e-4 off at worst: the rounding of the Gram matrix grows tenfold in a step
        torch.testing.assert_close(ours.double(), plain, atol=1e-3, rtol=0)


def test_widened_weights_give_the_outputs_of_fp32_and_gradients_rounded_to_bf16():
    torch.manual_seed(0)
    half = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).bfloat16()
    wide = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    wide.load_state_dict(half.state_dict())
    rows = torch.randn(5, 8)
    found, expected = WidenedWeights(half)(rows), wide(rows)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for mine, plain in zip(half.parameters(), wide.parameters(), strict=True):
        assert mine.grad.dtype == torch.bfloat16 and torch.equal(mine.grad, plain.grad.bfloat16())


def test_a_run_with_autocast_computes_in_fp32_without_fast_bf16_and_says_so(workdir, bf16, capsys):
    bf16(False)
    muon = OptimizerSettings(name="muon")
    train(run_config("cast", recipe={"autocast": "bf16"}, optimizer=muon), workdir, quiet=True)
    assert "cast: no fast bf16 on this device, so matrix products are computed in fp32" in capsys.readouterr().out
    train(run_config("plain", optimizer=muon), workdir, quiet=True)
    assert "bf16" not in capsys.readouterr().out
    assert metrics_of(workdir, "cast") == metrics_of(workdir, "plain")
    for name in ("model/dllm.json", "provenance.json"):
        assert json.loads((workdir / "runs/cast" / name).read_text())["products"] == "fp32"


def test_a_run_with_bf16_weights_keeps_them_without_fast_bf16_and_resumes_to_the_bit(workdir, bf16, monkeypatch):
    bf16(False)
    train(run_config("whole", recipe={"parameters": "bf16"}), workdir, quiet=True)
    saved = load_file(workdir / "runs/whole/model/model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}

    step = devices.Devices.step
    calls = iter(range(100))

    def breaks(*arguments, **named):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return step(*arguments, **named)

    monkeypatch.setattr(devices.Devices, "step", breaks)
    with pytest.raises(KeyboardInterrupt):
        train(run_config("torn", recipe={"parameters": "bf16"}), workdir, quiet=True)
    monkeypatch.setattr(devices.Devices, "step", step)
    train(run_config("torn", recipe={"parameters": "bf16"}), workdir, quiet=True)
    resumed = load_file(workdir / "runs/torn/model/model.safetensors")
    assert all(torch.equal(saved[name], resumed[name]) for name in saved)
