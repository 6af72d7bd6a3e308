"""Edit Flows: the loss and its minimiser, and a sampler that follows known rates exactly."""

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch

from dllm.config import EditSampling, EditSettings, GenerateSettings, Recipe
from dllm.core.batch import Batch, Noise, row_noise
from dllm.core.canvas import canvas_for, infill_canvas
from dllm.core.edits import (
    BLANK,
    DELETE,
    Columns,
    align,
    edit_inputs,
    merge,
    outstanding,
    span_targets,
    spans_of,
    state_at,
)
from dllm.models.edit_heads import EditLoss, new_edit_heads
from dllm.objectives.edit_flows import EditFlows
from dllm.sampling.edits import EditSampler, edit_canvas, edit_pieces
from dllm.schedules import KAPPAS
from tests.core.test_edits import plain_distance, ragged
from tests.edit_toys import ExactEdits, LearntEdits, RandomEdits, toy_backbone
from tests.samplers import numbered_rows
from tests.stock import FIRST_WORD, stock_backbone
from tests.synchronisation import forbid_synchronisation
from tests.training_loss import training_loss

A, B = 0, 1


@pytest.fixture
def numbered():
    """Rows that begin alike are independent samples."""
    with numbered_rows():
        yield


def batch_of(rows, prompts=0, first_id=0) -> Batch:
    """Rows of tokens whose first `prompts` tokens (one number, or one per row) are context."""
    prompts = [prompts] * len(rows) if isinstance(prompts, int) else prompts
    length = max(1, max(map(len, rows)))
    tokens = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    at = torch.arange(length)
    attention = at < torch.tensor([len(row) for row in rows])[:, None]
    maskable = attention & (at >= torch.tensor(prompts)[:, None])
    return Batch(tokens, attention, maskable, torch.arange(first_id, first_id + len(rows)))


def noise_of(batch: Batch, seed=0) -> Noise:
    return row_noise(seed, 0, batch.sample_ids, batch.tokens.shape[1])


def texts_of(canvas) -> list[tuple[int, ...]]:
    return [tuple(row) for row in canvas.responses()]


def shares_of(texts) -> dict:
    return {text: texts.count(text) / len(texts) for text in set(texts)}


def flow(schedule="cubic", *, starts=("empty",), **edits) -> EditFlows:
    return EditFlows(edits=EditSettings(schedule=schedule, starts=list(starts), **edits))


def sampler(schedule="cubic", *, starts=("empty",)) -> EditSampler:
    return EditSampler(EditSettings(schedule=schedule, starts=list(starts)))


def exact(pairs, symbols=2, schedule="cubic", **changes):
    return toy_backbone(ExactEdits(pairs, symbols, KAPPAS[schedule].value), **changes)


def empty_canvas(backbone, rows: int, room: int = 8):
    return canvas_for([[]] * rows, room, mask_id=backbone.mask_id, pad_id=backbone.pad_id)


def close(share: float, expected: float, count: int) -> bool:
    """Within 5 standard deviations of a share of `count` draws."""
    return abs(share - expected) <= 5 * math.sqrt(max(expected * (1 - expected), 1 / count) / count)


# --------------------------------------------------------------------------------------------------------------------
# The sampler follows known rates


@pytest.mark.parametrize("schedule", KAPPAS)
@pytest.mark.parametrize("reverse", [0.0, 0.7])
def test_a_single_insertion_is_still_to_be_made_at_t_with_probability_1_minus_kappa(schedule, reverse, numbered):
    """T1, at any number of steps, and with steps that go too far and back."""
    rows, steps = 3000, 5
    backbone = exact({((BLANK,), (A,)): 1.0}, schedule=schedule)
    options = GenerateSettings(steps=steps, edits=EditSampling(reverse=reverse))
    canvases = list(sampler(schedule).denoise(backbone, empty_canvas(backbone, rows), options))
    for step, canvas in enumerate(canvases[: steps + 1]):
        share = sum(text == (A,) for text in texts_of(canvas)) / rows
        assert close(share, float(KAPPAS[schedule].value(torch.tensor(step / steps))), rows)
    assert set(texts_of(canvases[-1])) == {(A,)}


