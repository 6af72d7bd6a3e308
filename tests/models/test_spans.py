"""Spans of tokens behind a clean row: what a stock class computes with a mask of four dimensions, span by span."""

import itertools

import numpy
import pytest
import torch

from dllm.core.packing import block_layout, layout_of, part_of
from dllm.core.spans import SpanRows
from dllm.models import attention as packed_attention
from dllm.models.forward import _base, _first_position, _no_cache, block_hidden, packed_hidden
from tests.models.families import CASES, VOCAB, ragged, stock_model
from tests.oracles import tabular_backbone
from tests.synchronisation import forbid_synchronisation

ROUNDING = 1e-5
"""fp32: hidden states are of order 3, and kernels add up in another order."""
CLEAN = (23, 9, 40, 40)
SPANS = (
    ((20, 21, 22), (14, 17, 20, 21), (5,)),
    (tuple(range(9)),),
    ((0, 3, 39), (38, 39), tuple(range(30, 40)), tuple(range(31, 40, 2)), (12,)),
    ((0, 3, 39), (38, 39), tuple(range(30, 40)), tuple(range(31, 40, 2)), (12,)),
)
BIDIRECTIONAL = [case for case in CASES if not case.endswith("-causal")]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def rows_of(clean=CLEAN, spans=SPANS) -> SpanRows:
    each = [span for row in spans for span in row]
    counts = ([len(row) for row in spans], [len(span) for span in each], [p for span in each for p in span])
    return SpanRows(*(numpy.array(x, dtype=numpy.int64) for x in (clean, *counts)))


def inputs_of(rows: SpanRows):
    """Tokens [B, L], random ones in the spans too, and the layout."""
    layout = block_layout(rows)
    return ragged(layout.lengths)[0], layout


def one_span_at_a_time(model, tokens, layout, clean=CLEAN, spans=SPANS):
    """The stock class on [clean ++ one span], with a mask and positions of its own: [T, D] in the layout's order."""
    window = getattr(model.config, "sliding_window", None)
    kinds = set(getattr(model.config, "layer_types", None) or {"sliding_attention" if window else "full_attention"})
    found = []
    for row, (length, versions) in enumerate(zip(clean, spans, strict=True)):
        at = length
        for number, span in enumerate(versions):
            position = torch.tensor([*range(length), *span])
            seen = torch.zeros(len(position), len(position), dtype=torch.bool)
            for q, k in itertools.product(range(len(position)), repeat=2):
                if k >= length:
                    seen[q, k] = q >= length
                else:
                    seen[q, k] = q < length or int(position[k]) not in span
            near = (position[:, None] - position).abs() <= (window or 0)
            masks = {kind: (seen if kind == "full_attention" else seen & near)[None, None] for kind in kinds}
            given = torch.cat([tokens[row, :length], tokens[row, at : at + len(span)]])[None]
            (mask, *others) = masks.values()
            hidden = _base(model)(
                input_ids=given,
                position_ids=position[None] + _first_position(model),
                attention_mask=masks if others else mask,
                **_no_cache(model),
            ).last_hidden_state[0]
            if not number:
                found.append(hidden[:length])
            found.append(hidden[length:])
            at += len(span)
    return torch.cat(found)


