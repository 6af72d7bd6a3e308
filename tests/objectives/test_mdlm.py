"""The training loss of masked diffusion and its neighbours: expectations against enumeration, and what it reads."""

import itertools

import pytest
import torch

from dllm.config import Recipe
from dllm.core.batch import Batch, Noise, row_noise
from dllm.core.losses import denominator
from dllm.models.backbone import TokenNLL
from dllm.objectives.ar import AR
from dllm.objectives.mdlm import MDLM
from dllm.objectives.mlm import MLM
from dllm.schedules import SCHEDULES
from tests.oracles import markov_backbone, tabular_backbone
from tests.toys import ToyBackbone
from tests.training_loss import training_loss

TARGET = [2, 0, 1, 1]


def repeated(row, rows, prompt_length=0, first_id=0):
    """The same row many times as different samples; what follows the prompt is maskable."""
    tokens = torch.tensor(row).expand(rows, -1)
    maskable = torch.arange(len(row)).expand(rows, -1) >= prompt_length
    return Batch(tokens, torch.ones_like(maskable), maskable, torch.arange(first_id, first_id + rows))


def every_noise(length, prompt_length):
    """Noise in which every mask count and every order of the targets occurs once."""
    orders = list(itertools.permutations(range(length)))
    level = (torch.arange(length) + 0.5) / length
    place = torch.tensor(orders).float() / length
    place = torch.nn.functional.pad(place, (prompt_length, 0), value=0.5)
    return Noise(level.repeat_interleave(len(orders)), place.repeat(length, 1))


def raw_bound(backbone, prompt, target):
    """The bound by its definition under the raw logits, which training uses as they are (no mask suppression)."""
    total = 0.0
    for k in range(1, len(target) + 1):
        subsets = list(itertools.combinations(range(len(target)), k))
        for subset in subsets:
            row = [*prompt, *(backbone.mask_id if i in subset else x for i, x in enumerate(target))]
            log_p = backbone.model.logits_of(torch.tensor([row]))[0].double().log_softmax(-1)
            total += sum(-log_p[len(prompt) + i, target[i]].item() for i in subset) / k / len(subsets)
    return total


def loss_of(backbone, recipe, batch, noise, divisor=None):
    model = TokenNLL(backbone)
    return training_loss(
        MDLM(recipe), model, batch, noise, mask_id=backbone.mask_id, denominator=divisor or len(batch.tokens)
    )


@pytest.mark.parametrize("prompt", [[], [1, 0]])
def test_over_all_noise_the_exact_count_loss_is_the_bound(prompt):
    backbone = tabular_backbone(3, seed=2)
    noise = every_noise(len(TARGET), len(prompt))
    batch = repeated(prompt + TARGET, len(noise.level), len(prompt))
    terms = loss_of(backbone, Recipe(normalisation="batch"), batch, noise)
    assert terms.loss.item() == pytest.approx(raw_bound(backbone, prompt, TARGET), abs=1e-4)  # fp32 sum of 96 rows
    assert terms.rows.mean().item() == pytest.approx(terms.loss.item(), abs=1e-4)


@pytest.mark.parametrize("schedule", [None, *SCHEDULES])
def test_drawn_noise_gives_the_bound_in_expectation(schedule):
    """U2: exact-count (None) and Bernoulli corruption under every schedule, against enumeration."""
    backbone, prompt, rows = tabular_backbone(3, seed=2), [1, 0], 30_000
    changes = {"corruption": "bernoulli", "schedule": schedule, "time_floor": 1e-5} if schedule else {}
    batch = repeated(prompt + TARGET, rows, len(prompt))
    noise = row_noise(5, 0, batch.sample_ids, batch.tokens.shape[1])
    terms = loss_of(backbone, Recipe(normalisation="batch", **changes), batch, noise)
    error = terms.rows.double().std().item() / rows**0.5
    assert abs(terms.loss.item() - raw_bound(backbone, prompt, TARGET)) < 4 * error
    assert error < 0.05 * terms.loss.item()  # so that the line above says something


def test_an_ideal_model_has_the_expected_loss_minus_log_p():
    """U3: true conditionals of a Markov chain; the bound is tight for every row."""
    backbone = markov_backbone(3, seed=1)
    for target in ([0, 2, 1, 1], [2, 2, 2, 2], [1, 0], [1]):
        noise = every_noise(len(target), 0)
        batch = repeated(target, len(noise.level))
        loss = loss_of(backbone, Recipe(normalisation="batch"), batch, noise).loss.item()
        assert loss == pytest.approx(-backbone.model.log_probability(target), abs=1e-5)  # fp32 cross-entropy


@pytest.mark.parametrize("normalisation", ["token", "sequence", "batch"])
def test_a_row_of_one_target_has_its_nll_as_loss_whatever_the_noise(normalisation):
    """U6."""
    backbone = tabular_backbone(3, seed=3)
    row = torch.tensor([[1, 2, backbone.mask_id]])
    nll = -backbone.model.logits_of(row).log_softmax(-1)[0, 2, 0].item()
    batch = repeated([1, 2, 0], 50, prompt_length=2)
    noise = Noise(torch.linspace(0, 1 - 2**-24, 50), torch.rand(50, 3))
    terms = loss_of(backbone, Recipe(normalisation=normalisation), batch, noise, divisor=50)
    assert terms.loss.item() == pytest.approx(nll, abs=1e-5)
    torch.testing.assert_close(terms.rows, torch.full((50,), nll), atol=1e-5, rtol=0)


