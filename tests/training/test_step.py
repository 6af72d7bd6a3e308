"""One step: the same loss and gradients whatever the layout, and a host that never waits for the device."""

from dataclasses import replace

import numpy
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from dllm.algorithms import algorithm_named
from dllm.config import OptimizerSettings, Recipe
from dllm.core.batch import row_noise
from dllm.core.corrupt import exact_count
from dllm.data.collate import ResponseEnd, collate, ended_lengths
from dllm.data.tokens import TokenRows
from dllm.models import heads
from dllm.models.backbone import Backbone, TokenNLL
from dllm.models.heads import _HeadNLL, head_logits
from dllm.objectives.mdlm import MDLM
from dllm.training.devices import devices_for
from dllm.training.micro_batches import TrainingSplit, micro_batches
from dllm.training.setup import scores_for
from tests.oracles import tabular_backbone
from tests.plain_forward import hidden_states, plain_hidden
from tests.stock import FIRST_WORD, KINDS, stock_backbone
from tests.synchronisation import forbid_synchronisation
from tests.training.conftest import run_config
from tests.training_loss import dense_masked_loss, training_loss

LENGTHS = (9, 14, 5, 14, 3, 11, 40, 22)
LAYOUTS = {
    "packed": {},
    "packed in micro-batches of rows": {"micro_batch_size": 3},
    "packed in micro-batches of tokens": {"micro_batch_tokens": 48},
    "padded in micro-batches of tokens": {"micro_batch_tokens": 48, "plain": True},
    "head in chunks": {"logits": 7},
    "activation checkpointing": {"activation_checkpointing": True, "micro_batch_size": 5},
    "all of it": {"logits": 5, "activation_checkpointing": True, "micro_batch_tokens": 60},
}


class Plain(Backbone):
    """A backbone whose rows are padded to the longest, as the stock class runs them."""

    hidden = plain_hidden


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("models")


@pytest.fixture(autouse=True)
def own_precision():
    """The next accelerator in this process may have another precision."""
    yield
    AcceleratorState._reset_state(reset_partial_state=False)


def split_for(backbone, algorithm):
    offsets = numpy.concatenate([[0], numpy.cumsum(LENGTHS)])
    words = numpy.random.default_rng(0).integers(FIRST_WORD, len(backbone.tokenizer), offsets[-1])
    rows = TokenRows(words.astype(numpy.uint16), offsets, numpy.array([2, 3, 1, 2, 1, 4, 11, 9], dtype=numpy.int32))
    end = ResponseEnd("block", backbone.eos_id, block_size=4, longest=48)
    return TrainingSplit(rows, algorithm, end, backbone.pad_id, backbone.mask_id)


def gradients_of(directory, kind, name="mdlm", *, recipe=None, ranks=1, plain=False, logits=10**6, **changes):
    """Loss and gradients of one step under a layout; ranks are run one after the other and their gradients added.

    plain: rows are padded; logits: how many rows of them are held at a time.
    """
    causal = name == "ar"
    backbone = stock_backbone(directory, kind, causal=causal)
    backbone.model.zero_grad()
    if plain:
        backbone = Plain(**vars(backbone))
    recipe = recipe or Recipe()
    algorithm = algorithm_named(name).part("objective")(recipe)
    config = run_config(length=48, algorithm=name, recipe=recipe.model_dump(), **changes)
    scores = scores_for(config, replace(backbone, prediction="next") if causal else backbone)
    loss = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "logits_at_once", lambda *_: logits)
        for rank in range(ranks):
            parts = micro_batches(split_for(backbone, algorithm), config, first=0, last=1, rank=rank, ranks=ranks)
            for part in parts:
                terms = algorithm.loss(scores, part.inputs, denominator=part.denominator)
                terms.loss.backward()
                loss += terms.loss.item()
    return loss, {n: p.grad.clone() for n, p in backbone.model.named_parameters() if p.grad is not None}


def assert_same(one, other):
    """Equal to rounding: fp32 sums of some hundred terms run in another order; gradients are of size 0.01 to 1."""
    assert one[0] == pytest.approx(other[0], rel=2e-6)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_do_not_depend_on_the_layout(directory, kind, layout):
    assert_same(gradients_of(directory, kind, **LAYOUTS[layout]), gradients_of(directory, kind, plain=True))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["mdlm", "mlm", "ar"])
def test_loss_and_gradients_do_not_depend_on_the_split_over_ranks(directory, name, ranks):
    kind = "llama" if name == "ar" else "modernbert"
    whole = gradients_of(directory, kind, name, plain=True)
    assert_same(gradients_of(directory, kind, name, ranks=ranks, micro_batch_tokens=50), whole)


