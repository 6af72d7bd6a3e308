"""Where a number comes from: commit, digests, versions, hardware, time; and the record beside every artifact.

An artifact is a directory; its record is a small JSON file beside it with the digest of the content. The records are
the nodes of the workflow's graph: the directories themselves are never deleted, touched or hashed by the workflow.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("dllm", "torch", "transformers", "accelerate", "tokenizers", "datasets", "lm-eval")


def write_atomically(path: str | Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def replace_directory(new: str | Path, target: str | Path) -> None:
    """Put the finished directory `new` in the place of `target`; what was there goes only once `new` is in place."""
    new, target = Path(new), Path(target)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(new, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def file_lock(path: str | Path) -> Iterator[bool]:
    """Hold the lock file `path`, so that only one attempt at a job writes at a time. A process that is killed lets go.

    The value says whether this attempt had to wait for another one. The file may be deleted together with its
    directory: an attempt that waited for it then makes a new one. Raises ValueError, one line, where the file system
    cannot lock files.
    """
    import fcntl

    path = Path(path)
    waited = False
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{path}: another attempt is at work here; waiting until it ends", flush=True)
                waited = True
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                raise ValueError(
                    f"{path}: this file system cannot lock files ({error.strerror}), so two attempts could write to "
                    "one place; put `workdir` on one that can (Lustre: mounted with flock)"
                ) from None
            try:
                same = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            except FileNotFoundError:
                same = False
            if same:
                yield waited
                return


def remove_directory(directory: str | Path) -> None:
    """Delete a directory so that it goes whole: a half of it is never left under its name."""
    directory = Path(directory)
    if directory.exists():
        doomed = directory.with_name(f".{directory.name}.doomed")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(directory, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def settle(*paths: str | Path) -> None:
    """Return once files and directories are on the disk, so that a crash of the machine leaves them whole."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def file_digest(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def directory_digest(directory: str | Path, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """digest, files and bytes of a directory: SHA-256 over the sorted (path, file digest) pairs."""
    directory = Path(directory)
    paths = sorted(
        p for p in directory.rglob("*") if p.is_file() and p.relative_to(directory).as_posix() not in leave_out
    )
    total = hashlib.sha256()
    for path in paths:
        total.update(f"{path.relative_to(directory).as_posix()}\0{file_digest(path)}\n".encode())
    return {"digest": total.hexdigest(), "files": len(paths), "bytes": sum(p.stat().st_size for p in paths)}


VOLATILE = ("provenance.json", "metrics.jsonl")
"""Files that hold times; an artifact's digest leaves them out, so that an identical rerun has an identical digest."""


def write_record(
    directory: str | Path,
    *,
    kind: str,
    name: str,
    config_digest: str,
    inputs: dict[str, str],
) -> dict:
    """Write `<directory>.json`, the record of a finished artifact, and return it.

    It holds nothing that differs between two identical runs, so that what depends on it need not run again.
    """
    record = {"kind": kind, "name": name} | directory_digest(directory, VOLATILE)
    record |= {"config_digest": config_digest, "inputs": inputs}
    write_atomically(f"{directory}.json", json.dumps(record, indent=1, sort_keys=True) + "\n")
    return record


def read_record(path: str | Path) -> dict:
    """The record at `path`. Raises ValueError, one line, if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: missing; run the workflow so that it makes {str(path).removesuffix('.json')}"
        ) from None
    except ValueError:
        raise ValueError(f"{path}: damaged; delete it and run the workflow again") from None


def input_digest(directory: str | Path) -> str:
    """The digest of an artifact that a job reads. Raises ValueError, one line, if the artifact or its record is gone.

    The workflow cannot help here: while the record is there, it believes that the artifact is, too.
    """
    digest = read_record(f"{directory}.json")["digest"]
    if not any(Path(directory).glob("*")):
        raise ValueError(f"{directory}: missing, {how_to_make(directory)}")
    return digest


def how_to_make(path: str | Path, otherwise: str = "run the workflow so that it makes it") -> str:
    """The next step for a file or directory of a work directory that is gone, whose record may still be there.

    otherwise: what is to be done where there is no record.
    """
    for place in (Path(path), *Path(path).parents):
        if place.parent.name in ("downloads", "data", "runs") and Path(f"{place}.json").is_file():
            return f"although its record is there; delete {place}.json and run the workflow again"
    return otherwise


@cache
def commit() -> dict[str, Any]:
    """The commit of the source tree, and whether it has uncommitted changes outside of results.

    Both are unknown (`unknown` and None) without git, and for a source tree that is not the top of its checkout: an
    unpacked release may lie inside another repository, whose commit says nothing about it.
    """
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str | None:
        try:
            # the clone may belong to another user, whose code is running at this moment
            command = ["git", "-c", f"safe.directory={root}", "-C", str(root), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top, head = git("rev-parse", "--show-toplevel"), git("rev-parse", "HEAD")
    if top is None or head is None or Path(top).resolve() != root:
        return {"commit": "unknown", "dirty": None}
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    return {"commit": head, "dirty": None if changes is None else bool(changes)}


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    known = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            continue
    return known


@cache
def hardware() -> str:
    """The processor, as a reader knows it, and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name}, {cores()} cores"


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def collect(**facts: Any) -> dict[str, Any]:
    """A provenance mapping: commit, versions, hardware, peak memory and the time, plus the facts given."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    own = {"versions": versions(), "hardware": hardware(), "peak_host_gib": round(peak / 2**30, 3)}
    return commit() | own | {"written": time.strftime("%Y-%m-%dT%H:%M:%S%z")} | facts
