"""Our samplers answer as the authors' own loops do, token for token."""

from dataclasses import replace

import pytest
import torch

from dllm.config import GenerateSettings
from dllm.core.canvas import canvas_for
from dllm.models.load import load_backbone
from dllm.sampling.sampler import block_sampler
from tests.models.published import llada2
from tests.models.published.pieces import block_causal, make_weights, save_byte_tokenizer, save_checkpoint
from tests.sampling import published_loops

BLOCK, END, MASK = 32, 257, llada2.MASK
SMALLER = {"num_hidden_layers": 2, "num_experts": 8, "n_group": 2, "topk_group": 1, "max_position_embeddings": 192}
CONFIG = llada2.CONFIG | SMALLER


@pytest.fixture(scope="module")
def weights():
    """Of a tiny LLaDA2 that is sure of some tokens and not of others, and takes some back when it sees more."""
    torch.set_num_threads(1)
    weights = make_weights(llada2.shapes(CONFIG), seed=3)
    return weights | {"lm_head.weight": weights["lm_head.weight"] * 4.0}


@pytest.fixture(scope="module")
def backbone(weights, tmp_path_factory):
    directory = tmp_path_factory.mktemp("llada2")
    save_checkpoint(directory, CONFIG, weights)
    save_byte_tokenizer(directory, llada2.TOKENS, kind="fast", template="", end="<|endoftext|>")
    return load_backbone(directory)


def scores_of(weights):
    """Logits of a row that attends block by block, by the plain statement of the architecture; no mask is proposed."""

    def scores(row):
        allowed = block_causal(len(row), BLOCK)
        logits = llada2.logits(CONFIG, weights, torch.tensor([row]), allowed)[0]
        logits[:, MASK] = -torch.inf
        return logits

    return scores


def ours(backbone, prompts, new_tokens, **settings):
    """What the sampler answers to all prompts at once, and the passes of each."""
    canvas = canvas_for(prompts, new_tokens, mask_id=backbone.mask_id, pad_id=backbone.pad_id)
    options = {"reveal_rule": "threshold"} | settings
    rows = block_sampler().complete(backbone, canvas, GenerateSettings(**options))
    return {row.number: (row.tokens, row.passes) for row in rows}


MODES = {
    "quality": {"threshold": 0.7, "edit_threshold": 0.5},
    "speed": {"threshold": 0.5, "edit_threshold": 0.0},
    "as the signature says": {"threshold": 0.95, "edit_threshold": 0.9},
    "never after the masks": {"threshold": 0.5, "edit_threshold": 0.0, "edit_passes": 0},
    "twice after the masks": {"threshold": 0.3, "edit_threshold": 0.0, "edit_passes": 2},
}
"""The two modes of the model card, the defaults of `generate`, and budgets of passes that run out."""

PROMPTS = [list(range(5, 10)), list(range(40, 77)), list(range(100, 132))]
"""Shorter than a block, one and a bit, a whole one."""


def decoded(weights, prompt, new_tokens, end, mode, *, early_stop):
    """What the authors' loop answers, and its passes."""
    budget = {"post_steps": mode["edit_passes"]} if "edit_passes" in mode else {}
    return published_loops.llada21(
        scores_of(weights), prompt, new_tokens, mask=MASK, end=end, threshold=mode["threshold"],
        editing_threshold=mode["edit_threshold"], early_stop=early_stop, **budget,
    )  # fmt: skip


def up_to_a_block(prompts):
    """New tokens up to the end of the block after the one in which each prompt ends."""
    return [2 * BLOCK - len(prompt) % BLOCK for prompt in prompts]


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_llada21_is_decoded_as_published(backbone, weights, mode):
    counts = up_to_a_block(PROMPTS)
    found = ours(backbone, PROMPTS, counts, early_stop=False, **MODES[mode])
    for number, (prompt, count) in enumerate(zip(PROMPTS, counts, strict=True)):
        assert found[number] == decoded(weights, prompt, count, END, MODES[mode], early_stop=False)


@torch.no_grad()
def test_llada21_ends_with_the_block_that_holds_the_end(backbone, weights):
    mode = MODES["quality"]
    (count,) = up_to_a_block(PROMPTS[:1])
    whole, passes = decoded(weights, PROMPTS[0], count, END, mode, early_stop=False)
    end = whole[9]  # a word of the first block, taken for the end
    expected, fewer = decoded(weights, PROMPTS[0], count, end, mode, early_stop=True)
    assert len(expected) <= 10 and fewer < passes
    tokens, made = ours(replace(backbone, eos_id=end), PROMPTS[:1], count, **mode)[0]
    assert tokens[: len(expected)] == expected and made == fewer


@torch.no_grad()
def test_of_an_answer_that_breaks_off_inside_a_block_all_but_that_block_is_as_published(backbone, weights):
    """There the published loop masks the whole block and cuts what it wrote; here the block is as long as asked."""
    mode, count = MODES["quality"], up_to_a_block(PROMPTS[:1])[0] - 10
    expected, _ = decoded(weights, PROMPTS[0], count, END, mode, early_stop=False)
    tokens, _ = ours(backbone, PROMPTS[:1], count, early_stop=False, **mode)[0]
    first = BLOCK - len(PROMPTS[0])
    assert tokens[:first] == expected[:first] and len(tokens) == len(expected) == count
