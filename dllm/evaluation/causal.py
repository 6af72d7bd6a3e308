"""An autoregressive baseline: lm-eval's own `hf` model, with the answers of the same store."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, cached_property

from lm_eval.api.instance import Instance

from dllm.config import GenerateSettings
from dllm.evaluation.adapter import check_target, room_for_prompt
from dllm.evaluation.store import Answer
from dllm.models.literal_text import encode_marked, marked, unmarked
from dllm.models.tokenizers import encode_text


class CausalAnswerer:
    """Answers of an lm-eval `HFLM`; `max_gen_toks` is the evaluation's, so that all models may say as much.

    chat_template says whether contexts are conversations in the chat template, which has marked them.
    """

    def __init__(
        self,
        tokenizer,
        open_model: Callable[[], object],
        *,
        generation: GenerateSettings,
        chat_template: bool = False,
    ):
        self.tokenizer = tokenizer
        self.generation = generation
        self.chat_template = chat_template
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
        if kind == "generate_until":
            room_for_prompt(self.generation, self.model.max_length)
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
        tokens = [len(encode_text(self.tokenizer, text)) for text in found]
        return [
            {
                "answer": text,
                "passes": min(most, length + 1),
                "tokens": length,
                **({"truncated": n} if n else {}),
            }
            for text, length, n in zip(found, tokens, lost, strict=True)
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
        """A request with marks where its text spells a control token, and of our length."""
        context, *rest = request.args
        context = context if self.chat_template else marked(self.tokenizer, context)
        if kind == "generate_until":
            rest = [{**rest[0], "max_gen_toks": self.generation.max_new_tokens}]
        elif kind == "loglikelihood":
            rest = [marked(self.tokenizer, rest[0])]
        arguments = (context, *rest)
        return Instance(request.request_type, request.doc, arguments, request.idx, metadata=request.metadata)


def open_causal(checkpoint: str, *, precision: str, device: str, batch_size: int):
    """lm-eval's HFLM on a local checkpoint; one that was trained here reads its prompts as in training.

    lm-eval leaves it to the tokenizer what it adds to a prompt, which is right for published models, and [CLS] and
    [SEP] for one that was made for encoders.
    """
    from dllm.models.load import read_sidecar

    dtype = {"fp32": "float32", "mixed": "bfloat16", "bf16": "bfloat16"}[precision]
    plain = {"add_bos_token": False} if read_sidecar(checkpoint) else {}
    return _literal_model()(pretrained=checkpoint, dtype=dtype, device=device, batch_size=batch_size, **plain)


@cache
def _literal_model() -> type:
    """HFLM that reads marked texts, and that no single request stops."""
    from lm_eval.models.huggingface import HFLM

    class LiteralLM(HFLM):
        def tok_encode(self, string, add_special_tokens=None, left_truncate_len=None, **options):
            if unmarked(string) == string:
                return super().tok_encode(string, add_special_tokens, left_truncate_len, **options)
            added = self.add_bos_token if add_special_tokens is None else add_special_tokens
            if added is None:  # as lm-eval: what the tokenizer adds, unless a chat template has written it already
                added = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
            ids = encode_marked(self.tokenizer, [string], special_tokens=added)[0]
            return ids[-left_truncate_len:] if left_truncate_len else ids

        def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, truncation=False):
            # a prompt without any token would have nothing to be continued
            rows = [self.tok_encode(string, None, left_truncate_len) or [self.prefix_token_id] for string in strings]
            found = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
            return found["input_ids"], found["attention_mask"]

        def loglikelihood(self, requests, disable_tqdm=False):
            pairs = [self._pair(*request.args) for request in requests]
            for request, (_, target) in zip(requests, pairs, strict=True):
                check_target(request, len(target), self.max_length)
            asked = [number for number, (_, target) in enumerate(pairs) if target]
            tokens = [(requests[number].args, *pairs[number]) for number in asked]
            scores = self._loglikelihood_tokens(tokens, disable_tqdm=disable_tqdm) if tokens else []
            found = dict(zip(asked, scores, strict=True))
            return [found.get(number, (0.0, True)) for number in range(len(requests))]  # nothing is certain to follow

        def _pair(self, context, continuation):
            """Token ids of both; the prefix token stands for a context without any."""
            before, after = [], []
            if context:
                before, after = self._encode_pair(context, continuation)
            else:
                after = self.tok_encode(continuation, add_special_tokens=False)
            if before or not after:
                return before, after
            return (after[:1], after[1:]) if after[0] == self.prefix_token_id else ([self.prefix_token_id], after)

    return LiteralLM
