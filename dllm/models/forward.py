"""The forward pass as algorithms see it: hidden states once, the LM head only where it is asked for.

This is the only place that knows how a stock class is put together, and the only one that shifts predictions: for
every backbone, the logits returned for position i score token i.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

HEADS = {
    "bert": lambda model, rows: model.cls(rows),
    "roberta": lambda model, rows: model.lm_head(rows),
    "modernbert": lambda model, rows: model.decoder(model.head(rows)),
}
"""LM head of masked-LM classes whose head is more than a linear layer: model type -> (model, rows [N, D]) -> [N, V]."""


def hidden_states(model: nn.Module, tokens: Tensor, attention: Tensor | None = None) -> Tensor:
    """Last hidden states [B, L, D] of tokens [B, L]; attention [B, L] bool marks real tokens (None: all are real).

    Padding may only stand on the right, so that positions count from the row's start.
    """
    if hasattr(model, "dllm_hidden"):
        return model.dllm_hidden(tokens, attention)
    inner = _unwrapped(model)
    mask = None if attention is None or bool(attention.all()) else attention.long()
    positions = {}
    if inner.config.model_type == "roberta":
        # it counts positions over tokens that are not its padding token, which is our EOS and may stand inside a row
        first = inner.config.pad_token_id + 1
        positions["position_ids"] = torch.arange(first, first + tokens.shape[1], device=tokens.device)[None]
    base = getattr(inner, inner.base_model_prefix)
    return base(input_ids=tokens, attention_mask=mask, **positions).last_hidden_state


def head_logits(model: nn.Module, rows: Tensor) -> Tensor:
    """Logits [N, V] of hidden rows [N, D]."""
    if hasattr(model, "dllm_logits"):
        return model.dllm_logits(rows)
    inner = _unwrapped(model)
    head = HEADS.get(inner.config.model_type)
    if head is not None:
        return head(inner, rows)
    linear = inner.get_output_embeddings()
    if linear is None:
        raise ValueError(
            f"model_type = {inner.config.model_type!r} has no known LM head; allowed: {', '.join(sorted(HEADS))} or a "
            "class whose head is its output embedding; add a line to dllm.models.forward.HEADS"
        )
    return linear(rows)


def logits_at(model: nn.Module, hidden: Tensor, where: Tensor, prediction: str = "in_place") -> Tensor:
    """fp32 logits [N, V] for the positions marked in `where` [B, L], in row-major order.

    prediction: `in_place` reads position i, `next` reads position i - 1 (the first position then has no prediction
    of its own and reads itself).
    """
    row, position = where.nonzero(as_tuple=True)
    if prediction == "next":
        position = (position - 1).clamp(min=0)
    return head_logits(model, hidden[row, position]).float()


class Scores(nn.Module):
    """A backbone whose `forward` returns logits at chosen positions.

    Wrappers such as DistributedDataParallel only see what goes through `forward`, so training calls this and
    everything else calls the functions above.
    """

    def __init__(self, model: nn.Module, prediction: str = "in_place"):
        super().__init__()
        self.model = model
        self.prediction = prediction

    def forward(self, tokens: Tensor, attention: Tensor | None, where: Tensor) -> Tensor:
        return logits_at(self.model, hidden_states(self.model, tokens, attention), where, self.prediction)


def _unwrapped(model: nn.Module) -> nn.Module:
    while isinstance(model, Scores) or hasattr(model, "module"):
        model = model.model if isinstance(model, Scores) else model.module
    return model


def is_bidirectional(model: nn.Module, vocab_size: int) -> bool:
    """Whether the first logits move when the last token changes, with padding in the batch; a start-up self-test."""
    device = next(model.parameters()).device
    tokens = torch.arange(1, 17, device=device).remainder(vocab_size).view(2, 8)
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 7) % vocab_size
    attention = torch.ones_like(tokens, dtype=torch.bool)
    attention[1, 5:] = False
    with torch.no_grad():
        before, after = (hidden_states(model, t, attention)[0, 0] for t in (tokens, other))
    return not torch.equal(before, after)
