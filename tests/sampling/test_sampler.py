"""Denoising a canvas with a masked model."""

import itertools
from dataclasses import replace

import numpy
import pytest
import torch

from dllm.choices import REVEAL_RULES, parallel_rules
from dllm.config import GenerateSettings
from dllm.core.canvas import canvas_for, infill_canvas
from dllm.sampling import loop as denoising
from dllm.sampling.rows import first_rows
from dllm.sampling.sampler import MaskedSampler
from dllm.sampling.step import DenoisingStep, Forward
from tests.oracles import markov_backbone, tabular_backbone
from tests.plain_sampler import plain_row
from tests.samplers import in_batches, numbered_rows
from tests.stock import stock_backbone
from tests.synchronisation import forbid_synchronisation

PROMPTS = [[0, 1, 2], [], [3, 3, 3, 3, 0, 1], [2], [0, 1, 2, 0]]
COUNTS = [6, 9, 4, 1, 7]


def settings(**options):
    return GenerateSettings(**({"block_size": 4, "early_stop": False} | options))


def canvas_of(backbone, prompts=PROMPTS, counts=COUNTS):
    return canvas_for(prompts, counts, mask_id=backbone.mask_id, pad_id=backbone.pad_id)


def drained(backbone, canvas, options, **keywords):
    *_, last = MaskedSampler().denoise(backbone, canvas, options, **keywords)
    return last


def every_option():
    for rule in REVEAL_RULES:
        yield settings(reveal_rule=rule)
        yield settings(reveal_rule=rule, temperature=1.0, top_p=0.9, steps=4, threshold=0.3, entropy_bound=1.5)
    yield settings(temperature=0.7, guidance=1.5, early_stop=True)
    yield settings(steps=5, ahead="hidden", early_stop=True)


@pytest.mark.parametrize("options", every_option(), ids=lambda o: f"{o.reveal_rule}-{o.temperature}")
def test_a_row_in_a_batch_equals_the_row_alone(options):
    backbone = tabular_backbone(seed=3)
    together = drained(backbone, canvas_of(backbone), options)
    assert together.done.all() and not together.masked.any()
    for row, (prompt, count) in enumerate(zip(PROMPTS, COUNTS, strict=True)):
        alone = drained(backbone, canvas_of(backbone, [prompt], [count]), options)
        assert alone.responses()[0] == together.responses()[row]
        torch.testing.assert_close(alone.confidence[0], together.confidence[row, : alone.tokens.shape[1]])


@pytest.mark.parametrize("options", every_option(), ids=lambda o: f"{o.reveal_rule}-{o.temperature}")
def test_the_sampler_does_what_the_plain_one_does(options):
    backbone = tabular_backbone(seed=3)
    m, options = backbone.mask_id, options.model_copy(update={"early_stop": False})
    rows = [[*prompt, *[m] * count] for prompt, count in zip(PROMPTS, COUNTS, strict=True)] + [[m, 1, m, m, 2, m]]
    canvas = infill_canvas(rows, mask_id=m, pad_id=backbone.pad_id)
    done = {row.number: row for row in MaskedSampler().complete(backbone, canvas, options)}
    together = drained(backbone, canvas, options).tokens.tolist()
    for number, row in enumerate(rows):
        start = canvas.start[number].item()
        expected, passes = plain_row(backbone, row, start, options)
        assert together[number][: len(row)] == expected and done[number].tokens == expected[start:]
        assert done[number].passes == passes * (2 if options.guidance else 1)


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
    frames = list(MaskedSampler().denoise(backbone, canvas_of(backbone, [[1, 2]], [10]), options))
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


@pytest.mark.parametrize("rule", parallel_rules())
def test_a_parallel_rule_reveals_at_least_the_quota_and_at_least_one(rule):
    backbone, (sure, unsure) = (
        tabular_backbone(),
        {"threshold": (0, 1), "factor": (9, 0.001), "entropy_bound": (99, 0)}[rule],
    )
    canvas = canvas_of(backbone, [[1], [2, 3]], [8, 8])
    for steps, passes in ((None, 8), (4, 4)):
        slow = settings(reveal_rule=rule, steps=steps, **{rule: float(unsure)})
        assert drained(backbone, canvas, slow).nfe == passes
    assert drained(backbone, canvas, settings(reveal_rule=rule, **{rule: float(sure)})).nfe == 2  # a block per pass


