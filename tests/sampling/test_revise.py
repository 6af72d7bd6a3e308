"""Revising: remasking and editing of revealed tokens."""

import itertools

import pytest
import torch
from pydantic import ValidationError

from dllm.choices import REMASKING
from dllm.config import GenerateSettings
from dllm.core.canvas import canvas_for
from dllm.sampling.sampler import MaskedSampler
from tests.oracles import markov_backbone, tabular_backbone
from tests.samplers import numbered_rows
from tests.toys import ToyBackbone

PROMPTS, COUNTS = [[0, 1, 2], [], [3, 3, 3, 3, 0, 1], [2], [0, 1, 2, 0]], [6, 9, 4, 1, 7]


def settings(**options):
    return GenerateSettings(**({"block_size": 4, "early_stop": False} | options))


def canvas_of(backbone, prompts=PROMPTS, counts=COUNTS):
    return canvas_for(prompts, counts, mask_id=backbone.mask_id, pad_id=backbone.pad_id)


def frames_of(backbone, canvas, options, **more):
    return list(MaskedSampler().denoise(backbone, canvas, options, **more))


WAYS = [
    *({"remask": name, "remask_share": 0.6, "steps": 12, "temperature": 1.0} for name in REMASKING),
    {"remask": "rescale", "remask_share": 1.0, "reveal_rule": "threshold", "threshold": 0.3},
    {"edit_threshold": 0.3, "steps": 6},
    {"edit_threshold": 0.3, "reveal_rule": "threshold", "threshold": 0.4, "temperature": 1.0, "edit_passes": 3},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_row_in_a_batch_equals_the_row_alone(way):
    backbone, options = tabular_backbone(seed=3), settings(**way)
    frames = frames_of(backbone, canvas_of(backbone), options)
    last = frames[-1]
    assert last.done.all() and not last.masked.any() and (last.tokens != backbone.mask_id).all()
    revised = [(~one.masked & (one.tokens != other.tokens)).any() for one, other in itertools.pairwise(frames)]
    assert any(revised), "tokens are taken back, or replaced"
    few = options.model_copy(update={"batch_size": 2})
    done = {row.number: row for row in MaskedSampler().complete(backbone, canvas_of(backbone), few)}
    for row, (prompt, count) in enumerate(zip(PROMPTS, COUNTS, strict=True)):
        alone = frames_of(backbone, canvas_of(backbone, [prompt], [count]), options)[-1]
        assert alone.responses()[0] == last.responses()[row] == done[row].tokens
        assert alone.nfe == done[row].passes


@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("name", REMASKING)
def test_a_share_of_0_is_masked_diffusion_token_for_token(name, steps):
    backbone = tabular_backbone(seed=3)
    plain = settings(temperature=1.0, steps=steps, block_size=16)
    revising = plain.model_copy(update={"remask": name, "remask_share": 0.0})
    canvas = canvas_of(backbone)
    pairs = zip(*(frames_of(backbone, canvas, way) for way in (plain, revising)), strict=True)
    assert all(torch.equal(one.tokens, other.tokens) for one, other in pairs)


@pytest.mark.parametrize("name", sorted(set(REMASKING) - {"loop"}))
@pytest.mark.parametrize("steps", [4, 8, 20])
def test_as_many_tokens_are_masked_after_each_pass_as_without_remasking(name, steps):
    """ReMDM keeps the marginal distribution of every time; the plan of the masks is that of masked diffusion."""
    backbone = tabular_backbone(seed=3)
    options = settings(remask=name, remask_share=1.0, steps=steps, block_size=8, temperature=1.0)
    frames = frames_of(backbone, canvas_of(backbone, [[1, 2]] * 20, [8] * 20), options)
    even = [-(-8 * (steps - k) // steps) for k in range(steps + 1)]
    for frame, count in zip(frames, even, strict=True):
        assert (frame.masked.sum(1) == count).all()
    back = [(~one.masked & other.masked).sum(1) for one, other in itertools.pairwise(frames)]
    most = [min(8 - before, after) for before, after in itertools.pairwise(even)]
    assert [count.tolist() for count in back] == [[count] * 20 for count in most]  # share 1: all that may be


def test_a_loop_holds_a_tenth_of_the_masks_and_takes_tokens_back_in_between():
    backbone = tabular_backbone(seed=3)
    options = settings(remask="loop", remask_share=0.1, steps=40, block_size=20, temperature=1.0)
    frames = frames_of(backbone, canvas_of(backbone, [[1, 2]] * 20, [20] * 20), options)
    masked = torch.stack([frame.masked.sum(1) for frame in frames])
    assert (masked[18:39] == 2).all() and (masked[40] == 0).all() and len(frames) == 41
    back = torch.stack([(~one.masked & other.masked).sum(1) for one, other in itertools.pairwise(frames)])
    assert (back[:18] == 0).all() and (back[38:] == 0).all()
    assert 1.4 < back[18:38].float().mean() < 2.0 and back.max() == 2  # 0.1 of 18


def test_the_least_sure_tokens_are_taken_back_first_and_unsure_ones_more_often():
    backbone = tabular_backbone(seed=3)
    canvas = canvas_of(backbone, [[1, 2]] * 50, [8] * 50)
    share = {}
    for name in ("least", "confidence", "rescale"):
        options = settings(remask=name, remask_share=0.3, steps=12, block_size=8, temperature=1.0, reveal_rule="random")
        rank = []
        with numbered_rows():
            for one, other in itertools.pairwise(frames_of(backbone, canvas, options)):
                for row in (~one.masked & other.masked).any(1).nonzero()[:, 0].tolist():
                    revealed = one.confidence[row, 2:10][~one.masked[row, 2:10]]
                    gone = one.confidence[row, 2:10][(~one.masked & other.masked)[row, 2:10]]
                    rank.append((revealed < gone.min()).float().mean().item())
        share[name] = sum(rank) / len(rank)
    assert share["least"] == 0 and share["confidence"] < share["rescale"]


@pytest.mark.parametrize("name", ["cap", "rescale", "loop"])
def test_samples_of_an_ideal_model_keep_their_distribution_one_token_at_a_time(name):
    """Where a pass reveals one token, what it takes back is drawn anew from its exact conditional: a Gibbs step."""
    backbone, count = markov_backbone(2, seed=2), 4000
    single = {"steps": 12, "remask_share": 0.3} if name == "loop" else {"steps": 9, "remask_share": 0.5}
    options = settings(remask=name, block_size=3, temperature=1.0, reveal_rule="random", **single)
    with numbered_rows():
        frames = frames_of(backbone, canvas_of(backbone, [[]] * count, [3] * count), options)
    assert any((~one.masked & other.masked).any() for one, other in itertools.pairwise(frames))
    number = (frames[-1].tokens * torch.tensor([4, 2, 1])).sum(1)
    found = torch.bincount(number, minlength=8)
    rows = itertools.product(range(2), repeat=3)
    expected = count * torch.tensor([backbone.model.log_probability(list(row)) for row in rows]).exp()
    revealed = [(one.masked & ~other.masked).sum(1).max() for one, other in itertools.pairwise(frames)]
    if max(revealed) == 1:
        assert ((found - expected) ** 2 / expected).sum() < 24.3  # chi-square of 7 degrees: exceeded 1 time in 1000
    else:
        assert ((found - expected) ** 2 / expected).sum() < 60  # two at once are drawn independently


class Knows(torch.nn.Module):
    """A model of one text, which it sees through wrong tokens, but only where at most one token is wrong."""

    def __init__(self, text, vocab):
        super().__init__()
        self.text, self.vocab = torch.tensor(text), vocab

    def logits_of(self, tokens, attention=None):
        sure = torch.nn.functional.one_hot(self.text[: tokens.shape[1]], self.vocab) * 8.0
        return sure.expand(len(tokens), -1, -1).clone()


class FirstWrong(Knows):
    """As long as there are masks, it proposes wrong tokens."""

    def logits_of(self, tokens, attention=None):
        right = super().logits_of(tokens)
        return torch.where((tokens == 5).any(1)[:, None, None], right.roll(1, -1), right)


def knowing(kind, text):
    return ToyBackbone(kind(text, 8), 5, 6, 7, 8)


TEXT = [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("threshold,right", [(0.9, True), (1.0, False)])
def test_planted_wrong_tokens_are_edited_by_a_model_that_knows(threshold, right):
    backbone = knowing(FirstWrong, TEXT)
    canvas = canvas_of(backbone, [[0, 1]], [6])
    plain = frames_of(backbone, canvas, settings(block_size=8, steps=2))[-1]
    assert plain.tokens[0, 2:].tolist() != TEXT[2:]
    frames = frames_of(backbone, canvas, settings(block_size=8, steps=2, edit_threshold=threshold))
    assert (frames[-1].tokens[0].tolist() == TEXT) == right and frames[-1].done.all()
    # two passes of masks, one that edits all of them, one that finds nothing to do; or that one alone
    assert frames[-1].nfe == (4 if right else 3)


def test_a_block_is_edited_for_a_number_of_passes_at_most():
    class Undecided(Knows):
        """Always proposes another token than the one that is there."""

        def logits_of(self, tokens, attention=None):
            return torch.nn.functional.one_hot((tokens + 1) % 4, self.vocab) * 9.0

    backbone = knowing(Undecided, TEXT)
    options = settings(steps=2, edit_threshold=0.5, edit_passes=5)
    last = frames_of(backbone, canvas_of(backbone, [[0]], [8]), options)[-1]
    assert last.nfe == 2 + 2 * 5 and last.done.all()


def test_given_tokens_and_finished_blocks_are_never_revised():
    for way in WAYS:
        backbone = tabular_backbone(seed=5)
        frames = frames_of(backbone, canvas_of(backbone, [[1, 2]], [8]), settings(**way))
        for one, other in itertools.pairwise(frames):
            changed = (one.tokens != other.tokens).nonzero()[:, 1]
            assert (changed >= 2).all() and ((changed - 2) // 4).unique().numel() <= 1


@pytest.mark.parametrize("way", [{"remask": "cap", "remask_share": 0.5, "steps": 24}, {"edit_threshold": 0.2}], ids=str)
def test_a_row_ends_early_at_the_end_of_a_block_that_holds_its_end(way):
    backbone = knowing(Knows, [0, 1, 2, 6, 6, 6, 6, 6, 6, 6])
    canvas = canvas_of(backbone, [[0]], [9])
    late, early = (frames_of(backbone, canvas, settings(early_stop=stop, **way))[-1] for stop in (False, True))
    assert torch.equal(late.tokens, early.tokens) and early.nfe < late.nfe and early.done.all()


def test_combinations_that_mean_nothing_are_refused_in_one_line():
    with pytest.raises(ValidationError, match="does not go together with edit_threshold = 0.5"):
        GenerateSettings(remask="cap", edit_threshold=0.5)
    with pytest.raises(ValidationError, match="remask_share = 0.3 needs a way to remask"):
        GenerateSettings(remask_share=0.3)
    with pytest.raises(ValidationError, match="edit_passes = 2 needs edits"):
        GenerateSettings(edit_passes=2)
    with pytest.raises(ValidationError, match="'rescale'"):
        GenerateSettings(remask="resale")
