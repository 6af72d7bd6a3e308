"""The page of a server: files that ask nobody but this server for anything, and headers that hold the browser to it.

What the page shows of a setting comes from `GenerateSettings`. Everything else is in `static/`: a browser runs it as
it is written.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import jinja2
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dllm.choices import REVEAL_RULES
from dllm.config import GenerateSettings

STATIC = Path(__file__).parent / "static"
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
"""The last two: a script that tries to make markup of a text fails, in browsers that know them."""
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
FIELDS = {
    "max_new_tokens": "Length",
    "steps": "Steps",
    "block_size": "Block",
    "reveal_rule": "Reveal rule",
    "threshold": "Threshold",
    "factor": "Factor",
    "entropy_bound": "Entropy bound",
    "temperature": "Temperature",
    "top_p": "Top p",
    "seed": "Seed",
}
"""The settings on the page, in its order, with their labels."""
API_NAMES = {"max_new_tokens": "max_tokens"}
"""Settings that OpenAI's API calls otherwise."""


@dataclass(frozen=True)
class Field:
    """One setting of the form. `least`, `most` and `step` bound a number; `rule` is the rule that it belongs to."""

    name: str
    label: str
    help: str
    rule: str
    choices: tuple[str, ...] = ()
    least: float | int | str = ""
    most: float | int | str = ""
    step: str = "any"


def page_routes() -> list[Route]:
    """`GET /` and the files it takes."""
    routes = [Route("/", _answer(page_html().encode(), "text/html"), methods=["GET"])]
    for file in sorted(STATIC.iterdir()):
        if file.suffix in TYPES:
            content = _answer(file.read_bytes(), TYPES[file.suffix])
            routes.append(Route(f"/static/{file.name}", content, methods=["GET"]))
    return routes


def _answer(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    return answer


def page_html() -> str:
    """The page, with a form of the settings in FIELDS; what they are unless set, the page asks `/v1/models`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(STATIC), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("index.html.jinja").render(fields=form_fields())


def form_fields() -> list[Field]:
    """The settings in FIELDS as fields of a form: help, bounds and choices are those of `GenerateSettings`."""
    return [_field(name, label) for name, label in FIELDS.items()]


def _field(name: str, label: str) -> Field:
    of_setting = GenerateSettings.model_fields[name]
    text = (of_setting.description or "").replace("`", "")
    rule = name if name in REVEAL_RULES else ""
    known = (API_NAMES.get(name, name), label, text[:1].upper() + text[1:] + ".", rule)
    if name == "reveal_rule":
        return Field(*known, choices=tuple(REVEAL_RULES))
    bounds = {
        name: getattr(part, name) for part in of_setting.metadata for name in ("ge", "gt", "le") if hasattr(part, name)
    }
    whole = int in (of_setting.annotation, *get_args(of_setting.annotation))
    least = bounds.get("ge", bounds["gt"] + 1 if "gt" in bounds else "")
    return Field(*known, least=least, most=bounds.get("le", ""), step="1" if whole else "any")
