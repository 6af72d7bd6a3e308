"""Losses: cross-entropy at masked tokens, and what a batch's sum is divided by."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Normalisation = Literal["token", "sequence", "batch"]


def row_shares(weight: Tensor, targets: Tensor, normalisation: Normalisation) -> Tensor:
    """What one nat at a masked token of each row contributes before the denominator: [B].

    weight [B] is the NELBO weight of the row, targets [B] its number of maskable tokens. `token` and `batch` count a
    nat as it is; `sequence` divides it by the row's number of targets.
    """
    return weight / targets.clamp(min=1) if normalisation == "sequence" else weight


def denominator(targets: Tensor, normalisation: Normalisation) -> float:
    """What the summed loss of a batch is divided by: its targets (`token`) or its rows (`sequence`, `batch`).

    targets [B] are the rows' numbers of maskable tokens, over the whole global batch, so that neither accumulation
    nor the number of devices changes the loss. Source: Sahoo et al. 2024 (`token`); Nie et al. 2025,
    arXiv:2502.09992, algorithm 2 (`sequence`).
    """
    return float(targets.sum()) if normalisation == "token" else float(len(targets))
