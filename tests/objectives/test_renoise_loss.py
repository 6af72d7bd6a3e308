"""Renoised canvases: all canvases of a batch are read as sampling reads them, and the loss is the scorer's bound."""

import math

import pytest
import torch

from dllm.config import Recipe
from dllm.core.batch import Batch, row_noise
from dllm.models.diffusion_gemma import Prefix
from dllm.models.renoise_loss import RenoiseLoss
from dllm.objectives.renoise import Renoise
from tests.likelihood.test_renoise_scorer import (  # noqa: F401 - `backbone` is a fixture
    SIZE,
    STEPS,
    WORDS,
    backbone,
    every_trajectory,
    predictions,
)
from tests.training_loss import training_loss

ROWS = [(0, 5), (3, 1), (9, 4), (1, 2)]
"""Tokens of prompt and response; the sliding window has 6, a canvas 2."""


def objective(**recipe) -> Renoise:
    return Renoise(Recipe(block_size=SIZE, **recipe), vocab_size=WORDS, passes=STEPS, bos_id=0)


def batch_of(rows, seed=0, ids=None) -> Batch:
    """Random rows of words, with padding behind them."""
    length = max(sum(row) for row in rows)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(WORDS, (len(rows), length), generator=generator)
    place = torch.arange(length)
    prompts, lengths = torch.tensor([[p, p + r] for p, r in rows]).T[..., None]
    attention = place < lengths
    return Batch(tokens * attention, attention, attention & (place >= prompts), torch.tensor(ids or range(len(rows))))


def nll_one_by_one(backbone, batch, inputs, *, conditioned) -> list[float]:  # noqa: F811
    """-log p of every target, canvas by canvas, as sampling predicts them; told itself where conditioned [B]."""
    found = []
    for row, (prompt, count) in enumerate(ROWS):
        clean = batch.tokens[row].tolist()
        for begin in range(0, count, SIZE):
            end = min(begin + SIZE, count)
            prefix = Prefix(backbone)
            if not prompt:
                prefix.read([])  # the start token
            prefix.read(clean[: prompt + begin])
            seen = inputs.seen[row : row + 1, begin:end]
            logits = prefix.predict(seen)
            if conditioned[row]:
                logits = prefix.predict(seen, logits)
            targets = torch.tensor(clean[prompt + begin : prompt + end])
            found += torch.nn.functional.cross_entropy(logits[0], targets, reduction="none").tolist()
    return found


def terms_of(model, objective, batch, noise, denominator=1.0):
    return training_loss(objective, model, batch, noise, mask_id=-1, denominator=denominator)


@pytest.mark.parametrize("training", [False, True])
def test_all_canvases_of_a_batch_are_predicted_as_sampling_predicts_each(backbone, training):  # noqa: F811
    batch = batch_of(ROWS)
    noise = row_noise(1, 0, batch.sample_ids, batch.tokens.shape[1])
    ours = objective(weight="uniform")
    inputs = ours.corrupt(batch, noise, mask_id=-1)
    assert 0 < inputs.conditioned.sum() < len(ROWS) and (inputs.seen[inputs.row, inputs.place] != inputs.targets).any()
    model = RenoiseLoss(backbone).train(training)
    with torch.no_grad():
        inside = {name: value for name, value in vars(inputs).items() if name != "share"}
        nats, nll = model(**inside, steps=0)
        terms = ours.loss(model, inputs, denominator=12.0)
    model.eval()
    expected = nll_one_by_one(backbone, batch, inputs, conditioned=inputs.conditioned & training)
    torch.testing.assert_close(nll, torch.tensor(expected), rtol=1e-4, atol=1e-5)  # fp32, in another order of sums
    assert torch.equal(nats, nll) and terms.loss.item() == pytest.approx(sum(expected) / 12, rel=1e-5)
    assert terms.masked == len(expected) == sum(count for _, count in ROWS)


