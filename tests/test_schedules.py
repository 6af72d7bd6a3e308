"""Noise schedules: functions that must agree with each other, and a bound that does not depend on them."""

import numpy
import pytest
import torch

from dllm.schedules import SCHEDULES
from tests.oracles import enumerated_nelbo, tabular_backbone

EACH = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def times():
    return torch.linspace(0.01, 0.999, 200, dtype=torch.float64, requires_grad=True)


@EACH
def test_the_derivative_is_the_one_autograd_finds(schedule):
    t = times()
    (expected,) = torch.autograd.grad(schedule.value(t).sum(), t)
    torch.testing.assert_close(schedule.derivative(t), expected)


@EACH
def test_the_weight_is_the_derivative_of_the_log_mask_ratio(schedule):
    t = times()
    (expected,) = torch.autograd.grad(schedule.mask_ratio(t).log().sum(), t)
    torch.testing.assert_close(schedule.weight(t), expected)


@EACH
def test_everything_is_clean_at_time_0_and_masked_at_time_1(schedule):
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(schedule.value(ends), 1 - ends, atol=1e-15, rtol=0)  # cos(pi / 2) in double
    assert (schedule.derivative(times()) < 0).all()


@EACH
def test_the_bound_of_a_toy_model_is_the_same_under_every_schedule(schedule):
    """U1: quadrature over time of the continuous-time bound = the sum over mask counts."""
    backbone, target = tabular_backbone(3, seed=4), [2, 0, 1]
    expected = enumerated_nelbo(backbone, [1], target)
    masks = (torch.arange(8)[:, None] >> torch.arange(3)) & 1 == 1
    rows = torch.cat(
        [torch.ones(8, 1, dtype=torch.long), torch.where(masks, backbone.mask_id, torch.tensor(target))], 1
    )
    logits = backbone.model.logits_of(rows)[:, 1:].double()
    logits[..., backbone.mask_id] = -torch.inf
    nll = -logits.log_softmax(-1)[:, torch.arange(3), target]
    nats, size = (nll * masks).sum(-1), masks.sum(-1)

    s, quadrature = (torch.from_numpy(x) for x in numpy.polynomial.legendre.leggauss(80))
    s, quadrature = (s + 1) / 2, quadrature / 2
    t = s**2  # takes the root out of `sqrt`, so that Gauss's rule converges for every schedule
    ratio = schedule.mask_ratio(t)[:, None]
    mean_nats = (ratio**size * (1 - ratio) ** (3 - size) * nats).sum(-1)
    integral = (quadrature * 2 * s * schedule.weight(t) * mean_nats).sum()
    assert integral.item() == pytest.approx(expected, abs=1e-9)
