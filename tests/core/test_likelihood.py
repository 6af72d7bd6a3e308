"""Likelihood designs: every estimator has the same expectation."""

import numpy
import pytest
import torch

from dllm.config import LikelihoodSettings
from dllm.core.likelihood import (
    ARRANGEMENT_LIMIT,
    ESTIMATORS,
    LATTICE,
    _arrangements,
    _windows_in_turn,
    budget_for,
    estimate,
    estimator_for,
    likelihood_design,
)
from tests.oracles import enumerated_nelbo, tabular_backbone


def random_table(length, seed=0):
    """nll_i(S) of a random model as a table [2^L, L], and sum over k of g_k by its definition."""
    backbone = tabular_backbone(3, seed)
    target = [i % 3 for i in range(length)]
    masks = (torch.arange(2**length)[:, None] >> torch.arange(length)) & 1 == 1
    tokens = torch.where(masks, backbone.mask_id, torch.tensor(target))
    logits = backbone.model.logits_of(tokens)
    logits[..., backbone.mask_id] = -torch.inf
    nll = -logits.log_softmax(-1)[..., : max(target) + 1].gather(
        -1, torch.tensor(target).expand(2**length, -1)[..., None]
    )
    return nll[..., 0].double(), enumerated_nelbo(backbone, [], target)


def nll_of(design, table):
    """Cheap passes have another model's nll, only a little like those of the exact ones."""
    found = (design.masked.long() << torch.arange(design.masked.shape[-1])).sum(-1)
    if not design.cheap:
        return table[found]
    cheap = table / 2 + random_table(table.shape[1], seed=99)[0]
    return torch.where(design.partial[:, None], cheap[found], table[found])


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_enumeration_is_the_definition(length):
    table, truth = random_table(length)
    design = likelihood_design(length, 0, LikelihoodSettings(estimator="enumerate"))
    nats, error = estimate(design, nll_of(design, table))
    assert nats == pytest.approx(truth, abs=1e-5) and error == 0  # fp32 table
    assert len(design.masked) == 2**length - 1


CASES = [
    ("chain", 3, {"budget": 5}),
    ("chain", 5, {"budget": 9}),
    ("chain", 6, {"budget": 64}),
    ("cover", 3, {"budget": 6}),
    ("cover", 4, {"budget": 64}),
    ("cover", 5, {"budget": 13}),
    ("cover", 6, {"budget": 9}),
    ("cover", 6, {"budget": 26}),
    ("cover", 8, {"budget": 3}),
    ("cover", 9, {"budget": 14}),
    ("cover", 9, {"budget": 64}),
    ("cover", 9, {"budget": 300}),
    ("lattice", 3, {"budget": 7}),
    ("lattice", 4, {"budget": 9}),
    ("lattice", 5, {"budget": 5}),
    ("lattice", 6, {"budget": 14}),
    ("lattice", 9, {"budget": 9}),
    ("lattice", 9, {"budget": 64}),
    ("multilevel", 3, {"budget": 5}),
    ("multilevel", 5, {"budget": 9}),
    ("multilevel", 6, {"budget": 14}),
    ("multilevel", 7, {"budget": 300}),
    ("multilevel", 9, {"budget": 30}),
    ("mc", 4, {"mc_draws": 4, "mc_batch": 4}),
    ("mc", 5, {"mc_draws": 8, "mc_batch": 1}),
]


@pytest.mark.parametrize("name,length,options", CASES, ids=lambda x: str(x))
def test_every_estimator_is_unbiased_and_its_error_is_not_too_small(name, length, options):
    table, truth = random_table(length, seed=length)
    settings = LikelihoodSettings(estimator=name, **options)
    design = likelihood_design(length, torch.arange(4000), settings)
    nats, errors = estimate(design, nll_of(design, table))
    assert abs(nats.mean().item() - truth) < 4 * nats.std().item() / len(nats) ** 0.5 + 1e-5
    ratio = (errors**2).mean().sqrt() / nats.std()
    if name == "cover" and options["budget"] <= ARRANGEMENT_LIMIT:
        assert (
            0.6 < ratio < 1.6
        )  # what it assumes about the model, that its nll are smooth, is wrong for a random table
    elif name in ("lattice", "multilevel"):
        assert 0.9 < ratio < 2  # its windows are drawn systematically: less noisy than if they were independent
    elif name == "chain" and options["budget"] < 2 * (2 * length - 1):
        assert 0.9 < ratio < 4  # of a single pair of orders it is cautious
    else:
        assert 0.9 < ratio < 1.12  # of independent units it is right, up to the noise of 4000 draws


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("length", [1, 2, 7, 33, 100])
def test_the_weights_of_a_design_add_up_to_the_length(name, length):
    """A model with the same nll everywhere has the bound L x nll, whatever is masked."""
    if (name, length) in {("enumerate", 33), ("enumerate", 100)} or (name == "exact" and length > 1):
        with pytest.raises(ValueError, match="use .*chain, cover or auto"):
            likelihood_design(length, 0, LikelihoodSettings(estimator=name))
        return
    design = likelihood_design(length, 5, LikelihoodSettings(estimator=name, budget=200))
    assert not (design.scored & ~design.masked).any() and not design.weight[~design.scored].any()
    if name != "mc":  # whose batches are spread over the sizes only on average
        assert design.weight.sum().item() == pytest.approx(length)
    if name == "mc":
        assert (design.weight.sum(-1) * len(design.weight) - length).abs().max() < 1e-9


