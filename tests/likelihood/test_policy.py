"""How many passes the policy says, and how many the designs take."""

import pytest

from dllm.config import LikelihoodSettings
from dllm.likelihood.designs import likelihood_design
from dllm.likelihood.policy import estimator_for, likelihood_passes

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 30, 48)


def forwarded(length: int, settings: LikelihoodSettings, keys: int = 8) -> float:
    """Mean number of different inputs of a design; a pass without a mask is not made."""
    designs = [likelihood_design(length, key, settings) for key in range(keys)]
    return sum(len(d.masked[d.masked.any(-1)].unique(dim=0)) for d in designs) / keys


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("budget", [16, 64])
def test_auto_takes_the_passes_of_its_design(length, budget):
    settings = LikelihoodSettings(budget=budget)
    exact = estimator_for(length, settings) == "enumerate"
    # masks drawn at random coincide by chance: exact where none are drawn, within a sixth otherwise
    assert likelihood_passes(length, settings) == pytest.approx(
        forwarded(length, settings), rel=1e-9 if exact else 0.17
    )


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["lattice", "mc"])
def test_every_estimator_takes_the_passes_of_its_design(length, name):
    settings = LikelihoodSettings(estimator=name, budget=100)
    assert likelihood_passes(length, settings) == pytest.approx(forwarded(length, settings), rel=0.17)


def test_planning_never_fails_where_scoring_will():
    assert likelihood_passes(0, LikelihoodSettings()) == 0
    assert likelihood_passes(40, LikelihoodSettings(budget=1)) > 0
    assert likelihood_passes(40, LikelihoodSettings(estimator="enumerate")) == 2**12 - 1


@pytest.mark.parametrize("change", [{"estimator": "chain"}, {"estimator": "cover"}, {"effort": 1.2}, {"effort": None}])
def test_a_setting_that_is_gone_is_refused_with_what_to_use_instead(change):
    message = "use budget" if "effort" in change else "'auto', 'enumerate', 'lattice' or 'mc'"
    with pytest.raises(ValueError, match=message):
        LikelihoodSettings(**change)
