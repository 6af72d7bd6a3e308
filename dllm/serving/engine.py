"""One loop over everything that is asked of a model: rows of answers and infills together, edits and scores in between.

A request's result is that of the same call of `DiffusionLM` alone, whatever else is running.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from threading import Condition, Lock, Thread

from dllm.config import GenerateSettings, LikelihoodSettings
from dllm.core.canvas import Completion
from dllm.language_model import DiffusionLM, Prompt
from dllm.sampling.loop import DenoisingLoop
from dllm.sampling.renoise import RenoisingSampler
from dllm.sampling.rows import RunningRows
from dllm.sampling.sampler import MaskedSampler
from dllm.serving.events import Closed, Event, Finished, Full, Scored, Stats, TooLong
from dllm.serving.requests import (
    OnEvent,
    Request,
    Row,
    answer_rows,
    canvas_events,
    edit_events,
    host_rows,
    infill_events,
    infill_row,
    piece_of,
)


class Turns:
    """Whose turn it is on a device that several engines share: in the order in which they ask."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._asked = self._served = 0

    def __enter__(self) -> None:
        with self._changed:
            turn, self._asked = self._asked, self._asked + 1
            self._changed.wait_for(lambda: self._served == turn)

    def __exit__(self, *_) -> None:
        with self._changed:
            self._served += 1
            self._changed.notify_all()


class Handle:
    """One submitted request."""

    def __init__(self, request: Request, engine: Engine):
        self._request, self._engine = request, engine

    def cancel(self) -> None:
        """Free its rows before the next pass, or leave the queue. No event follows. May be called again, by anyone."""
        self._request.cancelled = True
        self._engine.wake()


class _Cancelled(Exception):
    """A job is not wanted any more."""


@dataclass(eq=False)
class _Lane:
    """A loop of denoising and whose rows it has, by their numbers."""

    loop: DenoisingLoop
    rows: dict[int, tuple[Request, Row]] = field(default_factory=dict)

    def add(self, request: Request, rows: Iterable[Row]) -> None:
        """Queue rows of a request, each behind the one before it."""
        for behind, row in enumerate(rows):
            (number,) = self.loop.add(row.canvas, row.settings, row.ends, behind=behind)
            self.rows[number] = request, row


