"""The forward pass: hidden states once, the head only where it is asked for, the same numbers as the stock class."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from dllm.core.memory import LOGITS_BYTES, logits_at_once
from dllm.core.packing import layout_of, part_of
from dllm.models import heads, load
from dllm.models.backbone import TokenNLL
from dllm.models.heads import head_logits
from dllm.models.kv_cache import KVCache
from dllm.models.load import for_inference
from tests.models.families import CASES, ragged, stock_model
from tests.oracles import tabular_backbone
from tests.plain_forward import door, hidden_states, logits_at, packed_logits
from tests.stock import FIRST_WORD, KINDS, stock_backbone
from tests.synchronisation import forbid_synchronisation


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("models")


def random_batch(backbone, lengths=(12, 7, 1, 9), seed=0):
    """Tokens [B, L] without special ones, and which of them are real."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(FIRST_WORD, len(backbone.tokenizer), (len(lengths), max(lengths)), generator=generator)
    attention = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.where(attention, tokens, backbone.pad_id), attention


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_at_are_the_stock_classes_own_logits_there(directory, kind):
    backbone = stock_backbone(directory, kind)
    tokens, attention = random_batch(backbone)
    where = attention & (torch.arange(12) % 3 != 1)
    ours = logits_at(backbone.model, hidden_states(backbone.model, tokens, attention), where)
    stock = backbone.model(input_ids=tokens, attention_mask=attention.long()).logits
    assert ours.dtype == torch.float32 and ours.shape == (int(where.sum()), backbone.vocab_size)
    torch.testing.assert_close(ours, stock[where], atol=1e-5, rtol=0)  # another shape of the head's matrix product


@pytest.mark.parametrize("kind", ["bert", "llama"])
@torch.no_grad()
def test_next_prediction_reads_the_position_before(directory, kind):
    backbone = stock_backbone(directory, kind)
    hidden = hidden_states(backbone.model, random_batch(backbone)[0])
    everywhere = torch.ones(hidden.shape[:2], dtype=torch.bool)
    in_place = logits_at(backbone.model, hidden, everywhere).view(4, 12, -1)
    shifted = logits_at(backbone.model, hidden, everywhere, "next").view(4, 12, -1)
    torch.testing.assert_close(shifted[:, 1:], in_place[:, :-1])
    torch.testing.assert_close(shifted[:, 0], in_place[:, 0])  # the first position has no prediction of its own


@torch.no_grad()
def test_logits_come_in_row_major_order(directory):
    backbone = stock_backbone(directory, "bert")
    hidden = hidden_states(backbone.model, random_batch(backbone)[0])
    where = torch.zeros(4, 12, dtype=torch.bool)
    where[2, 1] = where[0, 5] = where[0, 3] = True
    expected = head_logits(backbone.model, torch.stack([hidden[0, 3], hidden[0, 5], hidden[2, 1]]))
    torch.testing.assert_close(logits_at(backbone.model, hidden, where), expected)


LENGTHS = (12, 7, 1, 9)
ROW, POSITION = torch.tensor([3, 0, 2, 0, 1]), torch.tensor([8, 11, 0, 3, 1])
TARGETS = torch.tensor([5, 6, 7, 8, 9])