def test_the_loss_is_its_rows_bounds_under_the_three_normalisations():
    """Of rows with bound l and n targets: sum l / sum n, mean of l / n, mean of l."""
    backbone = tabular_backbone(3)
    maskable = torch.arange(6) >= torch.tensor([[0], [2], [5], [6]])
    batch = Batch(torch.tensor([0, 2, 1, 1, 0, 2]).expand(4, -1), torch.ones_like(maskable), maskable, torch.arange(4))
    noise, targets = row_noise(2, 0, batch.sample_ids, 6), maskable.sum(-1)
    for name in ("token", "sequence", "batch"):
        terms = loss_of(backbone, Recipe(normalisation=name), batch, noise, denominator(targets, name))
        per_target = terms.rows / targets.clamp(min=1)
        expected = {"token": terms.rows.sum() / 11, "sequence": per_target.mean(), "batch": terms.rows.mean()}
        torch.testing.assert_close(terms.loss, expected[name])
        assert terms.rows[:3].min() > 0 and terms.rows[3] == 0


def test_prompt_and_padding_are_never_masked_and_cost_nothing():
    backbone = tabular_backbone(3)
    tokens = torch.tensor([[1, 2, 0, backbone.pad_id], [2, 1, 1, 0]]).repeat(200, 1)
    attention = tokens != backbone.pad_id
    maskable = attention & (torch.arange(4) >= 1)
    batch = Batch(tokens, attention, maskable, torch.arange(400))
    inputs = MDLM(Recipe()).corrupt(batch, row_noise(0, 0, batch.sample_ids, 4), mask_id=backbone.mask_id)
    masked = inputs.tokens == backbone.mask_id
    assert (
        torch.equal(masked.nonzero(), torch.stack([inputs.row, inputs.position], 1)) and not (masked & ~maskable).any()
    )
    assert torch.equal(inputs.tokens[~masked], tokens[~masked]) and torch.equal(inputs.targets, tokens[masked])
    assert masked.any(0).tolist() == [False, True, True, True]
    assert inputs.layout.lengths == (3, 4) * 200


def test_uniform_weight_is_plain_cross_entropy_at_the_masked_tokens():
    backbone, batch = tabular_backbone(3), repeated(TARGET, 64)
    noise = row_noise(0, 0, batch.sample_ids, 4)
    terms = loss_of(backbone, Recipe(weight="uniform", normalisation="batch"), batch, noise, divisor=64)
    assert terms.loss.item() == pytest.approx(terms.nll.item() / 64, rel=1e-5)
    assert terms.masked == ((noise.level * 4).long() + 1).sum()


def test_the_nll_of_a_loss_is_summed_over_its_masked_tokens():
    backbone, batch = tabular_backbone(3), repeated(TARGET, 32)
    noise = Noise(torch.full((32,), 1 - 2**-24), torch.rand(32, 4))  # everything masked, weight 1
    terms = loss_of(backbone, Recipe(), batch, noise, divisor=1.0)
    assert terms.masked == 128
    assert terms.nll.item() == pytest.approx(terms.loss.item()) == pytest.approx(terms.rows.sum().item())


def test_mlm_masks_its_share_of_every_row():
    backbone, batch = tabular_backbone(3), repeated([0, 1, 2, 0, 1, 2, 0, 1, 2, 0], 40)
    noise = row_noise(0, 0, batch.sample_ids, 10)
    terms = training_loss(
        MLM(Recipe(), 0.25), TokenNLL(backbone), batch, noise, mask_id=backbone.mask_id, denominator=400.0
    )
    assert terms.masked == 3 * 40
    assert terms.loss.item() == pytest.approx(terms.nll.item() / 120, rel=1e-5)  # the mean over masked tokens


def test_ar_scores_every_target_but_the_first_of_a_row_from_the_left():
    model = markov_backbone(3, seed=1).model

    class Causal(torch.nn.Module):
        """Next-token logits of the chain: position i scores token i + 1."""

        def logits_of(self, tokens, attention=None):
            return torch.nn.functional.pad(model.transition.log()[tokens], (0, 3), value=-1e4)

    backbone = ToyBackbone(Causal(), 3, 4, 5, 6, prediction="next")

    row = [0, 2, 1, 1, 0]
    batch = repeated(row, 2)
    noise = row_noise(0, 0, batch.sample_ids, 5)
    counted = AR().target_counts(batch.maskable.sum(-1), torch.zeros(2, dtype=torch.long))
    terms = training_loss(AR(), TokenNLL(backbone), batch, noise, mask_id=3, denominator=float(counted.sum()))
    from_the_left = model.initial[0].log().item() - model.log_probability(row)
    assert terms.masked == 8 and terms.nll.item() == pytest.approx(2 * from_the_left, abs=1e-5)
    # ten tokens, of which eight have a prediction: the loss is the mean over these
    assert terms.loss.item() == pytest.approx(from_the_left / 4, abs=1e-5)