def test_of_n_insertions_n_kappa_are_made_by_t(numbered):
    """T2. One pass makes at most one insertion right of a token, so the steps are fine."""
    rows, steps, text = 400, 150, (0, 1, 2, 3)
    backbone = exact({((BLANK,) * 4, text): 1.0}, symbols=4, schedule="linear")
    canvases = sampler("linear").denoise(backbone, empty_canvas(backbone, rows), GenerateSettings(steps=steps))
    for step, canvas in enumerate(itertools.islice(canvases, steps + 1)):
        if step % 30 == 0:
            present = canvas.length.float().mean().item() / 4
            assert abs(present - step / steps) < 0.03 + 0.01  # 5 standard deviations, and the bias of a step
    assert set(texts_of(canvas)) == {text}


def test_a_single_deletion_is_still_to_be_made_at_t_with_probability_1_minus_kappa(numbered):
    """T3."""
    rows, steps = 3000, 4
    backbone = exact({((A,), (BLANK,)): 1.0})
    canvas = edit_canvas([[A]] * rows, pad_id=backbone.pad_id)
    canvases = list(sampler().denoise(backbone, canvas, GenerateSettings(steps=steps)))
    for step, canvas in enumerate(canvases[: steps + 1]):
        assert close((canvas.length == 0).float().mean().item(), (step / steps) ** 3, rows)
    assert set(texts_of(canvases[-1])) == {()}


def test_a_text_of_a_s_becomes_one_of_b_s_by_substitutions_alone(numbered):
    """T4."""
    backbone = exact({((A,) * 4, (B,) * 4): 1.0})
    canvas = edit_canvas([[A] * 4] * 200, pad_id=backbone.pad_id)
    canvases = list(sampler().denoise(backbone, canvas, GenerateSettings(steps=6)))
    assert all((canvas.length == 4).all() for canvas in canvases)
    assert set(texts_of(canvases[-1])) == {(B,) * 4}


LANGUAGE = {(): 0.1, (A,): 0.2, (B,): 0.05, (A, A): 0.1, (A, B): 0.3, (B, A): 0.05, (B, B): 0.2}
FROM_EMPTY = {((BLANK,) * len(text), text): p for text, p in LANGUAGE.items()}


@pytest.mark.parametrize("reverse", [0.0, 1.0])
def test_fine_steps_with_the_posterior_rates_end_in_the_data_distribution(reverse, numbered):
    """T5, its second half."""
    rows, steps = 3000, 120
    backbone = exact(FROM_EMPTY)
    algorithm = sampler()
    *_, last = algorithm.denoise(
        backbone,
        empty_canvas(backbone, rows),
        GenerateSettings(steps=steps, temperature=1.0, edits=EditSampling(reverse=reverse, finish=0)),
    )
    shares = shares_of(texts_of(last))
    wrong = sum(abs(shares.get(text, 0) - p) for text, p in LANGUAGE.items()) / 2
    assert wrong < 0.04  # sampling alone gives about 0.02
    assert sum(share for text, share in shares.items() if text not in LANGUAGE) < 0.02


