"""The common ways, re-stated: what published code for masked diffusion does, in its own order of operations.

Nothing here is slowed down on purpose: greedy decoding skips the float64 noise that published samplers draw, and the
scores of the mask token are ruled out exactly as ours are, so that both sides compute the same numbers. Each function
uses a stock `transformers` model and nothing of ours, rotary positions included (`stock_rotary`).
Sources: Nie et al. 2025 (arXiv:2502.09992), algorithms 2, 3 and 5 and the authors' code; Sahoo et al. 2024
(arXiv:2406.07524).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dllm.models.rotary import stock_rotary


@stock_rotary()
@torch.no_grad()
def monte_carlo(
    model: nn.Module,
    prompt: Sequence[int],
    target: Sequence[int],
    mask_id: int,
    *,
    draws: int = 128,
    batch: int = 32,
    generator: torch.Generator | None = None,
) -> float:
    """The bound on -log p(target | prompt) of one request, nats: `draws` random masks in batches of `batch` rows.

    Mask counts are spread evenly over a batch; logits are computed at every position and cross-entropy taken at the
    masked ones.
    """
    length = len(target)
    batch = min(batch, draws)
    rows = torch.tensor([[*prompt, *target]]).repeat(batch, 1)
    answer = torch.arange(rows.shape[1]) >= len(prompt)
    total = 0.0
    for _ in range(draws // batch):
        first = torch.randint(1, length + 1, (), generator=generator).float()
        count = torch.round(torch.linspace(float(first), float(first + (batch - 1) * length / batch), batch)).long()
        count = (count - 1) % length + 1
        masked = torch.zeros_like(rows, dtype=torch.bool)
        masked[:, answer] = torch.rand(batch, length, generator=generator).argsort(-1) < count[:, None]
        logits = model(input_ids=torch.where(masked, mask_id, rows)).logits.float()
        logits[..., mask_id] = -torch.inf
        nll = functional.cross_entropy(logits[masked], rows[masked], reduction="none")
        ratio = (count / length)[:, None].expand_as(rows)[masked]
        total += float((nll / ratio).sum()) / batch
    return total / (draws // batch)


@stock_rotary()
@torch.no_grad()
def sample_batch(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    block_size: int,
    mask_id: int,
    pad_id: int,
    *,
    hide_ahead: bool = False,
) -> list[list[int]]:
    """Greedy answers of `new_tokens` tokens, one token of each row per pass, the most confident first.

    The rows [B] are padded on the right, which the model does not attend to. Every pass runs over the full canvas,
    computes logits at all its positions and takes their softmax; nothing stops at an end marker. hide_ahead: the model
    does not attend to tokens right of the active block (a model whose training responses end at a block boundary wants
    it so); otherwise it sees masks there.
    """
    start = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    rows = [torch.tensor([*prompt, *[mask_id] * new_tokens]) for prompt in prompts]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    position = torch.arange(tokens.shape[1])[None]
    ragged = len(set(start.flatten().tolist())) > 1
    for block in range(0, new_tokens, block_size):
        end = start + min(block + block_size, new_tokens)
        attention = (position < (end if hide_ahead else start + new_tokens)).long() if ragged or hide_ahead else None
        for _ in range(min(block_size, new_tokens - block)):
            masked = (tokens == mask_id) & (position >= start) & (position < end)
            logits = model(input_ids=tokens, attention_mask=attention).logits.float()
            logits[..., mask_id] = -torch.inf
            proposed = logits.argmax(-1)
            confidence = functional.softmax(logits, -1).gather(-1, proposed[..., None])[..., 0]
            place = torch.where(masked, confidence, -torch.inf).argmax(-1, keepdim=True)
            tokens.scatter_(1, place, proposed.gather(1, place))
    return [row[first : first + new_tokens].tolist() for row, (first,) in zip(tokens, start.tolist(), strict=True)]


@stock_rotary()
def masked_loss(
    model: nn.Module, tokens: Tensor, attention: Tensor, masked: Tensor, share: Tensor, mask_id: int
) -> Tensor:
    """The training loss of a padded batch: logits and cross-entropy at all positions, then masked and weighted.

    tokens, attention, masked [B, L]; share [B] is what a nat of each row counts. Returns a scalar, a sum.
    """
    logits = model(input_ids=torch.where(masked, mask_id, tokens), attention_mask=attention.long()).logits
    nll = functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="none").view_as(tokens)
    return (nll * masked * share[:, None]).sum()


@stock_rotary()
def masked_loss_selected(
    model: nn.Module, tokens: Tensor, attention: Tensor, masked: Tensor, share: Tensor, mask_id: int
) -> Tensor:
    """As `masked_loss`, but cross-entropy at masked positions only, of logits that are computed everywhere."""
    logits = model(input_ids=torch.where(masked, mask_id, tokens), attention_mask=attention.long()).logits
    nll = functional.cross_entropy(logits[masked].float(), tokens[masked], reduction="none")
    return (nll * share[masked.nonzero(as_tuple=True)[0]]).sum()
