"""A canvas as text: dots where it is masked, colours for how sure the model was.

The ramp runs from orange over blue to the terminal's own colour (after Okabe and Ito 2008), which readers with any
colour vision tell apart on light and dark grounds; what was just revealed is bold as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from os.path import commonprefix
from typing import TYPE_CHECKING, Literal

from rich.text import Text

if TYPE_CHECKING:
    from dllm.core.canvas import Canvas

MASK = "·"
END = "∎"
RAMP = ((0.3, "#d55e00", "unsure"), (0.6, "#e69f00", ""), (0.9, "#3d9be0", ""), (1.01, "default", "sure"))
"""(below this confidence, colour, name in the legend)"""

EDITS = {"kept": ("{}", ""), "gone": ("[-{}-]", "strike #d55e00"), "new": ("{{+{}+}}", "bold #3d9be0")}
"""What became of a piece of text -> how it is marked without and with colours."""

SPACE = re.compile(r"\s+")

State = Literal["masked", "new", "kept"]


@dataclass(frozen=True)
class Piece:
    """One canvas position: its text ("" while masked), its state, the probability its token had when revealed."""

    text: str
    state: State
    confidence: float


@dataclass(frozen=True)
class Frame:
    """What is drawn of an answer: its pieces, the changes and the forward passes so far."""

    pieces: Sequence[Piece]
    step: int
    passes: int


def pieces(canvas: Canvas, decode: Callable[[list[int]], str], *, previous: Canvas | None = None) -> list[Piece]:
    """The response of the only row, position by position; `new` is what was masked on the `previous` canvas.

    On the canvas of an algorithm that edits, `new` is what its last pass inserted or put there.
    decode turns token ids into text, special tokens included; a token's text is what it adds to its neighbours.
    """
    start, end = int(canvas.start[0]), int(canvas.length[0])
    tokens = canvas.tokens[0, start:end].tolist()
    masked = canvas.masked[0, start:end].tolist()
    trail = getattr(canvas, "trail", None)
    if trail is not None:
        here = (trail.row == 0) & (trail.token >= 0)
        before = (trail.before != trail.token)[here][start + 1 :].tolist()  # the front token is no position
    else:
        # a pass that changes a row's length reveals no token
        same = previous is not None and int(previous.length[0]) == start + len(tokens)
        before = previous.masked[0, start:end].tolist() if previous and same else [False] * len(tokens)
    texts = _texts(tokens, masked, decode)
    confidence = canvas.confidence[0, start:end].tolist()
    states: list[State] = [
        "masked" if now else "new" if then else "kept" for now, then in zip(masked, before, strict=True)
    ]
    return [Piece(*piece) for piece in zip(texts, states, confidence, strict=True)]


def _texts(tokens: Sequence[int], masked: Sequence[bool], decode: Callable[[list[int]], str]) -> list[str]:
    """What each token adds to the text of its unmasked run; "" while masked."""
    texts: list[str] = []
    for is_masked, run in groupby(zip(masked, tokens, strict=True), key=lambda pair: pair[0]):
        ids, known = [token for _, token in run], ""
        for size in range(1, len(ids) + 1):
            text = "" if is_masked else decode(ids[:size])
            texts.append(text[len(commonprefix([known, text])) :])
            known = text
    return texts


def style_of(piece: Piece) -> str:
    """The rich style of a piece."""
    if piece.state == "masked":
        return "dim"
    colour = next(colour for limit, colour, _ in RAMP if piece.confidence < limit)
    return f"bold {colour}" if piece.state == "new" else colour


def canvas_text(pieces_shown: Sequence[Piece], end: str = "") -> Text:
    """The pieces as styled text; the text of `end` (EOS) becomes a small sign."""

    def shown(piece: Piece) -> tuple[str, str]:
        if piece.state == "masked":
            return MASK, "dim"
        return (END, "dim") if end and piece.text.strip() == end else (piece.text, style_of(piece))

    text = Text()
    for style, run in groupby(map(shown, pieces_shown), key=lambda pair: pair[1]):
        text.append("".join(sign for sign, _ in run), style)
    return text


def edit_text(edits: Sequence[tuple[str, str]], *, colours: bool = True) -> Text:
    """Pieces of an edited text (`sampling.edits.edit_pieces`) on one line.

    With colours, what is gone is struck through and what is new is bold; else they read [-gone-] and {+new+}.
    """
    text = Text()
    for kind, piece in edits:
        piece = SPACE.sub(" ", piece)
        sign, style = EDITS[kind]
        text.append(piece if colours else sign.format(piece), style if colours else "")
    return text


def legend(*, colours: bool = True) -> Text:
    """What dots and boldness mean, and the colours where there are any."""
    text = Text(f"{MASK} masked   ", "dim")
    low = 0.0
    for limit, colour, name in RAMP if colours else ():
        high = min(limit, 1.0)
        text.append("■ ", colour)
        text.append(f"{100 * low:.0f}–{100 * high:.0f} %{' ' + name if name else ''}   ", "dim")
        low = high
    text.append("bold: new", "bold dim")
    return text


def status(step: int, passes: int, tokens: int, seconds: float) -> Text:
    """The line under an answer: steps, forward passes, tokens per second."""
    rate = tokens / seconds if seconds > 0 else 0.0
    counted = f"{passes} pass{'es' * (passes != 1)} · {tokens} token{'s' * (tokens != 1)}"
    return Text(f"step {step} · {counted} · {seconds:.1f} s · {rate:.0f} tokens/s", "dim")