def test_rows_that_are_done_leave_the_batch():
    backbone = tabular_backbone()
    frames = list(MaskedSampler().denoise(backbone, canvas_of(backbone), settings()))
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
    plain = model.logits_of

    def hidden(tokens, attention=None):
        logits = plain(tokens, attention)
        logits[..., backbone.eos_id] += 1.5
        return logits

    model.logits_of = hidden
    return backbone


@pytest.mark.parametrize("rule", REVEAL_RULES)
def test_stopping_early_keeps_the_answer_and_saves_passes(rule):
    saved = 0
    for seed in range(6):
        backbone = eager_to_end(tabular_backbone(seed=seed))
        canvas = canvas_of(backbone, [[1], [2, 3], [0]], [12, 16, 9])
        full = drained(backbone, canvas, settings(reveal_rule=rule))
        short = drained(backbone, canvas, settings(reveal_rule=rule, early_stop=True))
        for a, b in zip(full.responses(), short.responses(), strict=True):
            end = (a + [backbone.eos_id]).index(backbone.eos_id)
            assert a[:end] == b[:end] and backbone.mask_id not in b
        saved += full.nfe - short.nfe
    assert saved > 0


def test_a_finished_row_is_filled_with_the_end():
    backbone = tabular_backbone()

    def after_two(row):
        return sum(token != backbone.mask_id for token in row.response) >= 2

    last = drained(backbone, canvas_of(backbone, [[1], [0, 0]], [6, 5]), settings(), ended=after_two)
    assert last.nfe == 2 and last.done.all()
    assert all(response.count(backbone.eos_id) >= n for response, n in zip(last.responses(), (4, 3), strict=True))


def test_the_prompt_never_changes_and_the_mask_token_is_never_revealed():
    backbone = tabular_backbone(seed=2)
    canvas = canvas_of(backbone)
    for options in every_option():
        for frame in MaskedSampler().denoise(backbone, canvas, options):
            assert torch.equal(frame.tokens[~canvas.masked], canvas.tokens[~canvas.masked])
            assert torch.equal(frame.masked, (frame.tokens == backbone.mask_id) & frame.valid)


def test_seeds_change_a_sample_and_repeating_does_not():
    backbone = tabular_backbone(seed=2)
    samples = [drained(backbone, canvas_of(backbone), settings(temperature=1.0, seed=s)).tokens for s in (0, 0, 1)]
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])
    canvas = canvas_of(backbone, [[1], [1]], [8, 8])
    twins = drained(backbone, canvas, settings(temperature=1.0))
    assert torch.equal(twins.tokens[0], twins.tokens[1])
    with numbered_rows():
        apart = drained(backbone, canvas, settings(temperature=1.0))
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
    with numbered_rows():
        last = drained(backbone, canvas, options)
        at_once = drained(backbone, canvas, options.model_copy(update={"steps": 1}))
    statistic, freedom = chi_square(last.tokens, backbone, 3, 4)
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    wrong, _ = chi_square(at_once.tokens, backbone, 3, 4)
    assert wrong > 2 * statistic  # all tokens in one pass are independent, which a chain is not


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_rows_that_take_turns_sample_the_markov_chain_exactly(guidance):
    backbone, n = markov_backbone(), 4000
    canvas = canvas_of(backbone, [[]] * n, [4] * n)
    options = settings(reveal_rule="random", temperature=1.0, batch_size=700, guidance=guidance, batch_tokens=4096)
    with numbered_rows():
        rows = sorted(MaskedSampler().complete(backbone, canvas, options), key=lambda row: row.number)
    statistic, freedom = chi_square(torch.tensor([row.tokens for row in rows]), backbone, 3, 4)
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # guidance moves nothing where there is no prompt


