"""The page at `/`."""

from __future__ import annotations

from starlette.responses import RedirectResponse, Response


def page_response() -> Response:
    """What `GET /` answers: for now, where the documentation is."""
    return RedirectResponse("/docs", 307)
