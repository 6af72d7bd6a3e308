"""A device is taken for what it can do: one that lacks an operation, or errs, is left for the CPU in one line."""

import pytest
import torch

from dllm.core import devices
from dllm.core.devices import PROBES, best_device, known_device, missing

CPU = torch.device("cpu")


def accelerator(monkeypatch, kind):
    found = kind and torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)


def test_every_probe_is_a_number_that_the_cpu_itself_finds_again():
    for name, probe in PROBES.items():
        assert torch.isfinite(probe(CPU)).all() and torch.equal(probe(CPU), probe(CPU)), name
    assert missing(CPU, training=True) is None


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("kind", ["raises", "errs"])
def test_an_accelerator_that_fails_a_probe_is_left_for_the_cpu_in_one_line(monkeypatch, capsys, name, kind):
    def broken(device):
        if device.type == "cpu":
            return torch.zeros(3)
        if kind == "raises":
            raise NotImplementedError("not implemented for MPS")
        return torch.full((3,), 0.1)

    monkeypatch.setattr(devices, "PROBES", {n: broken if n == name else lambda _: torch.zeros(3) for n in PROBES})
    accelerator(monkeypatch, "mps")
    missing.cache_clear()
    try:
        assert best_device(training=True) == CPU
        assert capsys.readouterr().err == f"mps: {name} does not work there, so the CPU is used\n"
        assert best_device().type == ("mps" if name == "training" else "cpu")
    finally:
        missing.cache_clear()


def test_cuda_is_taken_as_it_is_and_without_an_accelerator_the_cpu(monkeypatch):
    monkeypatch.setattr(devices, "PROBES", {"never": None})
    accelerator(monkeypatch, "cuda")
    assert best_device(training=True) == torch.device("cuda")
    accelerator(monkeypatch, None)
    assert best_device(training=True) == CPU


@pytest.mark.parametrize("name", ["mps", "cuda", "cuda:7", "meta", "gpu", ""])
def test_a_device_that_is_not_there_is_one_line(monkeypatch, name):
    accelerator(monkeypatch, None)
    with pytest.raises(ValueError, match=f"--device {name}"):
        known_device(name)
    assert known_device("cpu") == CPU
