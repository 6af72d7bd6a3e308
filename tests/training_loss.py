"""The loss of a batch in one call: the noise and the corruption on the host, the loss on the batch's device."""

import torch
from torch import Tensor

from dllm.core.batch import Batch, LossTerms, Noise


def training_loss(objective, model, batch: Batch, noise: Noise, *, mask_id: int, denominator: float) -> LossTerms:
    """`loss` of what `corrupt` makes of a batch."""
    noise = Noise(noise.level.cpu(), noise.place.cpu())
    inputs = objective.corrupt(batch.to("cpu"), noise, mask_id=mask_id).to(batch.tokens.device)
    return objective.loss(model, inputs, denominator=denominator)


def dense_masked_loss(logits: Tensor, x_0: Tensor, masked: Tensor, share: Tensor) -> Tensor:
    """The textbook form: cross-entropy everywhere, then masked, weighted and summed.

    logits [B, L, V]; x_0, masked [B, L]; share [B]. Returns a scalar.
    """
    nll = -torch.log_softmax(logits.float(), -1).gather(-1, x_0[..., None])[..., 0]
    return (nll * masked * share[:, None]).sum()
