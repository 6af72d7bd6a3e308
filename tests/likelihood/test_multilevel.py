"""Two levels: cheap versions behind a clean row, and what a few exact ones say is wrong about them."""

import pytest
import torch

from dllm.config import LikelihoodSettings
from dllm.core.blocks import BlockRule
from dllm.core.likelihood import estimate, likelihood_design
from dllm.core.noise import keyed_hash, token_hash
from dllm.core.packing import block_layout
from dllm.likelihood import _masked as scoring
from dllm.likelihood._masked import nelbo_masked
from dllm.likelihood.scorer import MaskedScorer
from dllm.models.forward import block_hidden, head_logits, hidden_states
from dllm.sampling.step import block_rule
from tests.models.families import VOCAB, stock_model
from tests.models.test_spans import rows_of
from tests.oracles import ToyBackbone, tabular_backbone

MASK = 4
PROMPTS = [[9, 10, 11, 12, 13, 14], [9, 10, 11, 12, 13, 14], [], [7, 8], [20, 21, 22]]
TARGETS = [[30, 31, 32, 33], [30, 31, 35, 36, 37, 38, 39], [40, 41, 42, 43, 44, 45], [50, 51], [60]]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def backbone_of(case="modernbert", prediction="in_place", **changes):
    return ToyBackbone(stock_model(case), MASK, 1, 0, VOCAB, 128, prediction, **changes)


def settings_of(**options):
    return LikelihoodSettings(**{"estimator": "multilevel", "budget": 14} | options)


def nll_of(backbone, hidden, target):
    logits = head_logits(backbone.model, hidden).float()
    logits[:, backbone.mask_id] = -torch.inf
    return -logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None])[:, 0].double()


@torch.no_grad()
def textbook(backbone, prompt, target, settings):
    """The estimate pass by pass: stock rows for what is exact, and one span behind each clean row for what is not."""
    key = keyed_hash(settings.seed, token_hash(torch.tensor(prompt, dtype=torch.long)), torch.tensor(0))
    design = likelihood_design(len(target), key, settings)
    start, shift, lines = len(prompt), int(backbone.prediction == "next"), []
    for masked, partial in zip(design.masked, design.partial.tolist(), strict=True):
        answer = [backbone.mask_id if gone else token for token, gone in zip(target, masked.tolist(), strict=True)]
        version, clean = torch.tensor([[*prompt, *answer]]), torch.tensor([[*prompt, *target]])
        if not partial:
            hidden = hidden_states(backbone.model, version)[0]
        else:
            aimed = {start + i for i in masked.nonzero()[:, 0].tolist()}
            span = tuple(sorted(aimed | {max(0, i - shift) for i in aimed}))
            layout = block_layout(rows_of((clean.shape[1],), ((span,),)))
            found = block_hidden(backbone.model, torch.cat([clean, version[:, span]], 1), layout)[clean.shape[1] :]
            hidden = torch.zeros(clean.shape[1], found.shape[1]).index_copy(0, torch.tensor(span), found)
        places = (torch.arange(start, start + len(target)) - shift).clamp(min=0)
        lines.append(nll_of(backbone, hidden[places], target))
    return [x.item() for x in estimate(design, torch.stack(lines))]


@pytest.mark.parametrize(
    ("case", "budget"),
    [("bert", 14), ("roberta", 14), ("llama", 14), ("modernbert", 6), ("modernbert", 40), ("modernbert", 300)],
)
@pytest.mark.parametrize("prediction", ["in_place", "next"])
def test_a_score_is_that_of_its_passes_made_one_by_one(case, prediction, budget):
    backbone, settings = backbone_of(case, prediction), settings_of(budget=budget)
    scores = nelbo_masked(backbone, PROMPTS, TARGETS, settings)
    for prompt, target, score in zip(PROMPTS, TARGETS, scores, strict=True):
        nats, error = textbook(backbone, prompt, target, settings)
        assert (score.nats, score.standard_error) == pytest.approx((nats, error), abs=1e-3)  # weights sum up to 10^2


def enumerated(backbone, prompt, target):
    settings = LikelihoodSettings(estimator="enumerate")
    return nelbo_masked(backbone, [prompt], [target], settings)[0].nats


