"""Likelihood designs: every estimator has the same expectation."""

import pytest
import torch

from dllm.choices import ESTIMATORS
from dllm.config import LikelihoodSettings
from dllm.likelihood.designs import estimate, likelihood_design
from dllm.likelihood.policy import LATTICE, estimator_for
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
    return table[(design.masked.long() << torch.arange(design.masked.shape[-1])).sum(-1)]


def bound_and_error(design, nll):
    nats, noise = estimate(design, nll)
    return nats, noise.norm(dim=-1)


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_enumeration_is_the_definition(length):
    table, truth = random_table(length)
    design = likelihood_design(length, 0, LikelihoodSettings(estimator="enumerate"))
    nats, error = bound_and_error(design, nll_of(design, table))
    assert nats == pytest.approx(truth, abs=1e-5) and error == 0  # fp32 table
    assert len(design.masked) == 2**length - 1


CASES = [
    ("lattice", 3, {"budget": 7}),
    ("lattice", 4, {"budget": 9}),
    ("lattice", 5, {"budget": 5}),
    ("lattice", 6, {"budget": 14}),
    ("lattice", 9, {"budget": 9}),
    ("lattice", 9, {"budget": 64}),
    ("mc", 4, {"mc_draws": 4, "mc_batch": 4}),
    ("mc", 5, {"mc_draws": 8, "mc_batch": 1}),
]


@pytest.mark.parametrize("name,length,options", CASES, ids=lambda x: str(x))
def test_every_estimator_is_unbiased_and_its_error_is_not_too_small(name, length, options):
    table, truth = random_table(length, seed=length)
    settings = LikelihoodSettings(estimator=name, **options)
    # with more windows the noise of a key is smaller, and so is the bias that fewer of them show
    keys = 4000 if length < 9 else 2000 if options["budget"] < 64 else 600
    design = likelihood_design(length, torch.arange(keys), settings)
    nats, errors = bound_and_error(design, nll_of(design, table))
    assert abs(nats.mean().item() - truth) < 4 * nats.std().item() / len(nats) ** 0.5 + 1e-5
    ratio = (errors**2).mean().sqrt() / nats.std()
    if name == "lattice":
        assert 0.9 < ratio < 2  # its windows are drawn systematically: less noisy than if they were independent
    else:
        assert 0.9 < ratio < 1.12  # of independent units it is right, up to the noise of thousands of draws


def pairwise_models(length, count):
    """Models whose nll rises with each masked token, near ones more, and changes with some pairs of masked tokens.

    Returns nll_of(masked [K, S, L]) [M, K, S, L], and the bounds [M]: of a random size from 1 to L, another token is
    masked with probability 1/2 and two others with 1/3.
    """
    random, place = torch.Generator().manual_seed(length), torch.arange(length)
    apart = (place[:, None] - place).abs()
    single = torch.rand(count, length, length, generator=random).double() ** 2 * 3 * torch.exp(-apart / 3) * (apart > 0)
    chosen = torch.randint(0, length, (2, count, length), generator=random)
    change = torch.randn(count, length, generator=random).double() * 1.5

    def nll_of(masked):
        pairs = (masked[..., chosen[0]] & masked[..., chosen[1]]).permute(2, 0, 1, 3)
        return 2 + torch.einsum("mij,ksj->mksi", single, masked.double()) + change[:, None, None] * pairs

    others = (chosen[0] != place).long() + ((chosen[1] != place) & (chosen[1] != chosen[0])).long()
    chance = torch.tensor([1, 1 / 2, 1 / 3]).double()[others]
    return nll_of, 2 * length + single.sum((1, 2)) / 2 + (change * chance).sum(1)


@pytest.mark.parametrize("budget", [16, 64])
def test_stated_intervals_hold_the_bound_and_are_not_wide(budget):
    """Of lengths up to 40: 24 models under 24 keys, or exactly. Models share the masks of a key.

    Of the large budget, whose windows take a circle of eight more than once, every third length above 16.
    """
    for length in range(2, 41) if budget < 64 else (*range(2, 17), *range(18, 41, 3)):
        nll_of, bounds = pairwise_models(length, 24)
        design = likelihood_design(length, torch.arange(24), LikelihoodSettings(budget=budget))
        nats, errors = bound_and_error(design, nll_of(design.masked))
        off = (nats - bounds[:, None]).abs()
        if estimator_for(length, LikelihoodSettings(budget=budget)) == "enumerate":
            assert off.max() < 1e-5 and errors.max() == 0  # parts of the model are fp32
        else:
            assert (off < 1.96 * errors).double().mean() > 0.92, length
            assert (errors**2).mean() < 3.5**2 * (off**2).mean(), length


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("length", [1, 2, 7, 33, 100])
def test_the_weights_of_a_design_add_up_to_the_length(name, length):
    """A model with the same nll everywhere has the bound L x nll, whatever is masked."""
    if (name, length) in {("enumerate", 33), ("enumerate", 100)}:
        with pytest.raises(ValueError, match="use auto"):
            likelihood_design(length, 0, LikelihoodSettings(estimator=name))
        return
    design = likelihood_design(length, 5, LikelihoodSettings(estimator=name, budget=200))
    assert not design.weight[~design.masked].any()
    if name != "mc":  # whose batches are spread over the sizes only on average
        assert design.weight.sum().item() == pytest.approx(length)
    if name == "mc":
        assert (design.weight.sum(-1) * len(design.weight) - length).abs().max() < 1e-9


def test_many_keys_at_once_give_the_designs_of_each():
    keys = torch.tensor([[3, -8], [2**62, 0]])
    for name, length in (("enumerate", 4), ("lattice", 9), ("lattice", 40), ("mc", 5)):
        settings = LikelihoodSettings(estimator=name)
        together = likelihood_design(length, keys, settings)
        for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
            alone = likelihood_design(length, int(keys[place]), settings)
            for field in ("masked", "weight", "blend"):
                if getattr(together, field) is None:
                    continue
                assert torch.equal(getattr(together, field)[place], getattr(alone, field))


@pytest.mark.parametrize("budget", [5, 8, 16, 64, 200])
@pytest.mark.parametrize("length", [4, 20, 32, 33, 64, 300])
def test_auto_keeps_its_budget(length, budget):
    design = likelihood_design(length, 3, LikelihoodSettings(budget=budget))
    assert len(design.masked[design.masked.any(-1)].unique(dim=0)) <= budget


def test_the_policy_takes_exact_estimators_where_they_are_affordable():
    def names(budget, *lengths):
        return [estimator_for(length, LikelihoodSettings(budget=budget)) for length in lengths]

    assert names(64, 1, 2, 3, 6, 7, 32, 33) == [*["enumerate"] * 4, "lattice", "lattice", "lattice"]
    assert names(16, 1, 4, 5, 8, 9) == ["enumerate", "enumerate", "lattice", "lattice", "lattice"]
    assert names(1, 1) == ["enumerate"]


@pytest.mark.parametrize("estimator", ["auto", "lattice"])
def test_a_budget_too_small_says_what_is_the_least(estimator):
    with pytest.raises(ValueError, match="budget = 4 is too small: lattice of a target of 9 tokens needs at least 5"):
        likelihood_design(9, 0, LikelihoodSettings(estimator=estimator, budget=4))
    likelihood_design(9, 0, LikelihoodSettings(estimator=estimator, budget=5))


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
    nats, error = bound_and_error(design, nll)
    sizes = torch.arange(length).double() / (length - 1)
    assert nats == pytest.approx((second + (full - second) * (sizes**2.5).mean()).sum().item(), abs=1e-9)
    assert error.max() < 1e-9