@pytest.mark.parametrize("kernel", ["_by_row", "_padded"])
@pytest.mark.parametrize("case", BIDIRECTIONAL)
@torch.no_grad()
def test_spans_equal_the_stock_class_on_the_clean_row_and_one_span(case, kernel, monkeypatch):
    """Also where windows are narrower than the rows, and spans are taken together, some at a time."""
    model = stock_model(case)
    monkeypatch.setattr(packed_attention, "SHORTEST_GROUP", 6)
    monkeypatch.setattr(packed_attention, "SHORTEST_BLOCK", 4)
    monkeypatch.setattr(packed_attention, "_block_kernel", lambda *_: getattr(packed_attention, kernel))
    tokens, layout = inputs_of(rows_of())
    ours = packed_hidden(model, tokens, layout)
    torch.testing.assert_close(ours, one_span_at_a_time(model, tokens, layout), atol=ROUNDING, rtol=0)
    torch.testing.assert_close(ours, block_hidden(model, tokens, layout), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("case", ["bert", "modernbert", "llama", "gemma3_text", "qwen2"])
@torch.no_grad()
def test_the_last_layer_of_the_spans_alone_gives_the_same_numbers(case):
    model = stock_model(case)
    tokens, layout = inputs_of(rows_of())
    whole = layout.unpack(packed_hidden(model, tokens, layout))
    part = part_of(layout, CLEAN, layout.lengths)
    short = packed_hidden(model, tokens, layout, part=part)
    torch.testing.assert_close(short, part.pack(whole), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("case", ["bert", "modernbert", "llama"])
@torch.no_grad()
def test_a_row_with_its_spans_does_not_depend_on_other_rows_and_spans(case):
    model = stock_model(case)
    tokens, layout = inputs_of(rows_of())
    together = packed_hidden(model, tokens, layout).split(layout.lengths)
    for row, (length, spans) in enumerate(zip(CLEAN, SPANS, strict=True)):
        plain = packed_hidden(model, tokens[row : row + 1, :length], layout_of([length]))
        torch.testing.assert_close(together[row][:length], plain, atol=ROUNDING, rtol=0)
        at = length
        for span in spans:
            here = slice(at, at + len(span))
            alone = torch.cat([tokens[row, :length], tokens[row, here]])[None]
            hidden = packed_hidden(model, alone, block_layout(rows_of((length,), ((span,),))))
            torch.testing.assert_close(together[row][here], hidden[length:], atol=ROUNDING, rtol=0)
            at += len(span)


@torch.no_grad()
def test_a_span_of_a_whole_row_is_the_row_and_one_equal_to_the_clean_tokens_changes_nothing():
    model = stock_model("bert")
    tokens, _ = ragged((20,))
    whole = packed_hidden(model, torch.cat([tokens, tokens], 1), block_layout(rows_of((20,), ((tuple(range(20)),),))))
    torch.testing.assert_close(whole[20:], whole[:20], atol=ROUNDING, rtol=0)
    span = (3, 4, 19)
    some = packed_hidden(model, torch.cat([tokens, tokens[:, span]], 1), block_layout(rows_of((20,), ((span,),))))
    torch.testing.assert_close(some[20:], whole[list(span)], atol=ROUNDING, rtol=0)


def test_the_layout_knows_positions_and_the_token_before():
    layout = block_layout(rows_of((4, 3), (((1, 2), (0, 3)), ((2,),))))
    assert layout.lengths == (8, 4)
    assert layout.positions.tolist() == [0, 1, 2, 3, 1, 2, 0, 3, 0, 1, 2, 2]
    # of the span, if it stands there, else the clean one; the first of a text: itself
    assert layout.before.tolist() == [0, 0, 1, 2, 0, 4, 6, 2, 8, 8, 9, 9]


def test_the_padded_kernel_never_makes_the_host_wait(monkeypatch):
    monkeypatch.setattr(packed_attention, "_block_kernel", lambda *_: packed_attention._padded)
    model = stock_model("modernbert")
    tokens, layout = inputs_of(rows_of())
    packed_hidden(model, tokens, layout)
    layout.plans.clear()
    with forbid_synchronisation():
        packed_hidden(model, tokens, layout)


@pytest.mark.parametrize("model", [stock_model("deberta-v2"), tabular_backbone().model], ids=["deberta", "toy"])
def test_a_class_that_cannot_be_packed_is_refused(model):
    rows = rows_of((3,), (((1,),),))
    with pytest.raises(ValueError, match="spans need a class"):
        packed_hidden(model, torch.full((1, 4), VOCAB - 60), block_layout(rows))