@pytest.mark.parametrize("options", [{}, {"budget": 20}, {"budget": 64, "effort": 0.7}], ids=str)
@pytest.mark.parametrize("prediction", ["in_place", "next"])
def test_scores_over_seeds_average_to_the_bound_and_state_their_error(prediction, options):
    """Of a random stock model, whose cheap passes know nothing of its exact ones."""
    backbone, prompts, targets = backbone_of("modernbert", prediction), PROMPTS[:3], TARGETS[:3]
    scores = [nelbo_masked(backbone, prompts, targets, settings_of(seed=seed, **options)) for seed in range(120)]
    nats, errors = (
        torch.tensor([[getattr(score, name) for score in each] for each in scores], dtype=torch.float64)
        for name in ("nats", "standard_error")
    )
    truth = torch.tensor([enumerated(backbone, p, t) for p, t in zip(prompts, targets, strict=True)])
    assert ((nats.mean(0) - truth).abs() < 4 * nats.std(0) / len(nats) ** 0.5).all()
    ratio = (errors**2).mean(0).sqrt() / nats.std(0)
    assert ((ratio > 0.75) & (ratio < 3.5)).all()  # cautious, as that of `lattice` with more windows than tokens


@pytest.mark.parametrize("options", [{}, {"effort": 0.8, "budget": 64}, {"block_size": 3}], ids=str)
@pytest.mark.parametrize("prediction", ["in_place", "next"])
def test_a_score_depends_neither_on_the_batch_nor_on_other_requests(prediction, options, monkeypatch):
    backbone, settings = backbone_of("modernbert", prediction), settings_of(**options)
    together = nelbo_masked(backbone, PROMPTS, TARGETS, settings)

    def same(score, expected):
        given = (score.nats, score.standard_error)
        assert given == pytest.approx((expected.nats, expected.standard_error), abs=1e-3)  # weights sum up to 10^2

    for batch_tokens in (1, 50, 200):
        scores = nelbo_masked(backbone, PROMPTS, TARGETS, settings.model_copy(update={"batch_tokens": batch_tokens}))
        assert [score.passes for score in scores] == [score.passes for score in together]
        list(map(same, scores, together))
    monkeypatch.setattr(scoring, "_CHUNK_ROWS", 3)
    monkeypatch.setattr(scoring, "_HEAD_LOGITS", 140)
    monkeypatch.setattr(scoring, "_SPAN_TOKENS", 5)
    list(map(same, nelbo_masked(backbone, PROMPTS, TARGETS, settings), together))
    list(map(same, nelbo_masked(backbone, PROMPTS[::-1], TARGETS[::-1], settings), together[::-1]))
    for prompt, target, expected in zip(PROMPTS, TARGETS, together, strict=True):
        same(nelbo_masked(backbone, [prompt], [target], settings)[0], expected)


def test_short_targets_have_no_noise_and_requests_that_are_equal_cost_nothing():
    backbone = backbone_of("bert")
    scores = nelbo_masked(backbone, [[7, 8]] * 3, [[50, 51], [60], [50, 51]], settings_of())
    assert [score.standard_error for score in scores] == [0, 0, 0]
    assert [score.passes for score in scores] == [3, 1, 0]
    assert scores[0].nats == pytest.approx(enumerated(backbone, [7, 8], [50, 51]), abs=1e-4)
    twice = nelbo_masked(backbone, PROMPTS[:1] * 2, TARGETS[1:2] * 2, settings_of())
    assert twice[1].passes == 0 and twice[1].nats == twice[0].nats


@pytest.mark.parametrize("prediction", ["in_place", "next"])
def test_passes_are_what_is_computed_in_whole_rows(prediction, monkeypatch):
    backbone, forward, tokens = backbone_of("bert", prediction), scoring.packed_hidden, []

    def counted(model, given, layout, **options):
        tokens.append(layout.tokens)
        return forward(model, given, layout, **options)

    monkeypatch.setattr(scoring, "packed_hidden", counted)
    for prompt, target in zip(PROMPTS, TARGETS, strict=True):
        tokens.clear()
        score = nelbo_masked(backbone, [prompt], [target], settings_of())[0]
        assert score.passes == -(-sum(tokens) // len(prompt + target))


def test_models_that_cannot_compute_parts_of_rows_are_refused_in_one_line():
    def refused(match, backbone, **options):
        with pytest.raises(ValueError, match=match) as fault:
            nelbo_masked(backbone, PROMPTS[:1], TARGETS[:1], settings_of(), **options)
        assert "\n" not in str(fault.value) and "take estimator = 'auto'" in str(fault.value)

    refused("TabularDenoiser computes attention in a way of its own", tabular_backbone(40))
    refused("DebertaV2ForMaskedLM computes attention in a way of its own", backbone_of("deberta-v2"))
    refused("this model works block by block", backbone_of(), rule=BlockRule(4))
    with pytest.raises(ValueError, match="block by block"):
        MaskedScorer(block_rule).nelbo(backbone_of(sidecar={"block_size": 4}), PROMPTS[:1], TARGETS[:1], settings_of())