@pytest.mark.parametrize("budget", [3, 4, 9, 16, 23, 64])
@pytest.mark.parametrize("length", [2, 5, 8, 13, 20])
def test_the_windows_of_a_cover_weigh_every_size_equally(length, budget):
    """Exactly, over the offsets of the sizes: this is what makes any choice of the single weights unbiased."""
    sizes = torch.zeros(length, dtype=torch.float64)
    table = _arrangements(length, budget - 1)
    share = torch.diff(table.below, prepend=torch.zeros(1, dtype=torch.float64))
    for masked, weight, probability in zip(table.masked, table.weight, share, strict=True):
        sizes.index_add_(0, (masked.sum(-1) - 1).clamp(min=0), probability * weight.sum(-1))
        assert not weight[~masked].any()
        assert weight.sum(0) == pytest.approx(1, abs=5e-3)  # a position that scores the same everywhere
    assert sizes == pytest.approx(1, abs=1e-6)


def test_many_keys_at_once_give_the_designs_of_each():
    keys = torch.tensor([[3, -8], [2**62, 0]])
    for name, length in (
        ("enumerate", 4),
        ("chain", 6),
        ("cover", 9),
        ("cover", 40),
        ("lattice", 40),
        ("multilevel", 40),
        ("mc", 5),
    ):
        settings = LikelihoodSettings(estimator=name)
        together = likelihood_design(length, keys, settings)
        for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
            alone = likelihood_design(length, int(keys[place]), settings)
            for field in ("masked", "scored", "weight", "blend"):
                if getattr(together, field) is None:
                    continue
                assert torch.equal(getattr(together, field)[place], getattr(alone, field))


@pytest.mark.parametrize("budget", [3, 8, 16, 64, 200])
@pytest.mark.parametrize("length", [4, 20, 32, 33, 64, 300])
def test_auto_keeps_its_budget(length, budget):
    design = likelihood_design(length, 3, LikelihoodSettings(budget=budget))
    assert len(design.masked[design.scored.any(-1)].unique(dim=0)) <= budget


def test_the_policy_takes_exact_estimators_where_they_are_affordable():
    def names(budget, *lengths):
        return [estimator_for(length, LikelihoodSettings(budget=budget)) for length in lengths]

    assert names(64, 1, 2, 3, 6, 7, 32, 33) == ["exact", *["enumerate"] * 3, "cover", "cover", "cover"]
    assert names(16, 1, 4, 5, 8, 9) == ["exact", "enumerate", "chain", "chain", "cover"]
    assert names(1, 1) == ["exact"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 2}, "budget = 2 is too small: cover of a target of 5 tokens needs at least 3 passes; raise it$"),
        ({"budget": 8, "estimator": "chain"}, "chain of a target of 5 tokens needs at least 9 passes; .* take cover"),
    ],
)
def test_a_budget_too_small_says_what_is_the_least(settings, message):
    with pytest.raises(ValueError, match=message):
        likelihood_design(5, 0, LikelihoodSettings(**settings))
    likelihood_design(5, 0, LikelihoodSettings(**settings | {"budget": settings["budget"] + 1}))


def test_targets_of_different_lengths_share_their_orders():
    """The same key reveals the positions that both have in the same order."""
    settings = LikelihoodSettings(estimator="chain", budget=200)
    longer, shorter = (likelihood_design(length, 7, settings) for length in (9, 6))
    orders = [design.scored[:length].long().argmax(1) for design, length in ((longer, 9), (shorter, 6))]
    assert orders[0][orders[0] < 6].tolist() == orders[1].tolist()


