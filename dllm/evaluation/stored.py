"""An lm-eval model whose answers are on disk: given all requests, it computes its own share of the missing ones."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, Protocol

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from dllm.evaluation.store import Answer, AnswerStore, request_key
from dllm.models.tokenizers import chat_text

Progress = Callable[[int, int], None]
"""Called with the numbers of answers that are there and that are wanted, after every chunk."""

LIKELIHOODS_PER_CHUNK = 1024
SECONDS_BETWEEN_LOOKS = 1.0


class Answerer(Protocol):
    """What computes answers: a diffusion model, or an autoregressive baseline."""

    tokenizer: Any
    model_seconds: float

    def variant(self, kind: str, request: Instance) -> str: ...

    def answers(self, kind: str, requests: list[Instance], repeats: list[int]) -> list[Answer]: ...


class StoredLM(LM):
    """lm-eval's model: answers come from the store; `fill` computes those of one shard that are missing.

    Every process is given all requests, so that the examples drawn into the prompts do not depend on how many processes
    there are; the documents are dealt round robin. Documents with the same first prompt stay together, in a shard and
    in a chunk, with all their requests: a model may score them together with fewer passes, or in a race.
    """

    def __init__(
        self,
        answerer: Answerer,
        store: AnswerStore,
        *,
        model_key: str,
        generations_per_chunk: int = 32,
        progress: Progress | None = None,
        may_compute: bool = True,
    ):
        super().__init__()
        self.answerer = answerer
        self.store = store
        self.model_key = model_key
        self.generations_per_chunk = generations_per_chunk
        self.progress = progress or (lambda answered, wanted: None)
        self.may_compute = may_compute
        self.computed = 0
        self.found: dict[tuple[str, int], list[Answer]] = defaultdict(list)
        """Answers by (task, document), in the order of the requests."""

    # lm-eval's interface
    @property
    def tokenizer_name(self) -> str:
        return str(self.answerer.tokenizer.name_or_path)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in the tokenizer's own template, as in training; open at its end for a begun answer."""
        begun = {} if add_generation_prompt else {"continue_final_message": True}
        return chat_text(self.answerer.tokenizer, chat_history, add_generation_prompt=add_generation_prompt, **begun)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [tuple(answer["answer"]) for answer in self._all("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return [answer["answer"] for answer in self._all("loglikelihood_rolling", requests)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [answer["answer"] for answer in self._all("generate_until", requests)]

    # ours
    def fill(self, kind: str, requests: list[Instance], shard: tuple[int, int] = (0, 1)) -> None:
        """Compute and store what shard (i, n) of the documents lacks, chunk by chunk, long prompts first."""
        index, shards = shard
        part = _parts(requests, shards)
        missing: dict[str, tuple[Instance, int]] = {}
        wanted = set()
        for key, request, repeat in self._keyed(kind, requests):
            if part[_document(request)] == index:
                wanted.add(key)
                if key not in self.store:
                    missing.setdefault(key, (request, repeat))
        size = self.generations_per_chunk if kind == "generate_until" else LIKELIHOODS_PER_CHUNK
        answered = len(wanted) - len(missing)
        self.progress(answered, len(wanted))
        prompts = _prompts(requests)
        for keys in _chunks({key: prompts[_document(request)] for key, (request, _) in missing.items()}, size):
            chunk, repeats = zip(*(missing[key] for key in keys), strict=True)
            before = self.answerer.model_seconds
            answers = self._answers(kind, list(chunk), list(repeats))
            self.store.write(dict(zip(keys, answers, strict=True)), self.answerer.model_seconds - before)
            self.computed += len(keys)
            answered += len(keys)
            self.progress(answered, len(wanted))

    def _answers(self, kind: str, requests: list[Instance], repeats: list[int]) -> list[Answer]:
        """Answers to some requests. Raises ValueError that names task and document if one cannot be answered."""
        try:
            return self.answerer.answers(kind, requests, repeats)
        except ValueError:
            return [self._answer(kind, *one) for one in zip(requests, repeats, strict=True)]

    def _answer(self, kind: str, request: Instance, repeat: int) -> Answer:
        try:
            return self.answerer.answers(kind, [request], [repeat])[0]
        except ValueError as error:
            document = f"{request.task_name}, document {request.doc_id}: "
            raise ValueError(document + str(error).removeprefix(document)) from None

    def wait_for(self, kind: str, requests: list[Instance]) -> None:
        """Return once other processes have stored the answers to all requests."""
        keys = [key for key, _, _ in self._keyed(kind, requests)]
        while any(key not in self.store for key in keys):
            time.sleep(SECONDS_BETWEEN_LOOKS)
            self.store.read()

    def _all(self, kind: str, requests: list[Instance]) -> list[Answer]:
        if self.may_compute:
            self.fill(kind, requests)
        keyed = self._keyed(kind, requests)
        missing = {key for key, _, _ in keyed if key not in self.store}
        if missing:
            wanted = len({key for key, _, _ in keyed})
            raise ValueError(
                f"{self.store.directory}: {len(missing)} of {wanted} answers are missing; run the shards that are not "
                "done, or leave out --merge to compute them here"
            )
        answers = [self.store[key] for key, _, _ in keyed]
        for (_, request, _), answer in zip(keyed, answers, strict=True):
            self.found[(request.task_name, request.doc_id)].append(answer)
        return answers

    def _keyed(self, kind: str, requests: list[Instance]) -> list[tuple[str, Instance, int]]:
        """(key, request, repeat) of each request; lm-eval repeats a request by naming the same object again."""
        times: dict[int, int] = defaultdict(int)
        keyed = []
        for request in requests:
            repeat = times[id(request)]
            times[id(request)] += 1
            key = request_key(
                kind,
                request.args,
                repeat=repeat,
                variant=self.answerer.variant(kind, request),
                model_key=self.model_key,
            )
            keyed.append((key, request, repeat))
        return keyed


def _document(request: Instance) -> tuple[str, int]:
    return request.task_name, request.doc_id


def _prompts(requests: list[Instance]) -> dict[tuple[str, int], str]:
    """The first prompt of each (task, document)."""
    return {_document(request): request.args[0] for request in reversed(requests)}


def _parts(requests: list[Instance], shards: int) -> dict[tuple[str, int], int]:
    """The shard of each (task, document): round robin over the first prompts, equal ones in the same shard."""
    first = _prompts(requests)
    numbers: dict[str, int] = {}
    documents = dict.fromkeys(map(_document, requests))
    return {document: numbers.setdefault(first[document], len(numbers)) % shards for document in documents}


def _chunks(prompts: dict[str, str], size: int) -> Iterator[list[str]]:
    """Keys, long prompts first, in chunks of about `size` that do not part equal prompts."""
    chunk: list[str] = []
    ordered = sorted(prompts, key=lambda key: (-len(prompts[key]), prompts[key], key))
    for _, same in groupby(ordered, key=prompts.__getitem__):
        chunk += same
        if len(chunk) >= size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
