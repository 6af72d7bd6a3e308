"""Rotary positions in place: the numbers of the stock functions, their gradients and their layout in memory."""

import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dllm.core.packing import layout_of
from dllm.models import rotary
from dllm.models.attention import choose
from dllm.models.rotary import NAME, replace_rotary, stock_rotary, turned
from tests.models.families import CASES, ragged, stock_model
from tests.models.test_attention import LENGTHS, ROUNDING, assert_same_gradients, gradients
from tests.plain_forward import door

TURNING = [case for case in CASES if case.partition("-")[0] not in ("bert", "roberta", "distilbert", "gpt2")]


def function_of(model):
    return getattr(sys.modules[type(model).__module__], NAME)


def heads(seed=0, dtype=torch.float32):
    """Queries and keys as stock classes hand them over, views of one product, and the angles of their positions."""
    generator = torch.Generator().manual_seed(seed)
    product = torch.randn(2, 7, 3, 4, 8, generator=generator).to(dtype)
    angles = torch.randn(2, 7, 4, generator=generator).repeat(1, 1, 2)
    query, key, _ = product.unbind(2)
    return query.transpose(1, 2), key[:, :, :2].transpose(1, 2), angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("case", TURNING)
def test_a_class_that_turns_halves_gets_the_same_numbers_gradients_and_layout(case):
    model = stock_model(case)
    assert choose(model)
    apply = function_of(model)
    assert apply.__wrapped__ is not apply
    *given, cos, sin = heads()
    query, key = (x.clone().requires_grad_() for x in given)
    weight = torch.randn(2, 4, 7, 8, generator=torch.Generator().manual_seed(1))
    found = {}
    for name, function in (("stock", apply.__wrapped__), ("ours", apply)):
        outs = function(query, key, cos, sin)
        grads = torch.autograd.grad([(x * weight[:, : x.shape[1]]).sum() for x in outs], (query, key))
        found[name] = [*outs, *grads]
    for ours, stock in zip(found["ours"], found["stock"], strict=True):
        torch.testing.assert_close(ours, stock, atol=ROUNDING, rtol=0)
    for ours, stock in zip(apply(*given, cos, sin), apply.__wrapped__(*given, cos, sin), strict=True):
        assert ours.stride() == stock.stride()


@pytest.mark.parametrize("case", TURNING)
def test_a_model_computes_what_it_computed(case, monkeypatch):
    model, calls = stock_model(case), []
    monkeypatch.setattr(rotary, "turned", lambda *given: calls.append(1) or turned(*given))
    backbone = door(model, "in_place")
    tokens, _ = ragged(LENGTHS)
    calls.clear()  # those of the tests at loading
    ours = backbone.hidden(tokens, layout_of(LENGTHS))
    assert len(calls) == model.config.num_hidden_layers
    with stock_rotary():
        stock = backbone.hidden(tokens, layout_of(LENGTHS))
    assert len(calls) == model.config.num_hidden_layers
    torch.testing.assert_close(ours, stock, atol=ROUNDING, rtol=0)
    assert_same_gradients(gradients(model, ours), gradients(model, stock))


def test_its_gradient_is_that_of_its_numbers():
    *given, cos, sin = heads(dtype=torch.float64)
    # halves of cos and sin that differ, which no class has: the gradient is right for these, too
    cos, sin = (x + torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2)) for x in (cos, sin))
    query, key = (x.detach().requires_grad_() for x in given)
    assert torch.autograd.gradcheck(turned, (query, key, cos, sin))
    assert torch.autograd.gradgradcheck(turned, (query, key, cos, sin), fast_mode=True)  # along a random direction


def test_half_precision_and_other_calls_are_those_of_the_stock_function(monkeypatch):
    model, calls = stock_model("modernbert"), []
    replace_rotary(model)
    apply = function_of(model)
    monkeypatch.setattr(rotary, "turned", lambda *given: calls.append(1) or turned(*given))
    query, key, cos, sin = heads()
    other = (query.transpose(1, 2), key.transpose(1, 2), cos, sin), {"unsqueeze_dim": 2}
    for given, options in ((heads(dtype=torch.bfloat16), {}), other):
        assert all(map(torch.equal, apply(*given, **options), apply.__wrapped__(*given, **options)))
    with stock_rotary():
        assert all(map(torch.equal, apply(*heads()), apply.__wrapped__(*heads())))
    assert not calls
    apply(*heads(), unsqueeze_dim=1)  # as ModernBERT says it
    assert calls


def test_a_class_that_turns_pairs_of_neighbours_is_left_as_it_is():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("cohere", vocab_size=64, **sizes))
    before = function_of(model)
    replace_rotary(model)
    assert function_of(model) is before
