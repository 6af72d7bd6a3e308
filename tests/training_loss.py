"""The loss of a batch in one call: the noise and the corruption on the host, the loss on the batch's device."""

from dllm.core.batch import Batch, LossTerms, Noise


def training_loss(objective, model, batch: Batch, noise: Noise, *, mask_id: int, denominator: float) -> LossTerms:
    """`loss` of what `corrupt` makes of a batch."""
    noise = Noise(noise.level.cpu(), noise.place.cpu())
    inputs = objective.corrupt(batch.to("cpu"), noise, mask_id=mask_id).to(batch.tokens.device)
    return objective.loss(model, inputs, denominator=denominator)
