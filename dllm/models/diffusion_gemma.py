"""DiffusionGemma: the class that transformers has under this name, with a tokenizer, as a backbone that is sampled.

An encoder reads what is there causally, a decoder with the same weights predicts a canvas of random tokens behind it.
It fills in no masks, and the doors of other backbones (`hidden`, `logits`, `nll`) are none of this one: `Prefix`
is. Pictures are not read; the vision tower is loaded all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm.config import ModelEntry
from dllm.families import Family
from dllm.models.backbone import Backbone
from dllm.models.tokenizers import read_tokenizer

NO_MASK = -1
"""The id of the mask token of a model that has none."""


def load(
    directory: Path,
    family: Family,
    config: Any,
    *,
    device: str | torch.device,
    dtype: torch.dtype | None,
    entry: ModelEntry | None,
    causal: bool,
) -> Backbone:
    """The checkpoint in a directory as a backbone, in evaluation mode.

    Raises ValueError, one line, for a damaged checkpoint, a tokenizer of another one, and where it is to be trained.
    """
    from safetensors import SafetensorError
    from transformers import DiffusionGemmaForBlockDiffusion

    if entry is not None or causal:
        raise ValueError(
            f"{directory}: {family.name} is sampled and scored, and not trained: dllm has no objective for it; start "
            "from another model"
        )
    stock: Any = DiffusionGemmaForBlockDiffusion
    try:
        model, report = stock.from_pretrained(
            directory, config=config, dtype=dtype or torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{directory}: the weights cannot be loaded ({first}); fetch them again") from None
    for kind, what in (("missing_keys", "lack"), ("unexpected_keys", "have")):
        if found := sorted(report[kind]):
            raise ValueError(
                f"{directory}: the weights {what} {found[0]} ({len(found)} in all), so that this is another kind of "
                f"checkpoint than {family.name}, or a damaged one: fetch it again"
            )
    text = model.config.get_text_config()
    tokenizer: Any = read_tokenizer(directory)
    if len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has {len(tokenizer)} tokens, the model {text.vocab_size}; they are not from "
            "the same checkpoint"
        )
    model = model.to(device).eval()
    _test_itself(model, directory)
    eos = tokenizer.convert_tokens_to_ids(family.end_token)
    return Backbone(
        model=model,
        tokenizer=tokenizer,
        family="decoder",
        prediction="in_place",
        mask_id=NO_MASK,
        eos_id=eos,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos,
        vocab_size=text.vocab_size,
        max_length=text.max_position_embeddings,
        sidecar=family.sidecar() | {"block_size": model.config.canvas_length},
        packable=False,
    )


class Prefix:
    """What is before a canvas: its tokens as the encoder has read them, their keys and values.

    rows: how many canvases are predicted behind it at once. Without tokens it is the start of a text alone.
    """

    def __init__(self, backbone: Backbone, rows: int = 1):
        from transformers import DynamicCache

        self.backbone, self.rows = backbone, rows
        self.model: Any = backbone.model
        self.cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))

    def __len__(self) -> int:
        return self.cache.get_seq_length()

    @torch.no_grad()
    def read(self, tokens: list[int]) -> int:
        """Add tokens behind those that are there; returns how many went through the model."""
        tokens = tokens if tokens or len(self) else [self.backbone.tokenizer.bos_token_id]
        if not tokens:
            return 0
        device = self.backbone.device
        given = torch.tensor([tokens], device=device).expand(self.rows, -1)
        positions = torch.arange(len(self), len(self) + len(tokens), device=device)[None]
        with self._precision():
            self.model.model.encoder(input_ids=given, past_key_values=self.cache, position_ids=positions)
        return len(tokens)

    @torch.no_grad()
    def predict(self, canvases: Tensor, before: Tensor | None = None) -> Tensor:
        """fp32 logits [B, S, V] of canvases [B, S]; before: what was predicted in the pass before, logits [B, S, V]."""
        positions = torch.arange(len(self), len(self) + canvases.shape[1], device=canvases.device)[None]
        signal = None if before is None else before.to(self.model.get_input_embeddings().weight.dtype)
        with self._precision():
            found = self.model(
                decoder_input_ids=canvases,
                self_conditioning_logits=signal,
                past_key_values=self.cache,
                decoder_position_ids=positions,
            )
        return found.logits.float()

    def _precision(self) -> Any:
        compute = self.backbone.compute
        return nullcontext() if compute is None else torch.autocast(self.backbone.device.type, compute)


@torch.no_grad()
def _test_itself(model: Any, directory: Path) -> None:
    """Raise ValueError, one line, unless a canvas is read in both directions and a prompt to the left only."""
    device, size = model.device, model.config.canvas_length
    prompt, canvas = torch.arange(3, 9, device=device)[None], torch.arange(size, device=device)[None] % 8 + 3

    def differ(read: Callable[[Tensor], Tensor], tokens: Tensor) -> bool:
        """Whether what is read at the first position moves, by more than rounding, when all others change."""
        changed = tokens.clone()
        changed[0, 1:] = tokens[0, 1:].flip(0)
        before, after = read(tokens).float(), read(changed).float()
        return bool((before - after).abs().max() > 0.01 * before.abs().max())

    decoded = differ(lambda tokens: model(input_ids=prompt, decoder_input_ids=tokens).logits[0, 0], canvas)
    encoded = differ(lambda tokens: model.model.encoder(input_ids=tokens).last_hidden_state[0, 0], prompt)
    if encoded or not decoded:
        raise ValueError(
            f"{directory}: {type(model).__name__} does not read its canvas in both directions and its prompt to the "
            "left only, as it was trained; use another attention implementation or version of transformers"
        )