@pytest.mark.parametrize("prediction", ["in_place", "next"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_packed_logits_are_the_padded_ones_in_the_order_asked_for(case, prediction):
    model = stock_model(case)
    tokens, attention = ragged(LENGTHS)
    layout = layout_of(LENGTHS)
    everywhere = torch.ones_like(attention)
    padded = logits_at(model, hidden_states(model, tokens, attention), everywhere, prediction)
    expected = padded.view(*tokens.shape, -1)[ROW, POSITION]
    backbone = door(model, prediction)
    ours = packed_logits(backbone, backbone.hidden(tokens, layout), layout, ROW, POSITION)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, atol=5e-5, rtol=0)  # logits of order 10


@pytest.mark.parametrize("case", [*CASES, "deberta-v2"])
@torch.no_grad()
def test_the_head_of_every_family_is_the_stock_classes_own(case):
    model = stock_model(case)
    tokens, _ = ragged((9, 9))
    torch.testing.assert_close(
        head_logits(model, hidden_states(model, tokens)), model(input_ids=tokens).logits, atol=5e-5, rtol=0
    )


@torch.no_grad()
def test_a_bounded_head_is_bounded():
    model = stock_model("gemma3_text", final_logit_softcapping=2.0)
    tokens, _ = ragged((9, 9))
    ours = head_logits(model, hidden_states(model, tokens))
    torch.testing.assert_close(ours, model(input_ids=tokens).logits)
    assert ours.abs().max() < 2.0


def hold(monkeypatch, rows: int | None) -> None:
    """So many rows of logits are held at a time; None: all."""
    monkeypatch.setattr(heads, "logits_at_once", lambda *_: rows or 10**6)


@pytest.mark.parametrize("prediction", ["in_place", "next"])
@torch.no_grad()
def test_the_module_for_training_gives_the_backbones_nll(prediction, monkeypatch):
    backbone = door(stock_model("modernbert"), prediction)
    tokens, _ = ragged(LENGTHS)
    layout = layout_of(LENGTHS)
    logits = packed_logits(backbone, backbone.hidden(tokens, layout), layout, ROW, POSITION)
    expected = nn.functional.cross_entropy(logits, TARGETS, reduction="none")
    for chunk in (None, 2):
        hold(monkeypatch, chunk)
        torch.testing.assert_close(TokenNLL(backbone)(tokens, layout, ROW, POSITION, TARGETS), expected)


def test_weights_of_the_module_for_training_have_the_models_names_behind_a_prefix():
    model = stock_model("bert")
    assert list(TokenNLL(door(model)).state_dict()) == [f"model.{name}" for name in model.state_dict()]


# ----------------------------------------------------------------------------------------------------------------------
# The chunked head


def everything(monkeypatch, model, chunk, *, autocast=False):
    """nll at every token of a batch, and the gradients of their differently weighted sum."""
    hold(monkeypatch, chunk)
    tokens, attention = ragged(LENGTHS)
    layout = layout_of(LENGTHS)
    row, position = attention.nonzero(as_tuple=True)
    targets = tokens.roll(1, 1)[row, position]
    model.zero_grad()
    backbone = door(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        nll = backbone.nll(backbone.hidden_at(tokens, layout, row, position), targets)
    (nll * torch.linspace(-1, 2, len(nll))).sum().backward()
    return nll.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [1, 4, 29, 1000])
@pytest.mark.parametrize(
    "case", ["bert", "roberta", "modernbert", "distilbert", "llama", "gemma3_text", "bounded", "untied"]
)
def test_the_chunked_head_gives_the_same_nll_and_gradients(case, chunk, monkeypatch):
    """Tied weights among them, so that the head's gradient adds to the embedding's."""
    settings = {"bounded": {"final_logit_softcapping": 3.0}, "untied": {"tie_word_embeddings": False}}.get(case, {})
    model = stock_model({"bounded": "gemma3_text", "untied": "bert"}.get(case, case), **settings)
    plain, of_plain = everything(monkeypatch, model, None)
    ours, of_ours = everything(monkeypatch, model, chunk)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    assert of_ours.keys() == of_plain.keys()
    for name, expected in of_plain.items():
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(of_ours[name], expected, atol=2e-5 * scale, rtol=0, msg=lambda m, n=name: n + m)


def test_the_chunked_head_under_bf16_autocast_is_as_near_to_fp32_as_the_plain_one(monkeypatch):
    model = stock_model("modernbert")
    exact, of_exact = everything(monkeypatch, model, None)
    plain, of_plain = everything(monkeypatch, model, None, autocast=True)
    ours, of_ours = everything(monkeypatch, model, 4, autocast=True)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain, atol=1e-2, rtol=1e-3)  # the plain log-softmax sees the same bf16 logits
    for name, expected in of_exact.items():
        off, usual = ((each[name] - expected).abs().mean() for each in (of_ours, of_plain))
        assert of_ours[name].dtype == torch.float32 and off <= 1.5 * usual + 1e-6, name