def test_the_loss_is_least_at_the_posterior_rates():
    """T5: a table learnt by stochastic gradients, against the rates by enumeration."""
    times = (0.3, 0.6, 0.9)
    algorithm = flow(time_ceiling=0.999)
    truth = ExactEdits(FROM_EMPTY, 2, KAPPAS["cubic"].value)
    table = LearntEdits(list(LANGUAGE), 10, 2)
    optimizer = torch.optim.Adam(table.parameters(), lr=0.1)
    texts = [list(text) for text in LANGUAGE]
    generator = torch.Generator().manual_seed(0)
    steps, rows = 150, 1500
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / steps)
        draw = torch.multinomial(torch.tensor(list(LANGUAGE.values())), rows, True, generator=generator)
        batch = batch_of([texts[n] for n in draw.tolist()])
        noise = noise_of(batch, seed=step)
        level = torch.tensor(times)[(noise.level * len(times)).long()] / 0.999
        noise = Noise(level, torch.rand(noise.place.shape, generator=generator))
        optimizer.zero_grad()
        training_loss(algorithm, table, batch, noise, mask_id=2, denominator=float(rows)).loss.backward()
        optimizer.step()
    for text, t in itertools.product(LANGUAGE, times):
        if truth.probability(text, t) > 0.03:
            learnt, wanted = table.expected(text, t).detach(), truth.expected(text, t)
            # what 225 thousand draws leave of noise, at states seen a tenth of the time or less
            torch.testing.assert_close(learnt[:, :2], wanted[:, :2], atol=0.04, rtol=0.1)
            assert learnt[1:, 2:].max() < 0.02 if text else True  # nothing is deleted or substituted


# --------------------------------------------------------------------------------------------------------------------
# The loss


def plain_loss(model, columns: Columns, z_t, time, weight) -> torch.Tensor:
    """The divergence of each row, edit by edit."""
    losses = []
    for row in range(columns.rows):
        mine = (columns.row == row).tolist()
        z = [token for token, here in zip(z_t.tolist(), mine, strict=True) if here]
        goal = [token for token, here in zip(columns.z_1.tolist(), mine, strict=True) if here]
        given = [token for token, here in zip(columns.given.tolist(), mine, strict=True) if here]
        text = [token for token in z if token != BLANK]
        rates = model.expected(tuple(text[1:]), time[row].item())
        total, place, logs = 0.0, -1, 0.0
        for column, (now, then) in enumerate(zip(z, goal, strict=True)):
            place += now != BLANK
            if now != BLANK:
                if not given[column]:
                    total = total + rates[place, model.symbols :].sum()
                if not given[column] or (column + 1 < len(z) and not given[column + 1]):
                    total = total + rates[place, : model.symbols].sum()
            if now != then:
                kind = then if now == BLANK else model.symbols if then == BLANK else model.symbols + 1 + then
                logs = logs + rates[place, kind].log()
        losses.append(weight[row] * (total - logs))
    return torch.stack([torch.as_tensor(loss) for loss in losses])


def random_batch(seed=0, rows=30, symbols=4):
    draw = random.Random(seed)
    lengths = [draw.randrange(1, 9) for _ in range(rows)]
    texts = [[draw.randrange(symbols) for _ in range(length)] for length in lengths]
    return batch_of(texts, [draw.randrange(length) for length in lengths])


