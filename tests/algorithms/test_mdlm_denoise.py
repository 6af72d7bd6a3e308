"""Denoising a canvas with a masked model."""

import itertools
from dataclasses import replace

import pytest
import torch

from dllm.algorithms.denoising import denoise_masked
from dllm.config import GenerateSettings
from dllm.core.canvas import canvas_for, infill_canvas
from dllm.core.reveal import REVEAL_RULES
from tests.oracles import markov_backbone, tabular_backbone

PROMPTS = [[0, 1, 2], [], [3, 3, 3, 3, 0, 1], [2], [0, 1, 2, 0]]
COUNTS = [6, 9, 4, 1, 7]


def settings(**options):
    return GenerateSettings(**({"block_size": 4, "early_stop": False} | options))


def canvas_of(backbone, prompts=PROMPTS, counts=COUNTS):
    return canvas_for(prompts, counts, mask_id=backbone.mask_id, pad_id=backbone.pad_id)


def drained(backbone, canvas, options, **keywords):
    *_, last = denoise_masked(backbone, canvas, options, **keywords)
    return last


def every_option():
    for rule in REVEAL_RULES:
        yield settings(reveal_rule=rule)
        yield settings(reveal_rule=rule, temperature=1.0, top_p=0.9, steps=4, threshold=0.3)
    yield settings(temperature=0.7, guidance=1.5, early_stop=True)


@pytest.mark.parametrize("options", every_option(), ids=lambda o: f"{o.reveal_rule}-{o.temperature}")
def test_a_row_in_a_batch_equals_the_row_alone(options):
    backbone = tabular_backbone(seed=3)
    together = drained(backbone, canvas_of(backbone), options)
    assert together.done.all() and not together.masked.any()
    for row, (prompt, count) in enumerate(zip(PROMPTS, COUNTS, strict=True)):
        alone = drained(backbone, canvas_of(backbone, [prompt], [count]), options)
        assert alone.responses()[0] == together.responses()[row]
        torch.testing.assert_close(alone.confidence[0], together.confidence[row, : alone.tokens.shape[1]])


def test_sampling_is_infilling():
    backbone, options = tabular_backbone(seed=1), settings(temperature=1.0)
    rows = [[*prompt, *[backbone.mask_id] * count] for prompt, count in zip(PROMPTS, COUNTS, strict=True)]
    infilled = drained(backbone, infill_canvas(rows, mask_id=backbone.mask_id, pad_id=backbone.pad_id), options)
    assert torch.equal(infilled.tokens, drained(backbone, canvas_of(backbone), options).tokens)


def test_masks_anywhere_are_filled_and_nothing_else_changes():
    backbone = tabular_backbone(seed=1)
    m = backbone.mask_id
    rows = [[m, 1, m, 2, 0, m, m, 3], [0, 1, m, 2]]
    canvas = infill_canvas(rows, mask_id=m, pad_id=backbone.pad_id)
    last = drained(backbone, canvas, settings(block_size=2))
    assert torch.equal(last.tokens[~canvas.masked], canvas.tokens[~canvas.masked])
    assert (last.tokens[canvas.masked] != m).all() and last.nfe == 4


@pytest.mark.parametrize("rule", REVEAL_RULES)
def test_revealed_counts_follow_the_quotas_block_by_block(rule):
    backbone = tabular_backbone()
    options = settings(reveal_rule=rule, steps=5, threshold=1.0)
    frames = list(denoise_masked(backbone, canvas_of(backbone, [[1, 2]], [10]), options))
    assert [frame.masked.sum().item() for frame in frames] == [10, 8, 6, 4, 2, 0]  # blocks 4, 4, 2 in 2, 2, 1 passes
    for before, after in itertools.pairwise(frames):
        changed = (before.masked & ~after.masked).nonzero()[:, 1]
        left_of_block = 2 + (changed - 2) // 4 * 4
        assert not before.masked[0, 2 : left_of_block.min()].any() and len(left_of_block.unique()) == 1
        assert torch.equal(before.tokens[~before.masked], after.tokens[~before.masked])
        assert (after.confidence[after.masked] == 0).all() and (after.confidence[~after.masked] > 0).all()


@pytest.mark.parametrize("steps,passes", [(None, 9), (9, 9), (100, 9), (4, 4), (3, 3)])
def test_steps_are_the_forward_passes(steps, passes):
    backbone = tabular_backbone()
    assert drained(backbone, canvas_of(backbone), settings(steps=steps)).nfe == passes


