"""How numbers look: one decimal for per cent, `43.1 [38.0, 48.4]` for intervals, a true minus sign."""

from collections.abc import Sequence

from pandas import isna

from dllm.numbers import ABSENT


def fixed(value: float | None, digits: int = 1) -> str:
    """`-0.04` with one digit is `0.0`; a missing number is a dash."""
    if value is None or isna(value):
        return ABSENT
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", "−")


def interval(value: float, low: float, high: float, digits: int = 1) -> str:
    """`43.1 [38.0, 48.4]`, or the value alone where its interval is unknown."""
    if isna(value) or isna(low) or isna(high):
        return fixed(value, digits)
    return f"{fixed(value, digits)} [{fixed(low, digits)}, {fixed(high, digits)}]"


def signed_interval(value: float, low: float, high: float, digits: int = 1) -> str:
    """Like `interval`, with a plus sign before a positive value."""
    text = interval(value, low, high, digits)
    return text if isna(value) or round(value, digits) <= 0 else f"+{text}"


def quantity(value: float | None) -> str:
    """`65.5 M`: a count with three significant digits."""
    if value is None or isna(value):
        return ABSENT
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def joined(names: list[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def range_of(values: Sequence[float], digits: int = 1) -> str:
    """`1.9 to 2.1`, or one number where both ends look the same."""
    low, high = fixed(min(values), digits), fixed(max(values), digits)
    return low if low == high else f"{low} to {high}"


def in_words(count: int) -> str:
    """`five`: a small count as prose has it."""
    return "no one two three four five six seven eight nine ten eleven twelve".split()[count]
