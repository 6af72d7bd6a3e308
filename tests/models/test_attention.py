"""Attention over packed rows: the stock class's own numbers, for every family, kernel, wrapper and cache."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dllm.core.packing import layout_of, part_of
from dllm.models import attention as packed_attention
from dllm.models import kernel_by_row, kernels
from dllm.models.backbone import TokenNLL
from dllm.models.kv_cache import KVCache
from dllm.models.packed_batch import PackedBatch
from tests.models.families import CASES, ragged, stock_model
from tests.plain_forward import door, hidden_states
from tests.synchronisation import forbid_synchronisation

LENGTHS = (40, 7, 1, 23, 7, 7)
"""Ragged, longer than the windows, with a run of equal rows."""
ROUNDING = 1e-5
"""fp32: hidden states are of order 3, and kernels add up in another order."""
SYNCHRONISING = ("qwen3_moe", "qwen3_moe-causal")
"""The stock classes route tokens to experts with the host's help."""


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def gradients(model, hidden):
    """Of a sum in which every number counts differently."""
    model.zero_grad()
    (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, plain):
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        scale = max(1.0, expected.abs().max().item())  # a key's bias has none but rounding, so compare absolutely
        torch.testing.assert_close(ours[name], expected, atol=2 * ROUNDING * scale, rtol=0, msg=lambda m, n=name: n + m)


# ----------------------------------------------------------------------------------------------------------------------
# Packed = padded


