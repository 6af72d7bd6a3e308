"""Revising: revealed tokens are masked again, or replaced, until their block is finished. No training is needed.

Remasking (ReMDM, Wang et al. 2025, arXiv:2503.00307): from time t to s, a revealed token is masked again with
probability sigma, and of the masks as many more are revealed, so that at every time as many tokens are masked as
without remasking. sigma is at most sigma_max = min(1, (1 - alpha_s) / alpha_t): then all that may be masked at s is.
Here, as everywhere in this sampler, the masks of a block follow a plan, and not chance. With v revealed tokens, and m
that the plan leaves masked, a pass takes back an expected

    min(eta v, min(v, m))  (`cap`, and `loop` while its plan holds),  or  eta min(v, m)  (the others)

tokens, which is sigma v, eta the `remask_share`, and reveals so many more. With eta = 0, and in a last pass, that is
none.

Editing (LLaDA2.1, Bie et al. 2026, arXiv:2602.08676): in every pass, a revealed token is replaced by the one that the
model proposes at its place, if that is another one and its probability is above a threshold. A block whose masks are
all revealed goes on so as long as anything changes, for a number of passes at most.
"""

from __future__ import annotations

import numpy
import torch
from numpy import ndarray
from torch import Tensor

from dllm.algorithms import resolved
from dllm.choices import REMASKING
from dllm.core.noise import keyed_uniform
from dllm.sampling.plan import HELD_FROM, HELD_TO
from dllm.sampling.reveal import choose_positions
from dllm.sampling.rows import RunningRows, to_device

_COUNT_STREAM, _WHICH_STREAM = 2, 3
"""Streams of a row's noise, beside those of `sampling.reveal`."""


def expected_back(rows: RunningRows) -> ndarray:
    """How many tokens the next pass is expected to take back, [B] float64."""
    plan = rows.plan
    masks, passes = plan.of_block(plan.masks), plan.of_block(plan.passes).clip(1)
    revealed, after = masks - plan.left, plan.left - plan.counts()
    most = numpy.minimum(revealed, after)
    begun, done = 1 - plan.passes_left / passes, 1 - (plan.passes_left - 1) / passes
    holds = (begun >= HELD_FROM) & (done <= HELD_TO)
    expected = numpy.zeros(len(rows))
    for name in set(rows.remask.tolist()) - {"none"}:
        rule = REMASKING[name]
        amount = rows.remask_share * most if rule.scaled else numpy.minimum(rows.remask_share * revealed, most)
        expected = numpy.where((rows.remask == name) & (holds | (not rule.held)), amount, expected)
    return expected


def taken_back(rows: RunningRows, window: Tensor, inside: Tensor, expected: ndarray) -> tuple[Tensor, Tensor]:
    """How many tokens a pass takes back [B], and which of the window [B, S] bool; `expected` is rounded at random.

    window, inside [B, S]: the positions of the active blocks, and which are there.
    """
    step = torch.from_numpy(rows.plan.step).to(window.device)
    revealed = inside & ~rows.masked.gather(1, window) & ~rows.done[:, None]
    drawn = keyed_uniform(rows.keys, step, _COUNT_STREAM).double()
    count = (torch.from_numpy(expected).to(window.device) + drawn).floor().long()
    noise = keyed_uniform(rows.keys[:, None], window, step[:, None], _WHICH_STREAM)
    sure = rows.confidence.gather(1, window)
    score = torch.zeros_like(sure)
    for name in set(rows.remask.tolist()) - {"none"}:
        at = to_device((rows.remask == name).nonzero()[0], window.device)
        theirs = resolved(REMASKING[name].score)(sure.index_select(0, at), noise.index_select(0, at))
        score.index_copy_(0, at, theirs)
    back = choose_positions(score, revealed, count)
    return back.sum(1), back


def any_of_them(confidence: Tensor, noise: Tensor) -> Tensor:
    """A random order."""
    return noise


def unsure_ones(confidence: Tensor, noise: Tensor) -> Tensor:
    """A random order in which a token is next with a probability proportional to exp(-confidence)."""
    return -confidence - (-noise.clamp(min=2**-25).log()).log()


def least_sure(confidence: Tensor, noise: Tensor) -> Tensor:
    """The least sure first."""
    return -confidence


def mask_again(rows: RunningRows, window: Tensor, back: Tensor, mask_id: int) -> None:
    """Mask the tokens of the window [B, S] that are taken back, [B, S] bool."""
    row, column = back.nonzero(as_tuple=True)
    position = window[row, column]
    rows.tokens[row, position] = mask_id
    rows.masked[row, position] = True
    rows.confidence[row, position] = 0.0


def edits_of(rows: RunningRows, row: Tensor, position: Tensor, tokens: Tensor, confidence: Tensor) -> Tensor:
    """Which proposals [N] of rows and positions [N] replace a revealed token, bool [N]."""
    old, revealed = rows.tokens[row, position], ~rows.masked[row, position] & ~rows.done[row]
    return revealed & (tokens != old) & (confidence > rows.edit_threshold[row])
