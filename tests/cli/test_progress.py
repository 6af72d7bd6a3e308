"""Bars in terminals of several widths: what matters is never cut off."""

import pytest
from tqdm import tqdm

from dllm.numbers import bar_options


@pytest.mark.parametrize("columns", [40, 60, 71, 72, 80, 200])
@pytest.mark.parametrize("rate", ["", ", {rate_fmt}"])
def test_a_bar_shows_the_time_left_and_the_loss_and_fits_its_terminal(columns, rate):
    loss = "loss 3.038"
    options = bar_options(columns, rate)
    line = tqdm.format_meter(
        567, 999, 3_600, ncols=columns, prefix="chat-bert-tiny", unit="row", postfix=loss,
        bar_format=options["bar_format"],
    )  # fmt: skip
    assert len(line) <= columns and "567/999" in line and loss in line
    assert ("45:42 left" if columns < 72 else "<45:42") in line
    assert ("chat-bert-tiny" in line) == (columns >= 72)
