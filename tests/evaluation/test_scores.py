import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm.evaluation.scores import summarise
from dllm.numbers import wilson_interval


def mean(values):
    return sum(values) / len(values)


def perplexity(values):
    return math.exp(-mean(values))


def total(values):
    return float(sum(values))


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, Stat. Med. 17, table I, method 3: 81/263, 15/148, 0/20, 1/29
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_equal_published_ones(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_wilson_interval_holds_the_share_and_stays_in_the_unit_interval(pair):
    successes, n = pair
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_intervals_of_successes_and_failures_mirror_each_other(pair):
    successes, n = pair
    low, high = wilson_interval(successes, n)
    assert wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_no_interval_of_what_is_no_share(successes, n):
    with pytest.raises(ValueError, match=f"{successes} of {n}"):
        wilson_interval(successes, n)


def test_scores_of_zero_and_one_have_a_wilson_interval():
    summary = summarise([1, 0.0, True, 1], mean)
    assert (summary["value"], summary["n"]) == (0.75, 4)
    assert (summary["low"], summary["high"]) == wilson_interval(3, 4)
    assert summary["standard_error"] == pytest.approx(0.25)  # sqrt(3/16 / 3)


def test_other_scores_have_a_normal_interval():
    summary = summarise([0.0, 2.0, 4.0], mean)
    error = 2 / math.sqrt(3)
    assert summary["value"] == 2 and summary["standard_error"] == pytest.approx(error)
    assert summary["high"] - summary["low"] == pytest.approx(2 * 1.959964 * error, abs=1e-5)


def test_perplexity_has_the_interval_of_its_logarithm():
    values = [-1.0, -2.0, -3.0]
    summary, logarithm = summarise(values, perplexity), summarise([1.5, 2.0, 2.5], mean)
    assert summary["value"] == pytest.approx(perplexity(values))
    assert math.log(summary["low"]) == pytest.approx(2 * logarithm["low"] - 2)
    assert math.log(summary["high"]) == pytest.approx(2 * logarithm["high"] - 2)


def test_of_a_corpus_metric_only_the_value_is_known():
    assert summarise([(1, 2)], lambda values: 0.5) == {
        "value": 0.5,
        "standard_error": None,
        "low": None,
        "high": None,
        "n": 1,
    }


def test_one_document_has_no_standard_error():
    assert summarise([0.3], mean)["standard_error"] is None
    assert summarise([1], mean)["standard_error"] is None


def test_nothing_scored_is_an_error():
    with pytest.raises(ValueError, match="no scored document"):
        summarise([], total)
