"""Arithmetic and wording of numbers that several parts of the package show."""

from __future__ import annotations

import math
import os
import shutil
from statistics import NormalDist
from typing import Any

Z95 = NormalDist().inv_cdf(0.975)
"""Normal quantile of a two-sided 95 % interval."""

WIDE = 72
"""Columns of a terminal from which on a bar has a name."""

ABSENT = "–"
"""What a missing number looks like."""


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """Wilson score interval of a share, (low, high) in [0, 1].

    Raises ValueError unless 0 <= successes <= n and n > 0. Source: Wilson 1927, J. Am. Stat. Assoc. 22, eq. 1.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"wilson_interval: {successes} of {n} is not a share; give 0 <= successes <= n and n > 0")
    share, z = successes / n, Z95
    shrink = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # at 0 and n the interval touches the end exactly; rounding must not move it
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def duration(seconds: float | None) -> str:
    """Seconds in the unit that suits them: `4.2 s`, `51 s`, `12 min`, `3.5 h`, `12.0 days`; a dash if unknown."""
    if seconds is None or math.isnan(seconds):
        return ABSENT
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:,.1f} days"


def bar_options(columns: int | None = None, rate: str = ", {rate_fmt}") -> dict[str, Any]:
    """How tqdm draws a bar that is never cut where it matters: a narrow terminal sees no name and the time left first.

    rate: what stands behind the times; empty where what is appended says the speed.
    """
    columns = columns or shutil.get_terminal_size().columns
    wide = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}" + rate + "{postfix}]"
    narrow = "{percentage:3.0f}%|{bar:2}| {n_fmt}/{total_fmt} {remaining} left{postfix}"
    return {"bar_format": wide if columns >= WIDE else narrow, "dynamic_ncols": True}


def environment_number(name: str, default: int) -> int:
    """A whole number from 0 on of the environment, as launchers set it. Raises ValueError, one line, for another."""
    stated = os.environ.get(name, str(default))
    if not stated.isdecimal():
        raise ValueError(f"{name} = {stated!r} in the environment is not a number from 0 on; unset it")
    return int(stated)
