"""What DVC keeps of a work directory: pointers in git, content in a cache and in remotes.

    python workflow/cache.py fetch RECORD...          bring here what these records describe
    python workflow/cache.py track RECORD ARTIFACT    put an artifact into the cache and write ARTIFACT.dvc
    python workflow/cache.py verify                   compare every cached object with its name, remove damaged ones

The rules run fetch and track, in the work directory, where the configuration says `cache: dvc`; the graph itself knows
records only. A pointer names the record that it belongs to, so that an old pointer never brings back old content.
DVC is a command of its own environment (`make dvc`): nothing here imports it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dllm.provenance import file_digest, read_record, write_atomically

ROOT = Path(__file__).resolve().parent.parent
LOST = Path(".work/lost")
"""Where the record of an artifact goes that is neither here nor in a remote, below the work directory."""

NOT_THERE = ("Checkout failed for following targets", "No such file or directory", "No remote provided")
"""What DVC says when content cannot be had, and not when a remote cannot be reached."""


# --------------------------------------------------------------------------------------------------------------------
# What the Snakefile asks


@dataclass(frozen=True)
class Cache:
    """The cache of one work directory, as the rules see it."""

    kind: str
    script: str
    """Path of this file from the work directory."""

    def fetch(self, wildcards, input) -> str:
        """Beginning of a shell command that brings here what its input records describe; empty without DVC."""
        records = [path for path in input if path.startswith(("data/", "downloads/", "runs/"))]
        if self.kind == "none" or not records:
            return ""
        return shlex.join(["python", self.script, "fetch", *records]) + " && "

    def pointers(self, records: Iterable[str]) -> list[str]:
        """The pointers of some records; an empty list without DVC."""
        return [] if self.kind == "none" else [str(pointer_of(record)) for record in records]


def artifact_of(record: str) -> str:
    """What DVC keeps of a recorded artifact: of a run its weights, for git holds its small files."""
    name = record.removesuffix(".json")
    return f"{name}/model" if name.startswith("runs/") else name


def pointer_of(record: str) -> Path:
    """The pointer of a recorded artifact."""
    return Path(f"{artifact_of(record)}.dvc")


def record_of(artifact: str) -> str:
    """The record of what DVC keeps; answers of an evaluation (.samples.jsonl) are their own record."""
    return artifact if artifact.endswith(".jsonl") else f"{artifact.removesuffix('/model')}.json"


# --------------------------------------------------------------------------------------------------------------------
# fetch, track, verify


class Lost(ValueError):
    """An artifact is neither here, nor in the cache, nor in the remote; records: what is to be made again."""

    def __init__(self, records: list[str]):
        again = " ".join(records)
        artifacts = ", ".join(map(artifact_of, records))
        super().__init__(
            f"{artifacts}: neither here nor in DVC's cache or remote, so {again} set aside in {LOST}. To make them "
            f"again, and nothing that only depends on them: snakemake (same options) -- {again}. Then start again. "
            "To take it back: git checkout the records and pointers, and give DVC a remote that has them"
        )
        self.records = records


def fetch(record: str) -> None:
    """Bring the artifact of `record` here, in the state that the record states.

    Raises Lost if it cannot be had, with the record set aside so that the workflow makes it again, and ValueError if
    the remote does not answer or something else is in its place; then nothing has changed.
    """
    if not Path(record).exists() and (LOST / record).exists():  # by another job, a moment ago
        raise Lost([record])
    artifact, pointer = artifact_of(record), pointer_of(record)
    if not pointer.exists() or pointed_record(pointer) != state_of(record):
        if Path(artifact).exists():  # just made, and not tracked yet
            return
        set_aside(record)
    elif dvc("checkout", pointer).returncode:
        pulled = dvc("pull", pointer)
        if pulled.returncode and cannot_be_had(pulled.stderr):
            set_aside(record)
        elif pulled.returncode:
            raise ValueError(f"{artifact}: cannot be fetched; nothing has changed. DVC says: {last_error(pulled)}")
        else:
            print(f"{artifact}: fetched from the remote", file=sys.stderr)


def set_aside(record: str) -> None:
    """Move a record to .work/lost and remove its pointer, see that what it is made from is here, and raise Lost."""
    inputs = [f"{name}.json" for name in read_record(record).get("inputs", {})]
    (LOST / record).parent.mkdir(parents=True, exist_ok=True)
    os.replace(record, LOST / record)
    pointer_of(record).unlink(missing_ok=True)
    records = [record]
    for name in inputs:
        try:
            if Path(name).exists():
                fetch(name)
        except Lost as error:
            records += error.records
    raise Lost(records)


def track(record: str, artifact: str) -> None:
    """Put an artifact into the cache, linked and not copied, and write the pointer that names its record."""
    pointer = Path(f"{artifact}.dvc")
    state = state_of(record)
    added = dvc("add", artifact)
    if added.returncode:
        raise ValueError(f"{artifact}: cannot be tracked. DVC says: {last_error(added)}")
    text = re.sub(r"^meta:\n(  .*\n)*", "", pointer.read_text(encoding="utf-8"), flags=re.M)
    write_atomically(pointer, f"{text}meta:\n  record: {state}\n")


def verify() -> list[Path]:
    """Remove every cached object whose content is not what its name says, with its links below results/; return them.

    DVC itself takes a read-only object for good.
    """
    cache = Path(dvc("cache", "dir").stdout.strip())
    damaged = []
    for path in sorted(cache.glob("files/md5/??/[0-9a-f]*")):
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != path.parent.name + path.name.removesuffix(".dir"):
            damaged.append(path)
    files = {path.stat().st_ino for path in damaged}
    links = [path for path in (ROOT / "results").rglob("*") if files and path.is_file() and path.stat().st_ino in files]
    for path in (*links, *damaged):
        path.unlink()
    return damaged


def state_of(record: str) -> str:
    """What a pointer notes of its record: the digest of the content, or of the file if it is not a record."""
    return read_record(record)["digest"] if record.endswith(".json") else file_digest(record)


def pointed_record(pointer: Path) -> str:
    """The record that a pointer belongs to; empty for a pointer that `dvc add` wrote by hand."""
    found = re.search(r"^meta:\n  record: (\w+)$", pointer.read_text(encoding="utf-8"), re.M)
    return found[1] if found else ""


# --------------------------------------------------------------------------------------------------------------------
# The command


def dvc(verb: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    """Run DVC, waiting for its lock; its output is returned."""
    own = ROOT / ".venv-dvc" / "bin" / "dvc"
    tool = str(own) if own.exists() else shutil.which("dvc")
    if tool is None:
        raise ValueError(
            "cache = 'dvc', but there is no dvc command; run `make dvc`, or set `cache: none` in an overlay"
        )
    command = [tool, "--wait-for-lock", verb, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def cannot_be_had(said: str) -> bool:
    """Whether DVC's words mean that the content is nowhere: not so if a remote cannot be reached."""
    return any(words in said for words in NOT_THERE) and not unmounted()


