"""One file per algorithm, sharing pure functions; the registry is this dict."""

from __future__ import annotations

from importlib import import_module

ALGORITHMS = {
    "mdlm": "dllm.algorithms.mdlm:MDLM",
    "mlm": "dllm.algorithms.mlm:MLM",
    "ar": "dllm.algorithms.ar:AR",
}


def algorithm_class(name: str) -> type:
    """The class of a registered algorithm. Raises ValueError with the known names."""
    if name not in ALGORITHMS:
        raise ValueError(f"algorithm = {name!r}; allowed: {', '.join(ALGORITHMS)}")
    module, attribute = ALGORITHMS[name].split(":")
    return getattr(import_module(module), attribute)
