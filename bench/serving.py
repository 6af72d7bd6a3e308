"""Serving: requests that come from several clients at once, by one loop, one by one, and behind a lock."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from threading import Lock, Thread

from bench.generation import LONGEST_PROMPT
from bench.measure import Result, Row, Times, clock, compare, growth, interleaved, require
from bench.options import Options
from bench.workloads import chat_prompts, laptop
from dllm.config import GenerateSettings
from dllm.language_model import DiffusionLM
from dllm.serving.engine import Engine
from dllm.serving.events import Finished

Request = tuple[list[int], GenerateSettings]
Found = dict[int, tuple[str, float]]
"""The text of each request, by number, and the seconds that its client waited for it."""

SETTINGS = (
    {},
    {"temperature": 0.7, "seed": 1},
    {"reveal_rule": "threshold"},
    {"steps": 16},
)
"""What requests ask for, in turn: no two neighbours have the same settings."""

SAME = "same trained weights, fp32, threads, requests and settings, in one process; no HTTP on either side"


def serving(options: Options) -> Result:
    """Closed loops: every client asks, waits for its answer, and asks again, until no request is left."""
    trained = laptop(options)
    model, new = trained.model, 8 if options.quick else 32
    prompts = chat_prompts(trained, 4 if options.quick else 32, LONGEST_PROMPT)
    loads = {1: 2, 2: 4} if options.quick else {1: 8, 8: 24, 64: 64}
    rows: list[Row] = []
    totals: dict[float, Times] = {}
    late: dict[float, Times] = {}
    for clients, count in loads.items():
        asked = [
            (prompts[number % len(prompts)], GenerateSettings(max_new_tokens=new, **SETTINGS[number % len(SETTINGS)]))
            for number in range(count)
        ]
        compared, totals[clients], late[clients] = _compared(model, asked, clients, options)
        rows += compared
    curves = [
        growth(
            {x: _rates(times, loads[int(x)]) for x, times in totals.items()},
            name="serving-requests",
            title="Requests a second",
            x_label="clients",
            y_label="requests a second",
        ),
        growth(
            late,
            name="serving-latency",
            title="Latency, 95th percentile",
            x_label="clients",
            y_label="seconds",
        ),
    ]
    return Result(rows, curves, {"requests": dict(loads), "settings": [str(changes) for changes in SETTINGS]})


def _rates(times: Times, count: int) -> Times:
    """Requests a second of each round of each side."""
    return {side: [count / seconds for seconds in taken] for side, taken in times.items()}


def _compared(
    model: DiffusionLM, asked: list[Request], clients: int, options: Options
) -> tuple[list[Row], Times, Times]:
    """One number of clients: rows of the comparison, seconds of all requests, 95th percentiles of the latency."""
    found: dict[str, list[Found]] = {}

    def job(side: str, run: Callable[[], Found]) -> None:
        found.setdefault(side, []).append(run())

    jobs = {
        "one loop": partial(job, "one loop", partial(_one_loop, model, asked, clients)),
        "a lock": partial(job, "a lock", partial(_behind_a_lock, model, asked, clients)),
        "one by one": partial(job, "one by one", partial(_one_by_one, model, asked)),
    }
    times = interleaved(jobs, options.repeats(3), warmup=int(options.quick), at_most=60)
    texts = [{number: text for number, (text, _) in one.items()} for runs in found.values() for one in runs]
    correct = require(all(one == texts[0] for one in texts), "every answer of every round is the same text")
    waited = {side: [[seconds for _, seconds in one.values()] for one in runs] for side, runs in found.items()}
    waited = {side: runs[-len(times[side]) :] for side, runs in waited.items()}
    late = {side: [_percentile(one, 95) for one in runs] for side, runs in waited.items()}
    name = f"serving, {clients} client{'s' if clients > 1 else ''}, {len(asked)} requests of mixed settings"
    facts = {"held_equal": SAME, "correct": correct}
    rows = [
        compare(times["one loop"], times[side], name=name, against=against, note=_note(side, times, waited), **facts)
        for side, against in (("a lock", "a lock around one answer at a time"), ("one by one", "one after another"))
    ]
    late_row = compare(
        late["one loop"], late["a lock"], name=f"{name}; 95th percentile of the latency", against="a lock", **facts
    )
    return [*rows, late_row], times, late


def _note(side: str, times: Times, waited: dict[str, list[list[float]]]) -> str:
    """Requests a second and latencies of both sides, medians of the rounds."""

    def said(which: str) -> str:
        seconds = statistics.median(times[which])
        half, most = (statistics.median(_percentile(one, p) for one in waited[which]) for p in (50, 95))
        return (
            f"{len(waited[which][0]) / seconds:.1f} requests a second, latency {half:.2f} s (p50), {most:.2f} s (p95)"
        )

    return f"One loop: {said('one loop')}. {side.capitalize()}: {said(side)}."


def _percentile(values: list[float], percent: int) -> float:
    """The smallest value that at least so many percent do not exceed."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


def _one_loop(model: DiffusionLM, asked: list[Request], clients: int) -> Found:
    """Ours: an engine, whose rows come and go."""
    engine = Engine(model, name="bench", queue=clients)

    def ask(request: Request) -> str:
        ends: SimpleQueue = SimpleQueue()
        engine.answer(*request, on_event=lambda _, event: ends.put(event))
        end = ends.get()
        if not isinstance(end, Finished):
            raise end
        return end.text

    try:
        return _by_clients(ask, asked, clients)
    finally:
        engine.close(finish=True, timeout=60)


def _behind_a_lock(model: DiffusionLM, asked: list[Request], clients: int) -> Found:
    """Theirs: a thread per client, and the model is one client's at a time."""
    lock = Lock()

    def ask(request: Request) -> str:
        with lock:
            return model.generate([request[0]], request[1])[0]

    return _by_clients(ask, asked, clients)


def _one_by_one(model: DiffusionLM, asked: list[Request]) -> Found:
    """Theirs: no thread, no waiting for others."""
    return _by_clients(lambda request: model.generate([request[0]], request[1])[0], asked, 1)


def _by_clients(ask: Callable[[Request], str], asked: list[Request], clients: int) -> Found:
    """What clients are answered who ask at once, each for the next request when it has its answer."""
    left: SimpleQueue = SimpleQueue()
    for item in enumerate(asked):
        left.put(item)
    found: Found = {}
    failed: list[BaseException] = []

    def client() -> None:
        try:
            while (item := _next(left)) is not None:
                number, request = item
                began = clock()
                found[number] = (ask(request), clock() - began)
        except BaseException as error:
            failed.append(error)

    threads = [Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return found


def _next(queue: SimpleQueue) -> tuple[int, Request] | None:
    """The next request and its number, or None if there is none."""
    try:
        return queue.get_nowait()
    except Empty:
        return None
