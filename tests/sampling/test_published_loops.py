"""Our samplers answer as the authors' own loops do, token for token."""

import json
from dataclasses import replace

import pytest
import torch

from dllm.config import GenerateSettings
from dllm.core.canvas import canvas_for, infill_canvas
from dllm.core.packing import layout_of
from dllm.language_model import load
from dllm.models.load import load_backbone
from dllm.models.published import read_tensors
from dllm.sampling.expand import ExpandingSampler
from dllm.sampling.sampler import block_sampler
from tests.models.published import dream, llada2
from tests.models.published.pieces import block_causal, make_weights, save_byte_tokenizer, save_checkpoint
from tests.oracles import tabular_backbone
from tests.plain_forward import packed_logits
from tests.sampling import published_loops

BLOCK, END, MASK = 32, 257, llada2.MASK
CONFIG = llada2.CONFIG | {"num_hidden_layers": 2, "first_k_dense_replace": 2, "max_position_embeddings": 192}
"""Without experts, which the plain statement visits token by token: `tests/models/test_weights.py` has them."""


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


# --------------------------------------------------------------------------------------------------------------------
# DreamOn

M = 9  # the mask of a vocabulary of nine words
HOLES = [[0, 1, M, M, 2], [3, M, 4, 5], [M, M, M], [1, 2, 3, M, 0, M, M, 4], [5, 6]]
"""A hole inside, a short one, nothing else, two holes, no hole."""


def growing(seed, prediction="in_place"):
    """A random model, of a table, that expands a mask in one of nine times, and deletes one as often."""
    toy = tabular_backbone(9, seed=seed, prediction=prediction)
    return replace(toy, eos_id=8, sidecar={"algorithm": "expand", "expand_id": 7})


def table_of(backbone):
    """Its logits of a row by position, with none for the mask."""

    def scores(row):
        layout = layout_of([len(row)])
        hidden = backbone.hidden(torch.tensor([row]), layout)
        places = torch.arange(len(row))
        logits = packed_logits(backbone, hidden, layout, torch.zeros_like(places), places).clone()
        logits[:, M] = -torch.inf
        return logits

    return scores


@pytest.mark.parametrize("prediction", ["in_place", "next"])
@pytest.mark.parametrize("rule", ["confidence", "margin", "entropy"])
@pytest.mark.parametrize("room", [3, 12])
@torch.no_grad()
def test_dreamon_fills_holes_as_published(rule, room, prediction):
    lengths = set()
    for seed in range(6):
        backbone = growing(seed, prediction)
        canvas = infill_canvas(HOLES, mask_id=M, pad_id=backbone.pad_id)
        settings = GenerateSettings(reveal_rule=rule, max_new_tokens=room)
        *frames, last = ExpandingSampler().denoise(backbone, canvas, settings)
        done = {row.number: row for row in ExpandingSampler().complete(backbone, canvas, settings)}
        for number, row in enumerate(HOLES):
            expected, passes = row, 0
            if M in row:
                ids = {"mask": M, "expand": 7, "delete": 8}
                expected, passes = published_loops.dreamon(table_of(backbone), row, room, rule=rule, **ids)
            found = last.tokens[number, : last.length[number]].tolist()
            assert found == expected and done[number].passes == passes
            assert done[number].tokens == expected[int(canvas.start[number]) :]
            assert M not in found and 7 not in found, "what is left are words"
            lengths.add(len(found) - len(row))
    assert min(lengths) < 0 < max(lengths), "rows shrank and grew"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_grows_in_a_batch_equals_the_row_alone(temperature):
    backbone = growing(1)
    settings = GenerateSettings(max_new_tokens=8, temperature=temperature, top_p=0.9, batch_size=2)
    canvas = infill_canvas(HOLES, mask_id=M, pad_id=backbone.pad_id)
    *_, last = ExpandingSampler().denoise(backbone, canvas, settings)
    done = {row.number: row for row in ExpandingSampler().complete(backbone, canvas, settings)}
    for number, row in enumerate(HOLES):
        alone = infill_canvas([row], mask_id=M, pad_id=backbone.pad_id)
        *_, alone = ExpandingSampler().denoise(backbone, alone, settings)
        response = alone.responses()[0]
        assert response == last.responses()[number] == done[number].tokens and alone.nfe == done[number].passes


