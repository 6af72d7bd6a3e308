"""Diffusion language models: train, sample, score, chat, evaluate.

    import dllm
    model = dllm.load("results/laptop/runs/chat-large/model")
    model.generate([[{"role": "user", "content": "Hello!"}]])

Importing this package is quick: torch is imported with the first name that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dllm.config import GenerateSettings, LikelihoodSettings
    from dllm.core.canvas import Score
    from dllm.language_model import DiffusionLM, load

__version__ = "0.1.0"
__all__ = ["DiffusionLM", "GenerateSettings", "LikelihoodSettings", "Score", "load"]

_HOME = {
    "load": "dllm.language_model",
    "DiffusionLM": "dllm.language_model",
    "Score": "dllm.core.canvas",
    "GenerateSettings": "dllm.config",
    "LikelihoodSettings": "dllm.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dllm' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