def test_rows_that_are_done_leave_the_batch():
    backbone = tabular_backbone()
    frames = list(denoise_masked(backbone, canvas_of(backbone), settings()))
    assert backbone.model.forwarded == sum(COUNTS)
    assert all(frame.tokens.shape == frames[0].tokens.shape for frame in frames)


def test_a_threshold_of_zero_reveals_a_block_at_once():
    backbone, canvas = tabular_backbone(), canvas_of(tabular_backbone(), [[1], [2]], [8, 8])
    options = settings(reveal_rule="threshold", threshold=0.0)
    assert drained(backbone, canvas, options.model_copy(update={"block_size": 8})).nfe == 1
    assert drained(backbone, canvas, options).nfe == 2


def test_a_threshold_of_one_reveals_one_token_per_pass():
    backbone = tabular_backbone()
    canvas = canvas_of(backbone, [[1]], [8])
    sure = drained(backbone, canvas, settings(reveal_rule="threshold", threshold=1.0))
    assert sure.nfe == 8 and torch.equal(sure.tokens, drained(backbone, canvas, settings()).tokens)


def test_guidance_of_zero_is_plain_and_guidance_counts_both_passes():
    backbone = tabular_backbone(seed=5)
    plain = drained(backbone, canvas_of(backbone), settings(temperature=1.0))
    assert torch.equal(
        plain.tokens, drained(backbone, canvas_of(backbone), settings(temperature=1.0, guidance=0.0)).tokens
    )
    guided = drained(backbone, canvas_of(backbone), settings(temperature=1.0, guidance=2.0))
    assert guided.nfe == 2 * plain.nfe and not torch.equal(guided.tokens, plain.tokens)
    nearly = drained(backbone, canvas_of(backbone), settings(temperature=1.0, guidance=1e-6))
    assert torch.equal(nearly.tokens, plain.tokens)


def test_a_row_without_a_prompt_is_not_moved_by_guidance():
    backbone = tabular_backbone(seed=5)
    canvas = canvas_of(backbone, [[]], [6])
    guided = drained(backbone, canvas, settings(guidance=3.0))
    assert torch.equal(guided.tokens, drained(backbone, canvas, settings()).tokens)


def eager_to_end(backbone):
    """The backbone with EOS made likely."""
    model = backbone.model
    plain = model.dllm_hidden

    def hidden(tokens, attention=None):
        logits = plain(tokens, attention)
        logits[..., backbone.eos_id] += 1.5
        return logits

    model.dllm_hidden = hidden
    return backbone


@pytest.mark.parametrize("rule", REVEAL_RULES)
def test_stopping_early_keeps_the_answer_and_saves_passes(rule):
    saved = 0
    for seed in range(10):
        backbone = eager_to_end(tabular_backbone(seed=seed))
        canvas = canvas_of(backbone, [[1], [2, 3]], [12, 16])
        full = drained(backbone, canvas, settings(reveal_rule=rule))
        short = drained(backbone, canvas, settings(reveal_rule=rule, early_stop=True))
        for a, b in zip(full.responses(), short.responses(), strict=True):
            end = (a + [backbone.eos_id]).index(backbone.eos_id)
            assert a[:end] == b[:end] and backbone.mask_id not in b
        saved += full.nfe - short.nfe
    assert saved > 0


def test_a_finished_row_is_filled_with_the_end():
    backbone = tabular_backbone()

    def after_two(canvas):
        return (canvas.valid & ~canvas.masked).sum(1) - canvas.start >= 2

    last = drained(backbone, canvas_of(backbone, [[1], [0, 0]], [6, 5]), settings(), finished=after_two)
    assert last.nfe == 2 and last.done.all()
    assert all(response.count(backbone.eos_id) >= n for response, n in zip(last.responses(), (4, 3), strict=True))


def test_the_prompt_never_changes_and_the_mask_token_is_never_revealed():
    backbone = tabular_backbone(seed=2)
    canvas = canvas_of(backbone)
    for options in every_option():
        for frame in denoise_masked(backbone, canvas, options):
            assert torch.equal(frame.tokens[~canvas.masked], canvas.tokens[~canvas.masked])
            assert torch.equal(frame.masked, (frame.tokens == backbone.mask_id) & frame.valid)


