"""A canvas as text: dots, colours, and nothing lost."""

from dataclasses import replace

import pytest
import torch

from dllm.chat.render import END, MASK, RAMP, Piece, canvas_text, legend, pieces, status, style_of
from dllm.core.canvas import canvas_for
from tests.toys import word_tokenizer

TOKENIZER = word_tokenizer()


def canvas_of(text: str, hidden: set[int] = frozenset(), *, confidence: float = 0.5):
    """A canvas whose response is `text`, masked at the places `hidden`."""
    prompt, answer = (TOKENIZER(t, add_special_tokens=False)["input_ids"] for t in ("Who are you?", text))
    canvas = canvas_for([prompt], len(answer), mask_id=TOKENIZER.mask_token_id, pad_id=TOKENIZER.pad_token_id)
    masked = torch.zeros_like(canvas.masked)
    masked[0, [len(prompt) + place for place in hidden]] = True
    tokens = torch.tensor([prompt + answer]).masked_fill(masked, TOKENIZER.mask_token_id)
    sure = torch.full_like(canvas.confidence, confidence).masked_fill(masked, 0)
    return replace(canvas, tokens=tokens, masked=masked, confidence=sure, step=1, nfe=1)


def test_the_pieces_of_a_finished_canvas_are_its_text():
    found = pieces(canvas_of("Hello! I am a toy."), TOKENIZER.decode)
    assert [piece.text for piece in found] == ["Hello", "!", " I", " am", " a", " toy", "."]
    assert {piece.state for piece in found} == {"kept"}
    assert canvas_text(found).plain == "Hello! I am a toy."


def test_a_canvas_that_became_longer_or_shorter_in_a_pass_has_no_new_token():
    for before in ("one two", "one two red blue two one"):
        found = pieces(canvas_of("one two red blue", {1, 3}), TOKENIZER.decode, previous=canvas_of(before, {1}))
        assert [piece.state for piece in found] == ["kept", "masked", "kept", "masked"]


def test_masked_positions_are_dots_and_new_ones_are_marked():
    before, after = canvas_of("one two red blue", {1, 2, 3}), canvas_of("one two red blue", {1, 3}, confidence=0.25)
    found = pieces(after, TOKENIZER.decode, previous=before)
    assert [piece.state for piece in found] == ["kept", "masked", "new", "masked"]
    assert found[1] == Piece("", "masked", 0.0) and found[2] == Piece(" red", "new", 0.25)
    assert canvas_text(found).plain == f"one{MASK} red{MASK}"


def test_a_character_of_several_tokens_appears_with_its_last_one():
    characters = {(0,): "\ufffd", (0, 1): "é", (0, 1, 2): "é!"}
    canvas = replace(canvas_of("one two red"), tokens=torch.tensor([[9, 9, 9, 9, 0, 1, 2]]))
    assert [p.text for p in pieces(canvas, lambda ids: characters[tuple(ids)])] == ["\ufffd", "é", "!"]


def test_the_end_token_becomes_a_small_sign():
    text = canvas_text(pieces(canvas_of("one[PAD][PAD]"), TOKENIZER.decode), TOKENIZER.eos_token)
    assert text.plain == f"one{END}{END}"


@pytest.mark.parametrize(("confidence", "rank"), [(0.0, 0), (0.29, 0), (0.3, 1), (0.75, 2), (0.95, 3), (1.0, 3)])
def test_the_colour_says_how_sure_the_model_was(confidence, rank):
    assert style_of(Piece("a", "kept", confidence)) == RAMP[rank][1]
    assert style_of(Piece("a", "new", confidence)) == f"bold {RAMP[rank][1]}"


def test_the_colours_are_told_apart_by_lightness_or_hue_and_explained():
    assert len({colour for _, colour, _ in RAMP}) == len(RAMP)
    assert "masked" in legend().plain and "90–100 % sure" in legend().plain and len(legend().plain) <= 80
    assert "%" not in legend(colours=False).plain


def test_the_status_line_counts_tokens_per_second():
    assert status(3, 6, 12, 2.0).plain == "step 3 · 6 passes · 12 tokens · 2.0 s · 6 tokens/s"
    assert status(1, 1, 1, 1.0).plain.startswith("step 1 · 1 pass · 1 token · ")
    assert "0 tokens/s" in status(0, 0, 0, 0.0).plain
