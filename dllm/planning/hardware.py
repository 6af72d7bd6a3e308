"""What machines do: the assumptions behind every time in the plan."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dllm.config import HARDWARE, did_you_mean


@dataclass(frozen=True)
class Hardware:
    """One accelerator, or one core of a processor.

    bf16_tflops and fp32_tflops are dense peaks of matrix products; memory_gib and bandwidth_gbs (GB/s) those of the
    device; training and inference the assumed shares of the peak; startup_seconds until the first step, step_seconds
    and pass_seconds what a training step and a forward batch take besides arithmetic.
    """

    name: str
    bf16_tflops: float
    fp32_tflops: float
    memory_gib: float
    bandwidth_gbs: float
    training: float
    inference: float
    startup_seconds: float
    step_seconds: float
    pass_seconds: float

    @property
    def is_gpu(self) -> bool:
        """Whether it is an accelerator."""
        return self.name != "cpu"

    def tflops(self, precision: str) -> float:
        """Peak at a precision, `bf16` or `fp32`."""
        return self.bf16_tflops if precision == "bf16" else self.fp32_tflops


def _gpu(name: str, bf16: float, fp32: float, memory: float, bandwidth: float) -> Hardware:
    """An accelerator with the assumptions all of them share: they are not measurements."""
    return Hardware(name, bf16, fp32, memory, bandwidth, 0.40, 0.25, 60, 0.03, 0.015)


TABLE: dict[str, Hardware] = {
    "h200": _gpu("h200", 989, 67, 139, 4800),
    "h100": _gpu("h100", 989, 67, 79, 3350),
    "a100-80gb": _gpu("a100-80gb", 312, 19.5, 79, 2039),
    "a100-40gb": _gpu("a100-40gb", 312, 19.5, 39, 1555),
    "rtx-4090": _gpu("rtx-4090", 165, 82.6, 23.5, 1008),
    # per core; calibrated on the laptop run (2 shared cores of an AMD EPYC with AVX-512, fp32), see docs/reproduce.md
    "cpu": Hardware("cpu", 0.08, 0.08, 0, 20, 0.85, 0.6, 7.0, 0.02, 0.004),
}
"""Peaks from the vendors' data sheets (dense, without sparsity; SXM modules); memory as the driver shows it."""


def hardware(name: str, utilisation: float | None = None) -> Hardware:
    """The entry of `TABLE`, with another training utilisation if given. Raises ValueError for an unknown name."""
    if name not in TABLE:
        raise ValueError(f"hardware = {name!r} is not known. {did_you_mean(name, HARDWARE)}")
    machine = TABLE[name]
    if utilisation is None:
        return machine
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation = {utilisation} is not a share of the peak; allowed: above 0, up to 1")
    return replace(machine, training=utilisation, inference=utilisation * machine.inference / machine.training)
