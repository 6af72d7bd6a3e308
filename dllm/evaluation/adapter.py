"""Answers of a diffusion language model to the requests of lm-eval.

The rules, all in one place:
- `loglikelihood` is minus the NELBO of the continuation given the context. Context and continuation are tokenized
  without CLS/SEP, each on its own side of the boundary (`special_tokens: exact`).
- `is_greedy` (LAMBADA's accuracy) is true where decoding a canvas as long as the continuation, one token per forward
  pass, the most confident position first, gives the continuation. It costs one pass per token and is computed only for
  tasks that read it; elsewhere it is False.
- With `likelihood.rounds` the choices of a question are scored in rounds until the best one is known by each
  metric of its task (`likelihood.racing`). Tasks that read the likelihoods themselves are not raced.
- `loglikelihood_rolling` is the chain rule over blocks of `likelihood.block_size` tokens (default: half the model's
  length), each given as much of the text before it as fits.
- `generate_until` samples with the settings of the evaluation, not with the task's (temperature, max_gen_toks), and
  cuts at the task's strings.
- A prompt that does not fit is shortened from the left; the number of tokens lost is in the answer (`truncated`).
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Literal, Protocol

from lm_eval.api.instance import Instance

from dllm.config import GenerateSettings, LikelihoodSettings, Scorer, digest
from dllm.evaluation.store import Answer
from dllm.evaluation.task_files import Divisors
from dllm.likelihood.policy import estimator_for
from dllm.likelihood.racing import Question
from dllm.models.literal_text import encode_marked, marked

SpecialTokens = Literal["exact", "reference-v0", "reference-v0.1"]


class Model(Protocol):
    """The methods of `dllm.DiffusionLM` that are called; prompts and targets are lists of token ids."""

    max_length: int  # of prompt and answer together, in tokens

    def answers(self, prompts: list[list[int]], settings: GenerateSettings) -> list: ...

    def nelbo(self, prompts: list[list[int]], targets: list[list[int]], settings: LikelihoodSettings) -> list: ...

    def race(
        self, prompts: list[list[int]], targets: list[list[int]], questions: list, settings: LikelihoodSettings
    ) -> tuple[list, list]: ...

    def greedy_match(
        self, prompts: list[list[int]], targets: list[list[int]], settings: LikelihoodSettings
    ) -> list[bool]: ...


# --------------------------------------------------------------------------------------------------------------------
# Text to tokens


def encode(tokenizer, text: str, *, special_tokens: bool = False) -> list[int]:
    """Token ids of a marked text, without CLS/SEP unless `special_tokens`."""
    return encode_marked(tokenizer, [text], special_tokens=special_tokens)[0]


def encode_prompt(tokenizer, prompt: str, special_tokens: SpecialTokens) -> list[int]:
    """Token ids of a prompt to be continued, a marked text.

    `exact` and `reference-v0`: no CLS/SEP, as in training. `reference-v0.1`: CLS before and SEP behind it (fault F3).
    """
    return encode(tokenizer, prompt, special_tokens=special_tokens == "reference-v0.1")


def encode_pair(
    tokenizer, context: str, continuation: str, special_tokens: SpecialTokens
) -> tuple[list[int], list[int]]:
    """Token ids of a context and of the continuation to be scored, both marked texts.

    `exact`: each on its own, without CLS/SEP. The reference modes repeat fault F2: blanks at the end of the context
    move to the continuation, context and whole text are tokenized with CLS/SEP, and the whole is cut at the length of
    the context, which loses the continuation's first token and scores the final SEP.
    """
    if special_tokens == "exact":
        return encode(tokenizer, context), encode(tokenizer, continuation)
    stem = context.rstrip()
    continuation, context = context[len(stem) :] + continuation, stem
    prompt = encode(tokenizer, context, special_tokens=True)
    whole = encode(tokenizer, context + continuation, special_tokens=True)
    return prompt, whole[len(prompt) :]


def rolling_blocks(
    tokens: Sequence[int], max_length: int, block_size: int | None = None
) -> Iterator[tuple[list[int], list[int]]]:
    """(context, block) pairs whose blocks are the text in order; every pair fits into max_length.

    A block has block_size tokens, at most (and by default) half of max_length.
    """
    half = max(1, max_length // 2)
    size = min(block_size or half, half)
    for start in range(0, len(tokens), size):
        yield list(tokens[max(0, start - (max_length - size)) : start]), list(tokens[start : start + size])


def cut_at_stops(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((at for at in (text.find(stop) for stop in stops if stop) if at >= 0), default=len(text))]


def fit(prompt: list[int], room: int) -> tuple[list[int], int]:
    """The end of a prompt that fits into `room` tokens, and how many were lost."""
    lost = max(0, len(prompt) - max(0, room))
    return prompt[lost:], lost


def check_target(request: Instance, length: int, max_length: int) -> None:
    """Raise ValueError, one line, for a continuation that is longer than a model's rows."""
    if length > max_length:
        raise ValueError(
            f"{request.task_name}, document {request.doc_id}: the continuation has {length} tokens, the model takes "
            f"{max_length}; use `loglikelihood_rolling` or a longer model"
        )