def test_drawn_noise_gives_the_enumerated_bound_in_expectation(backbone):  # noqa: F811
    """Two canvases behind a prompt: their bounds add up, the second behind the clean first."""
    prompt, text, rows = [3, 1, 2], [1, 3, 0, 2], 6000
    expected = 0.0
    for begin in (0, SIZE):
        _, bound = every_trajectory(predictions(backbone, prompt + text[:begin], SIZE))
        expected += bound[WORDS * text[begin] + text[begin + 1]]
    tokens = torch.tensor(prompt + text).expand(rows, -1)
    every = torch.ones_like(tokens, dtype=torch.bool)
    batch = Batch(tokens, every, every & (torch.arange(7) >= 3), torch.arange(rows))
    model = RenoiseLoss(backbone).eval()
    with torch.no_grad():
        terms = terms_of(model, objective(), batch, row_noise(5, 0, batch.sample_ids, 7), rows * len(text))
    error = terms.rows.double().std().item() / rows**0.5
    assert abs(terms.loss.item() * len(text) - expected) < 4 * error
    assert error < 0.03 * expected, "so that the line above says something"


def test_the_published_loss_draws_times_and_the_bound_levels():
    batch = batch_of([(2, 4)] * 400)
    noise = row_noise(2, 0, batch.sample_ids, 6)
    flat, bound = (objective(weight=weight).corrupt(batch, noise, mask_id=-1) for weight in ("uniform", "elbo"))
    kept = [(x.seen[x.row, x.place] == x.targets).double().mean().item() for x in (flat, bound)]
    drawn = 1 / WORDS  # of those that are replaced, so many stay what they are
    assert kept[0] == pytest.approx(0.5 + 0.5 * drawn, abs=0.04), "times are uniform in [0, 1)"
    mean = (STEPS + 1) / 2 / STEPS
    assert kept[1] == pytest.approx(1 - mean + mean * drawn, abs=0.04), "levels are uniform in 1..N"
    assert set(bound.level.tolist()) == {1, 2, 3}
    assert flat.conditioned.double().mean().item() == pytest.approx(0.5, abs=0.1)


def test_a_row_has_the_same_noise_in_every_batch():
    whole = batch_of(ROWS * 4, seed=3)
    noise = row_noise(1, 0, whole.sample_ids, whole.tokens.shape[1])
    together = objective().corrupt(whole, noise, mask_id=-1)
    some = torch.tensor([13, 3, 4])
    width = int(whole.attention[some].sum(-1).max())
    part = Batch(*(x[some] if x.ndim == 1 else x[some, :width] for x in vars(whole).values()))
    alone = objective().corrupt(part, row_noise(1, 0, part.sample_ids, width), mask_id=-1)
    for mine, row in enumerate(some.tolist()):
        count = alone.count[mine]
        assert torch.equal(alone.seen[mine, :count], together.seen[row, :count])
        assert alone.conditioned[mine] == together.conditioned[row]
        assert torch.equal(alone.level[alone.row == mine], together.level[together.row == row])


def test_gradients_reach_the_encoder_are_finite_and_do_not_depend_on_slices(backbone, monkeypatch):  # noqa: F811
    batch = batch_of(ROWS)
    noise = row_noise(4, 0, batch.sample_ids, batch.tokens.shape[1])
    found = []
    for height in (10**9, 5):
        monkeypatch.setattr("dllm.models.renoise_loss.HEAD_LOGITS", height * WORDS)
        backbone.model.zero_grad()
        terms_of(RenoiseLoss(backbone).train(), objective(), batch, noise, 12.0).loss.backward()
        found.append({n: p.grad.clone() for n, p in backbone.model.named_parameters() if p.grad is not None})
    backbone.model.eval()
    assert found[0].keys() == found[1].keys() and not any("vision" in name for name in found[0])
    assert any(name.endswith("self_conditioning.up_proj.weight") for name in found[0])
    for name, whole in found[0].items():
        assert whole.isfinite().all()
        torch.testing.assert_close(whole, found[1][name], rtol=1e-3, atol=1e-5)


def test_tokens_that_go_through_the_model_are_counted():
    batch = batch_of(ROWS)
    noise = row_noise(4, 0, batch.sample_ids, batch.tokens.shape[1])
    inputs = objective().corrupt(batch, noise, mask_id=-1)
    lengths, prompts = (x.numpy() for x in (batch.attention.sum(-1), batch.attention.sum(-1) - batch.maskable.sum(-1)))
    counted = objective().forward_lengths(lengths, prompts)
    before = [max(1, p + (math.ceil(r / SIZE) - 1) * SIZE) for p, r in ROWS]
    assert counted.tolist() == [b + r for b, (_, r) in zip(before, ROWS, strict=True)]
    assert inputs.given.shape[1] == max(b + (p == 0) for b, (p, _) in zip(before, ROWS, strict=True))
