"""The last layer computed where it is read: the numbers of the whole layer, for fewer rows."""

import gc
import weakref

import pytest
import torch

from dllm.config import RunConfig
from dllm.core.packing import layout_of, part_of
from dllm.models import attention as packed_attention
from dllm.models.backbone import TokenNLL
from dllm.models.hidden import base_of
from dllm.models.kv_cache import KVCache
from dllm.models.last_layer import at_places
from dllm.models.packed_batch import PackedBatch
from dllm.models.self_tests import can_shorten
from dllm.training import setup
from tests.models.families import CASES, ragged, stock_model
from tests.models.test_attention import LENGTHS, ROUNDING, assert_same_gradients, gradients
from tests.plain_forward import door

ROW = torch.tensor([0, 0, 0, 1, 3, 5, 5])
POSITION = torch.tensor([0, 1, 39, 6, 20, 0, 5])
"""Some places of most rows; where predictions are shifted, one of them is read twice."""
WHOLE = ("distilbert", "gpt2")
"""One does not number its layers, the other shapes its last hidden states by its input: they are computed whole."""


@pytest.mark.parametrize("prediction", ["in_place", "next"])
@pytest.mark.parametrize("case", CASES)
def test_states_where_they_are_read_are_those_of_the_whole_layer_with_their_gradients(case, prediction):
    model = stock_model(case)
    backbone = door(model, prediction)
    assert backbone.shortens == (case.removesuffix("-causal") not in WHOLE)
    tokens, _ = ragged(LENGTHS)
    layout = layout_of(LENGTHS)
    whole = backbone.hidden(tokens, layout).index_select(0, backbone.read_at(layout, ROW, POSITION))
    read = backbone.hidden_at(tokens, layout, ROW, POSITION)
    assert type(read) is torch.Tensor
    torch.testing.assert_close(read, whole, atol=ROUNDING, rtol=0)
    assert_same_gradients(gradients(model, read), gradients(model, whole))


@pytest.mark.parametrize("prediction", ["in_place", "next"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_in_inference_only_rows_near_them_ask_and_the_states_are_the_same(case, prediction):
    backbone = door(stock_model(case), prediction)
    tokens, _ = ragged(LENGTHS)
    layout = layout_of(LENGTHS)
    places = backbone.read_at(layout, ROW, POSITION)
    whole = backbone.hidden(tokens, layout).index_select(0, places)
    torch.testing.assert_close(backbone.hidden_at(tokens, layout, ROW, POSITION), whole, atol=ROUNDING, rtol=0)
    batch, asking, among = PackedBatch(layout, layout, read=places).asking()
    assert batch.part.lengths == (40, 7, 0, 7, 0, 7)
    assert torch.equal(asking[among], places)


@torch.no_grad()
def test_what_is_planned_for_a_layout_goes_with_it():
    backbone, layout = door(stock_model("modernbert")), layout_of(LENGTHS)
    gc.disable()
    try:
        backbone.hidden_at(ragged(LENGTHS)[0], layout, ROW, POSITION)
        gone = weakref.ref(layout)
        del layout
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_part_whose_other_positions_are_stored_is_read_likewise(case):
    backbone, whole, short = door(stock_model(case)), KVCache(), KVCache()
    layout = layout_of(LENGTHS)
    begins = [length // 3 for length in LENGTHS]
    part = part_of(layout, begins, [length - length // 4 for length in LENGTHS])
    row = torch.arange(len(LENGTHS)).repeat(2)
    position = torch.tensor([*begins, *(length - length // 4 - 1 for length in LENGTHS)])
    for seed, given in ((0, layout), (1, part)):
        tokens, _ = ragged(LENGTHS, seed)
        expected = backbone.hidden(tokens, layout, cache=whole, part=given)
        read = backbone.hidden_at(tokens, layout, row, position, cache=short, part=given)
        torch.testing.assert_close(read, expected[backbone.read_at(given, row, position)], atol=ROUNDING, rtol=0)
    for kept, expected in zip(sum(short.pools, []), sum(whole.pools, []), strict=True):
        torch.testing.assert_close(kept, expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("case", ["bert", "modernbert", "llama"])
def test_behind_the_last_attention_there_are_only_the_rows_that_are_read(case):
    backbone, rows = door(stock_model(case)), []
    products = [x for x in base_of(backbone.model).modules() if isinstance(x, torch.nn.Linear)]
    for product in products:
        product.register_forward_hook(lambda module, given, out: rows.append(out.shape[1]))
    tokens, _ = ragged(LENGTHS)
    backbone.hidden_at(tokens, layout_of(LENGTHS), ROW, POSITION)
    last = {"bert": 3, "modernbert": 3, "llama": 4}[case]  # output of the attention, and the MLP
    assert rows == [sum(LENGTHS)] * (len(products) - last) + [len(ROW)] * last


def test_places_that_are_all_read_or_none_take_the_whole_layer():
    backbone = door(stock_model("bert"))
    tokens, attention = ragged(LENGTHS)
    layout = layout_of(LENGTHS)
    row, position = attention.nonzero(as_tuple=True)
    assert torch.equal(backbone.hidden_at(tokens, layout, row, position), backbone.hidden(tokens, layout))
    assert backbone.hidden_at(tokens, layout, row[:0], position[:0]).shape == (0, 32)


def test_a_class_whose_last_layer_is_another_one_is_found_out(monkeypatch):
    monkeypatch.setattr(packed_attention, "is_last", lambda module: module.layer_idx == 1)
    assert not can_shorten(stock_model("modernbert"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_last_layer_gives_the_same_gradients(reentrant):
    model = stock_model("modernbert").train()
    tokens, _ = ragged(LENGTHS)
    layout = layout_of(LENGTHS)
    plain = gradients(model, door(model).hidden_at(tokens, layout, ROW, POSITION))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_gradients(gradients(model, door(model).hidden_at(tokens, layout, ROW, POSITION)), plain)


def test_tokens_that_are_not_those_of_the_layout_are_an_error():
    with pytest.raises(ValueError, match="tokens \\[1, 3\\] are not the 6 rows"):
        door(stock_model("bert")).hidden_at(torch.zeros(1, 3, dtype=torch.long), layout_of(LENGTHS), ROW, POSITION)


def test_rows_as_many_as_there_are_units_keep_their_shapes():
    values = torch.randn(1, 32, 2, 16)
    rows = at_places(values.narrow(1, 0, 3), torch.tensor([3, 1, 30]), 32)
    assert rows.reshape(1, 32, -1).shape == (1, 3, 32)
    assert rows.reshape(-1, 32).shape == (3, 32)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_compiled_or_sharded_model_computes_its_last_layer_whole(sharded, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, dynamic: None)
    monkeypatch.setattr(setup, "cuts_weights", lambda: sharded)
    for compiled in (False, True):
        config = RunConfig.model_construct(compile=compiled, activation_checkpointing=False, algorithm="mdlm")
        scores = setup.scores_for(config, door(stock_model("bert")))
        assert isinstance(scores, TokenNLL) and scores.backbone.shortens == (not compiled and not sharded)
