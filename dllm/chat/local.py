"""A model of this process, as `dllm chat` talks to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dllm.chat.render import Frame, Piece, pieces
from dllm.chat.session import Session, fit_context
from dllm.core.canvas import Canvas
from dllm.language_model import DiffusionLM


@dataclass(frozen=True)
class Local:
    """See `chat.session.Talker`; its states are canvases."""

    model: DiffusionLM

    @property
    def end_token(self) -> str:
        """How EOS is spelt."""
        return self.model.backbone.tokenizer.eos_token

    def answer(self, session: Session, question: str) -> tuple[Session, int, Iterator[Canvas]]:
        """The session without what no longer fits, how many turns those are, and the canvases of an answer."""
        session, dropped = fit_context(session, question, lambda turns: len(self.model.encode_prompt(turns)))
        return session, dropped, self.model.stream([session.conversation.messages(question)], session.settings)

    def text(self, last: Canvas, stop: Sequence[str]) -> str:
        """The finished answer."""
        return self.model.decode(last.responses()[0], stop).strip()

    def frame(self, canvas: Canvas, previous: Canvas | None) -> Frame:
        """What a canvas shows, cut at the end of the answer once no mask is left before it."""
        shown: list[Piece] = pieces(canvas, self.model.backbone.tokenizer.decode, previous=previous)
        known = next((i for i, piece in enumerate(shown) if piece.state == "masked"), len(shown))
        size = self.model.answer_length(canvas.responses()[0][:known])
        return Frame(shown[:size] if size < known else shown, canvas.step, canvas.nfe)
