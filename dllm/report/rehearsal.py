"""The page at the end of a rehearsal: for each rule what works, what it took, and what it would take in full."""

from __future__ import annotations

from typing import Any

from dllm.numbers import duration


def rehearsal_page(outcome: Any) -> str:
    """The page as HTML, self-contained. outcome: a `dllm.planning.rehearsal.Outcome`."""
    from dllm.report.templating import environment, style_sheet

    template = environment(duration=duration).get_template("rehearsal.html.jinja")
    return template.render(outcome=outcome, style=style_sheet())