def test_a_chain_masks_what_it_has_not_revealed_and_scores_one_token():
    design = likelihood_design(6, 1, LikelihoodSettings(estimator="chain", budget=11))
    assert design.scored.sum(-1).eq(1).all() and len(design.masked.unique(dim=0)) == 11
    assert design.masked.sum(-1).tolist() == [6, 5, 4, 3, 2, 1] * 2


def test_designs_are_a_function_of_key_and_length():
    settings = LikelihoodSettings(estimator="chain")
    one, same, other = (likelihood_design(9, key, settings).masked for key in (4, 4, 5))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_an_empty_target_is_an_error():
    with pytest.raises(ValueError, match="at least one target token"):
        likelihood_design(0, 0, LikelihoodSettings())


def test_draws_that_do_not_fill_their_batches_are_an_error():
    with pytest.raises(ValueError, match="mc_draws = 100 is not a multiple of mc_batch = 32; e.g. 96"):
        likelihood_design(4, 0, LikelihoodSettings(estimator="mc", mc_draws=100))


def test_a_lattice_has_no_noise_where_its_model_of_the_nll_is_right():
    """nll of a token between two values, by the masked share of the target and of the tokens beside it."""
    length = 11
    design = likelihood_design(length, torch.arange(50), LikelihoodSettings(estimator="lattice", budget=9))
    full, second = torch.linspace(3, 9, length).double(), torch.linspace(2, 0, length).double()
    nll = second + design.blend * (full - second)
    nll[:, 0], nll[:, 1:LATTICE] = full, second
    nats, error = estimate(design, nll)
    sizes = torch.arange(length).double() / (length - 1)
    assert nats == pytest.approx((second + (full - second) * (sizes**2.5).mean()).sum().item(), abs=1e-9)
    assert error.max() < 1e-9


def test_two_levels_are_a_cheap_design_and_exact_windows_that_are_cheap_too():
    design = likelihood_design(20, torch.arange(3), LikelihoodSettings(estimator="multilevel", budget=20))
    first, rest = design.levels()
    same = likelihood_design(20, torch.arange(3), LikelihoodSettings(estimator="lattice", budget=20))
    assert torch.equal(first.masked, same.masked) and torch.equal(first.weight, same.weight)
    assert design.partial.tolist() == [True] * 20 + [False] * 3 + [True] * 3
    assert torch.equal(rest.masked[:, :3], rest.masked[:, 3:])
    assert torch.equal(rest.weight[:, :3], -rest.weight[:, 3:])
    cheap = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0)).double()
    wrong = torch.cat([cheap, rest.masked.double()], -2)
    assert estimate(design, wrong)[0] == pytest.approx(estimate(same, cheap)[0])  # where cheap is exact


def test_two_levels_forward_few_versions_exactly():
    cases = {(1, 5): 0, (2, 64): 0, (3, 45): 0, (3, 30): 7, (5, 9): 31, (6, 64): 63, (6, 62): 62, (12, 64): 64}
    for (length, budget), cheap in cases.items():
        assert likelihood_design(length, 0, LikelihoodSettings(estimator="multilevel", budget=budget)).cheap == cheap


@pytest.mark.parametrize("count", [2, 3, 7, 20])
@pytest.mark.parametrize("length", [3, 7, 20])
def test_exact_windows_weigh_every_size_equally_on_average(length, count):
    masked, total = _windows_in_turn(length, count, torch.arange(4000))
    sizes = torch.zeros(length, dtype=torch.float64).index_add_(0, (masked.sum(-1) - 1).flatten(), total.flatten())
    squares = torch.zeros(length, dtype=torch.float64)
    squares.index_add_(0, (masked.sum(-1) - 1).flatten(), total.flatten() ** 2 * count)  # windows of a key are few
    assert ((sizes / 4000 - 1).abs() < 4 * squares.sqrt() / 4000).all()


def test_effort_gives_passes_to_targets_that_surprise():
    nats = numpy.array([0.0, 4.0, 100.0, 400.0, 1e6])
    assert budget_for(nats, LikelihoodSettings(effort=1.5)).tolist() == [5, 6, 18, 33, 64]
    assert budget_for(nats, LikelihoodSettings(effort=1.5, budget=4)).tolist() == [4] * 5


def test_a_lattice_too_small_is_an_error():
    with pytest.raises(ValueError, match="budget = 4 is too small: lattice of a target of 9 tokens needs at least 5"):
        likelihood_design(9, 0, LikelihoodSettings(estimator="lattice", budget=4))
