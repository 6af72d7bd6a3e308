"""Two levels: cheap versions behind a clean row, and what a few exact ones say is wrong about them."""

from dataclasses import replace

import pytest
import torch

from dllm.algorithms import scoring
from dllm.algorithms.bd3lm import BD3LM
from dllm.algorithms.scoring import nelbo_masked
from dllm.config import LikelihoodSettings, Recipe
from dllm.core.blocks import BlockRule
from dllm.core.likelihood import estimate, likelihood_design
from dllm.core.noise import keyed_hash, token_hash
from dllm.core.packing import block_layout, layout_of
from dllm.models.forward import block_hidden, head_logits, hidden_states, packed_hidden
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


@pytest.mark.parametrize("options", [{}, {"budget": 6}, {"budget": 40}, {"budget": 300}])
@pytest.mark.parametrize("prediction", ["in_place", "next"])
@pytest.mark.parametrize("case", ["bert", "roberta", "modernbert", "llama"])
def test_a_score_is_that_of_its_passes_made_one_by_one(case, prediction, options):
    backbone, settings = backbone_of(case, prediction), settings_of(**options)
    scores = nelbo_masked(backbone, PROMPTS, TARGETS, settings)
    for prompt, target, score in zip(PROMPTS, TARGETS, scores, strict=True):
        nats, error = textbook(backbone, prompt, target, settings)
        assert (score.nats, score.standard_error) == pytest.approx((nats, error), abs=1e-3)  # weights sum up to 10^2