def test_the_chunked_head_never_holds_more_than_a_chunk_of_logits(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Shapes(TorchDispatchMode):
        tallest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[1] == 64:
                if out.shape[0] != 32:  # the transposed weight
                    Shapes.tallest = max(Shapes.tallest, out.shape[0])
            return out

    model = stock_model("llama")
    for chunk, most in ((4, 4), (None, sum(LENGTHS))):
        Shapes.tallest = 0
        with Shapes():
            everything(monkeypatch, model, chunk)
        assert Shapes.tallest == most


def test_the_chunked_head_takes_no_target_at_all(monkeypatch):
    model = stock_model("bert")
    tokens, _ = ragged(LENGTHS)
    layout = layout_of(LENGTHS)
    none = torch.zeros(0, dtype=torch.long)
    hold(monkeypatch, 4)
    nll = door(model).nll(door(model).hidden_at(tokens, layout, none, none), none)
    nll.sum().backward()
    assert nll.shape == (0,) and not model.cls.predictions.decoder.weight.grad.any()


def test_logits_are_kept_up_to_a_budget_and_held_a_part_at_a_time_beyond():
    for device, budget in LOGITS_BYTES.items():
        assert logits_at_once(50_368, 4, device) == budget // (50_368 * 4) > 1000
    assert logits_at_once(50_368, 2, "cpu") == 2 * logits_at_once(50_368, 4, "cpu")
    assert logits_at_once(50_368, 4, "mps") == logits_at_once(50_368, 4, "cpu")
    assert logits_at_once(2**40, 4, "cpu") == 1


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("prediction", ["in_place", "next"])
def test_scoring_never_makes_the_host_wait(chunk, prediction, monkeypatch):
    hold(monkeypatch, chunk)
    scores = TokenNLL(door(stock_model("modernbert"), prediction))
    tokens, _ = ragged(LENGTHS)
    with forbid_synchronisation():
        scores(tokens, layout_of(LENGTHS), ROW, POSITION, TARGETS).sum().backward()


# ----------------------------------------------------------------------------------------------------------------------
# Wrappers, precision, positions


@torch.no_grad()
@pytest.mark.parametrize("case", ["bert", "modernbert", "llama"])
def test_products_with_weights_held_in_bf16_are_those_that_autocast_makes_of_fp32_weights(case, monkeypatch):
    monkeypatch.setattr(load, "has_fast_bf16", lambda device: True)
    tokens, layout = ragged((9, 4))[0], layout_of((9, 4))
    autocast = replace(door(stock_model(case)), compute=torch.bfloat16)
    held = for_inference(door(stock_model(case)), mixed=True)
    assert torch.equal(held.hidden(tokens, layout), autocast.hidden(tokens, layout))
    kinds = {name: p.dtype for name, p in held.model.named_parameters()}
    products = {name for name in kinds if ".layer" in name and name.endswith("weight") and "norm" not in name.lower()}
    assert {kinds[name] for name in products} == {torch.bfloat16}
    assert {kinds[name] for name in kinds.keys() - products if "bias" not in name} == {torch.float32}


@torch.no_grad()
@pytest.mark.parametrize("packable", [True, False])
@pytest.mark.parametrize("case", ["modernbert", "llama"])
def test_layers_in_bf16_leave_the_head_and_the_scores_in_fp32(case, packable, monkeypatch):
    monkeypatch.setattr(load, "has_fast_bf16", lambda device: True)
    plain = replace(door(stock_model(case)), packable=packable)
    mixed = for_inference(replace(plain, model=deepcopy(plain.model)), mixed=True)
    tokens, _ = ragged((9, 4))
    layout = layout_of((9, 4))
    expected, found = (backbone.hidden(tokens, layout) for backbone in (plain, mixed))
    assert found.dtype == torch.float32 and not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0)
    row, position = torch.tensor([0, 1]), torch.tensor([3, 2])
    logits = packed_logits(mixed, found, layout, row, position)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, packed_logits(plain, found, layout, row, position))  # its head is untouched
    assert (logits != logits.bfloat16().float()).any()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_fast_bf16_products_and_bf16_weights_are_fp32_and_one_line_says_so(
    directory, dtype, monkeypatch, capsys
):
    monkeypatch.setattr(load, "has_fast_bf16", lambda device: False)
    half, layout = dtype == torch.bfloat16, layout_of(LENGTHS)
    given = stock_backbone(directory, "modernbert", dtype=dtype)
    tokens, _ = random_batch(given)
    rounded = {name: value.float() for name, value in given.model.state_dict().items()}
    capsys.readouterr()
    backbone = for_inference(given, mixed=not half)
    assert capsys.readouterr().err == "no fast bf16 on this device, so matrix products are computed in fp32\n"
    assert backbone.compute is None and backbone.model.dtype == torch.float32
    assert all(torch.equal(value, rounded[name]) for name, value in backbone.model.state_dict().items())
    assert backbone.hidden(tokens, layout).dtype == torch.float32
    for_inference(stock_backbone(directory, "modernbert"))
    assert "bf16" not in capsys.readouterr().err


