"""A row's numbers are its own: neither its neighbours nor the split of a batch change them."""

import numpy
import pytest
import torch

from dllm.config import Recipe
from dllm.core.batch import row_noise
from dllm.core.losses import denominator
from dllm.data.collate import ResponseEnd, collate, ended_lengths
from dllm.data.tokens import TokenRows
from dllm.models.backbone import TokenNLL
from dllm.objectives.mdlm import MDLM
from tests.plain_forward import hidden_states, logits_at
from tests.stock import FIRST_WORD, KINDS, stock_backbone
from tests.training_loss import training_loss

LENGTHS, PROMPTS = (9, 14, 5, 14, 3, 11), (3, 6, 1, 2, 1, 4)
SPLITS = ([0], [1, 2, 3], [4, 5])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("models")


def rows_of(vocab_size, prompts=PROMPTS):
    offsets = numpy.concatenate([[0], numpy.cumsum(LENGTHS)])
    tokens = numpy.random.default_rng(0).integers(FIRST_WORD, vocab_size, offsets[-1]).astype(numpy.uint16)
    return TokenRows(tokens, offsets, numpy.asarray(prompts, dtype=numpy.int32))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_row_in_a_batch_equals_the_row_alone(directory, kind, attention):
    backbone = stock_backbone(directory, kind)
    backbone.model.set_attn_implementation(attention)
    numbers = numpy.arange(len(LENGTHS))
    batch = collate(rows_of(len(backbone.tokenizer)), numbers, numpy.array(LENGTHS), pad_id=backbone.pad_id, end=None)
    together = hidden_states(backbone.model, batch.tokens, batch.attention)
    for number in numbers:
        alone = hidden_states(backbone.model, batch.tokens[number : number + 1, : LENGTHS[number]])
        logits = logits_at(backbone.model, alone, torch.ones(1, LENGTHS[number], dtype=torch.bool))
        where = torch.zeros_like(batch.attention)
        where[number, : LENGTHS[number]] = True
        # fp32 sums over masked keys run in another order; states and logits are of size 1
        torch.testing.assert_close(together[number, : LENGTHS[number]], alone[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(logits_at(backbone.model, together, where), logits, atol=1e-5, rtol=0)


def loss_and_gradients(backbone, recipe, end, parts):
    """The loss and gradients of all rows as one step that is split into `parts`, each padded for itself."""
    rows, numbers = (
        rows_of(len(backbone.tokenizer), PROMPTS if end else (0,) * len(LENGTHS)),
        numpy.arange(len(LENGTHS)),
    )
    lengths = ended_lengths(rows, numbers, end, 1)
    total = denominator(torch.from_numpy(lengths - rows.prompts), recipe.normalisation)
    backbone.model.zero_grad()
    loss, per_row = 0.0, torch.zeros(len(LENGTHS))
    for part in parts:
        batch = collate(rows, numpy.array(part), lengths[part], pad_id=backbone.pad_id, end=end)
        noise = row_noise(3, 1, batch.sample_ids, batch.tokens.shape[1])
        terms = training_loss(
            MDLM(recipe), TokenNLL(backbone), batch, noise, mask_id=backbone.mask_id, denominator=total
        )
        terms.loss.backward()
        loss, per_row[part] = loss + terms.loss.item(), terms.rows
    return loss, per_row, [p.grad.clone() for p in backbone.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("corruption", ["exact", "bernoulli"])
@pytest.mark.parametrize("end", ["fill", "block", "one", None])
@pytest.mark.parametrize("normalisation", ["token", "sequence", "batch"])
def test_the_loss_does_not_depend_on_the_split_into_micro_batches(directory, normalisation, end, corruption):
    """Nor on the split over devices, which is the same thing with the sum taken by another hand."""
    backbone = stock_backbone(directory, "bert", dtype=torch.float64)
    recipe = Recipe(normalisation=normalisation, corruption=corruption)
    end = end and ResponseEnd(end, backbone.eos_id, block_size=4, extra_blocks=2, seed=3)
    loss, rows, gradients = loss_and_gradients(backbone, recipe, end, [list(range(len(LENGTHS)))])
    split_loss, split_rows, split_gradients = loss_and_gradients(backbone, recipe, end, SPLITS)
    assert split_loss == pytest.approx(loss, rel=1e-6)  # the cross-entropy is fp32
    torch.testing.assert_close(split_rows, rows, rtol=1e-5, atol=1e-6)
    for one, other in zip(split_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
