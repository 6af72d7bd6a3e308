"""A model behind a server (`dllm serve`), as `dllm chat` talks to it. No torch here."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from dllm.chat.render import Frame, Piece
from dllm.chat.session import Session
from dllm.config import GenerateSettings

SECONDS = 60.0
"""For which a server may say nothing at all; while it works, it says more often that it does."""

LONGEST = 2**20
"""Most bytes of one line of a server's answer."""

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a terminal might obey; a server's text is text."""

OWN = ("batch_size", "batch_tokens", "early_stop", "max_new_tokens")
"""Settings that a request does not have, or has by another name."""


class ContextFull(ValueError):
    """A conversation and its answer do not fit into the model's context."""


@dataclass(frozen=True)
class State:
    """An answer on its way: its last canvas event, its text as far as it is known, whether that is all of it."""

    canvas: dict[str, Any]
    text: str = ""
    finished: bool = False
    revealed: frozenset[int] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Remote:
    """See `chat.session.Talker`; its states are `State`s. url: of the server; key: what it asks for, if anything."""

    url: str
    key: str | None
    card: dict[str, Any]

    @property
    def end_token(self) -> str:
        """How EOS is spelt."""
        return self.card["dllm"].get("end_token") or ""

    @property
    def sidecar(self) -> dict[str, Any]:
        """What is known of the model's training."""
        facts = self.card["dllm"]
        return {"algorithm": facts["algorithm"], "block_size": facts["defaults"]["block_size"]}

    def session(self) -> Session:
        """A new session with the model's own settings. Raises ValueError, one line, if this version knows them not."""
        facts = self.card["dllm"]
        defaults = {name: value for name, value in facts["defaults"].items() if name != "max_tokens"}
        try:
            settings = GenerateSettings.model_validate(defaults | {"max_new_tokens": facts["defaults"]["max_tokens"]})
        except ValidationError:
            raise ValueError(
                f"--server {self.url}: it has other settings; use the same version of dllm there"
            ) from None
        return Session(settings, facts["context"], sidecar=self.sidecar)

    def answer(self, session: Session, question: str) -> tuple[Session, int, Iterator[State]]:
        """The session without what no longer fits, how many turns those are, and the states of an answer."""
        turns = session.conversation.turns
        for dropped in range(len(turns) + 1):
            kept = replace(session.conversation, turns=turns[dropped:])
            try:
                states = _states(self._post(kept.messages(question), session.settings))
                return replace(session, conversation=kept), dropped, states
            except ContextFull:
                if dropped == len(turns):
                    raise
        raise AssertionError("the last round returns or raises")

    def text(self, last: State, stop: Sequence[str]) -> str:
        """The finished answer."""
        return last.text

    def frame(self, state: State, previous: State | None) -> Frame:
        """What a state shows; once it is finished, up to the end of the answer."""
        new = state.revealed if previous is not None else frozenset()
        texts, sure = state.canvas.get("pieces", []), state.canvas.get("confidence", [])
        shown = [
            Piece("", "masked", 0.0) if text is None else Piece(plain(text), "new" if i in new else "kept", sure[i])
            for i, text in enumerate(texts)
        ]
        if state.finished:
            shown = shown[: _covering(shown, state.text)] if shown else [Piece(state.text, "kept", 1.0)]
        return Frame(shown, state.canvas.get("step", 0), state.canvas.get("step", 0))

    def _post(self, messages: list[dict[str, str]], settings: GenerateSettings) -> http.client.HTTPResponse:
        chosen = {k: v for k, v in settings.model_dump(exclude=set(OWN)).items() if v is not None and v != []}
        body = {"model": self.card["id"], "messages": messages, "max_tokens": settings.max_new_tokens} | chosen
        return _ask(self.url, "/v1/chat/completions", self.key, body | {"stream": True, "canvas": True})


def remote(url: str, key: str | None, model: str | None) -> Remote:
    """A model of a server: the first one, or the one of this id. Raises ValueError, one line, if it is not there."""
    with closing(_ask(url, "/v1/models", key)) as response:
        try:
            cards = {card["id"]: card for card in json.load(response)["data"] if "defaults" in card["dllm"]}
        except (ValueError, KeyError, TypeError):
            cards = {}
    if not cards:
        raise ValueError(f"--server {url}: this is not a server of dllm; start one with dllm serve")
    if model is not None and model not in cards:
        raise ValueError(f"{model!r} is not a model of {url}; it has {', '.join(cards)}")
    return Remote(url, key, cards[model or next(iter(cards))])


def plain(text: str) -> str:
    """A text without what a terminal might obey."""
    return CONTROL.sub("\ufffd", text)


def _ask(url: str, path: str, key: str | None, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
    """A good answer, still to be read. Raises ValueError, one line, for any other, and ContextFull."""
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets that are no IPv6 address
        parts = urlsplit("")
    if parts.scheme not in kinds or not parts.hostname:
        raise ValueError(f"--server {url}: give an address such as http://127.0.0.1:8000")
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    try:
        data = None if body is None else json.dumps(body).encode()
        connection = kinds[parts.scheme](parts.hostname, parts.port, timeout=SECONDS)
        base = parts.path.rstrip("/").removesuffix("/v1")
        connection.request("GET" if data is None else "POST", base + path, data, headers)
        response = connection.getresponse()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(f"--server {url}: {_reason(error)}; is dllm serve running there?") from None
    if response.status == 200:
        return response
    with closing(response):
        raise _refused(url, response)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def _refused(url: str, response: http.client.HTTPResponse) -> ValueError:
    try:
        said = json.loads(response.read(LONGEST))["error"]
        kind = ContextFull if said.get("code") == "context_length_exceeded" else ValueError
        return kind(plain(str(said["message"])))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, http.client.HTTPException):
        return ValueError(f"--server {url}: HTTP {response.status} {plain(response.reason)}")


def _states(response: http.client.HTTPResponse) -> Iterator[State]:
    """What a stream tells, event by event. Raises ValueError, one line, if it ends too early."""
    with closing(response):
        state = State({})
        try:
            for data in _data(response):
                if "error" in data:
                    raise ValueError(plain(str(data["error"]["message"])))
                if canvas := data.get("canvas"):
                    canvas = _of_edits(canvas) if "edits" in canvas else canvas
                    state = replace(state, canvas=canvas, revealed=frozenset(canvas["revealed"]))
                    yield state
                for choice in data.get("choices", []):
                    state = replace(state, text=state.text + plain(choice["delta"].get("content") or ""))
                    if choice["finish_reason"]:
                        yield replace(state, finished=True)
                        return
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"the server went away in the middle of an answer ({_reason(error)}); ask again") from None
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError):
            raise ValueError(
                "the server does not speak as dllm serve does; use the same version of dllm there"
            ) from None
    raise ValueError("the server went away in the middle of an answer; ask again")


def _data(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    while line := response.readline(LONGEST):
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            yield json.loads(line[6:])


def _of_edits(canvas: dict[str, Any]) -> dict[str, Any]:
    """A canvas of a model that edits as one of positions: what is gone is not shown."""
    here = [(kind, text) for kind, text in canvas["edits"] if kind != "gone"]
    new = [place for place, (kind, _) in enumerate(here) if kind == "new"]
    texts = [text for _, text in here]
    return {"step": canvas["step"], "pieces": texts, "confidence": [1.0] * len(texts), "revealed": new}


def _covering(shown: Sequence[Piece], text: str) -> int:
    """How many pieces carry a text, whose white space at both ends was left out."""
    joined = ""
    for count, piece in enumerate(shown):
        if len(joined.strip()) >= len(text):
            return count
        joined += piece.text
    return len(shown)
