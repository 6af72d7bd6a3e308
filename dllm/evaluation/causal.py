"""An autoregressive baseline: lm-eval's own `hf` model, with the answers of the same store."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property

from lm_eval.api.instance import Instance

from dllm.config import GenerateSettings
from dllm.evaluation.store import Answer
from dllm.models.literal_text import unmarked
from dllm.models.tokenizers import encode_text


class CausalAnswerer:
    """Answers of an lm-eval `HFLM`; `max_gen_toks` is the evaluation's, so that all models may say as much."""

    def __init__(self, tokenizer, open_model: Callable[[], object], *, generation: GenerateSettings):
        self.tokenizer = tokenizer
        self.generation = generation
        self.model_seconds = 0.0
        self._open_model = open_model

    @cached_property
    def model(self):
        return self._open_model()

    def variant(self, kind: str, request: Instance) -> str:
        return ""

    def answers(self, kind: str, requests: list[Instance], repeats: Sequence[int] | None = None) -> list[Answer]:
        """Answers to requests of one kind, in their order."""
        requests = [self._own_request(kind, request) for request in requests]
        call = getattr(self.model, kind)  # loads the model
        begun = time.perf_counter()
        found = call(requests, disable_tqdm=True)
        self.model_seconds += time.perf_counter() - begun
        lost = [self._lost(kind, request) for request in requests]
        if kind == "loglikelihood":
            return [
                {
                    "answer": [float(value), bool(greedy)],
                    "standard_error": 0.0,
                    "estimator": "autoregressive",
                    "passes": 1,
                    **({"truncated": n} if n else {}),
                }
                for (value, greedy), n in zip(found, lost, strict=True)
            ]
        # one pass per token and one for the end
        most = self.generation.max_new_tokens
        return [
            {
                "answer": text,
                "passes": min(most, len(encode_text(self.tokenizer, text)) + 1),
                **({"truncated": n} if n else {}),
            }
            for text, n in zip(found, lost, strict=True)
        ]

    def _lost(self, kind: str, request: Instance) -> int:
        """How many tokens of a prompt lm-eval's model cuts off from the left."""
        longest = self.model.max_length
        if kind == "generate_until":
            return max(0, len(self.model.tok_encode(request.args[0])) - (longest - self.generation.max_new_tokens))
        if kind == "loglikelihood":  # the last token of a continuation is predicted and not read
            return max(0, sum(len(self.model.tok_encode(text)) for text in request.args[:2]) - 1 - longest)
        return 0

    def _own_request(self, kind: str, request: Instance) -> Instance:
        """A request as lm-eval's model reads it: without marks, and of our length."""
        context, *rest = request.args
        if kind == "generate_until":
            rest = [{**rest[0], "max_gen_toks": self.generation.max_new_tokens}]
        arguments = (unmarked(context), *rest)
        return Instance(request.request_type, request.doc, arguments, request.idx, metadata=request.metadata)


def open_causal(checkpoint: str, *, precision: str, device: str, batch_size: int):
    """lm-eval's HFLM on a local checkpoint; one that was trained here reads its prompts as in training.

    lm-eval leaves it to the tokenizer what it adds to a prompt, which is right for published models, and [CLS] and
    [SEP] for one that was made for encoders.
    """
    from lm_eval.models.huggingface import HFLM

    from dllm.models.load import read_sidecar

    dtype = {"fp32": "float32", "mixed": "bfloat16", "bf16": "bfloat16"}[precision]
    plain = {"add_bos_token": False} if read_sidecar(checkpoint) else {}
    return HFLM(pretrained=checkpoint, dtype=dtype, device=device, batch_size=batch_size, **plain)
