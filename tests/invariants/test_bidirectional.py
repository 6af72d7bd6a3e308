"""Every family sees both sides, with every attention and padding; only a causal load does not."""

import pytest
import torch

from dllm.models.self_tests import is_bidirectional
from tests.plain_forward import hidden_states
from tests.stock import FIRST_WORD, KINDS, stock_backbone

DECODERS = ("llama", "qwen2")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("models")


def movement(model, changed, lengths):
    """How far each position [L] of the first row moves when the token at `changed` is another; rows of `lengths`."""
    tokens = torch.arange(FIRST_WORD, FIRST_WORD + max(lengths)).repeat(len(lengths), 1)
    other = tokens.clone()
    other[0, changed] += 1
    attention = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        before, after = (hidden_states(model, t, attention)[0] for t in (tokens, other))
    return (before - after).abs().amax(-1)


@pytest.mark.parametrize("lengths", [(9,), (9, 9), (9, 4), (6, 9)], ids=["alone", "full", "other-padded", "padded"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_position_sees_the_first_and_the_last_token(directory, kind, attention, lengths):
    model = stock_backbone(directory, kind).model
    model.set_attn_implementation(attention)
    for changed in (0, lengths[0] - 1):
        assert (movement(model, changed, lengths)[: lengths[0]] > 0).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_position_sees_the_padding(directory, kind, attention):
    model = stock_backbone(directory, kind).model
    model.set_attn_implementation(attention)
    assert (movement(model, 7, (6, 9))[:6] == 0).all()


@pytest.mark.parametrize("lengths", [(9,), (9, 4), (6, 9)], ids=["alone", "other-padded", "padded"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_causal_load_stays_causal(directory, kind, attention, lengths):
    model = stock_backbone(directory, kind, causal=True).model
    model.set_attn_implementation(attention)
    moved = movement(model, 3, lengths)[: lengths[0]] > 0
    assert moved.tolist() == [i >= 3 for i in range(lengths[0])]


@pytest.mark.parametrize("kind", DECODERS)
def test_the_start_up_test_tells_the_two_apart(directory, kind):
    for causal in (False, True):
        backbone = stock_backbone(directory, kind, causal=causal)
        assert is_bidirectional(backbone.model) != causal
