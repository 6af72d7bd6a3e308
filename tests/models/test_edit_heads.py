"""Edit heads: on every backbone, sane at the start, aware of time, and the same after saving."""

from dataclasses import replace

import pytest
import torch

from dllm.core.packing import layout_of
from dllm.models.edit_heads import (
    HEADS_FILE,
    START_RATE,
    EditLoss,
    edit_loss,
    load_edit_heads,
    new_edit_heads,
    save_edit_heads,
)
from dllm.models.heads import head_logits
from tests.models.test_forward import random_batch
from tests.plain_forward import hidden_states
from tests.stock import KINDS, stock_backbone


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("models")


def trained(heads, seed=0):
    """Heads whose every parameter is random: nothing hides behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in heads.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=generator))
    return heads


def scores_of(backbone, seed=0):
    return EditLoss(backbone, trained(new_edit_heads(backbone.model, rank=8), seed))


LENGTHS = (12, 7, 1, 9)


def batch_for(backbone):
    tokens, _ = random_batch(backbone, LENGTHS)
    return tokens, layout_of(LENGTHS), torch.tensor([0.1, 0.5, 0.5, 0.9])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_new_heads_leave_the_backbone_as_it_is_and_give_small_even_rates(directory, kind):
    backbone = stock_backbone(directory, kind)
    scores = EditLoss(backbone, new_edit_heads(backbone.model))
    tokens, layout, time = batch_for(backbone)
    timed, log_rates = scores.rates(tokens, layout, time)
    attention = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    plain = layout.pack(hidden_states(backbone.model, tokens, attention))
    torch.testing.assert_close(timed.hidden, plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(log_rates.exp(), torch.full((layout.tokens, 3), START_RATE))
    place = torch.tensor([3, 3, 20])
    logits = scores.token_logits(timed, place, torch.tensor([True, False, True]))
    torch.testing.assert_close(logits, head_logits(backbone.model, plain[place]).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_row_in_a_batch_has_the_rates_it_has_alone(directory, kind):
    backbone = stock_backbone(directory, kind)
    scores = scores_of(backbone)
    tokens, layout, time = batch_for(backbone)
    together = scores.rates(tokens, layout, time)[1]
    for row, length in enumerate(LENGTHS):
        alone = scores.rates(tokens[row : row + 1, :length], layout_of([length]), time[row : row + 1])[1]
        low = int(layout.cu_seqlens[row])
        torch.testing.assert_close(together[low : low + length], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_time_reaches_the_rates_and_both_token_distributions_of_its_row_alone(directory, kind):
    backbone = stock_backbone(directory, kind)
    scores = scores_of(backbone)
    tokens, layout, time = batch_for(backbone)
    place, insert = torch.tensor([13, 14, 2, 25]), torch.tensor([True, False, True, False])
    results = []
    for t in (0.5, 0.6):
        time[1] = t
        timed, log_rates = scores.rates(tokens, layout, time)
        results.append((log_rates, scores.token_logits(timed, place, insert)))
    rates, logits = ((a - b).abs().amax(-1) for a, b in zip(*results, strict=True))
    second = torch.arange(layout.tokens).sub(12).ge(0) & (torch.arange(layout.tokens) < 19)
    assert rates[second].min() > 1e-5 and rates[~second].max() == 0
    assert logits[:2].min() > 1e-5 and logits[2:].max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_the_model_has_a_gradient(directory, kind):
    backbone = stock_backbone(directory, kind)
    scores = scores_of(backbone).train()
    tokens, layout, time = batch_for(backbone)
    place, insert = torch.tensor([3, 4]), torch.tensor([True, False])
    log_rates, nll = scores(tokens, layout, time, place, insert, torch.tensor([0, 0, 1]), torch.tensor([7, 8, 9]))
    assert log_rates.shape == (29, 3) and nll.shape == (3,)
    (log_rates.sum() + nll.sum()).backward()
    without = [name for name, value in scores.named_parameters() if value.grad is None or not value.grad.any()]
    assert [name for name in without if name.startswith("heads.")] == []
    backbone.model.zero_grad(set_to_none=True)


@torch.no_grad()
def test_the_nll_is_the_softmax_of_the_logits(directory):
    backbone = stock_backbone(directory, "bert")
    scores = scores_of(backbone)
    tokens, layout, time = batch_for(backbone)
    place, insert = torch.tensor([3, 4]), torch.tensor([True, False])
    which, targets = torch.tensor([0, 0, 1]), torch.tensor([7, 8, 9])
    _, nll = scores(tokens, layout, time, place, insert, which, targets)
    logits = scores.token_logits(scores.rates(tokens, layout, time)[0], place, insert)
    expected = torch.nn.functional.cross_entropy(logits[which], targets, reduction="none")
    torch.testing.assert_close(nll, expected)


@torch.no_grad()
def test_a_model_that_predicts_ahead_reads_substitutions_from_the_token_before(directory):
    backbone = stock_backbone(directory, "llama")
    heads = new_edit_heads(backbone.model)
    tokens, layout, time = batch_for(backbone)
    ahead = EditLoss(replace(backbone, prediction="next"), heads)
    timed, _ = ahead.rates(tokens, layout, time)
    logits = ahead.token_logits(timed, torch.tensor([4, 4]), torch.tensor([True, False]))
    torch.testing.assert_close(logits, head_logits(backbone.model, timed.hidden[[4, 3]]).float())


@torch.no_grad()
def test_rates_are_fp32_under_autocast_and_for_a_bf16_backbone(directory):
    tokens, layout, time = batch_for(stock_backbone(directory, "bert"))
    place, insert = torch.tensor([3, 4]), torch.tensor([True, False])
    for dtype in (torch.float32, torch.bfloat16):
        scores = scores_of(stock_backbone(directory, "bert", dtype=dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            timed, log_rates = scores.rates(tokens, layout, time)
            logits = scores.token_logits(timed, place, insert)
        assert log_rates.dtype == logits.dtype == torch.float32
        assert log_rates.isfinite().all() and (log_rates != log_rates.bfloat16().float()).any()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_saved_heads_give_the_same_rates_and_the_stock_weights_stay_free_of_them(directory, kind, tmp_path):
    backbone = stock_backbone(directory, kind)
    scores = scores_of(backbone)
    backbone.model.save_pretrained(tmp_path)
    assert save_edit_heads(scores.heads, tmp_path) == tmp_path / HEADS_FILE
    written = [save_edit_heads(scores.heads, tmp_path).read_bytes() for _ in range(5)]
    assert len(set(written)) == 1, "no order of a hash table is in the file"
    again, report = type(backbone.model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    if kind in ("llama", "qwen2"):
        again.config.is_causal = False
    loaded = edit_loss(
        replace(backbone, model=again.eval(), edit_heads=load_edit_heads(tmp_path, again), packable=None)
    )
    mine = edit_loss(replace(backbone, edit_heads=scores.heads)).rates(*batch_for(backbone))[1]
    torch.testing.assert_close(loaded.rates(*batch_for(backbone))[1], mine, atol=1e-5, rtol=1e-5)


def test_new_heads_are_seeded_and_leave_the_global_generator_alone(directory):
    model = stock_backbone(directory, "bert").model
    state = torch.random.get_rng_state()
    first, second, other = new_edit_heads(model), new_edit_heads(model), new_edit_heads(model, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.time[0].weight, second.time[0].weight)
    assert not torch.equal(first.time[0].weight, other.time[0].weight)


def test_a_checkpoint_without_heads_is_one_clear_error(directory, tmp_path):
    backbone = stock_backbone(directory, "roberta")
    with pytest.raises(ValueError, match="edit_heads.safetensors: missing; a checkpoint of edit_flows has its heads"):
        load_edit_heads(tmp_path, backbone.model)
    with pytest.raises(ValueError, match="has no edit heads; algorithm = 'edit_flows' needs one trained with it"):
        edit_loss(backbone)


@pytest.mark.parametrize("damage", ["cut", "text", "other"])
def test_damaged_heads_and_those_of_another_model_are_one_clear_error(directory, damage, tmp_path):
    model = stock_backbone(directory, "bert").model
    heads = new_edit_heads(model)
    if damage == "other":
        heads = type(heads)(16, 8)
    path = save_edit_heads(heads, tmp_path)
    if damage != "other":
        path.write_bytes(path.read_bytes()[:200] if damage == "cut" else b"no weights at all")
    with pytest.raises(ValueError, match="not from the same" if damage == "other" else "damaged") as fault:
        load_edit_heads(tmp_path, model)
    assert "\n" not in str(fault.value)