@pytest.mark.parametrize("normalisation", ["token", "sequence", "batch"])
def test_a_packed_step_with_a_chunked_head_equals_the_textbook_loss(directory, normalisation):
    recipe = Recipe(normalisation=normalisation)
    loss, gradients = gradients_of(directory, "modernbert", recipe=recipe, micro_batch_tokens=50, logits=6)
    backbone = stock_backbone(directory, "modernbert")
    model = backbone.model.train()
    model.zero_grad()
    (part,) = micro_batches(
        split_for(backbone, MDLM(recipe)), run_config(length=48, recipe=recipe.model_dump()), first=0, last=1
    )
    x = part.inputs
    clean, masked = x.tokens.clone(), torch.zeros_like(x.tokens, dtype=torch.bool)
    clean[x.row, x.position], masked[x.row, x.position] = x.targets, True
    attention = torch.arange(x.layout.width) < torch.tensor(x.layout.lengths)[:, None]
    logits = head_logits(model, hidden_states(model, x.tokens, attention))
    expected = dense_masked_loss(logits, clean, masked, x.share) / part.denominator
    expected.backward()
    assert_same((loss, gradients), (expected.item(), {n: p.grad for n, p in model.named_parameters()}))


def devices_of(backbone, config, *, bf16=False):
    scores = scores_for(config, backbone)
    return devices_for(Accelerator(cpu=True), scores, config.optimizer, bf16=bf16)


@pytest.mark.parametrize("changes", [{}, {"logits": 6}, {"activation_checkpointing": True}])
@pytest.mark.parametrize("name", ["mdlm", "mlm", "ar"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_never_makes_the_host_wait(directory, optimizer, name, changes, monkeypatch):
    rows = changes.get("logits", 10**6)
    monkeypatch.setattr(heads, "logits_at_once", lambda *_: rows)
    changes = {key: value for key, value in changes.items() if key != "logits"}
    kind = "llama" if name == "ar" else "modernbert"
    backbone = stock_backbone(directory, kind, causal=name == "ar")
    config = run_config(length=48, micro_batch_size=3, algorithm=name, **changes)
    config = config.model_copy(update={"optimizer": OptimizerSettings(name=optimizer)})
    algorithm, devices = algorithm_named(name).part("objective")(Recipe()), devices_of(backbone, config)
    parts = list(micro_batches(split_for(backbone, algorithm), config, first=0, last=1))
    assert len(parts) == 3
    with forbid_synchronisation():
        numbers = devices.step(algorithm, parts)
    assert numbers.loss.item() > 0 and numbers.gradient_norm.item() > 0
    assert numbers.masked == sum(len(part.inputs.targets) for part in parts)


def test_a_model_without_activation_checkpointing_says_so_in_one_line():
    line = r"run.activation_checkpointing = True, which TabularDenoiser does not offer; switch it off"
    with pytest.raises(ValueError, match=line) as caught:
        scores_for(run_config(activation_checkpointing=True), tabular_backbone())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_s_cross_entropy_is_the_stock_one_with_less_memory(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(70, 60_000, generator=generator) + 30).to(dtype)  # several slices of rows
    targets = torch.randint(60_000, (70,), generator=generator)
    upstream = torch.rand(70, generator=generator)
    found, passed_on = [], torch.eye(70, dtype=dtype)  # rows that make the weight's gradient that of the logits
    for function in (
        lambda x: _HeadNLL.apply(passed_on, x.T, None, targets, dtype, None, 70),
        lambda x: torch.nn.functional.cross_entropy(x.float(), targets, reduction="none"),
    ):
        x = logits.clone().requires_grad_()
        nll = function(x)
        nll.backward(upstream)
        found.append((nll.detach(), x.grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-5)  # both sum in fp32
    assert found[0][0].dtype == torch.float32 and found[0][1].dtype == dtype
    # gradients lie in [-1, 1]; bf16 ones are rounded once, to 8 bits
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-7)


def test_bf16_autocast_moves_the_loss_by_its_rounding_only(directory):
    losses = []
    for bf16 in (False, True):
        backbone = stock_backbone(directory, "modernbert")
        devices = devices_of(backbone, run_config(length=48), bf16=bf16)
        parts = micro_batches(split_for(backbone, MDLM()), run_config(length=48), first=0, last=1)
        losses.append(devices.step(MDLM(), parts).loss.item())
        AcceleratorState._reset_state(reset_partial_state=False)
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=2e-2)  # bf16 keeps 8 bits


def test_the_pipeline_and_the_composed_training_loss_give_the_same_bits(directory):
    backbone = stock_backbone(directory, "bert")
    data, config = split_for(backbone, MDLM()), run_config(length=48)
    (part,) = micro_batches(data, config, first=0, last=1)
    scores = TokenNLL(backbone)
    lengths = ended_lengths(data.rows, part.numbers, data.end, 0)
    batch = collate(data.rows, part.numbers, lengths, pad_id=data.pad_id, end=data.end)
    noise = row_noise(config.seed, 0, batch.sample_ids, batch.tokens.shape[1])
    whole = training_loss(MDLM(), scores, batch, noise, mask_id=data.mask_id, denominator=part.denominator)
    piped = MDLM().loss(scores, part.inputs, denominator=part.denominator)
    assert torch.equal(whole.loss, piped.loss) and torch.equal(whole.rows, piped.rows)
    assert whole.masked == piped.masked == len(part.inputs.row)
    chosen = exact_count(batch.maskable, noise.level, noise.place).masked
    assert torch.equal(chosen.nonzero(), torch.stack([part.inputs.row, part.inputs.position], 1))
