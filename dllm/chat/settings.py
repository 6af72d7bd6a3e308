"""Which checkpoint a name means, and how a chat samples by default."""

from __future__ import annotations

from pathlib import Path

from dllm.algorithms import trained_blocks
from dllm.config import GenerateSettings, did_you_mean, merge_first

CHAT_TOKENS = 128
"""Length of a chat answer's canvas, where the model's context has room for it."""

EDIT_TEMPERATURE = 0.7
"""Temperature of a chat with an Edit Flows model: at 0, every gap of an empty answer is given the same token."""

RESULTS = ("results/laptop", "results/paper")


def find_checkpoint(name: str | None = None) -> str:
    """The model directory that a name means: a directory, a run below `results/`, or a hub id (returned as it is).

    Without a name, the largest chat run. Raises ValueError, one line, if there is none.
    """
    models = _models()
    if name is None:
        chats = [model for model in models if model.parent.name.startswith("chat-")]
        if not chats:
            raise ValueError("no chat model below results/; run `make report` first, or give a model directory")
        return str(max(chats, key=_weight))
    runs = {model.parent.name: model for model in reversed(models)}
    if name in runs:
        return str(runs[name])
    path = Path(name).expanduser()
    tuned = sorted(path.glob("runs/*/model"))  # of a work directory with one run, as `dllm tune` leaves it
    for directory in (path, path / "model", *(tuned if len(tuned) == 1 else ())):
        if (directory / "config.json").is_file():
            return str(directory)
    if path.is_dir():
        step = merge_first(path) or "no config.json in it or in its model/; this is not a checkpoint directory"
        raise ValueError(f"{name}: {step}")
    if name.count("/") == 1 and not name.startswith((".", "/", "~", "results/")):
        return name
    hint = did_you_mean(name, list(runs)) if runs else "Run `make report` first, or give a model directory."
    raise ValueError(f"{name!r} is neither a model directory nor a run below results/. {hint}")


def _weight(model: Path) -> tuple[int, int]:
    """Bytes of a model's weights and when they were written: what the largest and then the newest one is chosen by."""
    stats = [path.stat() for path in model.glob("*.safetensors")]
    return sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)


def _models() -> list[Path]:
    """Model directories of finished runs, the laptop's before the paper's before others."""
    directories = [Path(name) for name in RESULTS]
    directories += sorted(path for path in Path().glob("results/*") if path not in directories)
    return [config.parent for directory in directories for config in sorted(directory.glob("runs/*/model/config.json"))]


def chat_context(sidecar: dict, max_length: int) -> int:
    """Tokens of a conversation and its answer together: the length a run was trained at, within the model's own."""
    return min(max_length, sidecar.get("length") or max_length)


def chat_generation(sidecar: dict, context: int) -> GenerateSettings:
    """How a chat samples unless told otherwise: half the context at most, in the blocks that training ended rows at.

    A checkpoint that was published with another sampler is sampled with that one.
    """
    tokens = max(1, min(CHAT_TOKENS, context // 2))
    blocks = trained_blocks(sidecar.get("algorithm"))
    if blocks == "none":  # it has no blocks, and what it draws must not be the same everywhere
        return GenerateSettings(max_new_tokens=tokens, block_size=tokens, temperature=EDIT_TEMPERATURE)
    in_blocks = sidecar.get("response_end") == "block" or blocks == "trained"
    block = sidecar.get("block_size") if in_blocks else None
    block_size = block or GenerateSettings().block_size
    return GenerateSettings(max_new_tokens=tokens, block_size=block_size, **sidecar.get("generation", {}))
