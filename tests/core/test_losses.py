"""What a batch's loss is divided by, and the masked-only loss against the textbook's dense one."""

import pytest
import torch

from dllm.core.batch import Batch, masked_inputs
from dllm.core.corrupt import apply_mask
from dllm.core.losses import denominator, row_shares
from dllm.models.backbone import TokenNLL
from dllm.objectives.mdlm import MDLM
from tests.stock import FIRST_WORD, stock_backbone
from tests.training_loss import dense_masked_loss


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "llama"])
def test_the_masked_only_loss_is_the_dense_loss_in_values_and_gradients(directory, kind):
    """U4, against the stock class's own full logits."""
    backbone = stock_backbone(directory, kind, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(FIRST_WORD, len(backbone.tokenizer), (5, 12), generator=generator)
    attention = torch.arange(12) < torch.tensor([12, 7, 3, 12, 9])[:, None]
    masked = attention & (torch.rand(5, 12, generator=generator) < 0.5)
    share = torch.tensor([1.0, 2.5, 0.0, 3.0, 0.5])
    batch = Batch(tokens, attention, attention, torch.arange(5))

    x_t = apply_mask(tokens, masked, backbone.mask_id)
    ours = MDLM().loss(TokenNLL(backbone), masked_inputs(batch, x_t, masked, share, share), denominator=7.0).loss
    ours.backward()
    gradients = {name: p.grad.clone() for name, p in backbone.model.named_parameters() if p.grad is not None}
    backbone.model.zero_grad()
    logits = backbone.model(input_ids=x_t, attention_mask=attention.long()).logits
    dense = dense_masked_loss(logits, tokens, masked, share) / 7.0
    dense.backward()

    torch.testing.assert_close(ours, dense)  # default fp32 tolerance: the cross-entropy is fp32
    assert set(gradients) == {name for name, p in backbone.model.named_parameters() if p.grad is not None}
    for name, parameter in backbone.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_a_batch_with_nothing_masked_has_loss_0_and_a_gradient(directory):
    backbone = stock_backbone(directory, "bert")
    everything, nothing = torch.ones(2, 4, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool)
    batch = Batch(torch.full((2, 4), FIRST_WORD), everything, everything, torch.arange(2))
    inputs = masked_inputs(batch, batch.tokens, nothing, torch.ones(2), torch.ones(2))
    terms = MDLM().loss(TokenNLL(backbone), inputs, denominator=8.0)
    terms.loss.backward()
    assert terms.loss == 0 and terms.masked == 0 and terms.rows.tolist() == [0, 0]


def test_the_three_normalisations_are_their_formulas():
    """Of rows with nats l and n targets: sum l / sum n, mean of l / n, mean of l."""
    nats, targets, weight = torch.tensor([6.0, 1.0, 9.0]), torch.tensor([4, 1, 0]), torch.tensor([2.0, 1.0, 0.0])
    expected = {"token": (12 + 1) / 5, "sequence": (12 / 4 + 1 / 1) / 3, "batch": (12 + 1) / 3}
    for name, value in expected.items():
        loss = (nats * row_shares(weight, targets, name)).sum() / denominator(targets, name)
        assert loss.item() == pytest.approx(value), name