@torch.no_grad()
def test_the_logits_are_fp32_for_a_bf16_model(directory):
    backbone = stock_backbone(directory, "bert", dtype=torch.bfloat16)
    tokens, attention = random_batch(backbone)
    assert logits_at(backbone.model, hidden_states(backbone.model, tokens, attention), attention).dtype == torch.float32


@torch.no_grad()
def test_an_end_token_inside_a_row_does_not_move_the_positions_behind_it(directory):
    """RoBERTa counts positions over the tokens that are not padding, and our end of text is its padding token."""
    backbone = stock_backbone(directory, "roberta")
    model, seen = backbone.model, []
    model.roberta.embeddings.position_embeddings.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    for front in (backbone.eos_id, FIRST_WORD):
        hidden_states(model, torch.tensor([[6, front, front, 7, 8]]))
    assert torch.equal(*seen)
    first = model.config.pad_token_id + 1
    assert seen[0].tolist() == [list(range(first, first + 5))]
    door(model).hidden(torch.tensor([[6, 7, 8], [9, 1, 1]]), layout_of([3, 1]))
    assert seen[-1].tolist() == [[first, first + 1, first + 2, first]]


def test_a_class_whose_head_is_unknown_is_an_error_that_says_where_to_add_it(directory):
    backbone = stock_backbone(directory, "llama")
    backbone.model.get_output_embeddings = lambda: None
    with pytest.raises(
        ValueError,
        match="model_type = 'llama' has no known LM head; allowed: albert, bert, deberta-v2, distilbert, electra",
    ):
        head_logits(backbone.model, torch.zeros(1, 32))


def test_a_toy_is_a_backbone_of_its_own():
    backbone = tabular_backbone()
    tokens = torch.tensor([[1, 2, 3]])
    expected = backbone.model.logits_of(tokens)
    layout, row, position = layout_of([3]), torch.tensor([0, 0]), torch.tensor([2, 1])
    hidden = backbone.hidden(tokens, layout)
    assert torch.equal(packed_logits(backbone, hidden, layout, row, position), expected[0, [2, 1]])
    nll = TokenNLL(backbone)(tokens, layout, row, position, torch.tensor([0, 1]))
    torch.testing.assert_close(nll, -expected[0, [2, 1]].log_softmax(-1)[[0, 1], [0, 1]])


def test_a_toy_sees_no_padding_and_has_a_cache_that_is_always_fresh():
    backbone = tabular_backbone()
    tokens = torch.tensor([[1, 2, 3], [0, 1, backbone.pad_id]])
    layout = layout_of([3, 2])
    part = part_of(layout, [1, 0], [2, 2])
    alone = [backbone.model.logits_of(tokens[:1])[0], backbone.model.logits_of(tokens[1:, :2])[0]]
    assert torch.equal(backbone.hidden(tokens, layout), torch.cat(alone))
    kept = backbone.hidden(tokens, layout, cache=KVCache(), part=part)
    assert torch.equal(kept, torch.cat([alone[0][1:2], alone[1]]))