class Engine:
    """A model and the thread that runs it. Every method may be called from any thread.

    Methods that take a request raise ValueError, one line, if it is wrong (the line is for who asked), `Full` if too
    many wait, and `Closed` after `close`. What goes wrong later is an event of this request only.
    """

    def __init__(
        self,
        model: DiffusionLM,
        *,
        name: str,
        batch_size: int = 32,
        batch_tokens: int = 16384,
        queue: int = 64,
        time_limit: float = 600.0,
        turns: Turns | None = None,
    ):
        """batch_size, batch_tokens: most rows, most tokens computed together; queue: most requests that wait.

        time_limit: seconds from being asked to the end; turns: shared by engines that take turns on one device.
        """
        self.model, self.name = model, name
        self.batch_size, self.batch_tokens, self.queue, self.time_limit = batch_size, batch_tokens, queue, time_limit
        self._turns = turns or Turns()
        self.encoding = Lock()
        """Held by whoever encodes texts: tokenizers are not safe with several threads that do."""
        self._piece = piece_of(model)
        self._changed = Condition()
        self._inbox: list[Request] = []
        self._requests: list[Request] = []
        self._jobs: deque[tuple[Request, Iterator[Event]]] = deque()
        self._waiting_jobs: deque[Request] = deque()
        masked = isinstance(model.sampler, MaskedSampler)
        self._lane = _Lane(self._loop()) if masked else None
        self._stats = Stats(*[0] * len(fields(Stats)))
        self._running = 0
        self._seconds = 1.0  # of a request, a moving average
        self._closing = self._abandoned = False
        self._thread = Thread(target=self._run, name=f"engine of {name}", daemon=True)
        self._thread.start()

    # ----------------------------------------------------------------------------------------------------------------
    # What may be asked of it

    def answer(
        self, prompt: Prompt, settings: GenerateSettings, *, n: int = 1, on_event: OnEvent, snapshots: bool = False
    ) -> Handle:
        """`n` answers, with the seeds settings.seed, settings.seed + 1, ...: a `Finished` of each.

        snapshots: also a `Snapshot` after every pass. `batch_size` and `batch_tokens` of the settings do not count.
        A model whose sampler does not reveal masks gives one answer to a request; one that edits sends `Edited`.
        """
        request = Request(on_event, snapshots)
        if n < 1:
            raise ValueError(f"n = {n} must be at least 1")
        with self.encoding:
            if self._lane is not None:
                request.rows = answer_rows(self.model, prompt, settings, n)
                self._check(request.rows[0])
            elif n > 1:
                name = self.model.algorithm.name
                raise ValueError(
                    f"n = {n}: a model of {name} gives one answer to a request; ask again with another seed"
                )
            elif isinstance(self.model.sampler, RenoisingSampler):
                (row,) = answer_rows(self.model, prompt, settings, n)
                canvases = self.model.sampler.denoise(self.model.backbone, row.canvas, settings, ended=row.ended)
                request.job = lambda: canvas_events(row, canvases, self._piece, request.asked)
            else:
                canvas = self.model.canvas([prompt], settings)
                drafts = self.model.sampler.denoise(self.model.backbone, canvas, settings)
                request.job = lambda: edit_events(self.model, drafts, prompt, settings, request.asked)
        return self._submit(request)

    def infill(self, text: str, settings: GenerateSettings, *, on_event: OnEvent, snapshots: bool = False) -> Handle:
        """A text with its masks filled: `Finished` as answer 0. Snapshots are of the whole text.

        A model whose sampler has no loop of rows sends `Edited` instead.
        """
        request = Request(on_event, snapshots)
        with self.encoding:
            if self._lane is not None:
                request.rows = [infill_row(self.model, text, settings)]
                self._check(request.rows[0])
            else:
                (tokens,) = self.model.holes([text])
                quiet = settings.model_copy(update={"early_stop": False})
                request.job = lambda: infill_events(self.model, tokens, quiet, request.asked)
        return self._submit(request)

    def edit(
        self,
        draft: str,
        prompt: Prompt | None,
        settings: GenerateSettings,
        *,
        on_event: OnEvent,
        snapshots: bool = False,
    ) -> Handle:
        """A draft edited: `Finished` as answer 0; snapshots: `Edited` after every pass."""
        request = Request(on_event, snapshots)
        with self.encoding:
            canvases = self.model.edits(draft, prompt, settings)
        given = "" if prompt is None else prompt
        request.job = lambda: edit_events(self.model, canvases, given, settings, request.asked)
        return self._submit(request)

    def score(
        self, prompts: Sequence[Prompt], targets: Sequence[str], settings: LikelihoodSettings, *, on_event: OnEvent
    ) -> Handle:
        """`DiffusionLM.nelbo` of the pairs: `Scored` as answer 0."""
        request = Request(on_event, snapshots=False)
        with self.encoding:
            rows, target_ids = self.model.pairs(prompts, targets)

        def job() -> Iterator[Event]:
            scores = self.model.nelbo(rows, target_ids, settings, between=lambda: self._between(request))
            counts = sum(map(len, rows)), sum(map(len, target_ids))
            yield Scored(tuple(scores), *counts, time.monotonic() - request.asked)

        request.job = job
        return self._submit(request)

    def stats(self) -> Stats:
        """What it has done, and what it is doing."""
        with self._changed:
            return replace(self._stats, queued=self._queued, running=self._running, jobs=len(self._jobs))

    def close(self, *, finish: bool, timeout: float) -> None:
        """Refuse what is new; finish what was taken, for `timeout` seconds at most, or (finish=False) end it.

        What is ended so gets `Closed` as its event. Returns when the thread has ended.
        """
        with self._changed:
            self._closing, self._abandoned = True, self._abandoned or not finish
            self._changed.notify_all()
        self._thread.join(timeout if finish else None)
        self._abandoned = True
        self.wake()
        self._thread.join()

    def wake(self) -> None:
        """Let the thread see that something has changed."""
        with self._changed:
            self._changed.notify_all()

    # ----------------------------------------------------------------------------------------------------------------
    # Coming

    def _loop(self) -> DenoisingLoop:
        sampler = self.model.sampler
        assert isinstance(sampler, MaskedSampler)
        return sampler.loop(self.model.backbone, self.batch_size, self.batch_tokens, every_pass=True)

    def _check(self, row: Row) -> None:
        """Raise ValueError, one line, for what the loop would refuse later."""
        self._loop().add(row.canvas, row.settings)

    @property
    def _queued(self) -> int:
        """How many requests wait."""
        return len(self._inbox) + sum(request.waits for request in self._requests)

    def _submit(self, request: Request) -> Handle:
        with self._changed:
            if self._closing:
                raise Closed(f"{self.name} takes no new requests")
            if (queued := self._queued) >= self.queue:
                self._count(refused=1)
                raise Full(max(1.0, self._seconds * queued / self.batch_size))
            self._inbox.append(request)
            self._changed.notify_all()
        return Handle(request, self)

    def _take_arrivals(self) -> None:
        """Queue what has come, and let go of what has ended, is not wanted any more, or takes too long."""
        with self._changed:
            arrived, self._inbox = self._inbox, []
            self._requests += arrived
        for request in arrived:
            if request.job is not None:
                self._waiting_jobs.append(request)
            if self._lane is not None:
                self._lane.add(request, request.rows)
        latest = time.monotonic() - self.time_limit
        for request in self._requests:
            if request.over:
                continue
            if self._abandoned:
                request.fail(Closed(f"{self.name} was closed"))
            elif request.asked < latest and not request.cancelled:
                self._fail(request, TooLong(f"not done within {self.time_limit:g} s; ask for fewer tokens or passes"))
            elif request.cancelled:
                request.over = True
                self._count(cancelled=1)
        self._leave()

    def _leave(self) -> None:
        """Forget requests that are over, with all that is left of them."""
        over = {id(request) for request in self._requests if request.over}
        if not over:
            return
        if self._lane is not None:
            gone = [number for number, (request, _) in self._lane.rows.items() if request.over]
            self._lane.loop.drop(gone)
            for number in gone:
                del self._lane.rows[number]
        self._jobs = deque(job for job in self._jobs if not job[0].over)
        self._waiting_jobs = deque(request for request in self._waiting_jobs if not request.over)
        with self._changed:
            self._requests = [request for request in self._requests if not request.over]
            self._running = 0 if self._lane is None else self._lane.loop.running

    # ----------------------------------------------------------------------------------------------------------------
    # The thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._inbox or self._requests or self._closing)
                if self._closing and not self._inbox and not self._requests:
                    return
            try:
                self._take_turn()
            except Exception as error:  # a bug of ours: who asked is told, and the next ones are served
                for request in [request for request in self._requests if not request.over]:
                    self._fail(request, error)
                self._lane = self._lane and _Lane(self._loop())
                self._leave()

    def _take_turn(self) -> None:
        """One pass of the rows, and the next step of one job."""
        self._take_arrivals()
        with self._turns:
            self._generate()
        if self._waiting_jobs and len(self._jobs) < self.batch_size:
            request = self._waiting_jobs.popleft()
            request.waits = False
            self._jobs.append((request, request.events()))
        if self._jobs:
            with self._turns:
                self._advance(*self._jobs.popleft())
        self._leave()

    def _advance(self, request: Request, events: Iterator[Event]) -> None:
        """The next event of a job."""
        try:
            event = next(events)
        except _Cancelled:
            return
        except Exception as error:
            self._fail(request, error)
            return
        if isinstance(event, Finished | Scored):
            self._result(request, 0, event)
            request.over = True
        else:
            self._count(passes=1, batches=1)
            self._jobs.append((request, events))
            if request.snapshots:
                request.tell(0, event)

    def _between(self, request: Request) -> None:
        """What is done between two forward batches of a score: others take their turns."""
        self._take_arrivals()
        if request.over:
            raise _Cancelled
        self._generate()
        self._turns.__exit__()
        self._turns.__enter__()

    def _generate(self) -> None:
        """One pass of rows, if there are any. An error in it is that of the one request that fails alone, too."""
        if self._lane is None or not self._lane.loop.busy:
            return
        try:
            self._pass(self._lane)
        except Exception:
            waiting = self._lane.loop.waiting
            ran = [number for number in self._lane.rows if number not in waiting]
            suspects = list(dict.fromkeys(self._lane.rows[number][0] for number in ran))
            for request in suspects:
                self._run_alone(request, [self._lane.rows[n][1] for n in ran if self._lane.rows[n][0] is request])
            self._lane.loop.drop(ran)
            for number in ran:
                del self._lane.rows[number]

    def _run_alone(self, request: Request, rows: Sequence[Row]) -> None:
        """Run rows of a request from their beginning to their end, without company."""
        lane = _Lane(self._loop())
        for row in rows:
            row.step, row.masked, row.known = 0, [], -1
        lane.add(request, rows)
        try:
            while lane.loop.busy and not request.over and not request.cancelled:
                self._pass(lane)
        except Exception as error:
            self._fail(request, error)

    def _pass(self, lane: _Lane) -> None:
        """One pass of a loop, and what is said of it."""
        before = lane.loop.computed
        rows, done = lane.loop.step()
        waiting, self._running = lane.loop.waiting, lane.loop.running
        for number, (request, _) in lane.rows.items():
            request.waits = request.waits and number in waiting
        if rows is not None:
            self._count(passes=len(rows), batches=1, computed=lane.loop.computed - before)
            self._show(lane, rows)
        for completion in done:
            request, row = lane.rows.pop(completion.number)
            self._finish(request, row, completion)

    def _show(self, lane: _Lane, rows: RunningRows) -> None:
        """The snapshots of those who want them."""
        wanted = [request.snapshots for request, _ in (lane.rows[number] for number in rows.number.tolist())]
        if not any(wanted):
            return
        states = host_rows((rows.tokens, rows.masked, rows.confidence), rows.length.tolist())
        for number, final, state in zip(rows.number.tolist(), rows.final.tolist(), states, strict=True):
            request, row = lane.rows[number]
            if request.snapshots and not request.over:
                try:
                    request.tell(row.index, row.snapshot(*state, final=final, piece=self._piece))
                except Exception as error:
                    self._fail(request, error)

    def _finish(self, request: Request, row: Row, completion: Completion) -> None:
        """The end of a row."""
        if request.over or request.cancelled:
            return
        try:
            if row.error is not None:
                raise row.error
            event = row.finish(completion, time.monotonic() - request.asked)
        except Exception as error:
            self._fail(request, error)
            return
        row.over = True
        self._result(request, row.index, event)
        request.over = not request.open

    def _result(self, request: Request, index: int, event: Finished | Scored) -> None:
        """A result, and whether it is the last one of its request.

        It is counted before it is told: who has the answer finds it in the counts.
        """
        self._count(tokens=event.tokens if isinstance(event, Finished) else 0)
        if request.open == [] or request.job is not None:
            self._count(finished=1)
            self._seconds += 0.1 * (event.seconds - self._seconds)
        request.tell(index, event)

    def _fail(self, request: Request, error: Exception) -> None:
        """Tell a request why it has no answer."""
        self._count(failed=1)
        request.fail(error)

    def _count(self, **more: int) -> None:
        """Add to the counts."""
        with self._changed:
            self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()})
