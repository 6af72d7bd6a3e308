"""Edit heads: what Edit Flows adds to a stock backbone, without modelling code.

Three rates per token (insert right of it, delete it, substitute it) come from one linear layer; the tokens to insert
and to substitute come from the backbone's own LM head behind one small adapter each. Time scales and shifts what these
three see, and leaves the backbone alone: in the tabular tests this learnt more than time added to the input embeddings,
and many times more than no time. What is new starts at zero: every rate is then `START_RATE`, and both token
distributions are the backbone's own.
Source: Havasi et al. 2025 (arXiv:2506.09018); modulation by time as in Peebles and Xie 2022 (arXiv:2212.09748).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dllm.core.packing import Layout
from dllm.models.backbone import Backbone

HEADS_FILE = "edit_heads.safetensors"
START_RATE = 0.1
"""Every normalised rate before training: few edits, and no rate so small that its logarithm dominates the loss."""

_FREQUENCIES = 32


@dataclass(frozen=True, eq=False)
class TimedHidden:
    """Hidden states [T, D] of packed tokens, the time states [B, D] of their rows, and the row [T] of each."""

    hidden: Tensor
    state: Tensor
    row: Tensor


class TimedNorm(nn.Module):
    """norm(x) (1 + scale(t)) + shift(t), a plain norm at the start; rows [N, D] and the time state [N, D] of each."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.modulation = _zero(nn.Linear(width, 2 * width))

    def forward(self, rows: Tensor, state: Tensor) -> Tensor:
        scale, shift = self.modulation(state).chunk(2, -1)
        return self.norm(rows) * (1 + scale) + shift


