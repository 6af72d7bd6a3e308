"""One loop over everything that is asked of a model: rows of answers and infills together, edits and scores in between.

A request's result is that of the same call of `DiffusionLM` alone, whatever else is running.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dllm.config import GenerateSettings, LikelihoodSettings
from dllm.language_model import DiffusionLM, Prompt
from dllm.serving.events import Event, Stats

OnEvent = Callable[[int, Event], None]
"""Called in the engine's thread with the number of the answer and what happened to it. It must not block."""


class Handle:
    """One submitted request."""

    def cancel(self) -> None:
        """Free its rows before the next pass, or leave the queue. No event follows. May be called again, by anyone."""
        raise NotImplementedError


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
        raise NotImplementedError

    def answer(
        self, prompt: Prompt, settings: GenerateSettings, *, n: int = 1, on_event: OnEvent, snapshots: bool = False
    ) -> Handle:
        """`n` answers, with the seeds settings.seed, settings.seed + 1, ...: a `Finished` of each.

        snapshots: also a `Snapshot` after every pass. `batch_size` and `batch_tokens` of the settings do not count.
        """
        raise NotImplementedError

    def infill(self, text: str, settings: GenerateSettings, *, on_event: OnEvent, snapshots: bool = False) -> Handle:
        """A text with its masks filled: `Finished` as answer 0. Snapshots are of the whole text."""
        raise NotImplementedError

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
        raise NotImplementedError

    def score(
        self, prompts: Sequence[Prompt], targets: Sequence[str], settings: LikelihoodSettings, *, on_event: OnEvent
    ) -> Handle:
        """`DiffusionLM.nelbo` of the pairs: `Scored` as answer 0."""
        raise NotImplementedError

    def stats(self) -> Stats:
        """What it has done, and what it is doing."""
        raise NotImplementedError

    def close(self, *, finish: bool, timeout: float) -> None:
        """Refuse what is new; finish what was taken, for `timeout` seconds at most, or (finish=False) end it.

        What is ended so gets `Closed` as its event. Returns when the thread has ended.
        """
        raise NotImplementedError


class Turns:
    """Whose turn it is on a device that several engines share: in the order in which they ask."""