def completed(backbone, prompts, counts, options, **keywords):
    rows = list(MaskedSampler().complete(backbone, canvas_of(backbone, prompts, counts), options, **keywords))
    assert sorted(row.number for row in rows) == list(range(len(prompts)))
    return [(row.tokens, row.passes, row.computed) for row in sorted(rows, key=lambda row: row.number)]


@pytest.mark.parametrize("options", every_option(), ids=lambda o: f"{o.reveal_rule}-{o.temperature}")
def test_a_row_that_takes_the_place_of_another_equals_the_row_alone(options):
    backbone = eager_to_end(tabular_backbone(seed=3))
    options = options.model_copy(update={"early_stop": True})
    alone = [completed(backbone, [p], [n], options)[0] for p, n in zip(PROMPTS, COUNTS, strict=True)]
    together = drained(backbone, canvas_of(backbone), options)
    assert together.responses() == [tokens for tokens, _, _ in alone]
    assert together.computed == sum(computed for _, _, computed in alone)
    for changes in (
        {},
        {"batch_size": 1},
        {"batch_size": 2},
        {"batch_tokens": 24},
        {"batch_tokens": 33, "batch_size": 4},
    ):
        found = completed(backbone, PROMPTS, COUNTS, options.model_copy(update=changes))
        assert found == alone, changes


def test_rows_never_exceed_the_budget_and_places_are_filled_at_once(monkeypatch):
    backbone, seen = tabular_backbone(), []
    step = DenoisingStep.run
    monkeypatch.setattr(DenoisingStep, "run", lambda self: seen.append(self.rows.length) or step(self))
    completed(backbone, PROMPTS, COUNTS, settings(batch_tokens=24))
    lengths = sorted((len(p) + n for p, n in zip(PROMPTS, COUNTS, strict=True)), reverse=True)
    assert max(length.sum() for length in seen) <= 24
    assert seen[0].tolist() == lengths[:2]  # 11 and 10 of 11, 10, 9, 9, 2
    assert backbone.model.forwarded == sum(COUNTS)


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_a_budget_smaller_than_a_row_is_one_clear_line(guidance):
    with pytest.raises(ValueError, match=f"batch_tokens = 10 is less than the {22 if guidance else 11} tokens"):
        completed(tabular_backbone(), PROMPTS, COUNTS, settings(batch_tokens=10, guidance=guidance))


@pytest.mark.parametrize("options", [settings(early_stop=True), settings(reveal_rule="threshold", threshold=0.4)])
def test_looking_at_the_rows_seldom_and_late_changes_nothing(options, monkeypatch):
    """As on an accelerator: copies are asked for every few passes and arrive some passes later."""
    backbone = eager_to_end(tabular_backbone(seed=3))

    def ended(row):
        return 2 in row.response[: row.known]

    expected = completed(backbone, PROMPTS, COUNTS, options)
    seldom = [completed(backbone, [p], [n], options, ended=ended)[0] for p, n in zip(PROMPTS, COUNTS, strict=True)]

    class Late(denoising._Reading):
        def __init__(self, rows, due, copies):
            super().__init__(rows, due, copies)
            self._host = [tensor.clone() for tensor in self._host]
            self.asked = 0

        def ready(self):
            self.asked += 1
            return self.asked > 3

    begin = denoising.DenoisingLoop.__init__

    def seldom_looking(self, *args, **keywords):
        begin(self, *args, **keywords)
        self.passes_per_reading = 4

    monkeypatch.setattr(denoising, "_Reading", Late)
    monkeypatch.setattr(denoising.DenoisingLoop, "__init__", seldom_looking)
    for size in (1, 3, 5):
        late = options.model_copy(update={"batch_size": size})
        assert [row[:2] for row in completed(backbone, PROMPTS, COUNTS, late)] == [row[:2] for row in expected]
        found = completed(backbone, PROMPTS, COUNTS, late, ended=ended)
        for (tokens, _, _), (others, _, _) in zip(found, seldom, strict=True):
            end = (tokens + [2]).index(2)
            assert tokens[:end] == others[:end]
    last = drained(backbone, canvas_of(backbone), options)
    assert last.responses() == [tokens for tokens, _, _ in expected]


