"""Hybrid diffusion: its loss is its bound in expectation, and without random tokens that of masked diffusion."""

import pytest
import torch

from dllm.config import Recipe
from dllm.core.batch import Batch, Noise, row_noise
from dllm.models.backbone import TokenNLL
from dllm.models.hybrid_loss import HybridLoss
from dllm.objectives.hybrid import Hybrid
from dllm.objectives.mdlm import MDLM
from dllm.schedules import SCHEDULES
from tests.hybrid_oracles import paper_bound, process_of
from tests.oracles import tabular_backbone
from tests.stock import stock_backbone
from tests.training_loss import training_loss


def hybrid_loss(backbone, share, batch, noise, recipe, denominator):
    objective = Hybrid(recipe, share, backbone.vocab_size)
    ids = {"mask_id": backbone.mask_id, "denominator": denominator}
    return training_loss(objective, HybridLoss(backbone), batch, noise, **ids)


@pytest.mark.parametrize("share,schedule", [(0.3, "linear"), (0.3, "cosine"), (1.0, "square")])
def test_drawn_noise_gives_the_bound_in_expectation(share, schedule):
    backbone, target, rows = tabular_backbone(2, seed=2), [1, 0], 30_000
    tokens = torch.tensor(target).expand(rows, -1)
    every = torch.ones_like(tokens, dtype=torch.bool)
    batch = Batch(tokens, every, every, torch.arange(rows))
    recipe = Recipe(normalisation="batch", schedule=schedule)
    terms = hybrid_loss(backbone, share, batch, row_noise(5, 0, batch.sample_ids, 2), recipe, rows)
    error = terms.rows.double().std().item() / rows**0.5
    expected = paper_bound(backbone, process_of(backbone, share), target)
    assert abs(terms.loss.item() - expected) < 4 * error
    assert error < 0.05 * expected  # so that the line above says something


@pytest.mark.parametrize("normalisation", ["token", "sequence", "batch"])
@pytest.mark.parametrize("corruption", ["exact", "bernoulli"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_random_tokens_it_is_masked_diffusion(corruption, schedule, normalisation):
    backbone = tabular_backbone(3)
    maskable = torch.arange(6) >= torch.tensor([[0], [2], [5], [6]])
    batch = Batch(torch.tensor([0, 2, 1, 1, 0, 2]).expand(4, -1), torch.ones_like(maskable), maskable, torch.arange(4))
    noise = row_noise(2, 0, batch.sample_ids, 6)
    recipe = Recipe(corruption=corruption, schedule=schedule, normalisation=normalisation)
    objectives = Hybrid(recipe, 0.0, backbone.vocab_size), MDLM(recipe)
    ours, masked = (objective.corrupt(batch, noise, mask_id=backbone.mask_id) for objective in objectives)
    assert torch.equal(ours.tokens, masked.tokens) and torch.equal(ours.targets, masked.targets)
    backbone.model.scale = 1.0
    logits_without_mask(backbone)
    terms = objectives[0].loss(HybridLoss(backbone), ours, denominator=7.0)
    expected = objectives[1].loss(TokenNLL(backbone), masked, denominator=7.0)
    for name in ("loss", "nll", "rows"):
        torch.testing.assert_close(getattr(terms, name), getattr(expected, name))


def logits_without_mask(backbone):
    """Training of masks takes the mask token's logit as it is; here it has none."""
    scores = backbone.model.logits_of
    mask = torch.tensor([backbone.mask_id])
    backbone.model.logits_of = lambda *inputs: scores(*inputs).index_fill(-1, mask, -1e4)


def test_prompt_and_padding_keep_their_tokens_and_every_target_counts():
    backbone = tabular_backbone(3)
    tokens = torch.tensor([[1, 2, 0, backbone.pad_id], [2, 1, 1, 0]]).repeat(300, 1)
    attention = tokens != backbone.pad_id
    maskable = attention & (torch.arange(4) >= 1)
    batch = Batch(tokens, attention, maskable, torch.arange(600))
    objective = Hybrid(Recipe(), 0.4, backbone.vocab_size)
    inputs = objective.corrupt(batch, row_noise(0, 0, batch.sample_ids, 4), mask_id=backbone.mask_id)
    assert torch.equal(inputs.tokens[~maskable], tokens[~maskable])
    assert torch.equal(maskable.nonzero(), torch.stack([inputs.row, inputs.position], 1))
    noised = inputs.tokens[maskable]
    replaced = (noised != backbone.mask_id) & (noised != tokens[maskable])
    assert (noised == backbone.mask_id).any() and replaced.any() and (noised == tokens[maskable]).any()


def test_a_row_has_the_same_noise_in_every_batch():
    backbone, objective = tabular_backbone(3), Hybrid(Recipe(), 0.4, 6)
    tokens = torch.randint(3, (8, 5), generator=torch.Generator().manual_seed(0))
    every = torch.ones_like(tokens, dtype=torch.bool)

    def noised(ids):
        batch = Batch(tokens[ids], every[ids], every[ids], torch.tensor(ids))
        return objective.corrupt(batch, row_noise(1, 0, batch.sample_ids, 5), mask_id=backbone.mask_id).tokens

    assert torch.equal(noised([0, 1, 2, 3, 4, 5, 6, 7])[[6, 2]], noised([6, 2]))


def test_gradients_are_finite_at_both_ends_and_do_not_depend_on_slices(tmp_path, monkeypatch):
    backbone = stock_backbone(tmp_path, "bert")
    tokens = torch.randint(6, backbone.vocab_size, (4, 7), generator=torch.Generator().manual_seed(0))
    every = torch.ones_like(tokens, dtype=torch.bool)
    batch = Batch(tokens, every, every, torch.arange(4))
    noise = Noise(torch.tensor([0.0, 0.3, 0.9, 1 - 2**-24]), row_noise(0, 0, batch.sample_ids, 7).place)
    found = []
    for height in (10**9, 5):
        monkeypatch.setattr("dllm.models.hybrid_loss.HEAD_LOGITS", height * backbone.vocab_size)
        backbone.model.zero_grad()
        hybrid_loss(backbone, 0.2, batch, noise, Recipe(), 28.0).loss.backward()
        found.append([p.grad.clone() for p in backbone.model.parameters() if p.grad is not None])
    for whole, sliced in zip(*found, strict=True):
        assert whole.isfinite().all()
        torch.testing.assert_close(whole, sliced, rtol=1e-3, atol=1e-6)
