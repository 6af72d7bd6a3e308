"""`--model dllm` of lm-eval's own command and of `lm_eval.simple_evaluate`: the rules of `dllm evaluate`, anywhere.

lm-eval offers packages no way to add a model to its command, so `register` does it from outside: `dllm lm-eval` calls
it and then lm-eval's command line; a script that imports this module may say `lm_eval.simple_evaluate(model="dllm")`.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import model_registry
from pydantic import ValidationError

from dllm.config import GenerateSettings, Scorer, did_you_mean
from dllm.config.settings import message_of
from dllm.evaluation.adapter import DiffusionAnswerer
from dllm.evaluation.evaluate import open_diffusion
from dllm.evaluation.store import Answer
from dllm.models.tokenizers import chat_template, chat_text
from dllm.numbers import environment_number

NAME = "dllm"
SCORER = Scorer.model_fields.keys() - {"likelihood", "fewshot_as_multiturn"}
"""Settings of a scorer that are arguments by their own names; examples as turns are an option of lm-eval."""
ARGUMENTS = ("pretrained", "revision", "is_greedy", "generation.*", "likelihood.*", *sorted(SCORER))


class DiffusionHarness(LM):
    """A diffusion language model as lm-eval's `LM`, by the rules of `evaluation.adapter`.

    pretrained: a checkpoint directory, or with `revision` a repository of the hub. The other arguments are settings
    by their names in a configuration: those of `GenerateSettings` behind `generation.`, of `LikelihoodSettings` behind
    `likelihood.`, of `Scorer` as they are. `is_greedy`: `auto` computes it where a document has one continuation,
    `all` for every choice. lm-eval's batch_size, if above 1, is the most rows denoised together; it changes no answer.
    Raises ValueError, one line, for an unknown argument and a value that is not allowed.
    """

    def __init__(
        self,
        pretrained: str = "",
        revision: str | None = None,
        is_greedy: str = "auto",
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **settings: Any,
    ):
        super().__init__()
        if not pretrained or not isinstance(pretrained, str):
            raise ValueError(
                f"model_args: pretrained = {pretrained!r}; allowed: a checkpoint directory, or with revision a "
                "repository of the hub, as in --model_args pretrained=./my-bert"
            )
        if environment_number("WORLD_SIZE", 1) > 1:
            raise ValueError("model dllm answers in one process; `accelerate launch -m dllm evaluate` shares the work")
        if is_greedy not in ("auto", "all"):
            raise ValueError(f"is_greedy = {is_greedy!r}; allowed: auto, all")
        self.is_greedy = is_greedy
        self.settings = settings
        self.generation, scorer = parse_arguments(settings)
        if str(batch_size or 1).isdecimal() and int(batch_size or 1) > 1:
            self.generation = self.generation.model_copy(update={"batch_size": int(batch_size or 1)})
        model = open_diffusion(_checkpoint(pretrained, revision), scorer.precision, _device(device))
        if model.algorithm.causal:
            raise ValueError(f"pretrained = {pretrained!r} is an autoregressive model; score it with --model hf")
        tokenizer = model.backbone.tokenizer
        if not tokenizer.chat_template and model.backbone.family == "encoder":
            tokenizer.chat_template = chat_template("bert")  # as its first chat training would give it
        self.answerer = DiffusionAnswerer(tokenizer, lambda: model, generation=self.generation, scorer=scorer)
        self.passes = 0

    @property
    def tokenizer_name(self) -> str:
        return str(self.answerer.tokenizer.name_or_path)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that prompts are written in. Raises ValueError for a model without one, and for another's."""
        own = self.answerer.tokenizer.chat_template
        if not own or isinstance(chat_template, str):
            why = f"has no template {chat_template!r}, only its own" if own else "has no chat template"
            raise ValueError(f"{self.tokenizer_name} {why}; give --apply_chat_template {'alone' if own else 'no more'}")
        self.answerer.chat_template = self.answerer.chat_template or bool(chat_template)
        return str(own) if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in the tokenizer's own template, as in training; open at its end for a begun answer."""
        self.answerer.chat_template = True  # from now on contexts are conversations, marked by this function
        begun = {} if add_generation_prompt else {"continue_final_message": True}
        return chat_text(self.answerer.tokenizer, chat_history, add_generation_prompt=add_generation_prompt, **begun)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        continuations = Counter((request.task_name, request.doc_id) for request in requests)
        single = frozenset(r.task_name for r in requests if continuations[r.task_name, r.doc_id] == 1)
        self.answerer.greedy_tasks = single if self.is_greedy == "auto" else None
        return [tuple(answer["answer"]) for answer in self._answers("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return [answer["answer"] for answer in self._answers("loglikelihood_rolling", requests)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [answer["answer"] for answer in self._answers("generate_until", requests)]

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval notes beside the scores: settings, and what the answers took."""
        return {
            NAME: {
                "arguments": self.settings,
                "generation": self.generation.model_dump(mode="json"),
                "scorer": self.answerer.scorer.model_dump(mode="json"),
                "passes": self.passes,
                "model_seconds": round(self.answerer.model_seconds, 3),
            }
        }

    def _answers(self, kind: str, requests: list[Instance]) -> list[Answer]:
        """Answers in the order of the requests. A request that lm-eval repeats is the same object; each draws anew."""
        times: Counter[int] = Counter()
        repeats = []
        for request in requests:
            repeats.append(times[id(request)])
            times[id(request)] += 1
        answers = self.answerer.answers(kind, requests, repeats)
        self.passes += sum(answer.get("passes") or 0 for answer in answers)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer["answer"])
        return answers


def parse_arguments(settings: dict[str, Any]) -> tuple[GenerateSettings, Scorer]:
    """Sampler and scorer of some model_args. Raises ValueError, one line, for a name or a value that is not one."""
    parts: dict[str, dict[str, Any]] = {"generation": {}, "likelihood": {}, "": {}}
    for name, value in settings.items():
        part, dot, setting = name.partition(".")
        group = part if dot and part in ("generation", "likelihood") else ""
        if not group and name not in SCORER:
            raise ValueError(f"model_args: {name} is not one of them. {did_you_mean(name, ARGUMENTS)}")
        parts[group][setting if group else name] = value
    if parts["likelihood"].get("rounds"):
        raise ValueError(
            "model_args: likelihood.rounds needs to know which metrics a task reads, which lm-eval does not tell; "
            "leave it out, or score with `dllm evaluate`"
        )
    generation = _validated(GenerateSettings, "generation.", parts["generation"])
    return generation, _validated(Scorer, "", parts[""] | {"likelihood": parts["likelihood"]})


def _validated(kind: Any, prefix: str, given: dict[str, Any]) -> Any:
    fields = kind.model_fields
    # a command line writes 1 where a share is meant, and lm-eval makes an integer of it
    given = {k: float(v) if type(v) is int and k in fields and fields[k].annotation is float else v
             for k, v in given.items()}  # fmt: skip
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        name = prefix + ".".join(map(str, problem["loc"]))
        hint = did_you_mean(str(problem["loc"][-1]), fields) if problem["type"] == "extra_forbidden" else ""
        raise ValueError(f"model_args: {name} = {problem['input']!r}: {message_of(problem)}. {hint}".rstrip()) from None


def _checkpoint(pretrained: str, revision: str | None) -> str:
    """A directory: the given one, or that of a pinned repository of the hub."""
    if Path(pretrained).is_dir() and revision is None:
        return pretrained
    from dllm.models.load import local_directory

    return str(local_directory(pretrained, revision))


def _device(name: str | None) -> str:
    from dllm.core.devices import best_device, known_device

    # lm-eval says cuda:0 where nobody named a device, and leaves it to the model that there may be none
    if name is None or name == "cuda:0" and not torch.cuda.is_available():
        return str(best_device())
    return str(known_device(name))


def register() -> None:
    """Make `dllm` a model of lm-eval, in this process."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=f"{__name__}:{DiffusionHarness.__name__}")


def run_lm_eval(arguments: list[str]) -> int:
    """lm-eval's own command line, which knows `--model dllm`. Returns its exit status."""
    from lm_eval.__main__ import cli_evaluate

    register()
    # lm-eval forks to bootstrap standard errors, and a fork of a process with the threads of torch may wait for ever
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        cli_evaluate()
    except SystemExit as end:  # argparse leaves this way after --help and for a mistake, which it has told
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    return 0


register()
