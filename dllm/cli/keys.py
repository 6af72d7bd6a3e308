"""The key of a server, in a file: not on a command line, which others can read."""

from __future__ import annotations

import argparse
import stat
import sys
from pathlib import Path

SMALLEST_KEY = 16
"""Least characters of a key."""


def add_key_argument(parser: argparse.ArgumentParser, whose: str) -> None:
    """`--api-key-file`."""
    parser.add_argument("--api-key-file", metavar="FILE", help=f"a file with the key {whose}")


def read_key(file: str) -> bytes:
    """The key in a file. Raises ValueError, one line, for what is not a key; warns if others can read the file."""
    path = Path(file)
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise ValueError(f"--api-key-file {file}: {error.strerror}; write a key into it") from None
    if len(key) < SMALLEST_KEY or len(key.split()) != 1 or not key.isascii():
        raise ValueError(
            f"--api-key-file {file}: a key is one word of at least {SMALLEST_KEY} ASCII characters; make one with: "
            "openssl rand -hex 32"
        )
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        print(
            f"warning: --api-key-file {file}: others on this machine can read it; run: chmod 600 {file}",
            file=sys.stderr,
        )
    return key
