"""A server under clients that behave and clients that do not, for minutes; run by hand.

    python -m tests.serving.soak --requests 2000 --seconds 600

It starts `dllm serve` with a toy, asks at a steady pace, and prints what came of it as JSON. Of ten requests six are
It starts `dllm serve` with a toy, asks at a steady pace, and prints as JSON what came of it. Of ten requests six are
its body, one sends half a JSON, one is wrong otherwise. Status 1 if an answer was wrong, if anything got a 5xx, if rows
or requests are left at the end, or if memory grew by more than a tenth after the first third.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import torch

import dllm
from dllm.config import GenerateSettings, LikelihoodSettings
from tests.serving.servers import TURNS, ask, chunks, process, served
from tests.toys import LEARNT, save_toy

CHAT = "/v1/chat/completions"


def cases(model) -> list[tuple[str, dict, object]]:
    """(path, body, what the model says alone) of requests with settings of all kinds."""
    found: list[tuple[str, dict, object]] = []
    asked = served(model, engine=object())
    for number, (turns, _) in enumerate(LEARNT * 4):
        draw = {"temperature": (0.0, 0.7, 1.3)[number % 3], "seed": number, "top_p": (1.0, 0.9)[number % 2]}
        shape = {"max_tokens": (8, 16, 24)[number % 3], "block_size": (8, 4)[number % 2]}
        rule = {"reveal_rule": ("confidence", "random", "threshold")[number % 3]}
        body = draw | shape | rule | {"n": 1 + number % 2}
        drawn = {key: value for key, value in body.items() if key not in ("n", "max_tokens")}
        base = asked.defaults.model_dump() | drawn | {"max_new_tokens": shape["max_tokens"]}
        texts = [
            model.generate([turns], GenerateSettings.model_validate(base | {"seed": number + more}))[0]
            for more in range(body["n"])
        ]
        found.append((CHAT, body | {"model": "toy", "messages": turns}, texts))
        found.append(
            (CHAT, body | {"model": "toy", "messages": turns, "stream": True, "canvas": number % 2 == 0}, texts)
        )
    texts = [" you", " Rome", " am a toy"]
    nats = [score.nats for score in model.nelbo([TURNS] * 3, texts, LikelihoodSettings(budget=8))]
    found.append(("/v1/score", {"model": "toy", "messages": TURNS, "continuations": texts, "budget": 8}, nats))
    found.append(("/v1/infill", {"model": "toy", "text": "Who [MASK] you?"}, model.infill(["Who [MASK] you?"])))
    return found


def said(body: dict, answer) -> object:
    """What an answer says: its texts, or its scores."""
    if body.get("stream"):
        texts = [""] * body["n"]
        for _, data in chunks(answer.text):
            assert "error" not in data, data
            for choice in data.get("choices", []):
                texts[choice["index"]] += choice["delta"].get("content") or ""
        return texts
    if "data" in answer.json:
        return [score["nats"] for score in answer.json["data"]]
    return [choice.get("text", choice.get("message", {}).get("content")) for choice in answer.json["choices"]]


class Clients:
    """What asks, and what came of it."""

    def __init__(self, url: str, good: list):
        self.url, self.good = url, good
        self.counts: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.wrong: list[str] = []
        self.lock = threading.Lock()

    def note(self, what: str, wrong: str = "") -> None:
        with self.lock:
            self.counts[what] += 1
            self.wrong += [wrong] if wrong else []

    def one(self, number: int) -> None:
        """The client of this number."""
        draw = random.Random(number)
        kind = ("good",) * 6 + ("vanish", "stall", "half", "mutant")
        try:
            getattr(self, kind[number % 10])(draw)
        except (OSError, AssertionError, ValueError, KeyError, IndexError) as error:
            self.note("broken", f"{kind[number % 10]} {number}: {type(error).__name__}: {error}")

    def good_(self, path: str, body: dict, expected: object) -> None:
        begin = time.monotonic()
        answer = ask(self.url, path, body)
        with self.lock:
            self.seconds.append(time.monotonic() - begin)
        if answer.status == 429:
            return self.note("429")
        if answer.status != 200:
            return self.note(str(answer.status), f"{path}: {answer.status} {answer.text[:200]}")
        found = said(body, answer)
        same = found == expected
        self.note("right" if same else "wrong answer", "" if same else f"{body}: {found} is not {expected}")

    def good(self, draw: random.Random) -> None:
        """Ask for one of the cases."""
        self.good_(*draw.choice(self.good))

    def vanish(self, draw: random.Random) -> None:
        """Go away, before or in the middle of an answer."""
        body = draw.choice(self.good[:8])[1] | {"n": 8, "stream": draw.random() < 0.7}
        with self._connection() as made:
            made.sendall(_posted(json.dumps(body).encode()))
            if draw.random() < 0.6:
                made.recv(200)
            if draw.random() < 0.5:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.note("vanished")

    def stall(self, draw: random.Random) -> None:
        """Stop in the middle of a request, and wait to be cut off."""
        data = _posted(json.dumps({"model": "toy", "messages": TURNS}).encode())
        with self._connection() as made:
            made.settimeout(60)
            made.sendall(data[: draw.randrange(1, len(data))])
            try:
                answer = made.recv(65536)
            except ConnectionResetError:
                answer = b""
        fine = not answer or b" 408 " in answer
        self.note("cut off" if fine else "not cut off", "" if fine else f"stalled: {answer[:200]!r}")

    def half(self, draw: random.Random) -> None:
        """Send half a JSON as if it were whole."""
        whole = json.dumps(draw.choice(self.good)[1])
        self._refused(ask(self.url, CHAT, whole[: draw.randrange(1, len(whole))]))

    def mutant(self, draw: random.Random) -> None:
        """Ask for something that is wrong."""
        wrong = [{"n": 10**9}, {"temperature": -1}, {"messages": 3}, {"logit_bias": {"1": 1}}, {"max_tokens": 10**6}]
        self._refused(ask(self.url, CHAT, {"model": "toy", "messages": TURNS} | draw.choice(wrong)))

    def _refused(self, answer) -> None:
        fine = 400 <= answer.status < 500 and set(answer.error) == {"message", "type", "param", "code"}
        self.note(str(answer.status), "" if fine else f"{answer.status} {answer.text[:200]}")

    def _connection(self) -> socket.socket:
        parts = urlsplit(self.url)
        return socket.create_connection((parts.hostname, parts.port), timeout=30)


def _posted(data: bytes) -> bytes:
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n"
    )
    return head.encode() + b"\r\n" + data


def memory(pid: int) -> float:
    """Resident memory of a process in MiB."""
    fields = Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()
    return int(fields[0]) / 1024


def soak(requests: int, seconds: float, workers: int) -> dict:
    """Ask so often in so many seconds; what came of it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = save_toy(Path(directory) / "toy", teach=LEARNT, length=64)
        good = cases(dllm.load(checkpoint, device="cpu"))
        with process(str(checkpoint), "--port", "0", "--device", "cpu") as (server, url):
            clients, sizes = Clients(url, good), []
            begin = time.monotonic()
            with ThreadPoolExecutor(workers) as pool:
                for number in range(requests):
                    time.sleep(max(0.0, begin + number * seconds / requests - time.monotonic()))
                    pool.submit(clients.one, number)
                    if number % max(1, requests // 30) == 0:
                        sizes.append(round(memory(server.pid), 1))
            time.sleep(1)
            taken = time.monotonic() - begin
            page = ask(url, "/metrics").text
            left = [line for line in page.splitlines() if line.startswith(("dllm_running", "dllm_queued"))]
            open_files = len(os.listdir(f"/proc/{server.pid}/fd"))
            sizes.append(round(memory(server.pid), 1))
            server.send_signal(signal.SIGTERM)
            _, err = server.communicate(timeout=60)
    times = sorted(clients.seconds)
    errors = [line for line in page.splitlines() if line.startswith("dllm_http_requests_total") and 'status="5' in line]
    grown = sizes[-1] / sizes[len(sizes) // 3] - 1
    return {
        "requests": requests,
        "seconds": round(taken, 1),
        "counts": dict(sorted(clients.counts.items())),
        "seconds of good ones, median and 95 %": [round(times[int(len(times) * share)], 3) for share in (0.5, 0.95)],
        "memory in MiB": sizes,
        "grown after the first third": round(grown, 4),
        "open files at the end": open_files,
        "left": left,
        "errors of the server": errors,
        "status": server.returncode,
        "standard error": err[-2000:],
        "wrong": clients.wrong[:20],
        "good": not clients.wrong
        and not errors
        and all(line.endswith(" 0.0") for line in left)
        and grown < 0.1
        and server.returncode == 0
        and "Traceback" not in err,
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--workers", type=int, default=100, help="most clients at once")
    args = parser.parse_args()
    found = soak(args.requests, args.seconds, args.workers)
    print(json.dumps(found, indent=2))
    return 0 if found["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
