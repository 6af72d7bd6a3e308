"""DiffusionGemma: the class that transformers has under this name, with a tokenizer, as a backbone.

An encoder reads what is there causally, a decoder with the same weights predicts a canvas of random tokens behind it.
It fills in no masks, and the doors of other backbones (`hidden`, `logits`, `nll`) are none of this one: `Prefix`
is, and `renoise_loss.RenoiseLoss` in training. Pictures are not read; the vision tower is loaded all the same, and
never trained.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm.config import ModelEntry
from dllm.families import RENOISING_PASSES, Family
from dllm.models.backbone import Backbone
from dllm.models.tokenizers import read_tokenizer

NO_MASK = -1
"""The id of the mask token of a model that has none."""

TWINS = ("model.decoder", "model.encoder.language_model")
"""The text part that is trained, and the other that has the same weights."""


def load(
    directory: Path,
    family: Family,
    config: Any,
    *,
    device: str | torch.device,
    dtype: torch.dtype | None,
    entry: ModelEntry | None,
    causal: bool,
    sidecar: dict[str, Any],
) -> Backbone:
    """The checkpoint in a directory as a backbone, in evaluation mode.

    sidecar: what training noted beside it; empty if dLLM did not train it. Raises ValueError, one line, for a damaged
    checkpoint, a tokenizer of another one, special tokens of an entry that are not its own, and where it is to be
    trained causally.
    """
    if causal:
        raise ValueError(
            f"{directory}: {family.name} is trained with algorithm: {family.algorithm} only, and not causally; set "
            "that, or start from another model"
        )
    noted = sidecar or family.sidecar()
    tokens = (noted["special_tokens"]["mask"], noted["special_tokens"]["eos"], noted["chat_template"])
    if entry is not None and entry.special != tokens:
        raise ValueError(
            f"{directory}: mask_token, end_token, chat_template of the model's entry are {', '.join(entry.special)}, "
            f"and those of this {family.name} are {', '.join(tokens)}; set them in the entry"
        )
    model = _with_weights(directory, family, config, dtype or torch.float32)
    text = model.config.get_text_config()
    tokenizer: Any = read_tokenizer(directory)
    if len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has {len(tokenizer)} tokens, the model {text.vocab_size}; they are not from "
            "the same checkpoint"
        )
    model = model.to(device).eval()
    _test_itself(model, directory)
    eos = tokenizer.convert_tokens_to_ids(tokens[1])
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
        sidecar=noted | {"block_size": model.config.canvas_length},
        packable=False,
        twins=TWINS,
    )


def _with_weights(directory: Path, family: Family, config: Any, dtype: torch.dtype | str) -> Any:
    """The class with the weights in a directory; ValueError, one line, where they are not exactly its own."""
    from safetensors import SafetensorError
    from transformers import DiffusionGemmaForBlockDiffusion

    stock: Any = DiffusionGemmaForBlockDiffusion
    try:
        model, report = stock.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",  # which takes the patterns of training as they are
            output_loading_info=True,
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
    return model


def new_diffusion_gemma(settings: dict[str, Any], tokenizer: Any) -> Any:
    """The class with random weights: settings as config.json has them, but for the tokens, which are the tokenizer's.

    Raises ValueError, one line, for settings that the class does not take.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    tokens = {key: tokenizer.eos_token_id for key in ("eos_token_id", "pad_token_id", "bos_token_id")}
    tokens["vocab_size"] = -(-len(tokenizer) // 8) * 8
    try:
        sizes = {key: value for key, value in settings.items() if key != "model_type"}
        config = DiffusionGemmaConfig(**sizes | {"text_config": settings["text_config"] | tokens})
        return DiffusionGemmaForBlockDiffusion(config)
    except (StrictDataclassError, ValueError, TypeError, LookupError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"new: no diffusion_gemma can be made of these settings ({reason[:200]})") from None


def process_steps(backbone: Backbone) -> int:
    """N, the passes of the process that scores and training know: the most that the checkpoint takes for a canvas."""
    stated = getattr(getattr(backbone.model, "generation_config", None), "max_denoising_steps", None)
    return stated or RENOISING_PASSES


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
