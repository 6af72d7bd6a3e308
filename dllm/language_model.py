"""A diffusion language model as its users see it: texts and conversations in, texts and scores out."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import torch

from dllm.algorithms import ALGORITHMS, Algorithm, algorithm_for
from dllm.config import GenerateSettings, LikelihoodSettings
from dllm.core.canvas import Canvas, Completion, Ended, Progress, Score, canvas_for, infill_canvas
from dllm.core.devices import best_device
from dllm.likelihood.racing import Question, Verdict
from dllm.models.backbone import Backbone
from dllm.models.literal_text import encode_marked, marked
from dllm.models.load import for_inference, load_backbone
from dllm.models.tokenizers import chat_text, check_ids, check_messages, encode_chat, encode_text, overlap, rewritten
from dllm.sampling.edits import EditCanvas, EditSampler, edit_canvas
from dllm.sampling.expand import framed
from dllm.sampling.sampler import Sampler

END_OF_TURN = "[/Answer]"
"""The end of turn of a checkpoint without a sidecar, if its chat template writes it."""

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
"""A token that is one byte of a character, in tokenizers that have such."""

Prompt = str | Sequence[dict] | Sequence[int]
"""A text to be continued, a conversation to be answered ({"role", "content"} turns), or token ids."""


@dataclass(frozen=True)
class Answer:
    """A generated text and its cost.

    tokens: how many it has up to its end; passes: forward passes its row took part in; computed: positions of the row
    that went through the model in them; ids: its tokens up to its end.
    """

    text: str
    tokens: int
    passes: int
    computed: int = 0
    ids: tuple[int, ...] = ()


def load(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | Literal["auto"] | None = None,
    mixed: bool = False,
    algorithm: str | None = None,
) -> DiffusionLM:
    """The model in a checkpoint directory, or at a revision of a hub repository; on an accelerator if there is one.

    dtype: of the weights; fp32 by default. mixed: bf16 matrix products in the layers, whose weights are then bf16, too,
    and go from disk to the device as they are stored; all else stays fp32. Where bf16 is not fast, products are fp32,
    and so are weights of dtype bf16; one line on stderr says so.
    algorithm: one that it was not trained with, but can be used with (None: its own). Raises ValueError,
    one line, for a missing, damaged or unsuitable checkpoint, and for an algorithm that cannot use it.
    """
    dtype = dtype or ("auto" if mixed else torch.float32)
    backbone = load_backbone(path_or_hub_id, revision=revision, device=device or best_device(), dtype=dtype)
    backbone = for_inference(backbone, mixed=mixed)
    return DiffusionLM(backbone, algorithm_for(backbone.sidecar.get("algorithm", "mdlm"), algorithm))


@dataclass(frozen=True)
class DiffusionLM:
    """A backbone, and the row of the algorithm that samples and scores with it."""

    backbone: Backbone
    algorithm: Algorithm

    @property
    def max_length(self) -> int:
        """Longest row, prompt and answer together, in tokens."""
        return self.backbone.max_length - self.algorithm.prefix_positions

    @cached_property
    def sampler(self) -> Sampler:
        """What samples with it. Raises ValueError, one line, if nothing does."""
        return self.algorithm.part("sampler")()

    # ----------------------------------------------------------------------------------------------------------------
    # Generation

    @cached_property
    def usual_settings(self) -> GenerateSettings:
        """How it samples where no settings are given: by default, or as it was published."""
        return GenerateSettings(**self.backbone.sidecar.get("generation", {}))

    def generate(self, prompts: Sequence[Prompt], settings: GenerateSettings | None = None) -> list[str]:
        """One text per prompt, in their order; see `answers`."""
        return [answer.text for answer in self.answers(prompts, settings)]

    def answers(self, prompts: Sequence[Prompt], settings: GenerateSettings | None = None) -> list[Answer]:
        """One answer per prompt, in their order.

        Finished rows make room for waiting ones, within `settings.batch_size` rows and `settings.batch_tokens` tokens.
        A text ends before the end of turn, EOS or a stop string. A row's answer does not depend on its batch-mates.
        Raises ValueError, one line, for an invalid prompt or one that leaves no room for `max_new_tokens`, and for a
        token budget that is smaller than a single row.
        """
        settings = settings or self.usual_settings
        rows = self._prompt_rows(prompts, settings)
        if not rows:
            return []
        answers: list[Answer] = [Answer("", 0, 0)] * len(rows)
        # the rows wait on the host
        canvas = self._canvas(rows, settings, "cpu")
        for row in self.sampler.complete(self.backbone, canvas, settings, ended=self.ended(settings)):
            answers[row.number] = self.answer_of(prompts[row.number], row, settings)
        return answers

    def answer_of(self, prompt: Prompt, row: Completion, settings: GenerateSettings) -> Answer:
        """What the finished row of a prompt says."""
        text, length = self.decode(row.tokens, settings.stop), self.answer_length(row.tokens, settings.stop)
        return Answer(
            text=text.strip() if is_chat(prompt) else text,
            tokens=length,
            passes=row.passes,
            computed=row.computed,
            ids=tuple(row.tokens[:length]),
        )

    def canvas(self, prompts: Sequence[Prompt], settings: GenerateSettings) -> Canvas:
        """The canvas of some prompts, all masks, on the host. Raises ValueError as `answers`."""
        return self._canvas(self._prompt_rows(prompts, settings), settings, "cpu")

    def stream(self, prompts: Sequence[Prompt], settings: GenerateSettings | None = None) -> Iterator[Canvas]:
        """The canvas of all prompts, all masks at first, then after every change.

        All prompts are one batch. `decode(canvas.responses()[row])` is a row's text so far.
        """
        settings = settings or self.usual_settings
        canvas = self._canvas(self._prompt_rows(prompts, settings), settings, self.backbone.device)
        return self.sampler.denoise(self.backbone, canvas, settings, ended=self.ended(settings))

    def infill(self, texts: Sequence[str], settings: GenerateSettings | None = None) -> list[str]:
        """Each text with its mask tokens (`[MASK]`) replaced by what the model puts there; the rest stays.

        Everywhere else a mask token that a text spells is text. Raises ValueError, one line, for a model that fills no
        masks, and for a text without one or longer than the model's context.
        """
        rows = self.holes(texts)
        if not rows:
            return []
        settings = (settings or self.usual_settings).model_copy(update={"early_stop": False})
        backbone = self.backbone
        canvas = infill_canvas(rows, mask_id=backbone.mask_id, pad_id=backbone.pad_id, device=backbone.device)
        *_, last = self.sampler.denoise(self.backbone, canvas, settings)
        ends = zip(last.tokens.tolist(), last.length.tolist(), strict=True)
        return [backbone.tokenizer.decode(row[:length], skip_special_tokens=True) for row, length in ends]

    def holes(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts with mask tokens that are to be filled. Raises ValueError as `infill`."""
        if isinstance(self.sampler, EditSampler) or self.backbone.mask_id < 0:
            instead = "use `generate`, or `edits` instead of `infill`"
            instead = instead if isinstance(self.sampler, EditSampler) else "use `generate`"
            raise ValueError(f"{self.algorithm.name} fills no masks; {instead}")
        _check_list(texts, "texts")
        tokenizer, mask = self.backbone.tokenizer, self.backbone.tokenizer.mask_token
        rows = encode_marked(tokenizer, [marked(tokenizer, text, but=(mask,)) for text in texts])
        rows = [framed(self.backbone, row) for row in rows]
        for number, row in enumerate(rows):
            if self.backbone.mask_id not in row or len(row) > self.max_length:
                raise ValueError(
                    f"texts[{number}] has {len(row)} tokens, {row.count(self.backbone.mask_id)} of them {mask}; it "
                    f"needs one at least, and {self.max_length} tokens at most"
                )
        return rows

    def edits(
        self, draft: str, prompt: Prompt | None = None, settings: GenerateSettings | None = None
    ) -> Iterator[EditCanvas]:
        """A text on its way to a better one: the canvas of the draft, then the canvas after every pass.

        The draft answers a conversation, continues a text or token ids, or is all there is (prompt: None). What each
        pass changes is shown by `sampling.edits.edit_pieces`; `decode(canvas.responses()[0])` is the text so far.
        Raises ValueError, one line, for a model that does not edit, or a draft that does not fit into its context.
        """
        if not isinstance(self.sampler, EditSampler):
            trained = self.backbone.sidecar.get("algorithm", "mdlm")
            raise ValueError(
                f"a draft can be edited by a model trained with edit_flows only; this one was trained with {trained}"
            )
        settings = settings or GenerateSettings(temperature=1.0)
        given = [] if prompt is None else self.encode_prompt(prompt)
        if prompt is not None and is_chat(prompt):
            # as training renders an answer: what the template writes behind the prompt, and one EOS
            turns: list[Any] = [*prompt, {"role": "assistant", "content": draft}]
            before = chat_text(self.backbone.tokenizer, turns[:-1], add_generation_prompt=True)
            whole = chat_text(self.backbone.tokenizer, turns, add_generation_prompt=False)
            tokens = [*encode_marked(self.backbone.tokenizer, [whole[len(before) :]])[0], self.backbone.eos_id]
        else:
            tokens = self._encode_text(draft)
        if len(given) + len(tokens) > self.max_length:
            raise ValueError(
                f"prompt and draft have {len(given) + len(tokens)} tokens; the model's context is {self.max_length} "
                "tokens; shorten them"
            )
        canvas = edit_canvas([[*given, *tokens]], len(given), pad_id=self.backbone.pad_id, device=self.backbone.device)
        return self.sampler.denoise(self.backbone, canvas, settings)

    def _canvas(self, rows: list[list[int]], settings: GenerateSettings, device: torch.device | str) -> Canvas:
        ids = {"mask_id": self.backbone.mask_id, "pad_id": self.backbone.pad_id}
        return canvas_for(rows, settings.max_new_tokens, device=device, **ids)

    def ended(self, settings: GenerateSettings) -> Ended | None:
        """What ends a row early: the end of turn, EOS, or a stop string."""
        return partial(self._has_ended, self._ends(settings.stop)) if settings.early_stop else None

    def _has_ended(self, end_strings: Sequence[str], row: Progress) -> bool:
        """Whether a response now holds an end of turn or one of `end_strings`.

        Text is decoded only if a new token may hold the last character of one of them.
        """
        tokens = row.response[: row.known]
        new_tokens = tokens[row.known - row.new :]
        if not self._end_ids.isdisjoint(new_tokens):
            return True
        last = {mark[-1] for mark in end_strings}
        if not last or not any(self._may_show(token, last) for token in new_tokens):
            return False
        text = self._text(tokens)
        return any(mark in text for mark in end_strings)

    def _may_show(self, token: int, characters: set[str]) -> bool:
        """Whether a token may bring one of the characters into a decoded text."""
        if token not in self._texts:
            self._texts[token] = self.backbone.tokenizer.decode([token], skip_special_tokens=True)
        # spaces may come from the decoder, and other characters may take several tokens
        return any(not c.isascii() or c == " " or c in self._texts[token] for c in characters)

    @cached_property
    def _texts(self) -> dict[int, str]:
        """Decoded single tokens, as they were asked for."""
        return {}

    # ----------------------------------------------------------------------------------------------------------------
    # Scores

    def nelbo(
        self,
        prompts: Sequence[Prompt],
        targets: Sequence[str | Sequence[int]],
        settings: LikelihoodSettings | None = None,
        *,
        between: Callable[[], object] | None = None,
    ) -> list[Score]:
        """A bound on -log p(target | prompt) in nats for each pair; lower is better.

        Prompt and target are tokenized each on its own, without CLS/SEP. between: called after every forward batch, so
        that others can use the model, too. Raises ValueError, one line, for an empty
        target or a pair longer than the model's context.
        """
        return self._scored("nelbo", prompts, targets, settings, between=between)

    def race(
        self,
        prompts: Sequence[Prompt],
        targets: Sequence[str | Sequence[int]],
        questions: Sequence[Question],
        settings: LikelihoodSettings,
    ) -> tuple[list[Score], list[Verdict]]:
        """`nelbo` of the choices of questions, only as precise as is needed to know which is best; see `Question`.

        A score depends on the other choices of its question, and on nothing else of the batch, up to float rounding.
        """
        rows, target_ids = self.pairs(prompts, targets)
        return self.algorithm.part("scorer")().race(self.backbone, rows, target_ids, questions, settings)

    def greedy_match(
        self,
        prompts: Sequence[Prompt],
        targets: Sequence[str | Sequence[int]],
        settings: LikelihoodSettings | None = None,
    ) -> list[bool]:
        """Whether greedy decoding of exactly the target's length, one token per pass, gives the target."""
        return self._scored("greedy_match", prompts, targets, settings)

    def _scored(self, verb: str, prompts, targets, settings: LikelihoodSettings | None, **options) -> list:
        """What the scorer's `nelbo` or `greedy_match` says of the pairs."""
        rows, target_ids = self.pairs(prompts, targets)
        scorer = self.algorithm.part("scorer")()
        settings = settings or LikelihoodSettings()
        return getattr(scorer, verb)(self.backbone, rows, target_ids, settings, **options) if rows else []

    def _check_trained(self) -> None:
        """Raise ValueError, one line, if the checkpoint was trained with another algorithm: no score of it is meant."""
        trained = self.backbone.sidecar.get("algorithm")
        name = self.algorithm.name
        if trained in ALGORITHMS and trained != name:
            raise ValueError(
                f"algorithm = {name!r} cannot score a checkpoint trained with {trained!r}: it would be the bound of a "
                f"model that was never trained; leave the algorithm out, or train with {name!r}"
            )

    def pairs(self, prompts: Sequence[Prompt], targets: Sequence[str | Sequence[int]]) -> tuple[list, list]:
        """Token ids of prompts and targets that are to be scored. Raises ValueError as `nelbo`."""
        self._check_trained()
        _check_list(prompts, "prompts")
        _check_list(targets, "targets")
        if len(prompts) != len(targets):
            raise ValueError(f"{len(prompts)} prompts and {len(targets)} targets; every prompt needs one target")
        target_ids = [self._encode_text(target) if isinstance(target, str) else list(target) for target in targets]
        for number, ids in enumerate(target_ids):
            if not ids:
                raise ValueError(f"targets[{number}] = {targets[number]!r} has no tokens; there is nothing to score")
        # no tokens at all are a prompt here: the likelihood of a text from its start
        rows = [self.encode_prompt(p) if isinstance(p, str) or len(p) else [] for p in prompts]
        for name, lists in (("prompts", rows), ("targets", target_ids)):
            for number, tokens in enumerate(lists):
                check_ids(f"{name}[{number}]", tokens, self.backbone.vocab_size)
        return rows, target_ids

    # ----------------------------------------------------------------------------------------------------------------
    # Text and tokens

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a text as it is, or of a conversation in the chat template up to where the answer begins.

        Exactly as in training: no CLS, no SEP. Token ids are returned as they are. Raises ValueError, one line, for
        a conversation that is empty, has an unknown role or ends with an answer.
        """
        if isinstance(prompt, str):
            return self._encode_text(prompt)
        turns: list[Any] = list(prompt)
        if turns and all(isinstance(turn, int) for turn in turns):
            return turns
        check_messages(turns)
        if turns[-1]["role"] == "assistant":
            raise ValueError("the last turn of messages is the assistant's; end with a turn of the user to be answered")
        if not self.backbone.tokenizer.chat_template:
            raise ValueError("this model's tokenizer has no chat template; give a text instead of messages")
        return encode_chat(self.backbone.tokenizer, turns, add_generation_prompt=True)

    def decode(self, tokens: Sequence[int], stop: Sequence[str] = ()) -> str:
        """Text of a response up to its end of turn, EOS or stop string; special tokens and masks are left out."""
        text = self._text(tokens)
        ends = [(at, mark) for mark in self._ends(stop) if (at := text.find(mark)) >= 0]
        if not ends:
            return text
        at, mark = min(ends)
        # the chat template writes a line break between an answer and its end of turn
        return text[:at].rstrip() if mark in self._ends(()) else text[:at]

    def settled(self, tokens: Sequence[int], stop: Sequence[str] = ()) -> str:
        """The beginning of `decode` of every response that begins with these tokens, which have no mask.

        What may still become a part of its end is left out: white space, the beginning of an end of turn or of a stop
        string, what the tokenizer's decoder may rewrite, and characters of which bytes may be missing.
        """
        tokenizer, known = self.backbone.tokenizer, self._before_eos(tokens)
        goes_on = len(known) == len(tokens)
        # a byte that follows may change what the bytes before it are
        while goes_on and known and _BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(known[-1]))):
            known.pop()
        text = self._text(known)
        if goes_on and getattr(tokenizer, "clean_up_tokenization_spaces", False):
            text = text[: -len(" do n't ")]  # a clean-up that needs more text can reach so far back
        ends = [len(text.rstrip("\ufffd"))]
        for mark in self._ends(stop):
            at = text.find(mark)
            ends.append(at if at >= 0 else len(text) - overlap(text, mark))
        if goes_on:
            ends += [len(text) - overlap(text, mark) for mark in self._rewritten]
        return text[: min(ends)].rstrip()

    def answer_length(self, tokens: Sequence[int], stop: Sequence[str] = ()) -> int:
        """How many of a response's tokens carry its text, that is, are before its end."""
        tokens = self._before_eos(tokens)
        text, whole = self.decode(tokens, stop), self._text(tokens)
        if len(text) == len(whole):
            return len(tokens)
        return bisect_left(range(len(tokens)), len(text), key=lambda count: len(self._text(tokens[:count])))

    def _text(self, tokens: Sequence[int]) -> str:
        known = [token for token in self._before_eos(tokens) if token != self.backbone.mask_id]
        return self.backbone.tokenizer.decode(known, skip_special_tokens=True)

    def _before_eos(self, tokens: Sequence[int]) -> list[int]:
        return list(takewhile(lambda token: token not in self._end_ids, map(int, tokens)))

    @cached_property
    def end_of_turn(self) -> str | None:
        """The string that ends an answer, or None where only EOS does."""
        if self.backbone.sidecar:
            return self.backbone.sidecar.get("special_tokens", {}).get("end_of_turn")
        return END_OF_TURN if END_OF_TURN in (self.backbone.tokenizer.chat_template or "") else None

    @cached_property
    def _end_ids(self) -> frozenset[int]:
        """EOS, padding, and the end of turn where it is a special token, which a decoded text does not show."""
        ids = {self.backbone.eos_id, self.backbone.pad_id}
        if self.end_of_turn in self.backbone.tokenizer.all_special_tokens:
            ids.add(self.backbone.tokenizer.convert_tokens_to_ids(self.end_of_turn))
        return frozenset(ids)

    @cached_property
    def _end_marks(self) -> tuple[str, ...]:
        if not self.end_of_turn:
            return ()
        # tokenizers that put spaces around punctuation or drop case decode it differently
        decoded = self.backbone.tokenizer.decode(self._encode_text(self.end_of_turn), skip_special_tokens=True)
        return tuple(dict.fromkeys(mark for mark in (self.end_of_turn, decoded.strip()) if mark))

    @cached_property
    def _rewritten(self) -> tuple[str, ...]:
        return rewritten(self.backbone.tokenizer)

    def _ends(self, stop: Sequence[str]) -> list[str]:
        return [*self._end_marks, *(mark for mark in stop if mark)]

    def _encode_text(self, text: str) -> list[int]:
        return list(encode_text(self.backbone.tokenizer, text))

    def _prompt_rows(self, prompts: Sequence[Prompt], settings: GenerateSettings) -> list[list[int]]:
        _check_list(prompts, "prompts")
        rows = [self.encode_prompt(prompt) for prompt in prompts]
        room = self.max_length - settings.max_new_tokens
        for number, row in enumerate(rows):
            check_ids(f"prompts[{number}]", row, self.backbone.vocab_size)
            if len(row) > room:
                raise ValueError(
                    f"prompts[{number}] has {len(row)} tokens; with max_new_tokens = {settings.max_new_tokens} the "
                    f"model's context of {self.max_length} tokens leaves {max(0, room)}; shorten the prompt "
                    "or lower max_new_tokens"
                )
        return rows


def is_chat(prompt: Prompt) -> bool:
    """Whether a prompt is a conversation."""
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], dict)


def _check_list(values: Sequence[Any], name: str) -> None:
    if isinstance(values, str | dict) or (len(values) and isinstance(values[0], dict | int)):
        raise ValueError(f"{name} is a single value; give a list, e.g. {name}=[...] with one element")
