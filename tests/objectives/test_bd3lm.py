"""Block diffusion: a doubled pass is its blocks one after another; the ends are next-token and masked diffusion."""

import itertools
from dataclasses import replace
from functools import partial

import numpy
import pytest
import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from dllm.choices import REVEAL_RULES
from dllm.config import GenerateSettings, LikelihoodSettings, Recipe
from dllm.core.attention_pattern import BlockRows, BlockRule
from dllm.core.batch import Batch, Noise, row_noise
from dllm.core.canvas import canvas_for, infill_canvas
from dllm.core.packing import block_layout, layout_of
from dllm.likelihood.scorer import block_scorer
from dllm.models import attention, kernel_by_row, kernels
from dllm.models.backbone import TokenNLL
from dllm.models.heads import head_logits
from dllm.models.kv_cache import KVCache
from dllm.objectives.bd3lm import BD3LM
from dllm.objectives.mdlm import MDLM
from dllm.sampling.rows import block_rule, first_rows
from dllm.sampling.sampler import MaskedSampler, block_sampler
from dllm.sampling.step import DenoisingStep, Forward
from tests.models.families import CASES, VOCAB, ragged, stock_model
from tests.objectives.test_mdlm import every_noise, raw_bound, repeated
from tests.oracles import enumerated_nelbo, tabular_backbone
from tests.plain_forward import block_hidden, door, packed_logits
from tests.samplers import in_batches, no_cache
from tests.synchronisation import forbid_synchronisation
from tests.training_loss import training_loss

MASK = 4
ROUNDING = 1e-5
"""fp32: hidden states are of order 3, and kernels add up in another order."""
PROMPTS, LENGTHS = (0, 5, 2, 9, 0, 0), (23, 14, 2, 30, 7, 7)
BIDIRECTIONAL = [case for case in CASES if not case.endswith("-causal")]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def backbone_of(case, prediction="in_place", **sidecar):
    sidecar = {"algorithm": "bd3lm", "block_size": 4} | sidecar
    model = stock_model(case)
    return replace(door(model, prediction), mask_id=MASK, eos_id=1, sidecar=sidecar)


def batch_of(prompts=PROMPTS, lengths=LENGTHS, seed=0):
    tokens, attention = ragged(lengths, seed)
    maskable = attention & (torch.arange(tokens.shape[1]) >= torch.tensor(prompts)[:, None])
    return Batch(tokens, attention, maskable, torch.arange(len(lengths)))


def inputs_of(batch, **recipe):
    noise = row_noise(3, 0, batch.sample_ids, batch.tokens.shape[1])
    return BD3LM(Recipe(**{"block_size": 4} | recipe)).corrupt(batch, noise, mask_id=MASK)