def unmounted() -> bool:
    """Whether the default remote is a directory that is not there: a disk to be mounted, rather than lost content."""
    for line in dvc("remote", "list").stdout.splitlines():
        _, url, *marks = line.split()
        if marks == ["(default)"] and "://" not in url:
            return not (ROOT / ".dvc" / url).is_dir()
    return False


def last_error(done: subprocess.CompletedProcess) -> str:
    """DVC's error, on one line."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    return (errors or done.stderr.splitlines() or ["nothing"])[-1].removeprefix("ERROR: ")


def main(arguments: list[str] | None = None) -> int:
    """Run a verb in the current directory."""
    parser = argparse.ArgumentParser(prog="cache.py", description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("fetch", help="bring recorded artifacts here").add_argument("records", nargs="+")
    tracking = verbs.add_parser("track", help="put an artifact into the cache")
    tracking.add_argument("record")
    tracking.add_argument("artifact")
    verbs.add_parser("verify", help="remove damaged objects from the cache")
    args = parser.parse_args(arguments)
    try:
        if args.verb == "fetch":
            for record in args.records:
                fetch(record)
        elif args.verb == "track":
            track(args.record, args.artifact)
        else:
            damaged = verify()
            for path in damaged:
                print(f"{path}: damaged, removed")
            print("`dvc pull` brings it back" if damaged else "every cached object is what its name says")
            return 1 if damaged else 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