def step_of(backbone, canvas, options):
    """All rows of a canvas together, on the backbone's device."""
    rows = first_rows(backbone, canvas, options, None, 0)
    rows = rows.taken(numpy.arange(len(rows)), backbone.device)
    return DenoisingStep(backbone, Forward.of(options, None), rows)


@pytest.mark.parametrize("options", every_option(), ids=lambda o: f"{o.reveal_rule}-{o.temperature}")
def test_a_step_never_waits_for_the_device(options):
    if options.reveal_rule in parallel_rules():
        pytest.skip("how many tokens were revealed is read once per pass")
    backbone = tabular_backbone(seed=3)
    decoder = step_of(backbone, canvas_of(backbone), options)
    for _ in range(3):
        with forbid_synchronisation():
            decoder.run()
            decoder.keep(decoder.rows.plan.open)


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.7, "reveal_rule": "random"}, {"reuse": "dual"}], ids=str)
@pytest.mark.parametrize("kind", ["modernbert", "llama"])
def test_a_step_of_a_stock_model_never_waits_for_the_device(kind, changes, tmp_path):
    backbone = stock_backbone(tmp_path, kind)
    decoder = step_of(backbone, canvas_of(backbone, [[7, 8, 9], [10]], [9, 12]), settings(**changes))
    for _ in range(5):
        with forbid_synchronisation():
            decoder.run()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", every_option(), ids=lambda o: f"{o.reveal_rule}-{o.temperature}")
def test_an_accelerator_samples_what_the_cpu_does(options, tmp_path):
    options = options.model_copy(update={"early_stop": True, "batch_size": 3})
    rows = [[7, 8, 9], [10], [11, 12, 13, 14, 15], [6, 6]], [9, 12, 6, 8]
    expected = completed(stock_backbone(tmp_path, "bert"), *rows, options)
    found = completed(stock_backbone(tmp_path, "bert", device="cuda"), *rows, options)
    assert [row[:2] for row in found] == [row[:2] for row in expected]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_an_accelerator_is_only_asked_for(tmp_path):
    backbone = stock_backbone(tmp_path, "bert", device="cuda")
    decoder = step_of(backbone, canvas_of(backbone, [[7, 8, 9], [10]], [9, 12]), settings())
    decoder.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_response_ends_where_its_known_beginning_says_so():
    backbone, asked = tabular_backbone(seed=3), []

    def ended(row):
        known = row.response[: row.known]
        assert 0 <= row.new <= row.known and backbone.mask_id not in known
        assert len(row.response) == COUNTS[row.number] and row.response[row.known] == backbone.mask_id
        asked.append(row)
        return row.known >= 3

    found = completed(backbone, PROMPTS, COUNTS, settings(), ended=ended)
    full = completed(backbone, PROMPTS, COUNTS, settings())
    for (tokens, passes, _), (whole, all_passes, _) in zip(found, full, strict=True):
        assert tokens[:3] == whole[:3] and passes <= all_passes and backbone.mask_id not in tokens
    assert sum(passes for _, passes, _ in found) < sum(passes for _, passes, _ in full)


def test_batches_one_after_the_other_give_the_same_rows():
    backbone, options = eager_to_end(tabular_backbone(seed=3)), settings(early_stop=True, batch_size=2)

    def ended(row):
        return 2 in row.response[: row.known]

    canvas = canvas_of(backbone)
    plain = in_batches(MaskedSampler(), backbone, canvas, options, ended=ended)
    better = MaskedSampler().complete(backbone, canvas, options, ended=ended)
    first, second = (sorted((r.number, r.tokens, r.passes) for r in rows) for rows in (plain, better))
    assert first == second