def gradients(model, hidden):
    """Of a sum in which every number counts differently."""
    model.zero_grad()
    (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def terms_of(backbone, batch, noise, divisor=1.0, algorithm=BD3LM, prediction="in_place", **recipe):
    model = TokenNLL(replace(backbone, prediction=prediction))
    settings = {"mask_id": backbone.mask_id, "denominator": divisor}
    return training_loss(algorithm(Recipe(**recipe)), model, batch, noise, **settings)


# ----------------------------------------------------------------------------------------------------------------------
# The doubled forward


@pytest.mark.parametrize("anchor", ["response", "row"])
@pytest.mark.parametrize("kernel", ["by_row", "_padded"])
@pytest.mark.parametrize("case", BIDIRECTIONAL)
def test_the_doubled_forward_equals_the_stock_class_with_a_dense_mask_and_its_gradients(
    case, kernel, anchor, monkeypatch
):
    model = stock_model(case)
    monkeypatch.setattr(kernel_by_row, "SHORTEST_GROUP", 6)  # so that blocks are taken together, some at a time
    monkeypatch.setattr(attention, "kernel_for", lambda *_, **__: getattr(kernels, kernel))
    inputs = inputs_of(batch_of(), block_anchor=anchor)
    ours = door(model).hidden(inputs.tokens, inputs.layout)
    plain = block_hidden(model, inputs.tokens, inputs.layout)
    torch.testing.assert_close(ours, plain, atol=ROUNDING, rtol=0)
    ours, plain = gradients(model, ours), gradients(model, plain)
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(ours[name], expected, atol=2 * ROUNDING * scale, rtol=0)


@pytest.mark.parametrize("size", [1, 3, 4, 16, 40])
@torch.no_grad()
def test_the_doubled_forward_equals_block_after_block_behind_a_cache_of_the_clean_prefix(size):
    """The decisive test, against the stock class and its own cache: no mask, no packing of ours."""
    from transformers import DynamicCache

    model = stock_model("llama")
    batch = batch_of((6,), (29,))
    inputs = inputs_of(batch, block_size=size)
    hidden = door(model).hidden(inputs.tokens, inputs.layout)
    clean, first, count = inputs.layout.blocks.clean[0], *inputs.layout.blocks.spans_of(0)
    cache, at, low = DynamicCache(), int(clean), 0

    def forward(tokens, begin):
        position = torch.arange(begin, begin + len(tokens))[None]
        return model.model(tokens[None], position_ids=position, past_key_values=cache).last_hidden_state[0]

    for begin, tokens in zip(first.tolist(), count.tolist(), strict=True):
        if low < begin:
            found = forward(batch.tokens[0, low:begin], low)  # prompt, then each clean block
            torch.testing.assert_close(hidden[low:begin], found, atol=ROUNDING, rtol=0)
            low = begin
        found = forward(inputs.tokens[0, at : at + tokens], begin)
        torch.testing.assert_close(hidden[at : at + tokens], found, atol=ROUNDING, rtol=0)
        cache.crop(-tokens)
        at += tokens
    assert at == len(hidden) and low == first[-1]


@torch.no_grad()
def test_blocks_of_one_token_are_next_token_prediction_with_a_mask_as_query():
    causal, model = stock_model("llama-causal"), stock_model("llama")
    batch = batch_of((0, 3), (9, 8))
    # every token is masked whatever the noise, as a block of one has no other count
    terms = inputs_of(batch, block_size=1, block_anchor="row")
    nll = TokenNLL(door(model))(terms.tokens, terms.layout, terms.row, terms.position, terms.targets)
    assert torch.equal(terms.weight, torch.ones(9 + 5)) and len(nll) == 9 + 5
    expected = []
    for row, place in batch.maskable.nonzero().tolist():
        asked = torch.cat([batch.tokens[row, :place], torch.tensor([MASK])])[None]
        logits = causal(asked).logits[0, -1]
        expected.append(-logits.log_softmax(-1)[batch.tokens[row, place]])
    torch.testing.assert_close(nll, torch.stack(expected), atol=ROUNDING, rtol=1e-5)


@pytest.mark.parametrize("case", ["modernbert", "llama"])
@pytest.mark.parametrize("corruption", ["exact", "bernoulli"])
@pytest.mark.parametrize("normalisation", ["token", "sequence"])
@pytest.mark.parametrize("prompts", [(0, 0, 0), (3, 0, 7)])
def test_one_block_is_masked_diffusion_with_its_gradients(case, corruption, normalisation, prompts):
    """With a prompt, the block must hold it too: blocks counted from the row."""
    backbone, batch = backbone_of(case), batch_of(prompts, (13, 8, 11))
    noise = row_noise(7, 1, batch.sample_ids, 13)
    anchor = "row" if any(prompts) else "response"
    recipe = {"corruption": corruption, "normalisation": normalisation, "block_anchor": anchor}
    found = {}
    for algorithm in (BD3LM, MDLM):
        backbone.model.zero_grad()
        terms = terms_of(backbone, batch, noise, 32.0, algorithm, block_size=50, **recipe)
        terms.loss.backward()
        gradient = {name: p.grad.clone() for name, p in backbone.model.named_parameters() if p.grad is not None}
        found[algorithm] = terms, gradient
    (ours, our_gradient), (plain, gradient) = found.values()
    assert ours.masked == plain.masked
    torch.testing.assert_close(ours.loss, plain.loss, atol=0, rtol=1e-5)
    torch.testing.assert_close(ours.rows, plain.rows, atol=0, rtol=1e-5)
    for name, expected in gradient.items():
        torch.testing.assert_close(our_gradient[name], expected, atol=ROUNDING, rtol=1e-4)


@pytest.mark.parametrize("case", ["bert", "llama"])
@torch.no_grad()
def test_a_corrupted_block_moves_itself_alone_and_a_clean_one_the_blocks_behind_it(case):
    model, size, n = stock_model(case), 3, 11
    inputs = inputs_of(batch_of((0,), (n,)), block_size=size)
    pattern, before = inputs.layout.blocks.pattern, door(model).hidden(inputs.tokens, inputs.layout)
    for place, (position, span) in enumerate(zip(pattern.position, pattern.span, strict=True)):
        tokens = inputs.tokens.clone()
        tokens[0, place] = (tokens[0, place] + 17) % VOCAB
        moved = (door(model).hidden(tokens, inputs.layout) - before).abs().amax(-1) > 0
        if span >= 0:
            expected = pattern.span == span
        else:
            block, own = pattern.position // size, position // size
            expected = (pattern.span >= 0) & (block > own) | (pattern.span < 0) & (block >= own)
        assert moved.tolist() == expected.tolist()


@pytest.mark.parametrize("prediction", ["in_place", "next"])
@pytest.mark.parametrize("case", ["modernbert", "qwen2", "llama"])
def test_a_row_in_a_batch_equals_the_row_alone(case, prediction):
    backbone, batch = backbone_of(case), batch_of()
    together = terms_of(backbone, batch, row_noise(5, 2, batch.sample_ids, 30), prediction=prediction, block_size=4)
    for row, length in enumerate(LENGTHS):
        alone = Batch(*(x[row : row + 1, :length] for x in (batch.tokens, batch.attention, batch.maskable)),
                      batch.sample_ids[row : row + 1])  # fmt: skip
        noise = row_noise(5, 2, alone.sample_ids, length)
        terms = terms_of(backbone, alone, noise, prediction=prediction, block_size=4)
        torch.testing.assert_close(terms.rows[0], together.rows[row], atol=1e-4, rtol=1e-5)
    assert together.rows[2] == 0  # no targets


@torch.no_grad()
def test_who_predicts_one_ahead_reads_a_blocks_first_token_off_the_clean_one_before_it():
    backbone, batch = backbone_of("llama"), batch_of((5,), (14,))
    ahead = replace(backbone, prediction="next")
    inputs = inputs_of(batch, block_size=3)
    hidden = backbone.hidden(inputs.tokens, inputs.layout)
    pattern = inputs.layout.blocks.pattern
    for place in range(int(inputs.layout.blocks.clean[0]), inputs.layout.tokens):
        position, span = pattern.position[place], pattern.span[place]
        at = position - 1 if (position - 5) % 3 == 0 else place - 1
        assert pattern.span[at] in (-1, span)
        found = packed_logits(ahead, hidden, inputs.layout, torch.tensor([0]), torch.tensor([place]))
        torch.testing.assert_close(found, head_logits(backbone.model, hidden[at : at + 1]))


def test_the_loss_never_makes_the_host_wait():
    backbone = backbone_of("llama")
    inputs, model = inputs_of(batch_of()), TokenNLL(backbone)
    BD3LM().loss(model, inputs, denominator=1.0)  # settles how the class is packed
    with forbid_synchronisation():
        BD3LM().loss(model, inputs, denominator=1.0).loss.backward()


# ----------------------------------------------------------------------------------------------------------------------
# Kernels of CUDA, with what they call replaced by its plain version: what is checked is what they are asked


@pytest.mark.parametrize("case", ["modernbert", "llama", "qwen2"])
@torch.no_grad()
def test_flexattention_is_asked_the_same(case, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    model, inputs = stock_model(case), inputs_of(batch_of())
    expected = door(model).hidden(inputs.tokens, inputs.layout)
    inputs.layout.plans.clear()
    monkeypatch.setattr(attention, "kernel_for", lambda *_, **__: kernels._flex)
    monkeypatch.setattr(kernels, "_flex_attention", lambda: flex_attention)
    found = door(model).hidden(inputs.tokens, inputs.layout)
    torch.testing.assert_close(found, expected, atol=ROUNDING, rtol=0)
    masks = [mask for about, mask in inputs.layout.plans.items() if about[0] == "flex"]
    assert all(mask.shape[-1] % kernels.TILE == 0 for mask in masks) and masks


def plain_varlen(q, k, v, cu_q, cu_k, max_q, max_k, window, options):
    """Sequence by sequence; nothing but `window` limits what is seen."""
    assert window == (-1, -1) and max_q == int(cu_q.diff().max()) and max_k == int(cu_k.diff().max())
    found = []
    for n in range(len(cu_q) - 1):
        parts = (x[a[n] : a[n + 1]].transpose(0, 1)[None] for x, a in ((q, cu_q), (k, cu_k), (v, cu_k)))
        found.append(scaled_dot_product_attention(*parts, scale=options["scale"], enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize(("case", "prediction"), [("bert", "in_place"), ("llama", "in_place"), ("qwen3", "next")])
def test_flashattention_is_asked_the_same_when_sampling(case, prediction, monkeypatch):
    backbone, options = backbone_of(case, prediction), settings(steps=6, temperature=1.0)
    expected = sampled(block_sampler(), backbone, canvas_of(backbone), options)
    monkeypatch.setattr(attention, "kernel_for", lambda *_, **__: kernels._flash_blocks)
    monkeypatch.setattr(kernels, "_varlen", lambda dropout: plain_varlen)
    assert sampled(block_sampler(), backbone, canvas_of(backbone), options).responses() == expected.responses()
    with no_cache():
        assert sampled(block_sampler(), backbone, canvas_of(backbone), options).responses() == expected.responses()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["modernbert", "llama"])
def test_on_cuda_training_and_sampling_equal_the_cpu(case, dtype):
    # FlexAttention needs heads of 16 at least
    sizes = {"hidden_size": 64} | ({"head_dim": 16} if case == "llama" else {})
    model = stock_model(case, **sizes)
    inputs = inputs_of(batch_of())
    expected = door(model).hidden(inputs.tokens, inputs.layout)
    gradient = gradients(model, expected)
    model, inputs = model.to("cuda", dtype), inputs.to("cuda")
    found = door(model).hidden(inputs.tokens, inputs.layout)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found.float().cpu(), expected, atol=tolerance * expected.abs().max().item(), rtol=0)
    (found.float() * torch.linspace(-1, 1, found.numel(), device="cuda").view(found.shape)).sum().backward()
    for name, parameter in model.named_parameters():
        if name in gradient:
            size = gradient[name].norm() + 1
            assert (parameter.grad.float().cpu() - gradient[name]).norm() < 2 * tolerance * size
    backbone = replace(backbone_of(case), model=model, device=torch.device("cuda"))
    canvas = canvas_of(backbone)
    if dtype == torch.float32:
        with_cache = sampled(block_sampler(), backbone, canvas, settings()).responses()
        with no_cache():
            assert sampled(block_sampler(), backbone, canvas, settings()).responses() == with_cache


# ----------------------------------------------------------------------------------------------------------------------
# Corruption


def block_bound(backbone, prompt, target, size, bound=raw_bound):
    blocks = [target[low : low + size] for low in range(0, len(target), size)]
    return sum(bound(backbone, prompt + target[: i * size], block) for i, block in enumerate(blocks))


@pytest.mark.parametrize("prompt", [[], [1, 0]])
@pytest.mark.parametrize("options", [{}, {"corruption": "bernoulli", "time_floor": 1e-5, "schedule": "cosine"}])
def test_drawn_noise_gives_the_sum_of_the_blocks_bounds_in_expectation(prompt, options):
    backbone, rows, target = tabular_backbone(3, seed=2), 8_000, [2, 0, 1, 1, 2]
    batch = repeated(prompt + target, rows, len(prompt))
    noise = row_noise(5, 0, batch.sample_ids, batch.tokens.shape[1])
    terms = terms_of(backbone, batch, noise, rows, normalisation="batch", block_size=2, **options)
    error = terms.rows.double().std().item() / rows**0.5
    expected = block_bound(backbone, prompt, target, 2)
    assert abs(terms.loss.item() - expected) < 4 * error and error < 0.02 * expected


def test_over_all_noise_one_block_is_the_bound():
    backbone, target = tabular_backbone(3, seed=2), [2, 0, 1, 1]
    noise = every_noise(4, 2)
    batch = repeated([1, 0, *target], len(noise.level), 2)
    terms = terms_of(backbone, batch, noise, len(noise.level), normalisation="batch", block_size=4)
    assert terms.loss.item() == pytest.approx(raw_bound(backbone, [1, 0], target), abs=1e-4)  # fp32 sum of 96 rows


@pytest.mark.parametrize("corruption", ["exact", "bernoulli"])
def test_a_clipped_range_bounds_the_share_of_masks_of_every_block(corruption):
    batch = batch_of((0,) * 40, (64,) * 40)
    recipe = {"block_size": 16, "corruption": corruption, "time_low": 0.45, "time_high": 0.55, "time_floor": 1e-9}
    inputs = inputs_of(batch, **recipe)
    block = inputs.layout.blocks.pattern.span[inputs.layout.index(inputs.row, inputs.position)]
    masks = torch.bincount(torch.from_numpy(block), minlength=160).float()
    if corruption == "exact":  # floor(16 t) + 1
        assert masks.min() == 8 and masks.max() == 9 and torch.isin(inputs.weight, torch.tensor([16 / 8, 16 / 9])).all()
    else:
        assert abs(masks.mean() - 8) < 4 * 2 / 160**0.5
        assert inputs.weight.min() >= 1 / 0.55 - 1e-3 and inputs.weight.max() <= 1 / 0.45 + 1e-3


def test_a_row_of_unequal_prompts_doubles_only_its_response():
    inputs = inputs_of(batch_of((20,), (30,)), block_size=8)
    assert inputs.layout.lengths == (28 + 10,)  # nothing sees the last block's clean tokens


# ----------------------------------------------------------------------------------------------------------------------
# Sampling

STOCK = [(case, "in_place") for case in ("bert", "modernbert", "llama", "gpt2")] + [("qwen2", "next")]
ROWS = [[5, 6, 7, 8, 9], [], [6, 9], [30] * 11]
COUNTS = [13, 8, 9, 3]


def settings(**options):
    return GenerateSettings(**({"block_size": 4, "early_stop": False} | options))


def canvas_of(backbone, prompts=ROWS, counts=COUNTS):
    return canvas_for(prompts, counts, mask_id=backbone.mask_id, pad_id=backbone.pad_id)


def sampled(algorithm, backbone, canvas, options):
    *_, last = algorithm.denoise(backbone, canvas, options)
    assert not last.masked.any() and last.done.all()
    return last


OPTIONS = [
    *(settings(reveal_rule=rule, temperature=0.8, threshold=0.2, entropy_bound=3.0) for rule in REVEAL_RULES),
    settings(early_stop=True, temperature=1.0),
    settings(steps=5),
    settings(ahead="hidden"),
]


@pytest.mark.parametrize("anchor", ["response", "row"])
@pytest.mark.parametrize(("case", "prediction"), STOCK)
def test_sampling_with_the_cache_is_sampling_without_it_token_for_token(case, prediction, anchor):
    backbone = backbone_of(case, prediction, block_anchor=anchor)
    for options in OPTIONS if case == "modernbert" else OPTIONS[-4:]:  # rules know nothing of layers
        with_cache = sampled(block_sampler(), backbone, canvas_of(backbone), options)
        with no_cache():
            without = sampled(block_sampler(), backbone, canvas_of(backbone), options)
        assert with_cache.responses() == without.responses() and with_cache.nfe == without.nfe
        torch.testing.assert_close(with_cache.confidence, without.confidence, atol=1e-4, rtol=0)
        assert with_cache.computed < 0.7 * without.computed


@pytest.mark.parametrize("options", OPTIONS[-4:], ids=str)
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_row_depends_neither_on_its_batch_mates_nor_on_when_it_joins_them(options, batch_size):
    backbone = backbone_of("modernbert")
    options = options.model_copy(update={"batch_size": batch_size})
    fixed = sampled(block_sampler(), backbone, canvas_of(backbone), options).responses()
    for complete in (block_sampler().complete, partial(in_batches, block_sampler())):
        rows = {row.number: row.tokens for row in complete(backbone, canvas_of(backbone), options)}
        assert [rows[number] for number in range(len(ROWS))] == fixed


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["in_place", "next"])
def test_every_pass_scores_what_the_stock_class_scores_with_a_dense_mask(prediction):
    """One token per pass, greedily: the whole row in the definition's own words."""
    backbone = backbone_of("llama", prediction)
    found = sampled(block_sampler(), backbone, canvas_of(backbone, [[5, 6, 7]], [10]), settings())
    row = [5, 6, 7] + [MASK] * 10
    for low in (3, 7, 11):
        while MASK in row[low : low + 4]:
            length = min(low + 4, 13)
            block = torch.tensor([-1] * 3 + [i // 4 for i in range(10)])[:length]
            mask = block[None] <= block[:, None]
            logits = backbone.model(torch.tensor([row[:length]]), attention_mask=mask[None, None]).logits[0]
            logits = logits if prediction == "in_place" else logits.roll(1, 0)
            logits[:, MASK] = -torch.inf
            open_ = [i for i in range(low, length) if row[i] == MASK]
            best = max(open_, key=lambda i: logits[i].softmax(-1).max())
            row[best] = int(logits[best].argmax())
    assert found.tokens[0].tolist() == row


@pytest.mark.parametrize("case", ["modernbert", "llama"])
def test_one_block_samples_as_masked_diffusion_does(case):
    backbone = backbone_of(case, block_size=40, block_anchor="row")
    canvas = canvas_of(backbone)
    for options in (settings(block_size=40, temperature=1.0), settings(block_size=40, steps=4)):
        ours, plain = (
            sampled(block_sampler(), backbone, canvas, options),
            sampled(MaskedSampler(), backbone, canvas, options),
        )
        assert ours.responses() == plain.responses() and ours.nfe == plain.nfe


def test_what_is_given_right_of_a_block_waits_for_its_own():
    backbone = backbone_of("llama", block_size=3)
    rows = [[5, MASK, 7, MASK, MASK, 8, 9, 10, 11, 12, MASK, 13], [MASK, 6, 7, 8, 9, MASK, 5]]
    canvas = infill_canvas(rows, mask_id=MASK, pad_id=0)
    cached = sampled(block_sampler(), backbone, canvas, settings())
    with no_cache():
        assert torch.equal(cached.tokens, sampled(block_sampler(), backbone, canvas, settings()).tokens)
    other = [[*rows[0][:4], MASK, 50, *rows[0][6:]], rows[1]]  # behind the first block, which holds positions 1 to 3
    moved = sampled(block_sampler(), backbone, infill_canvas(other, mask_id=MASK, pad_id=0), settings())
    assert torch.equal(moved.tokens[0, :4], cached.tokens[0, :4]) and torch.equal(moved.tokens[1], cached.tokens[1])


def test_guidance_goes_without_the_cache():
    backbone = backbone_of("llama")
    guided = sampled(block_sampler(), backbone, canvas_of(backbone), settings(guidance=1.0))
    assert guided.nfe == 2 * guided.step
    with no_cache():
        last = sampled(block_sampler(), backbone, canvas_of(backbone), settings(guidance=1.0))
    assert torch.equal(last.tokens, guided.tokens) and last.computed == guided.computed


def test_a_row_ends_at_its_eos():
    backbone = backbone_of("llama")
    shifted = backbone.model.get_output_embeddings()
    shifted.bias = torch.nn.Parameter(torch.zeros(VOCAB).index_fill(0, torch.tensor([backbone.eos_id]), 30.0))
    (row,) = block_sampler().complete(backbone, canvas_of(backbone, [[5, 6]], [12]), settings(early_stop=True))
    assert row.tokens == [backbone.eos_id] * 12 and row.passes <= 4


@torch.no_grad()
def test_keys_and_values_of_finished_blocks_are_those_of_the_whole_row():
    """What the cache holds of clean tokens is what a pass over all of them computes."""
    backbone = backbone_of("llama")
    rule, canvas = block_rule(backbone), canvas_of(backbone, [[5, 6, 7]], [12])
    rows = first_rows(backbone, canvas, settings(), rule, 0)
    decoder = DenoisingStep(backbone, Forward.of(settings(), rule), rows)
    while not rows.plan.block[0] == 2 or not rows.plan.left[0] == 1:
        decoder.run()
    whole = KVCache()
    blocks = BlockRows.plain(rule, rows.origin, rows.length)
    backbone.hidden(rows.tokens, block_layout(blocks), cache=whole)
    for ours, plain in zip(decoder._cache.pools, whole.pools, strict=True):
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a[:, :11], b[:, :11], atol=ROUNDING, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Likelihood

SCORED = [
    ([5, 6], [7, 8, 9, 10, 11]),
    ([5, 6], [7, 8, 9, 10, 12]),
    ([], [20, 21, 22]),
    ([9] * 7, [5, 6, 7, 8, 9, 5, 6]),
    ([5, 6], [7]),
]


def test_short_blocks_are_scored_exactly():
    backbone = replace(tabular_backbone(seed=1), sidecar={"algorithm": "bd3lm", "block_size": 3})
    prompts, targets = [[0, 1], [0, 1], [], [3]], [[1, 2, 3, 0, 0], [1, 2, 3, 0, 1], [0, 3, 3], [1, 1, 2, 0, 1, 2, 3]]
    scores = block_scorer().nelbo(backbone, prompts, targets, LikelihoodSettings())
    for prompt, target, score in zip(prompts, targets, scores, strict=True):
        expected = block_bound(backbone, prompt, target, 3, enumerated_nelbo)
        assert score.nats == pytest.approx(expected, abs=1e-4) and score.standard_error == 0  # fp32 logits


@pytest.mark.parametrize("anchor", ["response", "row"])
@pytest.mark.parametrize(("case", "prediction"), STOCK)
@torch.no_grad()
def test_a_score_is_the_blocks_bound_by_the_stock_class_with_a_dense_mask(case, prediction, anchor):
    """By enumeration of all masks of all blocks; requests share clean tokens and differ in where blocks begin."""
    backbone = backbone_of(case, prediction, block_size=2, block_anchor=anchor)
    prompts, targets = zip(*SCORED, strict=True)
    scores = block_scorer().nelbo(backbone, prompts, targets, LikelihoodSettings())
    for (prompt, target), score in zip(SCORED, scores, strict=True):
        assert score.nats == pytest.approx(plain_score(backbone, prompt, target, anchor), abs=1e-3)
        assert score.standard_error == 0


def plain_score(backbone, prompt, target, anchor):
    row, start, total = prompt + target, len(prompt) if anchor == "response" else 0, 0.0
    edges = sorted({len(prompt), *(i for i in range(len(prompt), len(row)) if (i - start) % 2 == 0), len(row)})
    for low, high in itertools.pairwise(edges):
        for k in range(1, high - low + 1):
            subsets = list(itertools.combinations(range(low, high), k))
            for subset in subsets:
                tokens = [MASK if i in subset else token for i, token in enumerate(row[:high])]
                blocks = BlockRows.plain(BlockRule(2), numpy.array([start]), numpy.array([high]))
                hidden = block_hidden(backbone.model, torch.tensor([tokens]), block_layout(blocks))
                at = [max(0, i - 1) if backbone.prediction == "next" else i for i in subset]
                logits = head_logits(backbone.model, hidden[at]).double()
                logits[:, MASK] = -torch.inf
                nll = cross_entropy(logits, torch.tensor([row[i] for i in subset]))
                total += float(nll) / len(subsets)
    return total


@pytest.mark.parametrize("batch_tokens", [1, 40, 100_000])
def test_a_score_depends_neither_on_the_batch_nor_on_the_other_requests(batch_tokens):
    backbone = backbone_of("modernbert", block_size=4)
    prompts, targets = zip(*SCORED, strict=True)
    options = LikelihoodSettings(budget=9, batch_tokens=batch_tokens)
    together = block_scorer().nelbo(backbone, prompts, targets, options)
    for prompt, target, score in zip(prompts, targets, together, strict=True):
        (alone,) = block_scorer().nelbo(backbone, [prompt], [target], options)
        assert score.nats == pytest.approx(alone.nats, abs=1e-3)
        assert score.standard_error == pytest.approx(alone.standard_error, abs=1e-3)


def test_blocks_of_one_token_are_scored_as_the_chain_rule():
    backbone, causal = backbone_of("llama", block_size=1, block_anchor="row"), stock_model("llama-causal")
    prompt, target = [5, 6, 7], [8, 9, 10, 11]
    (score,) = block_scorer().nelbo(backbone, [prompt], [target], LikelihoodSettings())
    total = 0.0
    with torch.no_grad():
        for i, token in enumerate(target):
            logits = causal(torch.tensor([[*prompt, *target[:i], MASK]])).logits[0, -1].double()
            logits[MASK] = -torch.inf
            total -= float(logits.log_softmax(-1)[token])
    assert score.nats == pytest.approx(total, abs=1e-4) and score.passes == 4


def test_greedy_match_is_what_greedy_sampling_gives():
    backbone = backbone_of("llama")
    canvas = canvas_of(backbone, [[5, 6, 7]], [10])
    (target,) = sampled(block_sampler(), backbone, canvas, settings()).responses()
    other = [*target[:-1], (target[-1] + 1) % VOCAB]
    found = block_scorer().greedy_match(backbone, [[5, 6, 7]] * 2, [target, other], LikelihoodSettings())
    assert found == [True, False]


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be


def test_a_class_with_an_attention_of_its_own_gets_one_line():
    model = stock_model("deberta-v2")
    inputs = inputs_of(batch_of())
    with pytest.raises(ValueError, match="DebertaV2ForMaskedLM computes attention in its own way") as fault:
        door(model).hidden(inputs.tokens, inputs.layout)
    assert "\n" not in str(fault.value)


def test_a_causal_model_gets_one_line():
    model = stock_model("llama-causal")
    door(model).hidden(torch.full((1, 4), 5), layout_of([4]))
    inputs = inputs_of(batch_of())
    with pytest.raises(ValueError, match="attends to the left only") as fault:
        door(model).hidden(inputs.tokens, inputs.layout)
    assert "\n" not in str(fault.value)


def test_noise_of_one_row_is_that_of_the_row_in_any_width():
    batch = batch_of((3,), (17,))
    wide = Batch(*(torch.nn.functional.pad(x, (0, 9)) for x in (batch.tokens, batch.attention, batch.maskable)),
                 batch.sample_ids)  # fmt: skip
    noise = Noise(torch.tensor([0.3]), torch.rand(1, 26))
    algorithm = BD3LM(Recipe(block_size=4))
    narrow = algorithm.corrupt(batch, Noise(noise.level, noise.place[:, :17]), mask_id=MASK)
    padded = algorithm.corrupt(wide, noise, mask_id=MASK)
    for name in ("row", "position", "targets", "weight", "share"):
        assert torch.equal(getattr(narrow, name), getattr(padded, name))


@pytest.mark.parametrize(("option", "value"), [("reuse", "prefix"), ("ahead", "visible")])
def test_options_that_mean_nothing_in_blocks_are_refused(option, value):
    backbone = backbone_of(*STOCK[0])
    with pytest.raises(ValueError, match=f"{option} = '{value}' means nothing to algorithm = 'bd3lm'") as fault:
        sampled(block_sampler(), backbone, canvas_of(backbone), settings(**{option: value}))
    assert "\n" not in str(fault.value)