def test_no_row_grows_beyond_the_models_context_and_what_is_given_stays():
    backbone = replace(growing(0), max_length=9)
    canvas = infill_canvas(HOLES, mask_id=M, pad_id=backbone.pad_id)
    words = [[token for token in row if token != M] for row in HOLES]
    longest = 0
    for seed in range(8):
        settings = GenerateSettings(max_new_tokens=20, temperature=1.0, seed=seed)
        for frame in ExpandingSampler().denoise(backbone, canvas, settings):
            longest = max(longest, int(frame.length.max()))
            for number, row in enumerate(frame.tokens.tolist()):
                left = iter(row[: frame.length[number]])
                assert all(word in left for word in words[number]), "in their order"
    assert longest == 9


@pytest.mark.parametrize(
    "options", [{"steps": 4}, {"reveal_rule": "threshold"}, {"guidance": 1.0}, {"reuse": "prefix"}, {"remask": "cap"}]
)
def test_options_that_mean_nothing_where_rows_grow_are_one_line(options):
    backbone = growing(0)
    canvas = infill_canvas(HOLES, mask_id=M, pad_id=backbone.pad_id)
    with pytest.raises(ValueError, match=f"{next(iter(options))} = .* means nothing to algorithm = 'expand'") as error:
        ExpandingSampler().denoise(backbone, canvas, GenerateSettings(**options))
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def dreamon_checkpoint(tmp_path_factory):
    """A tiny Dream whose tokenizer has the token that DreamOn adds, and so is a DreamOn."""
    directory, special = tmp_path_factory.mktemp("dreamon"), [*dream.TOKENS, "<|beginoftext|>", "<|expand|>"]
    save_checkpoint(directory, dream.CONFIG, make_weights(dream.shapes(dream.CONFIG), seed=1))
    save_byte_tokenizer(directory, special, kind="qwen2", template="{{ messages[0]['content'] }}")
    settings = json.loads((directory / "tokenizer_config.json").read_text()) | {"bos_token": "<|beginoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def test_a_dream_with_dreamons_token_fills_holes_of_any_length(dreamon_checkpoint):
    lm = load(dreamon_checkpoint, device="cpu")
    assert lm.algorithm.name == "expand" and lm.backbone.sidecar["expand_id"] == 261
    assert lm.usual_settings == GenerateSettings(reveal_rule="entropy")
    (row,) = lm.holes(["a <|mask|><|mask|> b"])
    assert row[0] == 260 and row[-1] == 256 and row.count(259) == 2, "as published, between start and end"
    weights = dict(read_tensors(dreamon_checkpoint))

    def scores(tokens):
        logits = dream.logits(dream.CONFIG, weights, torch.tensor([tokens]))[0]
        logits = torch.cat([logits[:1], logits[:-1]])  # position i is scored from the one before it
        logits[:, 259] = -torch.inf
        return logits

    settings = lm.usual_settings.model_copy(update={"max_new_tokens": 12})
    expected, _ = published_loops.dreamon(scores, row, 12, mask=259, expand=261, delete=256)
    assert lm.infill(["a <|mask|><|mask|> b"], settings) == [lm.backbone.tokenizer.decode(expected[1:-1])]
    with pytest.raises(ValueError, match="algorithm = 'expand' has no .*likelihood is that of no canvas"):
        lm.nelbo(["a"], ["b"])


def test_what_a_user_writes_never_grows(dreamon_checkpoint):
    lm = load(dreamon_checkpoint, device="cpu")
    (row,) = lm.holes(["<|expand|> <|mask|>"])
    assert 261 not in row
