"""One file per algorithm, sharing pure functions; the registry is this dict."""

from __future__ import annotations

from importlib import import_module

ALGORITHMS = {
    "mdlm": "dllm.algorithms.mdlm:MDLM",
    "bd3lm": "dllm.algorithms.bd3lm:BD3LM",
    "mlm": "dllm.algorithms.mlm:MLM",
    "ar": "dllm.algorithms.ar:AR",
    "edit_flows": "dllm.algorithms.edit_flows:EditFlow",
}

MASKED = ("mdlm", "bd3lm", "mlm")
"""Algorithms that fill in masks: a model trained with one of them can be used with another, if that is wanted."""


def algorithm_for(trained: str, wanted: str | None) -> type:
    """The class with which to use a model trained with one algorithm; wanted: another one (None: the same).

    Raises ValueError, one line, for an unknown algorithm, or one that the model cannot serve.
    """
    if wanted is None or wanted == trained:
        return algorithm_class(trained)
    found = algorithm_class(wanted)
    # a model that has only seen clean blocks before its own cannot fill in a text as a whole
    allowed = {"mdlm": MASKED, "mlm": MASKED}.get(trained, (trained,))
    if wanted not in allowed:
        allowed = ", ".join(allowed)
        raise ValueError(
            f"algorithm = {wanted!r} cannot use a model trained with {trained!r}; allowed: {allowed}; "
            f"leave it out, or train one with algorithm: {wanted}"
        )
    return found


def algorithm_class(name: str) -> type:
    """The class of a registered algorithm. Raises ValueError with the known names."""
    if name not in ALGORITHMS:
        raise ValueError(f"algorithm = {name!r}; allowed: {', '.join(ALGORITHMS)}")
    module, attribute = ALGORITHMS[name].split(":")
    return getattr(import_module(module), attribute)