@pytest.mark.parametrize("case", CASES)
def test_packed_equals_padded_with_its_gradients(case):
    model = stock_model(case)
    tokens, attention = ragged(LENGTHS)
    layout = layout_of(LENGTHS)
    assert door(model).packable
    padded = layout.pack(hidden_states(model, tokens, attention))
    packed = door(model).hidden(tokens, layout)
    torch.testing.assert_close(packed, padded, atol=ROUNDING, rtol=0)
    assert_same_gradients(gradients(model, packed), gradients(model, padded))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_row_alone_equals_the_row_packed(case):
    model = stock_model(case)
    tokens, _ = ragged(LENGTHS)
    layout = layout_of(LENGTHS)
    packed = door(model).hidden(tokens, layout).split(LENGTHS)
    for row, length in enumerate(LENGTHS):
        alone = door(model).hidden(tokens[row : row + 1, :length], layout_of([length]))
        torch.testing.assert_close(packed[row], alone, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("case", [case for case in CASES if case not in SYNCHRONISING])
def test_a_packed_forward_never_makes_the_host_wait(case):
    model = stock_model(case)
    door(model)
    tokens, _ = ragged(LENGTHS)
    with forbid_synchronisation():
        door(model).hidden(tokens, layout_of(LENGTHS)).sum().backward()


@pytest.mark.parametrize("case", ["modernbert", "gemma3_text", "gemma3_text-causal", "qwen2", "gpt2-causal"])
def test_the_padded_kernel_gives_the_same_numbers(case, monkeypatch):
    model = stock_model(case)
    tokens, attention = ragged((*LENGTHS, 3, 0))
    layout = layout_of((*LENGTHS, 3, 0))
    expected = door(model).hidden(tokens, layout)
    monkeypatch.setattr(packed_attention, "kernel_for", lambda *_, **__: kernels._padded)
    with forbid_synchronisation():
        packed = door(model).hidden(tokens, layout)
    torch.testing.assert_close(packed, expected, atol=ROUNDING, rtol=0)
    assert_same_gradients(gradients(model, packed), gradients(model, expected))


@torch.no_grad()
def test_a_long_row_is_walked_along_in_blocks():
    """A window much shorter than the row: several blocks, each with its own keys."""
    model = stock_model("modernbert", local_attention=20, max_position_embeddings=512)
    lengths = (300, 65, 193, 194)
    tokens, attention = ragged(lengths)
    layout = layout_of(lengths)
    packed = door(model).hidden(tokens, layout)
    (plan,) = (runs for (_, window, _), runs in layout.plans.items() if window.left is not None)
    assert [len(run.blocks) for run in plan] == [5, 1, 4, 4]
    torch.testing.assert_close(packed, layout.pack(hidden_states(model, tokens, attention)), atol=ROUNDING, rtol=0)


def test_plans_are_made_once_for_all_layers_and_passes(monkeypatch):
    made = []
    plan = kernel_by_row._runs
    monkeypatch.setattr(kernel_by_row, "_runs", lambda *args: made.append(args) or plan(*args))
    model = stock_model("modernbert")
    tokens, _ = ragged(LENGTHS)
    door(model)
    made.clear()
    layout = layout_of(LENGTHS)
    for _ in range(2):
        door(model).hidden(tokens, layout)
    assert len(made) == 2, "one for the full layers, one for the sliding ones"


def test_a_class_that_cannot_be_packed_takes_the_padded_forward():
    model = stock_model("deberta-v2")
    assert not door(model).packable
    tokens, attention = ragged(LENGTHS)
    layout = layout_of(LENGTHS)
    assert torch.equal(door(model).hidden(tokens, layout), layout.pack(hidden_states(model, tokens, attention)))


def test_a_class_whose_packed_numbers_differ_is_found_out():
    class Mixes(nn.Module):
        """Shifts hidden states by one, over the borders of packed rows."""

        def forward(self, hidden):
            return hidden + hidden.roll(1, 1) * 0.1

    model = stock_model("llama")
    model.model.layers[1].mlp = nn.Sequential(model.model.layers[1].mlp, Mixes())
    assert not door(model).packable


def test_the_check_leaves_training_mode_and_the_random_state_alone():
    model = stock_model("bert").train()
    model.bert.embeddings.eval()
    before = torch.random.get_rng_state()
    assert door(model).packable
    assert model.training and model.cls.training and not model.bert.embeddings.dropout.training
    assert torch.equal(torch.random.get_rng_state(), before)


# ----------------------------------------------------------------------------------------------------------------------
# The switch


@pytest.mark.parametrize("case", ["modernbert", "llama", "mistral", "gemma3_text-causal"])
@torch.no_grad()
def test_plain_forwards_are_those_of_the_stock_class_bit_for_bit(case):
    tokens, attention = ragged(LENGTHS)
    stock, ours = stock_model(case), stock_model(case)
    assert door(ours).packable
    assert ours.config._attn_implementation == "dllm" and stock.config._attn_implementation == "sdpa"
    for mask in (attention, None):
        assert torch.equal(hidden_states(ours, tokens, mask), hidden_states(stock, tokens, mask))


def test_a_saved_model_names_no_attention_of_ours(tmp_path):
    from transformers import AutoModelForMaskedLM

    model = stock_model("modernbert")
    assert door(model).packable
    model.save_pretrained(tmp_path)
    assert "dllm" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert AutoModelForMaskedLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_what_packed_attention_does_not_know_is_an_error():
    layout = layout_of([3])
    q = torch.zeros(1, 2, 3, 4)
    module = SimpleNamespace(is_causal=False)
    with pytest.raises(ValueError, match="does not know softcap"):
        packed_attention.attention(module, q, q, q, None, softcap=5.0, packed=PackedBatch(layout, layout))


# ----------------------------------------------------------------------------------------------------------------------
# Precision and wrappers


@pytest.mark.parametrize("case", ["modernbert", "qwen3", "bert"])
def test_bf16_autocast_packed_is_as_near_to_fp32_as_padded(case):
    model = stock_model(case)
    tokens, attention = ragged(LENGTHS)
    layout = layout_of(LENGTHS)
    exact = door(model).hidden(tokens, layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        packed = door(model).hidden(tokens, layout)
        padded = layout.pack(hidden_states(model, tokens, attention))
    off, usual = (packed - exact).abs().mean(), (padded - exact).abs().mean()
    assert off < 1.5 * usual and usual > 0
    assert all(torch.isfinite(g).all() for g in gradients(model, packed.float()).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_models_pack(dtype):
    model = stock_model("llama").to(dtype)
    tokens, attention = ragged(LENGTHS)
    layout = layout_of(LENGTHS)
    assert door(model).packable
    packed = door(model).hidden(tokens, layout)
    assert packed.dtype == dtype
    padded = layout.pack(hidden_states(model, tokens, attention))
    torch.testing.assert_close(packed.float(), padded.float(), atol=0.15, rtol=0)  # three layers of rounding at order 3


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", ["modernbert", "llama", "bert"])
def test_recomputed_activations_give_the_same_gradients(case, reentrant):
    model = stock_model(case).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    tokens, _ = ragged(LENGTHS)
    layout = layout_of(LENGTHS)
    plain = gradients(model, door(model).hidden(tokens, layout))
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    assert_same_gradients(gradients(model, door(model).hidden(tokens, layout)), plain)


def test_distributed_data_parallel_passes_layouts_through(tmp_path):
    model = stock_model("modernbert")
    tokens, _ = ragged(LENGTHS)
    layout = layout_of(LENGTHS)
    row, position = torch.tensor([0, 0, 3]), torch.tensor([39, 2, 5])
    targets = torch.tensor([7, 8, 9])
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(TokenNLL(door(model)))
        nll = wrapped(tokens, layout, row, position, targets)
        nll.sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(nll, TokenNLL(door(model))(tokens, layout, row, position, targets))


# ----------------------------------------------------------------------------------------------------------------------
# Keys and values kept between passes

REACHES = {"full": (False, None), "causal": (True, None), "window": (False, 6), "causal window": (True, 6)}


def seen(query, key, causal, window):
    """The stock masks, in words: see `_reach`."""
    if causal:
        return key <= query and (window is None or query - key < window)
    return window is None or abs(query - key) <= window


def plain_attention(q, k, v, positions, length, causal, window):
    """One query and one head at a time; q [N, H, D] at `positions` [N], k and v [L, G, D]."""
    out = torch.empty_like(q)
    groups = q.shape[1] // k.shape[1]
    for n, position in enumerate(positions):
        keys = [key for key in range(length) if seen(position, key, causal, window)]
        for head in range(q.shape[1]):
            scores = k[keys, head // groups] @ q[n, head] * 0.5
            out[n, head] = scores.softmax(0) @ v[keys, head // groups]
    return out


def aligned_flash(dropout):
    """What varlen FlashAttention promises: windows are counted from the ends of queries and keys, put together."""

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, window, options):
        out = torch.empty_like(q)
        left, right = (10**9 if side < 0 else side for side in window)
        for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
            assert b - a <= max_q and d - c <= max_k
            place = torch.arange(b - a)[:, None] + (d - c) - (b - a)
            key = torch.arange(d - c)
            mask = (key >= place - left) & (key <= place + right)
            heads = [x.repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1) for x in (k[c:d], v[c:d])]
            scores = (q[a:b].transpose(0, 1) @ heads[0].mT * options["scale"]).masked_fill(~mask, -torch.inf)
            out[a:b] = (scores.softmax(-1) @ heads[1]).transpose(0, 1)
        return out

    return kernel


@pytest.mark.parametrize("kernel", ["by_row", "_padded", "_flash"])
@pytest.mark.parametrize("reach", REACHES)
def test_a_stale_cache_differs_only_in_its_stored_keys_and_values(reach, kernel, monkeypatch):
    """Three passes over parts of the rows against a loop that keeps its own table of what was written last."""
    causal, window = REACHES[reach]
    monkeypatch.setattr(kernels, "_varlen", aligned_flash)

    def choose(batch, q, dropout, window, *, stored):
        flat = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=q.shape)
        chosen = kernels.kernel_for(batch, flat, dropout, window, stored=stored)
        return chosen if kernel == "_flash" else getattr(kernels, kernel)

    monkeypatch.setattr(packed_attention, "kernel_for", choose)
    module = SimpleNamespace(is_causal=causal, config=SimpleNamespace(sliding_window=window))
    lengths, generator = (9, 30, 30, 4), torch.Generator().manual_seed(0)
    layout = layout_of(lengths)
    table = torch.zeros(2, 4, 30, 2, 8)
    cache = KVCache()
    parts = [
        layout,
        part_of(layout, (3, 10, 10, 0), (9, 20, 20, 0)),
        part_of(layout, (0, 11, 10, 0), (0, 30, 20, 4)),
        part_of(layout, (8, 0, 29, 2), (9, 5, 30, 3)),
    ]
    for part in parts:
        q = torch.randn(1, 4, part.tokens, 8, generator=generator)
        k, v = torch.randn(2, 1, 2, part.tokens, 8, generator=generator)
        batch = PackedBatch(layout, part, cache)
        with forbid_synchronisation() if kernel != "_flash" else torch.no_grad():
            ours, _ = packed_attention.attention(
                module, q, k, v, None, scaling=0.5, sliding_window=window, packed=batch
            )
        at = 0
        for row, (first, count, length) in enumerate(zip(part.begins, part.lengths, lengths, strict=True)):
            here = slice(at, at + count)
            table[0, row, first : first + count] = k[0, :, here].transpose(0, 1)
            table[1, row, first : first + count] = v[0, :, here].transpose(0, 1)
            positions = range(first, first + count)
            expected = plain_attention(q[0, :, here].transpose(0, 1), *table[:, row], positions, length, causal, window)
            torch.testing.assert_close(ours[0, here], expected, atol=1e-5, rtol=0)
            at += count


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_cache_refreshed_at_every_pass_changes_nothing(case):
    model = stock_model(case)
    layout = layout_of(LENGTHS)
    cache = KVCache()
    for seed in range(2):
        tokens, _ = ragged(LENGTHS, seed)
        plain = door(model).hidden(tokens, layout)
        assert torch.equal(door(model).hidden(tokens, layout, cache=cache), plain)
        begin, end = [length // 3 for length in LENGTHS], [length - length // 4 for length in LENGTHS]
        part = part_of(layout, begin, end)
        kept = door(model).hidden(tokens, layout, cache=cache, part=part)
        expected = part.pack(layout.unpack(plain))
        torch.testing.assert_close(kept, expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("-causal")])
@torch.no_grad()
def test_block_by_block_a_causal_model_with_a_cache_is_exact(case):
    """What was stored never saw what came later: nothing is stale. The rows grow, and so does the cache."""
    model = stock_model(case)
    tokens, _ = ragged(LENGTHS)
    whole = layout_of(LENGTHS)
    expected = whole.unpack(door(model).hidden(tokens, whole))
    cache = KVCache()
    for first in range(0, 40, 8):
        ends = [min(length, first + 8) for length in LENGTHS]
        layout = layout_of(ends, first + 8)
        part = part_of(layout, [min(first, end) for end in ends], ends)
        ours = door(model).hidden(tokens[:, : first + 8], layout, cache=cache, part=part)
        torch.testing.assert_close(ours, part.pack(expected[:, : first + 8]), atol=ROUNDING, rtol=0)


@torch.no_grad()
def test_a_stale_prefix_does_change_the_rest():
    """Or else the tests above would prove nothing."""
    model = stock_model("llama")
    tokens, _ = ragged(LENGTHS)
    layout = layout_of(LENGTHS)
    part = part_of(layout, [length // 2 for length in LENGTHS], LENGTHS)
    cache = KVCache()
    door(model).hidden(tokens, layout, cache=cache)
    changed = tokens.clone()
    changed[0, 39] = 63 - changed[0, 39]
    stale = part.unpack(door(model).hidden(changed, layout, cache=cache, part=part))
    fresh = part.unpack(part.pack(layout.unpack(door(model).hidden(changed, layout))))
    assert (stale[0] - fresh[0]).abs().max() > 1e-3
    torch.testing.assert_close(stale[1:], fresh[1:], atol=ROUNDING, rtol=0)


@torch.no_grad()
def test_rows_retire_and_new_ones_take_their_place():
    model = stock_model("modernbert")
    tokens, _ = ragged(LENGTHS)
    cache = KVCache()
    door(model).hidden(tokens, layout_of(LENGTHS), cache=cache)
    cache.reorder([3, -1, 0])
    rows = torch.stack([tokens[3], tokens[5].flip(0), tokens[0]])
    layout = layout_of([23, 40, 40])
    part = part_of(layout, (10, 0, 39), (12, 40, 40))
    ours = door(model).hidden(rows, layout, cache=cache, part=part)
    expected = part.pack(layout.unpack(door(model).hidden(rows, layout)))
    torch.testing.assert_close(ours, expected, atol=ROUNDING, rtol=0)


@torch.no_grad()
def test_a_cache_that_cannot_complete_a_part_is_an_error():
    model = stock_model("bert")
    tokens, _ = ragged(LENGTHS)
    layout = layout_of(LENGTHS)
    part = part_of(layout, [0] * 6, [1] * 6)
    with pytest.raises(ValueError, match=r"row 0: positions 1..39 are neither stored nor in this pass \(0..0\)"):
        door(model).hidden(tokens, layout, cache=KVCache(), part=part)
    cache = KVCache()
    door(model).hidden(tokens, layout, cache=cache)
    with pytest.raises(ValueError, match="holds 6 rows, the pass has 2; call reorder"):
        door(model).hidden(tokens[:2], layout_of(LENGTHS[:2]), cache=cache)
    with pytest.raises(ValueError, match="are not the 6 rows x 40"):
        door(model).hidden(tokens[:, :5], layout)


def test_a_cache_with_gradients_is_an_error():
    model = stock_model("bert")
    tokens, _ = ragged(LENGTHS)
    with pytest.raises(ValueError, match="torch.no_grad"):
        door(model).hidden(tokens, layout_of(LENGTHS), cache=KVCache())


# ----------------------------------------------------------------------------------------------------------------------
# A part without a cache


@pytest.mark.parametrize("case", ["modernbert", "llama-causal", "deberta-v2"])
def test_a_part_without_a_cache_is_taken_from_the_whole(case):
    """Also where it leaves a row out, and with gradients."""
    model = stock_model(case)
    tokens, _ = ragged(LENGTHS)
    layout = layout_of(LENGTHS)
    part = part_of(layout, [30, 2, 0, 0, 3, 6], [37, 2, 1, 23, 4, 7])
    found = door(model).hidden(tokens, layout, part=part)
    assert torch.equal(found, part.pack(layout.unpack(door(model).hidden(tokens, layout))))
    assert found.requires_grad


# ----------------------------------------------------------------------------------------------------------------------
# CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_on_cuda_every_kernel_equals_the_cpu(case):
    tokens, attention = ragged(LENGTHS)
    layout = layout_of(LENGTHS)
    expected = door(stock_model(case)).hidden(tokens, layout)
    model = stock_model(case).cuda()
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.3)):
        model = model.to(dtype)
        assert door(model).packable
        ours = door(model).hidden(tokens.cuda(), layout.to("cuda"))
        torch.testing.assert_close(ours.float().cpu(), expected, atol=tolerance, rtol=0)
