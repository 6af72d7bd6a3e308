from dllm.report.format import fixed, interval, joined, quantity, signed_interval
from dllm.report.statistics import Estimate, against_chance, all_of, decide_below


def test_the_errors_of_a_difference_add_in_squares():
    difference = Estimate(5.0, 3.0) - Estimate(2.0, 4.0)
    assert difference == Estimate(3.0, 5.0)


def test_only_an_interval_clear_of_chance_is_above_or_below_it():
    assert [against_chance(low, low + 0.1, 0.25) for low in (0.26, 0.2, 0.1)] == ["above", "near", "below"]
    assert against_chance(0.1, 0.2, None) == ""
    assert against_chance(1e-18, 0.1, 0.0) == "near"


def test_one_failure_fails_and_one_doubt_leaves_undecided():
    assert all_of(["holds", "undecided", "does not hold"]) == "does not hold"
    assert all_of(["holds", "undecided"]) == "undecided"
    assert all_of(["holds", "holds"]) == "holds"
    assert all_of([]) == "undecided"


def test_a_bound_is_met_only_by_two_standard_errors():
    assert decide_below(Estimate(1.0, 0.1), 1.2) == "holds"
    assert decide_below(Estimate(1.0, 0.11), 1.2) == "undecided"
    assert decide_below(Estimate(1.0, 0.05), 0.8) == "does not hold"


def test_numbers_look_alike_everywhere():
    nan = float("nan")
    assert interval(43.1, 38.0, 48.4) == "43.1 [38.0, 48.4]"
    assert signed_interval(2.0, -1.0, 5.0) == "+2.0 [−1.0, 5.0]"
    assert signed_interval(-2.0, -3.0, -1.0) == "−2.0 [−3.0, −1.0]"
    assert (fixed(-0.04), fixed(nan), fixed(None), interval(nan, 0, 1)) == ("0.0", "–", "–", "–")
    assert (quantity(65_536_000), quantity(950), quantity(2.36e9)) == ("65.5 M", "950", "2.36 B")
    assert (joined(["a"]), joined(["a", "b", "c"]), joined([])) == ("a", "a, b and c", "")