class Adapter(nn.Module):
    """x + up(silu(down(norm(x, t)))), the identity at the start; rows [N, D] to rows [N, D]."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.norm = TimedNorm(width)
        self.down = nn.Linear(width, rank)
        self.up = _zero(nn.Linear(rank, width))

    def forward(self, rows: Tensor, state: Tensor) -> Tensor:
        return rows + self.up(nn.functional.silu(self.down(self.norm(rows, state))))


class EditHeads(nn.Module):
    """Time, three rates and two token adapters, in fp32, for hidden states of a given width."""

    def __init__(self, width: int, rank: int = 64):
        super().__init__()
        self.sizes = {"width": width, "rank": rank}
        self.time = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU())
        self.norm = TimedNorm(width)
        self.rates = _zero(nn.Linear(width, 3))
        nn.init.constant_(self.rates.bias, math.log(START_RATE))
        self.insert = Adapter(width, rank)
        self.substitute = Adapter(width, rank)

    def on(self, backbone: Backbone) -> EditLoss:
        """These heads on a backbone."""
        return EditLoss(backbone, self)

    def time_state(self, time: Tensor) -> Tensor:
        """[B, D] from times [B] in [0, 1]: sines and cosines of a tenth to three turns, and a layer."""
        turns = torch.logspace(-1, 0.5, _FREQUENCIES, device=time.device)
        angle = 2 * math.pi * time.float()[:, None] * turns
        return self.time(torch.cat([angle.sin(), angle.cos()], -1))

    def log_rates(self, timed: TimedHidden) -> Tensor:
        """fp32 logarithms [T, 3] of the rates to insert, delete and substitute."""
        # one modulation per row, not per token
        scale, shift = self.norm.modulation(timed.state).chunk(2, -1)
        rows = self.norm.norm(timed.hidden.float())
        return self.rates(rows * (1 + scale.index_select(0, timed.row)) + shift.index_select(0, timed.row))

    def token_rows(self, timed: TimedHidden, place: Tensor, read: Tensor, insert: Tensor) -> Tensor:
        """Rows [N, D] as the LM head is to see them: hidden states at `read` [N] for edits at `place` [N].

        An insertion where insert [N], else a substitution.
        """
        # plain indexing: its gradient is summed in a fixed order, unlike index_select's
        rows, state = timed.hidden[read], timed.state[timed.row.index_select(0, place)]
        wide = rows.float()
        return torch.where(insert[:, None], self.insert(wide, state), self.substitute(wide, state)).to(rows.dtype)


class EditLoss(nn.Module):
    """A backbone and its edit heads: what the edit loss is made of. `forward` is all that training's wrappers see.

    Layouts count the front token of each row, so that the first token of a text has one to its left.
    """

    def __init__(self, backbone: Backbone, heads: EditHeads):
        super().__init__()
        self.backbone, self.model, self.heads = backbone, backbone.model, heads

    def forward(
        self,
        tokens: Tensor,
        layout: Layout,
        time: Tensor,
        place: Tensor,
        insert: Tensor,
        which: Tensor,
        targets: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Log rates [T, 3] of every token, and -log Q [N] of targets [N]; fp32 nats.

        tokens [B, L]; time [B]. The LM head runs at U packed places [U], for an insertion right of the place where
        insert [U], else for a substitution there; which [N] says whose distribution scores each target, since
        insertions that share an anchor share it.
        """
        timed, log_rates = self.rates(tokens, layout, time)
        logits = self.token_logits(timed, place, insert)
        return log_rates, logits.logsumexp(-1)[which] - logits[which, targets]

    def rates(self, tokens: Tensor, layout: Layout, time: Tensor) -> tuple[TimedHidden, Tensor]:
        """The packed tokens' hidden states with their time, for `token_logits`, and their log rates [T, 3]."""
        hidden = self.backbone.hidden(tokens, layout)
        with _full_precision(hidden):  # three numbers per token, which exp() is taken of
            timed = TimedHidden(hidden, self.heads.time_state(time), layout.flat // layout.width)
            return timed, self.heads.log_rates(timed)

    def token_logits(self, timed: TimedHidden, place: Tensor, insert: Tensor) -> Tensor:
        """fp32 logits [N, V] of the token to insert right of the place [N], or to put there."""
        # a head that predicts ahead reads the token at i from i - 1, and what follows i from i
        read = torch.where(insert, place, place - 1) if self.backbone.prediction == "next" else place
        with _full_precision(timed.hidden):
            rows = self.heads.token_rows(timed, place, read, insert)
        return self.backbone.head_logits(rows)


def _full_precision(like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, enabled=False)


def new_edit_heads(model: nn.Module, rank: int = 64, seed: int = 0) -> EditHeads:
    """Seeded edit heads that fit a stock model, on its device."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        config: Any = model.config
        return EditHeads(config.hidden_size, rank).to(next(model.parameters()).device)


def save_edit_heads(heads: EditHeads, directory: str | Path, state: dict[str, Tensor] | None = None) -> Path:
    """Write the heads and their sizes beside a checkpoint; returns the file. state: their tensors, if elsewhere."""
    path = Path(directory) / HEADS_FILE
    tensors = {name: value.detach().cpu().contiguous() for name, value in (state or heads.state_dict()).items()}
    # one entry: several would be written in another order by every process
    save_file(tensors, path, metadata={"sizes": json.dumps(heads.sizes, sort_keys=True)})
    return path


def load_edit_heads(directory: str | Path, model: nn.Module) -> EditHeads:
    """The heads beside a checkpoint, on its model's device, in evaluation mode.

    Raises ValueError, one line, if there are none, or if they are damaged or not made for this model.
    """
    path = Path(directory) / HEADS_FILE
    if not path.exists():
        raise ValueError(f"{path}: missing; a checkpoint of edit_flows has its heads there: train or fetch it again")
    try:
        with safe_open(path, "pt") as file:
            sizes = json.loads((file.metadata() or {})["sizes"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        heads = EditHeads(**sizes)
        heads.load_state_dict(tensors)
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, KeyError) as error:
        first = " ".join(str(error).split())[:160]
        raise ValueError(f"{path}: damaged ({first}); train or fetch this checkpoint again") from None
    if sizes["width"] != model.config.hidden_size:
        raise ValueError(
            f"{path}: heads of width {sizes['width']}, but the model has {model.config.hidden_size}; "
            "they are not from the same checkpoint"
        )
    return heads.to(next(model.parameters()).device).eval()


def edit_loss(backbone: Backbone) -> nn.Module:
    """A backbone with its edit heads, to be asked for rates and tokens.

    Raises ValueError, one line, for a backbone without heads.
    """
    if backbone.edit_heads is None:
        raise ValueError("this checkpoint has no edit heads; algorithm = 'edit_flows' needs one trained with it")
    return backbone.edit_heads.on(backbone)


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