@pytest.mark.parametrize("starts", [["empty"], ["masked"], ["noisy"], ["empty", "masked", "noisy"]])
def test_the_loss_is_the_plain_sum_over_edits(starts):
    batch = random_batch()
    algorithm = flow(starts=starts, masks=6)
    noise = noise_of(batch)
    inputs = algorithm.corrupt(batch, noise, mask_id=4)
    model = RandomEdits(5)  # the mask token stands in texts, too
    terms = algorithm.loss(model, inputs, denominator=7.0)

    seen = {}
    original = edit_inputs

    def spy(columns, z_t, time, weight, share, **kwargs):
        seen.update(columns=columns, z_t=z_t, time=time, weight=weight)
        return original(columns, z_t, time, weight, share, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dllm.objectives.edit_flows.edit_inputs", spy)
        algorithm.corrupt(batch, noise, mask_id=4)
    losses = plain_loss(model, seen["columns"], seen["z_t"], seen["time"], seen["weight"])
    todo = torch.bincount(seen["columns"].row[seen["z_t"] != seen["columns"].z_1], minlength=30)
    # the toy gives one of its symbols for each new token; its softmax runs over them alone
    torch.testing.assert_close(terms.loss, losses.sum() / 7)
    torch.testing.assert_close(terms.rows, losses - seen["weight"] * todo, atol=1e-4, rtol=1e-4)
    edits = outstanding(seen["columns"], seen["z_t"])
    assert terms.masked == int((edits.kind != DELETE).sum())


def test_a_row_in_a_batch_has_the_loss_it_has_alone():
    batch = random_batch(1)
    algorithm, model = flow(starts=["empty", "masked", "noisy"]), RandomEdits(5)
    noise = noise_of(batch)
    together = training_loss(algorithm, model, batch, noise, mask_id=4, denominator=1.0).rows
    for row in (0, 13, 29):
        length = int(batch.attention[row].sum())
        one = Batch(*(x[row : row + 1, :length] if x.dim() == 2 else x[row : row + 1] for x in vars(batch).values()))
        alone = Noise(noise.level[row : row + 1], noise.place[row : row + 1, :length])
        terms = training_loss(algorithm, model, one, alone, mask_id=4, denominator=1.0)
        torch.testing.assert_close(terms.rows, together[row : row + 1])


@pytest.mark.parametrize("normalisation", ["token", "sequence"])
def test_the_loss_is_normalised_as_the_recipe_says(normalisation):
    batch = random_batch(2)
    plain, model = flow(), RandomEdits(4)
    algorithm = EditFlows(recipe=Recipe(normalisation=normalisation))
    inputs = plain.corrupt(batch, noise_of(batch), mask_id=4)
    rows = plain.loss(model, inputs, denominator=1.0).rows + inputs.weight * inputs.layout.unpack(
        inputs.edits.sum(-1)
    ).sum(-1)
    per_row = rows / batch.maskable.sum(-1).clamp(min=1) if normalisation == "sequence" else rows
    loss = training_loss(algorithm, model, batch, noise_of(batch), mask_id=4, denominator=3.0).loss
    torch.testing.assert_close(loss, per_row.sum() / 3)


def test_only_targets_are_edited_and_insertions_stand_beside_them():
    rows = [[0, 1, 2, 3], [0, 1, 2, 3]]
    batch = batch_of(rows)
    maskable = torch.tensor([[False, False, True, True], [False, True, False, False]])
    batch = Batch(batch.tokens, batch.attention, maskable, batch.sample_ids)
    inputs = flow().corrupt(batch, Noise(torch.tensor([0.0, 0.999]), torch.rand(2, 4)), mask_id=9)
    first, second = inputs.layout.lengths
    assert inputs.tokens[0, :first].tolist() == [9, 0, 1] and inputs.tokens[1, :second].tolist() == [9, 0, 1, 2, 3]
    assert inputs.insertable.tolist() == [False, False, True, False, True, True, False, False]
    assert inputs.editable.tolist() == [False] * 3 + [False, False, True, False, False]
    assert inputs.edits[2].tolist() == [2, 0, 0] and inputs.edits.sum() == 2
    assert inputs.targets.tolist() == [2, 3] and inputs.which.tolist() == [0, 0]  # they share an anchor, and a softmax


def inputs_from(sources, batch, noise, mask_id):
    """The inputs of rows with one run of targets each, whose starts are the given lists of tokens."""
    algorithm, spans = flow(), spans_of(batch.maskable)
    aligned = align(ragged(sources), span_targets(batch.tokens, spans, torch.ones_like(spans.row, dtype=torch.bool)))
    columns = merge(batch.tokens, batch.attention & ~batch.maskable, spans, [aligned], mask_id)
    kappa, t = KAPPAS["cubic"], noise.level * algorithm.edits.time_ceiling
    weight = kappa.weight(t)
    return edit_inputs(columns, state_at(columns, kappa.value(t), noise.keys), t, weight, weight, pad_id=mask_id)


def test_a_given_source_is_edited_into_the_target():
    batch = batch_of([[7, 1, 2, 3]], 1)
    inputs = inputs_from([[1, 5, 3, 4]], batch, Noise(torch.zeros(1), torch.zeros(1, 4)), 9)
    assert inputs.tokens.tolist() == [[9, 7, 1, 5, 3, 4]]
    assert inputs.edits.nonzero().tolist() == [[3, 2], [5, 1]]  # 5 becomes 2, 4 goes
    assert inputs.targets.tolist() == [2]


def test_a_row_that_would_outgrow_the_context_starts_from_nothing():
    batch = batch_of([[1, 2, 3]] * 200)
    noise = Noise(torch.zeros(200), torch.rand(200, 3))
    kept = flow(starts=["masked"], masks=6).corrupt(batch, noise, mask_id=9)
    limited = EditFlows(edits=EditSettings(starts=["masked"], masks=6), max_length=5).corrupt(batch, noise, mask_id=9)
    for before, after in zip(kept.layout.lengths, limited.layout.lengths, strict=True):
        assert after == (before if before <= 5 else 1)
    assert max(kept.layout.lengths) == 7
    with pytest.raises(ValueError, match="row 0 of the batch takes more than the model's 3 positions, one of which"):
        EditFlows(max_length=3).corrupt(batch, noise, mask_id=9)


def test_equivalent_anchors_give_the_same_loss():
    """T7: where a blank stands beside an emptied column does not matter."""
    losses = []
    for z_0, z_1 in (([9, 1, BLANK, 3], [9, 1, 2, BLANK]), ([9, 1, 3, BLANK], [9, 1, BLANK, 2])):
        given = torch.tensor([True, False, False, False])
        columns = Columns(torch.tensor(z_0), torch.tensor(z_1), torch.zeros(4).long(), given, 1)
        ones = torch.ones(1)
        inputs = edit_inputs(columns, torch.tensor([9, 1, BLANK, BLANK]), 0.5 * ones, ones, ones, pad_id=9)
        losses.append(flow().loss(RandomEdits(4), inputs, denominator=1.0).loss)
    assert torch.equal(*losses)


def test_a_batch_without_targets_costs_nothing():
    batch = batch_of([[1, 2], [3]], [2, 1])
    terms = training_loss(flow(), RandomEdits(4), batch, noise_of(batch), mask_id=4, denominator=1.0)
    assert terms.loss == 0 and terms.masked == 0 and terms.rows.tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_step_never_waits_for_the_device(kind, tmp_path):
    backbone = stock_backbone(tmp_path, kind)
    scores = EditLoss(backbone, new_edit_heads(backbone.model))
    algorithm = flow(starts=["empty", "masked", "noisy"])
    batch = random_batch()
    inputs = algorithm.corrupt(batch, noise_of(batch), mask_id=backbone.mask_id)
    expected = algorithm.loss(scores, inputs, denominator=1.0).loss  # the first call settles how the class is packed
    with forbid_synchronisation():
        loss = algorithm.loss(scores, inputs, denominator=1.0).loss
        loss.backward()
    assert torch.equal(loss, expected)


def test_inputs_keep_their_values_on_their_way_to_a_device():
    inputs = flow(starts=["noisy"]).corrupt(random_batch(), noise_of(random_batch()), mask_id=4)
    moved = inputs.to("cpu")
    assert moved.width == inputs.width
    assert torch.equal(moved.edits, inputs.edits) and torch.equal(moved.layout.flat, inputs.layout.flat)


# --------------------------------------------------------------------------------------------------------------------
# The sampler: rows, starts, limits


def settings(**changes) -> GenerateSettings:
    return GenerateSettings(**{"max_new_tokens": 9, "steps": 7, "temperature": 1.0} | changes)


def run(algorithm, backbone, canvas, chosen=None, **options):
    return list(algorithm.denoise(backbone, canvas, chosen or settings(), **options))


def busy(**changes):
    """A model that inserts, deletes and substitutes all the time."""
    return toy_backbone(RandomEdits(4, scale=0.8), **changes)


@pytest.mark.parametrize("reverse", [0.0, 0.5])
@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_a_row_in_a_batch_equals_the_row_alone(reverse, guidance):
    backbone = busy()
    algorithm = sampler(starts=["empty", "masked"])
    chosen = settings(guidance=guidance, edits=EditSampling(reverse=reverse))
    texts = [[0, 1, 2], [3], [2, 2, 1, 0, 3, 1], [], [1, 0, 1, 3]]
    starts = [1, 1, 2, 0, 0]
    together = run(algorithm, backbone, edit_canvas(texts, starts, pad_id=backbone.pad_id), chosen)
    for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
        alone = run(algorithm, backbone, edit_canvas([text], start, pad_id=backbone.pad_id), chosen)
        for step, canvas in enumerate(alone):
            assert canvas.responses()[0] == together[step].responses()[row]
        assert together[-1].responses()[row] == alone[-1].responses()[0]  # it stays as it is when it is done


def test_two_runs_are_the_same_and_another_seed_is_not(numbered):
    backbone, algorithm = busy(), sampler()
    canvas = edit_canvas([[0, 1, 2, 3]] * 3, pad_id=backbone.pad_id)
    first = [texts_of(c) for c in run(algorithm, backbone, canvas)]
    assert first == [texts_of(c) for c in run(algorithm, backbone, canvas)]
    assert first != [texts_of(c) for c in run(algorithm, backbone, canvas, settings(seed=1))]
    assert len(set(first[-1])) > 1


@pytest.mark.parametrize("reverse", [0.0, 1.0])
def test_what_is_given_stays_and_no_row_outgrows_its_room(reverse):
    backbone = toy_backbone(RandomEdits(4, scale=3.0), max_length=12)
    algorithm, sampling = sampler(), EditSampling(reverse=reverse)
    texts = [[0, 1, 2, 3, 0], [2, 1], [3] * 11]
    first = edit_canvas(texts, [2, 2, 11], pad_id=backbone.pad_id)
    longest = 0
    for canvas in run(algorithm, backbone, first, settings(max_new_tokens=6, steps=12, edits=sampling)):
        for text, start, row in zip(texts, (2, 2, 11), canvas.tokens.tolist(), strict=True):
            assert row[:start] == text[:start]
        assert (canvas.length <= torch.tensor([8, 8, 11])).all()
        assert (canvas.tokens[~canvas.valid] == backbone.pad_id).all()
        assert canvas.tokens.shape[1] == canvas.length.max()
        longest = max(longest, int(canvas.length[0]))
    assert longest == 8  # the model would insert far more
    assert canvas.done.all()


def test_an_infilled_canvas_changes_where_its_masks_were_alone():
    backbone = toy_backbone(RandomEdits(4, scale=2.0))
    m = backbone.mask_id
    first = infill_canvas([[0, 1, m, m, 2, 3]], mask_id=m, pad_id=backbone.pad_id)
    lengths = []
    for canvas in run(sampler(), backbone, first, settings(steps=20)):
        lengths.append(int(canvas.length))
        row = canvas.tokens[0, : lengths[-1]].tolist()
        assert row[:2] == [0, 1] and row[-2:] == [2, 3]
    assert lengths[0] == 4 and max(lengths) > 6


@pytest.mark.parametrize(
    "masks, starts, kept",
    [("auto", ["empty"], False), ("auto", ["masked"], True), ("keep", ["empty"], True), ("drop", ["masked"], False)],
)
def test_a_canvas_of_masks_starts_with_or_without_them(masks, starts, kept):
    backbone = busy()
    algorithm = sampler(starts=starts)
    canvas = canvas_for([[0, 1]], 5, mask_id=backbone.mask_id, pad_id=backbone.pad_id)
    first = next(algorithm.denoise(backbone, canvas, settings(edits=EditSampling(masks=masks))))
    assert first.responses() == [[backbone.mask_id] * 5 if kept else []]
    assert int(first.masked.sum()) == (5 if kept else 0)


def test_from_masks_every_mask_becomes_a_token_or_goes(numbered):
    pairs = {((4, 4, 4), (0, 1, BLANK)): 0.5, ((4, 4, 4), (BLANK, 2, 3)): 0.5}
    backbone = toy_backbone(ExactEdits(pairs, 4, KAPPAS["cubic"].value))
    canvas = canvas_for([[]] * 300, 3, mask_id=4, pad_id=6)
    canvases = run(sampler(starts=["masked"]), backbone, canvas, settings(steps=200))
    shares = shares_of(texts_of(canvases[-1]))
    # two edits in one step can give a mixture of both texts, from which no rates lead on
    assert shares[(0, 1)] + shares[(2, 3)] > 0.97
    assert close(shares[(0, 1)], 0.5, 300)


def test_how_a_checkpoint_was_trained_is_read_from_its_sidecar():
    backbone = busy(sidecar={"edits": EditSettings(starts=["masked"], schedule="linear").model_dump()})
    assert sampler().trained_with(backbone).schedule == "linear"
    canvas = canvas_for([[0]], 3, mask_id=backbone.mask_id, pad_id=backbone.pad_id)
    assert next(sampler().denoise(backbone, canvas, settings())).masked.sum() == 3


def test_the_final_passes_make_the_edits_that_are_more_likely_missing_than_not():
    """Two steps cannot insert four tokens right of one another: the passes at the end do."""
    backbone = exact({((BLANK,) * 4, (0, 1, 2, 3)): 1.0}, symbols=4)
    short, whole = (
        run(sampler(), backbone, empty_canvas(backbone, 50), settings(steps=2, edits=EditSampling(finish=n)))[-1]
        for n in (0, 8)
    )
    assert (short.length < 4).any()
    assert set(texts_of(whole)) == {(0, 1, 2, 3)} and whole.done.all()


def test_the_mask_token_is_never_inserted():
    backbone = busy()
    backbone.model.token_logits = lambda hidden, place, insert: torch.tensor([0.0, 0, 0, 0, 9, 0, 0]).expand(
        len(place), 7
    )
    *_, last = run(sampler(), backbone, edit_canvas([[0, 1, 2]] * 9, pad_id=backbone.pad_id))
    assert not (last.tokens[last.valid] == backbone.mask_id).any()


def test_a_row_longer_than_the_context_is_one_clear_error():
    backbone = busy(max_length=4)
    canvas = edit_canvas([[0, 1, 2, 3]], pad_id=backbone.pad_id)
    with pytest.raises(ValueError, match="4 positions and a front token, the model has 4. Shorten"):
        next(sampler().denoise(backbone, canvas, settings()))


def test_passes_are_counted_and_rows_done_at_the_end():
    backbone = busy()
    canvas = edit_canvas([[0, 1, 2]], pad_id=backbone.pad_id)
    plain = run(sampler(), backbone, canvas, settings(edits=EditSampling(finish=0)))
    assert [c.nfe for c in plain] == list(range(8)) and [bool(c.done) for c in plain] == [False] * 7 + [True]
    guided = run(sampler(), backbone, canvas, settings(guidance=1.0, edits=EditSampling(finish=0)))
    assert guided[-1].nfe == 14 and guided[-1].step == 7
    scored = [1 + int(c.length) for c in plain[:-1]]  # a front token each
    assert [c.computed for c in plain] == [sum(scored[:n]) for n in range(8)]


# --------------------------------------------------------------------------------------------------------------------
# A stock model learns to edit

GONE, OLD, NEW, HEAD, TAIL, OTHER = range(FIRST_WORD, FIRST_WORD + 6)


def draft_and_text(count: int, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Drafts, and what one rule of each kind makes of them: GONE goes, OLD becomes NEW, behind a HEAD comes a TAIL.

    An OTHER stands between any two of them, so that there is one shortest edit.
    """
    draw = random.Random(seed)
    rules = {GONE: [], OLD: [NEW], HEAD: [HEAD, TAIL]}
    units = [[draw.choice(list(rules)) for _ in range(draw.randint(1, 4))] for _ in range(count)]
    drafts = [[token for unit in row for token in (unit, OTHER)] for row in units]
    return drafts, [[new for old in draft for new in rules.get(old, [old])] for draft in drafts]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_stock_model_learns_to_insert_delete_and_substitute(kind, tmp_path):
    torch.set_num_threads(1)
    backbone = stock_backbone(tmp_path, kind)
    objective, model = flow(), backbone.model
    scores = EditLoss(backbone, new_edit_heads(model, rank=16))
    optimizer = torch.optim.AdamW(scores.parameters(), lr=3e-3, weight_decay=0.0)
    steps = 110
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        drafts, texts = draft_and_text(32, seed=step)
        batch = batch_of(texts)
        inputs = inputs_from(drafts, batch, noise_of(batch, seed=step), backbone.mask_id)
        optimizer.zero_grad()
        objective.loss(scores, inputs, denominator=float(batch.maskable.sum())).loss.backward()
        torch.nn.utils.clip_grad_norm_(scores.parameters(), 1.0)
        optimizer.step()
    backbone = replace(backbone, edit_heads=scores.heads)
    drafts, texts = draft_and_text(150, seed=steps)
    canvas = edit_canvas(drafts, pad_id=backbone.pad_id)
    *_, last = sampler().denoise(backbone, canvas, GenerateSettings(steps=10, max_new_tokens=16))
    before, after = (
        sum(plain_distance(a, b) for a, b in zip(rows, texts, strict=True)) / 150 for rows in (drafts, last.responses())
    )
    assert before > 2 and after < 0.25 * before


# --------------------------------------------------------------------------------------------------------------------
# Watching it


WORDS = ["the", "cat", "dog", "sat", "very", "still", "down"]


@pytest.mark.parametrize("space", ["before", "between", "after"])
def test_frames_show_a_sentence_becoming_another(space):
    """Whether a tokenizer's words carry the space before them, none of their own, or the one behind them."""
    pairs = {((0, 1, 3, BLANK, 6), (0, 2, 3, 5, BLANK)): 1.0}
    backbone = exact(pairs, symbols=7)

    def decode(tokens):
        words = [WORDS[token] for token in tokens]
        return (
            " ".join(words) if space == "between" else "".join(f" {w}" if space == "before" else f"{w} " for w in words)
        )

    def marked(canvas):
        signs = {"kept": "{}", "gone": "[-{}-]", "new": "{{+{}+}}"}
        frame = "".join(signs[kind].format(text) for kind, text in edit_pieces(canvas, decode))
        return frame.replace(" -]", "-] ").replace(" +}", "+} ").strip()

    canvases = list(sampler().denoise(backbone, edit_canvas([[0, 1, 3, 6]], pad_id=9), settings(steps=8)))
    trail = canvases[-1].trail
    since_start = replace(canvases[-1], trail=replace(trail, before=trail.origin))
    whole = [marked(canvases[0]), marked(since_start)]
    assert whole[0] == "the cat sat down"
    assert whole[-1].replace("  ", " ").replace("] {", "]{") in (
        "the [-cat-]{+dog+} sat [-down-]{+still+}",
        "the [-cat-]{+dog+} sat {+still+}[-down-]",
    )
    steps = [marked(canvas) for canvas in canvases]
    assert sum("{+still+}" in frame for frame in steps) == 1  # marked in its own pass only
    assert sum("[-cat-]" in frame for frame in steps) == 1