@pytest.mark.parametrize("reuse", ["prefix", "dual"])
@pytest.mark.parametrize("kind", ["bert", "modernbert", "llama"])
def test_reuse_that_is_refreshed_in_every_pass_is_exact(kind, reuse, tmp_path):
    backbone = stock_backbone(tmp_path, kind)
    prompts, counts = [[7, 8, 9], [10], [11, 12, 13, 14, 15]], [5, 8, 6]  # two blocks each, whole ones and begun ones
    exact = completed(backbone, prompts, counts, settings())
    fresh = completed(backbone, prompts, counts, settings(reuse=reuse, refresh=1))
    assert fresh == exact
    for refresh in (None, 2):
        options = settings(reuse=reuse, refresh=refresh)
        found = completed(backbone, prompts, counts, options)
        assert [passes for _, passes, _ in found] == counts
        assert all(fewer < all_of_them for (*_, fewer), (*_, all_of_them) in zip(found, exact, strict=True))
        alone = [completed(backbone, [p], [n], options)[0] for p, n in zip(prompts, counts, strict=True)]
        assert found == alone == completed(backbone, prompts, counts, options.model_copy(update={"batch_size": 2}))


def test_reuse_computes_the_block_or_also_what_follows(tmp_path):
    backbone = stock_backbone(tmp_path, "bert")
    cost = {
        reuse: completed(backbone, [[7, 8, 9]], [8], settings(reuse=reuse))[0][2]
        for reuse in ("none", "prefix", "dual")
    }
    # two blocks of 4: of 4 passes each, the first computes all 11 positions
    assert cost == {"none": 8 * 11, "prefix": 11 + 3 * 8 + 11 + 3 * 4, "dual": 11 + 3 * 4 + 11 + 3 * 4}


def test_a_canvas_without_masks_is_given_back():
    backbone = tabular_backbone()
    canvas = canvas_of(backbone, [[1, 2]], [0])
    frames = list(MaskedSampler().denoise(backbone, canvas, settings()))
    assert len(frames) == 1 and frames[0] is canvas and backbone.model.forwarded == 0


def test_a_row_beyond_the_context_is_an_error():
    backbone = replace(tabular_backbone(), max_length=8)
    with pytest.raises(ValueError, match="take 10 positions, the model has 8"):
        next(MaskedSampler().denoise(backbone, canvas_of(backbone, [[1] * 4], [6]), settings()))


def test_a_hidden_canvas_grows_block_by_block():
    backbone = tabular_backbone(sidecar={"response_end": "block"})
    settings = GenerateSettings(max_new_tokens=6, block_size=2, early_stop=False)
    *_, whole = MaskedSampler().denoise(backbone, canvas_of(backbone, [[0, 1], [2]], 6), settings)
    for row, prompt in enumerate([[0, 1], [2]]):
        grown = list(prompt)
        for _ in range(3):  # the plain version: a canvas of one block, over and over
            *_, block = MaskedSampler().denoise(backbone, canvas_of(backbone, [grown], 2), settings)
            grown = block.tokens[0, : len(grown) + 2].tolist()
        assert whole.tokens[row, : len(grown)].tolist() == grown


def test_what_stands_ahead_is_hidden_only_where_training_ended_at_blocks_and_nothing_is_kept_there():
    trained, other = tabular_backbone(sidecar={"response_end": "block"}), tabular_backbone()
    automatic = GenerateSettings(max_new_tokens=6, block_size=2, early_stop=False)

    def last(backbone, settings):
        return [*MaskedSampler().denoise(backbone, canvas_of(backbone, [[0, 1]], 6), settings)][-1].tokens.tolist()

    assert last(trained, automatic) == last(other, automatic.model_copy(update={"ahead": "hidden"}))
    assert last(other, automatic) == last(trained, automatic.model_copy(update={"ahead": "visible"}))
    assert last(trained, automatic) != last(other, automatic)
    mask = trained.mask_id
    kept = infill_canvas([[0, mask, mask, mask, 3]], mask_id=mask, pad_id=trained.pad_id)
    *_, infilled = MaskedSampler().denoise(trained, kept, automatic)
    *_, plain = MaskedSampler().denoise(other, kept, automatic)
    assert infilled.tokens.tolist() == plain.tokens.tolist()
