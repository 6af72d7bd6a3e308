"""Resumable state: complete checkpoints that appear atomically, old ones pruned, one attempt at a time."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from dllm.provenance import remove_directory, settle

KEEP = 2
"""Checkpoints kept: the newest, and one before it in case the newest turns out damaged."""


SIZES = "sizes.json"
"""File of a checkpoint that says how long its others are."""


def _sizes(directory: Path) -> dict[str, int]:
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != SIZES)
    return {str(p.relative_to(directory)): p.stat().st_size for p in files}


def check_sizes(checkpoint: Path) -> None:
    """Raise ValueError if a file of a checkpoint is missing or has another length than when it was written."""
    stated, sizes = json.loads((checkpoint / SIZES).read_text(encoding="utf-8")), _sizes(checkpoint)
    for name, size in stated.items():
        if sizes.get(name) != size:
            raise ValueError(f"{name} has {sizes.get(name, 'no')} bytes, not {size}")


class StateDirectory:
    """`.work/<run>-<digest>`: checkpoints `step-N`, metrics so far, and the lock of the attempt that is at it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def lock(self) -> Path:
        """The file that an attempt locks (`dllm.provenance.file_lock`)."""
        return self.path / "lock"

    def tidy(self) -> None:
        """Delete what attempts that were killed left half written or half deleted."""
        left = [*self.path.glob(".*"), *self.path.parent.glob(f".{self.path.name}.doomed")]
        for path in left:
            shutil.rmtree(path, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(int(p.name[5:]) for p in self.path.glob("step-*") if p.name[5:].isdigit())

    def scratch(self, step: int) -> Path:
        """The directory into which the checkpoint of a step is written."""
        return self.path / f".step-{step}"

    def begin(self, step: int) -> Path:
        """The scratch directory of a step, made empty."""
        self.abandon(step)
        self.scratch(step).mkdir()
        return self.scratch(step)

    def finish(self, step: int) -> None:
        """Make the scratch directory the checkpoint of `step` and prune old ones."""
        scratch = self.scratch(step)
        (scratch / SIZES).write_text(json.dumps(_sizes(scratch)), encoding="utf-8")
        settle(*scratch.rglob("*"), scratch, *self.path.glob("metrics.jsonl"))
        remove_directory(self.checkpoint(step))
        os.replace(scratch, self.checkpoint(step))
        for old in self.steps()[:-KEEP]:
            remove_directory(self.checkpoint(old))

    def abandon(self, step: int) -> None:
        """Take back what `begin` began, and the room it takes."""
        shutil.rmtree(self.scratch(step), ignore_errors=True)

    def checkpoint(self, step: int) -> Path:
        """Directory of a complete checkpoint."""
        return self.path / f"step-{step}"

    def remove(self) -> None:
        """Delete everything, once the run's artifact is in place."""
        remove_directory(self.path)


class MetricsLog:
    """`metrics.jsonl`: one JSON object per line, cut back to a step when a run resumes."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`, and a torn last line."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if row["step"] <= step:
                kept.append(line)
        temporary = self.path.with_suffix(".partial")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def write(self, row: dict) -> None:
        """Append one row."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None  # a full disk does not name the file
