"""Peak memory of one training step, in a process of its own: `python -m bench.memory ours`."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def peak_mib(way: str, *, quick: bool = False) -> float:
    """Peak memory of one step in a fresh process, MiB, less the memory after the model was loaded."""
    command = [sys.executable, "-m", "bench.memory", way, *(["--quick"] if quick else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed: {done.stderr.strip()[-400:]}")
    return float(done.stdout.strip().splitlines()[-1])


def main(arguments: list[str]) -> None:
    """Print the peak of one way, MiB."""
    from bench.options import Options
    from bench.step import Sizes, Trainer, pool

    way, quick = arguments[0], "--quick" in arguments
    sizes = Sizes.of(Options(Path(), quick=quick))
    chunk = {"logits": 512} if way == "ours-chunked" else {}
    trainer = Trainer(sizes, bf16=way == "ours-bf16", **chunk)
    rows, random, grouped_rows, grouped = pool(sizes)
    with contextlib.suppress(OSError):  # Linux forgets the peak of the imports; elsewhere it stays, and is counted
        Path("/proc/self/clear_refs").write_text("5")
    before = resident_mib()
    if way == "random":
        trainer.common(rows, random)
    elif way == "grouped":
        trainer.common(grouped_rows, grouped)
    else:
        trainer.ours(rows)
    print(max(0.0, peak_resident_mib() - before))


def resident_mib() -> float:
    """MiB this process holds now (Linux), or its peak so far where that is not known."""
    return _status("VmRSS") or peak_resident_mib()


def peak_resident_mib() -> float:
    """The most MiB this process has held.

    On Linux VmHWM: `ru_maxrss` of a child begins at its parent's peak. Elsewhere `ru_maxrss`, on macOS in bytes.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status("VmHWM") or usage / (2**20 if sys.platform == "darwin" else 2**10)


def _status(field: str) -> float | None:
    """A field of /proc/self/status, MiB; None if it does not exist."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith(f"{field}:")), None)


if __name__ == "__main__":
    main(sys.argv[1:])
