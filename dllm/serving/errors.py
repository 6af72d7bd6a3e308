"""Errors in the shape of OpenAI's: `{"error": {"message", "type", "param", "code"}}`, whatever goes wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from starlette.responses import Response

from dllm.config.settings import lower_first, message_of
from dllm.serving.schemas import ErrorType, Failure, FailureOf

CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    421: "unknown_host",
    429: "queue_full",
    500: "internal_error",
    503: "shutting_down",
    504: "time_limit",
}
"""The code of a status, unless an error has one of its own."""

SETTING = re.compile(r"^(\w+) = ")
"""How our own one-line errors begin that concern a setting."""

PLACE = re.compile(r"^(prompts|targets|texts|request )\[?(\d+)\]?(?=:| )")
"""How our own one-line errors begin that concern one of several texts."""

API_PLACES = {"prompts": "prompt", "texts": "text", "targets": "continuations[{}]", "request ": "continuations[{}]"}
"""What a request calls the texts that the package knows by these names; of prompts the package sees one at a time."""

TOO_LONG = re.compile(r"model's context.*tokens|exceed the model's|positions.*the model has")
"""Our own errors that say that a text does not fit the model."""

UNION_TAG = re.compile(r"str|int|float|bool|none|(list|dict|function|constrained|nullable)\b.*|[A-Z]\w*")
"""Parts of the place of an error that name a type, not a field."""


class ApiError(Exception):
    """An answer that is an error: its status, what is said, the parameter it is about, the machine's word for it."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: float = 0
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code or CODES[status]
        self.headers = {"retry-after": str(max(1, round(retry_after)))} if retry_after else {}

    @property
    def body(self) -> Failure:
        """What is sent."""
        kind: ErrorType = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        message = str(self).encode(errors="backslashreplace").decode()  # half a character cannot be sent
        return Failure(error=FailureOf(message=message, type=kind, param=self.param, code=self.code))

    def response(self, *, close: bool = False) -> Response:
        """The error as an answer; close: and nothing more on this connection, as a body may still be under way."""
        headers = self.headers | ({"connection": "close"} if close else {})
        return Response(self.body.model_dump_json(), self.status, headers, "application/json")


def mistake(error: ValueError) -> ApiError:
    """A mistake of the request that the package found: one line, which may begin with a setting."""
    message = " ".join(str(error).split()).replace("max_new_tokens", "max_tokens")
    param: str | None = None
    if place := PLACE.match(message):
        param = API_PLACES[place[1]].format(place[2])
        message = f"{param}{message[place.end() :]}"
    elif named := SETTING.match(message):
        param = named[1]
    code = "context_length_exceeded" if TOO_LONG.search(message) else None
    return ApiError(400, message, param=param, code=code)


def refusal(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body."""
    problem: Any = _telling(error.errors(include_url=False, include_input=False))
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {context.get('error', 'it cannot be read')}", code="invalid_json")
    if kind == "unsupported_parameter":
        return ApiError(400, problem["msg"], param=context["name"], code=kind)
    where = _place(problem["loc"])
    if kind == "extra_forbidden":
        return ApiError(
            400, f"{where} is not a parameter of this request; leave it out", param=where, code="unknown_parameter"
        )
    message = lower_first(message_of(problem))
    if kind == "missing":
        return ApiError(400, f"{where} is missing", param=where, code="missing_parameter")
    return ApiError(400, f"{where}: {message}" if where else message, param=where or None)


def _telling(problems: Sequence[Any]) -> Any:
    """The first problem; of a value that may be of several types, the one that was found deepest in it."""
    first = problems[0]["loc"]
    if not first or not UNION_TAG.fullmatch(str(first[-1])):
        return problems[0]
    same = [problem for problem in problems if problem["loc"][: len(first) - 1] == first[:-1]]
    return max(same, key=lambda problem: len(problem["loc"]))


def _place(location: tuple[int | str, ...]) -> str:
    """The place of an error as a path: `messages[0].content`."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not UNION_TAG.fullmatch(part):
            path += f".{part}" if path else part
    return path[:200]
