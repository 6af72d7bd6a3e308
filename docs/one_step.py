"""One training step of masked diffusion, from rows on disk to moved weights: python docs/one_step.py MODEL DATA"""

import sys

import torch

from dllm.config import Recipe
from dllm.core.batch import masked_inputs, row_noise
from dllm.core.corrupt import apply_mask, corrupted
from dllm.core.losses import denominator
from dllm.data.collate import ResponseEnd, collate, ended_lengths, epoch_batches
from dllm.data.tokens import open_rows
from dllm.models.backbone import TokenNLL
from dllm.models.load import load_backbone


def one_step(model: str, data: str, *, rows: int = 8, seed: int = 42, epoch: int = 0):
    backbone, disk = load_backbone(model), open_rows(data, "train")
    # 1. a batch: some rows of the epoch, padded on the right; the tokens of a text or of an answer may be masked
    numbers = epoch_batches(disk.lengths, rows, seed, epoch, grouped=False)[0]
    end = ResponseEnd("one", backbone.eos_id) if disk.prompts.any() else None
    batch = collate(disk, numbers, ended_lengths(disk, numbers, end, epoch), pad_id=backbone.pad_id, end=end)
    # 2. noise: a function of (seed, epoch, row), so that neither batch nor device changes it
    noise = row_noise(seed, epoch, batch.sample_ids, batch.tokens.shape[1])
    # 3. corruption: k of a row's n targets are masked, k uniform in 1..n; n / k makes the sum of their nll a bound
    found = corrupted(batch.maskable, noise.level, noise.place, Recipe())
    x_t = apply_mask(batch.tokens, found.masked, backbone.mask_id)
    # 4. forward: nats at the masked tokens, [N]; rows are packed, and the head runs at these tokens alone
    inputs = masked_inputs(batch, x_t, found.masked, found.weight, found.weight)
    trained = TokenNLL(backbone).train()
    nll = trained(inputs.tokens, inputs.layout, inputs.row, inputs.position, inputs.targets)
    # 5. loss: the bound of every row, per target of the batch
    loss = (nll * found.weight[inputs.row]).sum() / denominator(batch.maskable.sum(-1), "token")
    # 6. backward, and the weights move
    loss.backward()
    torch.optim.AdamW(trained.parameters(), lr=1e-3).step()
    return loss.item(), trained


if __name__ == "__main__":
    print(f"{one_step(*sys.argv[1:])[0]:.3f} nats per token")