def test_seeds_change_a_sample_and_repeating_does_not():
    backbone = tabular_backbone(seed=2)
    samples = [drained(backbone, canvas_of(backbone), settings(temperature=1.0, seed=s)).tokens for s in (0, 0, 1)]
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])
    canvas = canvas_of(backbone, [[1], [1]], [8, 8])
    twins = drained(backbone, canvas, settings(temperature=1.0))
    assert torch.equal(twins.tokens[0], twins.tokens[1])
    apart = drained(backbone, canvas, settings(temperature=1.0), row_seeds=torch.arange(2))
    assert not torch.equal(apart.tokens[0], apart.tokens[1])


def chi_square(tokens, backbone, states, length):
    rows = list(itertools.product(range(states), repeat=length))
    p = torch.tensor([backbone.model.log_probability(list(row)) for row in rows]).exp()
    code = (tokens * states ** torch.arange(length - 1, -1, -1)).sum(-1)
    expected = p * len(tokens)
    return ((torch.bincount(code, minlength=len(rows)) - expected) ** 2 / expected).sum().item(), len(rows) - 1


def test_one_token_per_pass_in_random_order_samples_the_markov_chain_exactly():
    backbone, n = markov_backbone(), 5000
    canvas = canvas_of(backbone, [[]] * n, [4] * n)
    options = settings(reveal_rule="random", temperature=1.0)
    statistic, freedom = chi_square(
        drained(backbone, canvas, options, row_seeds=torch.arange(n)).tokens, backbone, 3, 4
    )
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    at_once = options.model_copy(update={"steps": 1})
    wrong, _ = chi_square(drained(backbone, canvas, at_once, row_seeds=torch.arange(n)).tokens, backbone, 3, 4)
    assert wrong > 2 * statistic  # all tokens in one pass are independent, which a chain is not


def test_a_canvas_without_masks_is_given_back():
    backbone = tabular_backbone()
    canvas = canvas_of(backbone, [[1, 2]], [0])
    frames = list(denoise_masked(backbone, canvas, settings()))
    assert len(frames) == 1 and frames[0] is canvas and backbone.model.forwarded == 0


def test_a_row_beyond_the_context_is_an_error():
    backbone = replace(tabular_backbone(), max_length=8)
    with pytest.raises(ValueError, match="take 10 positions, the model has 8"):
        next(denoise_masked(backbone, canvas_of(backbone, [[1] * 4], [6]), settings()))


def test_a_hidden_canvas_grows_block_by_block():
    backbone = tabular_backbone(sidecar={"response_end": "block"})
    settings = GenerateSettings(max_new_tokens=6, block_size=2, early_stop=False)
    *_, whole = denoise_masked(backbone, canvas_of(backbone, [[0, 1], [2]], 6), settings)
    for row, prompt in enumerate([[0, 1], [2]]):
        grown = list(prompt)
        for _ in range(3):  # the plain version: a canvas of one block, over and over
            *_, block = denoise_masked(backbone, canvas_of(backbone, [grown], 2), settings, row_seeds=torch.tensor([0]))
            grown = block.tokens[0, : len(grown) + 2].tolist()
        assert whole.tokens[row, : len(grown)].tolist() == grown


def test_what_stands_ahead_is_hidden_only_where_training_ended_at_blocks_and_nothing_is_kept_there():
    trained, other = tabular_backbone(sidecar={"response_end": "block"}), tabular_backbone()
    automatic = GenerateSettings(max_new_tokens=6, block_size=2, early_stop=False)

    def last(backbone, settings):
        return [*denoise_masked(backbone, canvas_of(backbone, [[0, 1]], 6), settings)][-1].tokens.tolist()

    assert last(trained, automatic) == last(other, automatic.model_copy(update={"ahead": "hidden"}))
    assert last(other, automatic) == last(trained, automatic.model_copy(update={"ahead": "visible"}))
    assert last(trained, automatic) != last(other, automatic)
    mask = trained.mask_id
    kept = infill_canvas([[0, mask, mask, mask, 3]], mask_id=mask, pad_id=trained.pad_id)
    *_, infilled = denoise_masked(trained, kept, automatic)
    *_, plain = denoise_masked(other, kept, automatic)
    assert infilled.tokens.tolist() == plain.tokens.tolist()
