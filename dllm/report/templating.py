"""What the pages share: their style sheet, and where their templates are."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined


def style_sheet() -> str:
    """The CSS of the pages."""
    return (Path(__file__).parent / "templates" / "page.css").read_text(encoding="utf-8")


def environment(*, html: bool = True, **filters) -> Environment:
    """Where the templates of the report are, with some filters of their own; html: texts are escaped for HTML."""
    made = Environment(
        loader=PackageLoader("dllm.report"), autoescape=html, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters.update(filters)
    return made
