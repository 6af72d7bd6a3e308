"""An engine that answers one request after the other, by the model's own functions: what the API is tried against."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator

from dllm.chat.render import pieces
from dllm.serving.events import Closed, Edited, Event, Finished, Full, Scored, Snapshot, Stats


class Handle:
    def __init__(self):
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()


class SerialEngine:
    """`slow`: seconds that every pass takes longer than it needs."""

    def __init__(self, model, *, name: str = "toy", most: int = 64, slow: float = 0.0):
        self.model, self.name, self.most, self.slow = model, name, most, slow
        self.waiting: queue.Queue = queue.Queue()
        self.encoding = threading.Lock()
        self.closed = False
        self.finished = self.cancelled = self.running = self.tokens = 0
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def answer(self, prompt, settings, *, n=1, on_event, snapshots=False):
        rows = [self.model.encode_prompt(prompt)]
        self.model.canvas([prompt], settings)

        def events() -> Iterator[tuple[int, Event]]:
            for number in range(n):
                drawn = settings.model_copy(update={"seed": settings.seed + number})
                begin, previous = time.monotonic(), None
                for canvas in self.model.stream([prompt], drawn):
                    if snapshots and previous is not None:
                        yield number, self._snapshot(canvas, previous, drawn)
                    previous = canvas
                answer = self.model.answers([prompt], drawn)[0]
                reason = "length" if answer.tokens == settings.max_new_tokens else "stop"
                seconds = time.monotonic() - begin
                self.tokens += answer.tokens
                yield (
                    number,
                    Finished(answer.text, len(rows[0]), answer.tokens, answer.passes, reason, seconds, answer.ids),
                )

        return self._take(events, on_event)

    def infill(self, text, settings, *, on_event, snapshots=False):
        (filled,) = self.model.infill([text], settings) or [""]
        holes = text.count("[MASK]")
        return self._take(lambda: iter([(0, Finished(filled, 0, holes, holes, "length", 0.0, ()))]), on_event)

    def edit(self, draft, prompt, settings, *, on_event, snapshots=False):
        canvases = self.model.edits(draft, prompt, settings)

        def events():
            for step, canvas in enumerate(canvases):
                text = self.model.decode(canvas.responses()[0])
                yield 0, Edited(step, (("kept", text),), text)
            yield 0, Finished(text, 0, 1, step, "stop", 0.0, ())

        return self._take(events, on_event)

    def score(self, prompts, targets, settings, *, on_event):
        self.model.pairs(prompts, targets)

        def events():
            scores = self.model.nelbo(prompts, targets, settings)
            yield 0, Scored(tuple(scores), 1, sum(map(len, targets)), 0.0)

        return self._take(events, on_event)

    def stats(self) -> Stats:
        waiting = self.waiting.qsize()
        return Stats(waiting, self.running, 0, self.tokens, 0, 0, 0, self.finished, 0, self.cancelled, 0)

    def close(self, *, finish: bool, timeout: float) -> None:
        self.closed = True
        self.waiting.put(None)
        self.thread.join(timeout)

    def _snapshot(self, canvas, previous, settings) -> Snapshot:
        shown = pieces(canvas, self.model.backbone.tokenizer.decode, previous=previous)
        ids = canvas.responses()[0]
        texts = tuple(None if piece.state == "masked" else piece.text for piece in shown)
        known = next((place for place, text in enumerate(texts) if text is None), len(texts))
        text = self.model.decode(ids[:known], settings.stop).strip()
        return Snapshot(
            step=canvas.step,
            pieces=texts,
            ids=tuple(ids),
            confidence=tuple(piece.confidence for piece in shown),
            revealed=tuple(place for place, piece in enumerate(shown) if piece.state == "new"),
            text=text if known == len(texts) else "",
        )

    def _take(self, events: Callable[[], Iterator], on_event) -> Handle:
        if self.closed:
            raise Closed
        if self.waiting.qsize() >= self.most:
            raise Full(2.0)
        handle = Handle()
        self.waiting.put((events, on_event, handle))
        return handle

    def _work(self) -> None:
        while (item := self.waiting.get()) is not None:
            events, on_event, handle = item
            self.running = 1
            try:
                for number, event in events():
                    if handle.cancelled.is_set():
                        self.cancelled += 1
                        break
                    on_event(number, event)
                    if self.slow:
                        time.sleep(self.slow)
                else:
                    self.finished += 1
            except Exception as error:
                on_event(0, error)
            self.running = 0


def scripted(engine: SerialEngine, events: list[tuple[int, Event]]) -> SerialEngine:
    """The engine, whose answers are these events."""
    engine.answer = lambda prompt, settings, *, on_event, **_: engine._take(lambda: iter(events), on_event)
    return engine