def room_for_prompt(generation: GenerateSettings, max_length: int) -> int:
    """How many tokens a prompt may have beside its answer. Raises ValueError, one line, if it may have none."""
    room = max_length - generation.max_new_tokens
    if room <= 0:
        raise ValueError(
            f"generation.max_new_tokens = {generation.max_new_tokens} leaves no room for a prompt: the model takes "
            f"{max_length} tokens; choose fewer new tokens"
        )
    return room


def bf16(value: float) -> float:
    """A score rounded to bfloat16 (fault F4; exact for one-token targets, where the sum is a single term)."""
    import torch

    return float(torch.tensor(value, dtype=torch.bfloat16))


class DiffusionAnswerer:
    """Answers of a diffusion language model.

    open_model is called at the first request that needs the model; greedy_tasks names the tasks whose metrics read
    `is_greedy` (None: all); divisors: by task whose choices may be raced, `task_files.choice_divisors` of it;
    chat_template says whether contexts are conversations in the chat template.
    """

    def __init__(
        self,
        tokenizer,
        open_model: Callable[[], Model],
        *,
        generation: GenerateSettings,
        scorer: Scorer,
        greedy_tasks: frozenset[str] | None = None,
        divisors: dict[str, Divisors] | None = None,
        chat_template: bool = False,
    ):
        self.tokenizer = tokenizer
        self.generation = generation
        self.scorer = scorer
        self.greedy_tasks = greedy_tasks
        self.divisors = (divisors or {}) if scorer.likelihood.rounds else {}
        self.chat_template = chat_template
        self.model_seconds = 0.0
        """Wall time spent in the model so far, without loading it."""
        self._open_model = open_model

    @cached_property
    def model(self) -> Model:
        return self._open_model()

    def variant(self, kind: str, request: Instance) -> str:
        """What an answer depends on besides the request's arguments: the greedy check, and in a race the question."""
        if kind != "loglikelihood":
            return ""
        greedy = "greedy" if self.greedy_tasks is None or request.task_name in self.greedy_tasks else ""
        if request.task_name not in self.divisors:
            return greedy
        rules = sorted(self.divisors[request.task_name](request))
        return f"{greedy} race {digest({'document': json.dumps(request.doc, default=str), 'rules': rules})}"

    def answers(self, kind: str, requests: list[Instance], repeats: Sequence[int] | None = None) -> list[Answer]:
        """Answers to requests of one kind, in their order. A request's answer does not depend on the others."""
        if not requests:
            return []
        if kind == "loglikelihood":
            return self._loglikelihoods(requests)
        if kind == "loglikelihood_rolling":
            return self._rolling_loglikelihoods(requests)
        return self._generations(requests, repeats or [0] * len(requests))

    def _loglikelihoods(self, requests: list[Instance]) -> list[Answer]:
        prompts, targets, lost = [], [], []
        for request, (prompt, target) in zip(requests, self._encode_pairs(requests), strict=True):
            check_target(request, len(target), self.model.max_length)
            prompt, n = fit(prompt, self.model.max_length - len(target))
            prompts.append(prompt)
            targets.append(target)
            lost.append(n)
        scores, verdicts = self._scores(requests, prompts, targets)
        rows = [i for i, request in enumerate(requests) if self.variant("loglikelihood", request) and targets[i]]
        pairs = [prompts[i] for i in rows], [targets[i] for i in rows]
        matches = self._timed("greedy_match", *pairs, self.scorer.likelihood) if rows else []
        greedy = dict(zip(rows, matches, strict=True))
        # an empty continuation is certain, and trivially the greedy one
        return [
            {
                "answer": [0.0 - nats, bool(greedy.get(i, not targets[i]))],
                "standard_error": error,
                "estimator": self._estimator(len(targets[i])),
                "passes": passes + (len(targets[i]) if i in greedy else 0),
                **verdicts.get(i, {}),
                **({"truncated": lost[i]} if lost[i] else {}),
            }
            for i, (nats, error, passes) in enumerate(scores)
        ]

    def _rolling_loglikelihoods(self, requests: list[Instance]) -> list[Answer]:
        size = self.scorer.likelihood.block_size
        blocks = [
            list(rolling_blocks(encode(self.tokenizer, marked(self.tokenizer, r.args[0])), self.model.max_length, size))
            for r in requests
        ]
        flat = [pair for pairs in blocks for pair in pairs]
        scores = iter(self._nelbo([context for context, _ in flat], [block for _, block in flat]))
        answers: list[Answer] = []
        for pairs in blocks:
            own = [next(scores) for _ in pairs]
            answers.append(
                {
                    "answer": 0.0 - math.fsum(nats for nats, _, _ in own),
                    "standard_error": math.sqrt(math.fsum(error**2 for _, error, _ in own)),
                    "estimator": self._estimator(max((len(block) for _, block in pairs), default=0)),
                    "passes": sum(passes for _, _, passes in own),
                }
            )
        return answers

    def _scores(
        self, requests: list[Instance], prompts: list[list[int]], targets: list[list[int]]
    ) -> tuple[list[tuple[float, float, int]], dict[int, Answer]]:
        """(nats, standard error, passes) per pair, and of raced ones how the race of their question ended."""
        documents: dict[tuple[str, int], list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            if request.task_name in self.divisors and targets[i]:
                documents[request.task_name, request.doc_id].append(i)
        raced = sorted(i for choices in documents.values() for i in choices)
        plain = sorted(set(range(len(requests))) - set(raced))
        found = dict(zip(plain, self._nelbo([prompts[i] for i in plain], [targets[i] for i in plain]), strict=True))
        if not raced:
            return [found[i] for i in plain], {}
        place = {i: at for at, i in enumerate(raced)}
        questions = []
        for (task, _), choices in documents.items():
            choices.sort(key=lambda i: requests[i].idx)  # random numbers follow from the first choice
            divisors = [self.divisors[task](requests[i]) for i in choices]
            by_rule = {rule: [divisor[rule] for divisor in divisors] for rule in divisors[0]}
            questions.append(Question([place[i] for i in choices], by_rule))
        pairs = [prompts[i] for i in raced], [targets[i] for i in raced]
        scores, verdicts = self._timed("race", *pairs, questions, self.scorer.likelihood)
        found |= dict(zip(raced, map(self._plain, scores), strict=True))
        ends: dict[int, Answer] = {
            i: {
                "estimator": "lattice" if found[i][1] else "enumerate",
                "rounds": verdict.rounds,
                "doubt": verdict.doubt,
            }
            for choices, verdict in zip(documents.values(), verdicts, strict=True)
            for i in choices
        }
        return [found[i] for i in range(len(requests))], ends

    def _nelbo(self, prompts: list[list[int]], targets: list[list[int]]) -> list[tuple[float, float, int]]:
        """(nats, standard error, passes) per pair; an empty target costs nothing."""
        rows = [i for i, target in enumerate(targets) if target]
        pairs = [prompts[i] for i in rows], [targets[i] for i in rows]
        scores = self._timed("nelbo", *pairs, self.scorer.likelihood) if rows else []
        found = [(0.0, 0.0, 0)] * len(targets)
        for i, score in zip(rows, scores, strict=True):
            found[i] = self._plain(score)
        return found

    def _plain(self, score) -> tuple[float, float, int]:
        nats = bf16(score.nats) if self.scorer.bf16_scores else float(score.nats)
        return nats, float(score.standard_error), int(score.passes)

    def _encode_pairs(self, requests: list[Instance]) -> list[tuple[list[int], list[int]]]:
        """`encode_pair` of each request; without CLS/SEP, all texts at once and each once."""
        pairs = [(self._context(request), marked(self.tokenizer, request.args[1])) for request in requests]
        if self.scorer.special_tokens != "exact":
            return [encode_pair(self.tokenizer, prompt, text, self.scorer.special_tokens) for prompt, text in pairs]
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        tokens = dict(zip(texts, encode_marked(self.tokenizer, texts), strict=True))
        return [(list(tokens[context]), list(tokens[continuation])) for context, continuation in pairs]

    def _context(self, request: Instance) -> str:
        """A request's context as a marked text: a conversation was marked when the chat template wrote it."""
        return request.args[0] if self.chat_template else marked(self.tokenizer, request.args[0])

    def _estimator(self, length: int) -> str:
        """What a target of `length` tokens is scored by: of blocks, the first one."""
        settings = self.scorer.likelihood
        return estimator_for(min(length, settings.block_size or length), settings) if length else "none"

    def _timed(self, method: str, *arguments):
        call = getattr(self.model, method)  # loads the model
        begun = time.perf_counter()
        found = call(*arguments)
        self.model_seconds += time.perf_counter() - begun
        return found

    def _generations(self, requests: list[Instance], repeats: Sequence[int]) -> list[Answer]:
        room = room_for_prompt(self.generation, self.model.max_length)
        groups: dict[tuple, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[(repeats[i], *stop_strings(request))].append(i)
        answers: list[Answer] = [{}] * len(requests)
        for (repeat, *stops), rows in groups.items():
            settings = self.generation.model_copy(
                update={"seed": self.generation.seed + repeat, "stop": [*self.generation.stop, *stops]}
            )
            prompts, lost = [], []
            for i in rows:
                prompt = encode_prompt(self.tokenizer, self._context(requests[i]), self.scorer.special_tokens)
                prompt, n = fit(prompt, room)
                prompts.append(prompt)
                lost.append(n)
            for i, found, n in zip(rows, self._timed("answers", prompts, settings), lost, strict=True):
                text = cut_at_stops(found.text, settings.stop)
                cost = {"passes": found.passes, "tokens": found.tokens}
                answers[i] = {"answer": text, **cost, **({"truncated": n} if n else {})}
        return answers


def stop_strings(request: Instance) -> list[str]:
    """The strings at which a task ends an answer."""
    until = request.args[1].get("until") or []
    return [until] if isinstance(until, str) else list(until)
