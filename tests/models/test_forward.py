"""The forward pass: hidden states once, the head only where it is asked for, the same numbers as the stock class."""

import pytest
import torch
from torch import nn

from dllm.models.forward import Scores, head_logits, hidden_states, logits_at
from tests.oracles import tabular_backbone
from tests.stock import FIRST_WORD, KINDS, stock_backbone


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("models")


def random_batch(backbone, lengths=(12, 7, 1, 9), seed=0):
    """Tokens [B, L] without special ones, and which of them are real."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(FIRST_WORD, len(backbone.tokenizer), (len(lengths), max(lengths)), generator=generator)
    attention = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.where(attention, tokens, backbone.pad_id), attention


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_at_are_the_stock_classes_own_logits_there(directory, kind):
    backbone = stock_backbone(directory, kind)
    tokens, attention = random_batch(backbone)
    where = attention & (torch.arange(12) % 3 != 1)
    ours = logits_at(backbone.model, hidden_states(backbone.model, tokens, attention), where)
    stock = backbone.model(input_ids=tokens, attention_mask=attention.long()).logits
    assert ours.dtype == torch.float32 and ours.shape == (int(where.sum()), backbone.vocab_size)
    torch.testing.assert_close(ours, stock[where], atol=1e-5, rtol=0)  # another shape of the head's matrix product


@pytest.mark.parametrize("kind", ["bert", "llama"])
@torch.no_grad()
def test_next_prediction_reads_the_position_before(directory, kind):
    backbone = stock_backbone(directory, kind)
    hidden = hidden_states(backbone.model, random_batch(backbone)[0])
    everywhere = torch.ones(hidden.shape[:2], dtype=torch.bool)
    in_place = logits_at(backbone.model, hidden, everywhere).view(4, 12, -1)
    shifted = logits_at(backbone.model, hidden, everywhere, "next").view(4, 12, -1)
    torch.testing.assert_close(shifted[:, 1:], in_place[:, :-1])
    torch.testing.assert_close(shifted[:, 0], in_place[:, 0])  # the first position has no prediction of its own


@torch.no_grad()
def test_logits_come_in_row_major_order(directory):
    backbone = stock_backbone(directory, "bert")
    hidden = hidden_states(backbone.model, random_batch(backbone)[0])
    where = torch.zeros(4, 12, dtype=torch.bool)
    where[2, 1] = where[0, 5] = where[0, 3] = True
    expected = head_logits(backbone.model, torch.stack([hidden[0, 3], hidden[0, 5], hidden[2, 1]]))
    torch.testing.assert_close(logits_at(backbone.model, hidden, where), expected)


@pytest.mark.parametrize("prediction", ["in_place", "next"])
@torch.no_grad()
def test_the_wrapper_for_training_equals_the_functions(directory, prediction):
    backbone = stock_backbone(directory, "modernbert")
    tokens, attention = random_batch(backbone)
    expected = logits_at(backbone.model, hidden_states(backbone.model, tokens, attention), attention, prediction)
    scores = Scores(backbone.model, prediction)
    assert torch.equal(scores(tokens, attention, attention), expected)
    assert torch.equal(logits_at(scores, hidden_states(scores, tokens, attention), attention, prediction), expected)


@torch.no_grad()
def test_a_data_parallel_wrapper_is_seen_through(directory):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    backbone = stock_backbone(directory, "roberta")
    tokens, attention = random_batch(backbone)
    wrapped = Wrapper(Scores(Wrapper(backbone.model)))
    assert torch.equal(hidden_states(wrapped, tokens, attention), hidden_states(backbone.model, tokens, attention))


@torch.no_grad()
def test_the_logits_are_fp32_for_a_bf16_model(directory):
    backbone = stock_backbone(directory, "bert", dtype=torch.bfloat16)
    tokens, attention = random_batch(backbone)
    assert logits_at(backbone.model, hidden_states(backbone.model, tokens, attention), attention).dtype == torch.float32


@torch.no_grad()
def test_an_end_token_inside_a_row_does_not_move_the_positions_behind_it(directory):
    """RoBERTa counts positions over the tokens that are not padding, and our end of text is its padding token."""
    backbone = stock_backbone(directory, "roberta")
    model, seen = backbone.model, []
    model.roberta.embeddings.position_embeddings.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    for front in (backbone.eos_id, FIRST_WORD):
        hidden_states(model, torch.tensor([[6, front, front, 7, 8]]))
    assert torch.equal(*seen)
    first = model.config.pad_token_id + 1
    assert seen[0].tolist() == [list(range(first, first + 5))]


def test_a_class_whose_head_is_unknown_is_an_error_that_says_where_to_add_it(directory):
    backbone = stock_backbone(directory, "llama")
    backbone.model.get_output_embeddings = lambda: None
    with pytest.raises(
        ValueError, match="model_type = 'llama' has no known LM head; allowed: bert, modernbert, roberta"
    ):
        head_logits(backbone.model, torch.zeros(1, 32))


def test_a_module_with_its_own_two_methods_is_taken_as_it_is():
    backbone = tabular_backbone()
    tokens = torch.tensor([[1, 2, 3]])
    expected = backbone.model.dllm_hidden(tokens)
    where = torch.tensor([[False, True, True]])
    assert torch.equal(logits_at(backbone.model, hidden_states(backbone.model, tokens), where), expected[0, 1:])
    assert torch.equal(Scores(backbone.model)(tokens, None, where), expected[0, 1:])
