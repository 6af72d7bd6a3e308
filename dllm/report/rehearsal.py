"""The page at the end of a rehearsal: for each rule what works, what it took, and what it would take in full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dllm.numbers import duration


def rehearsal_page(outcome: Any) -> str:
    """The page as HTML, self-contained. outcome: a `dllm.planning.rehearsal.Outcome`."""
    environment = Environment(
        loader=PackageLoader("dllm.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["duration"] = duration
    style = (Path(__file__).parent / "templates" / "page.css").read_text(encoding="utf-8")
    return environment.get_template("rehearsal.html.jinja").render(outcome=outcome, style=style)
