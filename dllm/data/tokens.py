"""Token files: rows of token ids on disk, memory-mapped, with the length of each row's prompt.

Of rows with a chosen and a rejected answer, a split has the prompts with the chosen ones, and `rejected_split` of it,
row by row, the same prompts with the rejected ones.
"""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy

from dllm.provenance import how_to_make


def row_dtype(vocab_size: int) -> type:
    """The smallest unsigned type that holds every token id."""
    return numpy.uint16 if vocab_size <= 2**16 else numpy.uint32


def rejected_split(split: str) -> str:
    """The name of the split with the rejected answers of another one."""
    return f"{split}.rejected"


class TokenWriter:
    """Writes one split as `<split>.tokens.bin`; in memory are only the lengths of its rows."""

    def __init__(self, directory: Path, split: str, vocab_size: int):
        self.directory, self.split = directory, split
        self.dtype = row_dtype(vocab_size)
        self.file = open(directory / f"{split}.tokens.bin", "wb")
        self.lengths, self.prompts = array("i"), array("i")

    def add(self, tokens: list[int] | numpy.ndarray, prompt_length: int = 0) -> None:
        """Append one row; its first `prompt_length` tokens are context, the others targets."""
        self.file.write(numpy.asarray(tokens, dtype=self.dtype).tobytes())
        self.lengths.append(len(tokens))
        self.prompts.append(prompt_length)

    def extend(self, tokens: numpy.ndarray, lengths: numpy.ndarray, prompts: numpy.ndarray) -> None:
        """Append rows [N] whose tokens lie end to end."""
        numpy.asarray(tokens, dtype=self.dtype).tofile(self.file)
        self.lengths.frombytes(lengths.astype(numpy.int32).tobytes())
        self.prompts.frombytes(prompts.astype(numpy.int32).tobytes())

    def close(self) -> dict:
        """Finish the files and return the split's counts for the manifest."""
        self.file.close()
        lengths, prompts = (numpy.frombuffer(found, dtype=numpy.int32) for found in (self.lengths, self.prompts))
        offsets = numpy.concatenate([[0], numpy.cumsum(lengths, dtype=numpy.int64)])
        numpy.save(self.directory / f"{self.split}.offsets.npy", offsets)
        numpy.save(self.directory / f"{self.split}.prompts.npy", prompts)
        tokens = int(offsets[-1])
        return {
            "rows": len(lengths),
            "tokens": tokens,
            "target_tokens": tokens - int(prompts.sum(dtype=numpy.int64)),
            "longest_row": int(lengths.max(initial=0)),
            "dtype": numpy.dtype(self.dtype).name,
        }


@dataclass(frozen=True)
class TokenRows:
    """One split of a prepared dataset: tokens (flat, memory-mapped), offsets [N + 1], prompt lengths [N].

    ids [N]: the rows' sample ids, where those are not their numbers here.
    """

    tokens: numpy.ndarray
    offsets: numpy.ndarray
    prompts: numpy.ndarray
    ids: numpy.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> numpy.ndarray:
        """Tokens per row, [N]."""
        return numpy.diff(self.offsets)

    def row(self, index: int) -> numpy.ndarray:
        """The tokens of one row."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def open_rows(directory: str | Path, split: str) -> TokenRows:
    """One split of a prepared dataset. Raises ValueError, one line, if it is missing or damaged."""
    directory = Path(directory)
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        counts = manifest["splits"][split]
        offsets = numpy.load(directory / f"{split}.offsets.npy")
        prompts = numpy.load(directory / f"{split}.prompts.npy")
        path = directory / f"{split}.tokens.bin"
        if path.stat().st_size != counts["tokens"] * numpy.dtype(counts["dtype"]).itemsize:
            raise ValueError(f"{path.name} has the wrong size")
        if (len(offsets) - 1, len(prompts), int(offsets[-1])) != (counts["rows"], counts["rows"], counts["tokens"]):
            raise ValueError("offsets and prompts do not fit the manifest")
        tokens = (
            numpy.memmap(path, dtype=counts["dtype"], mode="r") if counts["tokens"] else numpy.zeros(0, counts["dtype"])
        )
    except (OSError, ValueError, LookupError, TypeError, EOFError) as error:
        raise ValueError(f"{directory}: no usable split {split!r} ({error}), {how_to_make(directory)}") from None
    return TokenRows(tokens, offsets, prompts)


def open_pairs(directory: str | Path, split: str) -> tuple[TokenRows, TokenRows]:
    """One split of a prepared dataset, and its rejected answers. Raises ValueError, one line, if it has none."""
    rows = open_rows(directory, split)
    manifest = json.loads((Path(directory) / "manifest.json").read_text(encoding="utf-8"))
    if rejected_split(split) not in manifest["splits"]:
        raise ValueError(
            f"{directory}: holds no rejected answers; take a dataset of kind: preference, with chosen and rejected ones"
        )
    return rows, open_rows(directory, rejected_split(split))
