"""The equations keep what must hold whatever the constants are."""

import math

import numpy
import pytest

from dllm.config import (
    BenchmarkSize,
    DataPart,
    DatasetEntry,
    GenerateSettings,
    ModelEntry,
    PrepareConfig,
    Recipe,
    RunEntry,
    Scorer,
    Shape,
)
from dllm.core.attention_pattern import BlockRows, BlockRule
from dllm.planning.cost import (
    GIB,
    Place,
    forwarded_tokens,
    generated_answers,
    likelihood_answers,
    renoised_answers,
    scoring,
    training,
    training_steps,
)
from dllm.planning.data import Prepared, Split, prepared
from dllm.planning.hardware import HARDWARE, TABLE, hardware
from dllm.planning.shapes import forward_flops, head_flops, parameters
from dllm.training.trainer import make_plan

SHAPE = Shape(model_type="bert", layers=4, width=256, heads=4, intermediate=1024, vocabulary=1000, positions=512)
TEXT = Prepared(Split(1000, 256_000, 256_000, 256, 256), Split(), 256_000, 2)
ONE_GPU = Place(hardware("a100-80gb"), devices=1)
EXACT = Recipe()


def a_run(**settings) -> RunEntry:
    given = {"init": "m", "data": "d", "length": 256, "steps": 10, "global_batch_size": 8, "micro_batch_size": 8}
    return RunEntry(**given | settings)


def cost(run: RunEntry | None = None, place: Place = ONE_GPU, recipe: Recipe = EXACT):
    return training(run or a_run(), recipe, SHAPE, TEXT, place)


def test_training_is_six_n_per_token_and_twelve_l_d_n_and_the_head_at_masked_positions_only():
    tokens = 10 * 8 * 256
    layers, head = parameters(SHAPE).layers, parameters(SHAPE).head
    expected = tokens * (6 * layers + 12 * 4 * 256 * 256 + 0.5 * 6 * head)
    assert cost().flops == pytest.approx(expected, rel=1e-12)
    assert cost().tokens == tokens and cost().steps == 10


@pytest.mark.parametrize("anchor", ["response", "row"])
@pytest.mark.parametrize(("length", "prompt"), [(96, 64), (96, 0), (90, 64), (64, 60)])
def test_block_diffusion_forwards_its_targets_twice_and_its_prompt_once(anchor, length, prompt):
    rule = BlockRule(16, anchor)
    counted = BlockRows.doubled(rule, numpy.array([prompt]), numpy.array([length])).lengths[0]
    recipe = Recipe(block_size=16, block_anchor=anchor)
    found = forwarded_tokens(a_run(algorithm="bd3lm"), recipe, length, length - prompt)
    # where in a block a prompt ends is not known, only that it is anywhere
    assert found == pytest.approx(counted, abs=0 if anchor == "response" or not prompt else 16)
    assert forwarded_tokens(a_run(), recipe, length, length - prompt) == length


def test_chat_tuning_in_blocks_costs_less_than_twice_as_much_without():
    data = Prepared(Split(1000, 90_000, 30_000, 90, 180), Split(), 90_000, 2)
    recipe = Recipe(block_size=16, response_end="one")
    plain, blocks = (
        training(a_run(algorithm=name, steps=1000), recipe, SHAPE, data, ONE_GPU).flops for name in ("mdlm", "bd3lm")
    )
    assert 1.15 < blocks / plain < 1.4  # a third of the tokens are targets


def test_twice_the_steps_are_twice_the_flops_and_devices_share_the_time():
    assert cost(a_run(steps=20)).flops == 2 * cost().flops
    eight = Place(hardware("a100-80gb"), devices=8)
    one_hour, shared = cost(a_run(steps=100_000)), cost(a_run(steps=100_000), eight)
    assert shared.flops == one_hour.flops
    assert shared.seconds < one_hour.seconds


@pytest.mark.parametrize("budget", [{"steps": 30}, {"epochs": 2.5, "steps": None}, {"steps": 30, "stop_after": 7}])
@pytest.mark.parametrize("rows", [5, 100, 1013])
def test_the_steps_are_those_of_the_trainer(budget, rows, tmp_path):
    run = a_run(**budget)
    told = run.model_copy(update={"name": "x"})
    assert training_steps(run, rows) == make_plan(told, rows, 1).last_step


def test_checkpointing_runs_the_layers_once_more_and_keeps_less():
    plain, saving = cost(), cost(a_run(activation_checkpointing=True))
    layers = 10 * 8 * 256 * forward_flops(SHAPE, 256)
    assert saving.flops - plain.flops == pytest.approx(layers)
    assert saving.device_gib < plain.device_gib


def test_memory_is_sixteen_bytes_a_parameter_and_grows_with_the_micro_batch():
    none = training(a_run(micro_batch_size=1), Recipe(autocast="none"), SHAPE, TEXT, ONE_GPU).device_gib
    assert none > 16 * parameters(SHAPE).total / GIB
    assert cost().device_gib > cost(a_run(micro_batch_size=4)).device_gib
    assert cost(a_run(micro_batch_tokens=512)).device_gib < cost().device_gib


def test_the_last_evaluation_reads_at_most_test_rows():
    data = Prepared(TEXT.train, Split(5000, 1_280_000, 1_280_000, 256, 256), 256_000, 2)

    def flops(test_rows, **changes):
        return training(a_run(**changes), Recipe(), SHAPE, data, ONE_GPU, test_rows).flops

    assert flops(None) == flops(5000) == flops(9000) > flops(100)
    assert flops(None, eval_rows=50) - flops(100, eval_rows=50) == pytest.approx(
        4900 / (12 * 4900) * (flops(None) - flops(100)), rel=1e-6
    )  # of twelve readings of the split, only the last one is bounded


def test_each_stage_of_zero_shards_more_and_fsdp_shards_all():
    """In bytes a parameter, of weights, gradients, moments, and the copy of the weights that DeepSpeed keeps."""
    eight, n = Place(hardware("a100-80gb"), devices=8), parameters(SHAPE).total
    exact = Recipe(autocast="none")
    found = {
        launch: training(a_run(micro_batch_size=1, launch=launch), exact, SHAPE, TEXT, eight).device_gib * GIB
        for launch in ("ddp", "zero1", "zero2", "zero3", "fsdp")
    }
    assert found["ddp"] - found["zero1"] == pytest.approx((4 + 4 + 8 - (4 + 4 + (8 + 4) / 8)) * n)
    assert found["ddp"] - found["zero2"] == pytest.approx((4 + 4 + 8 - (4 + (4 + 8 + 4) / 8)) * n)
    gathered = 4 * max(parameters(SHAPE).layers / SHAPE.layers, parameters(SHAPE).embedding)
    assert found["ddp"] - found["fsdp"] == pytest.approx(16 * n * 7 / 8 - gathered)
    assert found["zero3"] - found["fsdp"] == pytest.approx(4 * n / 8)


def test_adapters_need_no_gradients_and_states_of_frozen_weights_and_four_bits_hold_them():
    def gib(**adapter):
        return cost(a_run(micro_batch_size=1, adapter=adapter)).device_gib

    n, layers = parameters(SHAPE).total, parameters(SHAPE).layers
    plain = cost(a_run(micro_batch_size=1))
    # query, key, value, output, and two of the feed-forward part
    adapters = 4 * (8 * 4 * (256 + 256) + 8 * 2 * (256 + 1024))
    assert plain.device_gib - gib(rank=8) == pytest.approx((12 * n - 16 * adapters) / GIB)
    assert gib(rank=8) - gib(rank=8, kind="qlora") == pytest.approx((4 - 0.52 + 2) * layers / GIB)
    run = cost(a_run(adapter={"rank": 8}))
    assert run.scratch_gib == pytest.approx(2 * 3 * 4 * adapters / GIB)
    assert 0.6 * plain.flops < run.flops < 0.7 * plain.flops


def test_a_checkpoint_holds_weights_and_two_moments():
    weights = 4 * parameters(SHAPE).total / GIB
    assert cost().kept_gib == weights
    assert cost().scratch_gib == 2 * 3 * weights


def test_autoregressive_training_scores_every_token_and_sees_half_the_row():
    ar = cost(a_run(algorithm="ar"))
    tokens = 10 * 8 * 256
    expected = 3 * tokens * (forward_flops(SHAPE, 256, causal=True) + head_flops(SHAPE))
    assert ar.flops == pytest.approx(expected)


def test_a_likelihood_takes_fewer_passes_under_auto_than_as_published():
    size = BenchmarkSize(documents=100, choices=4, prompt_tokens=50, answer_tokens=1)
    ours = likelihood_answers(size, 100, Scorer(), causal=False)
    published = Scorer(likelihood={"estimator": "mc"}, special_tokens="reference-v0")
    theirs = likelihood_answers(size, 100, published, causal=False)
    assert ours.passes == 100 and ours.tokens == 100 * 51
    assert theirs.passes > 4 * ours.passes
    greedy = size.model_copy(update={"greedy": True})
    assert likelihood_answers(greedy, 100, Scorer(), causal=False).passes == 100 + 400


def test_free_answers_cost_a_pass_a_token_and_half_the_canvas_where_it_is_hidden():
    settings = GenerateSettings(max_new_tokens=64, block_size=16)
    seen = generated_answers(100, 10, settings, causal=False, hides=False)
    hidden = generated_answers(100, 10, settings, causal=False, hides=True)
    assert seen.passes == hidden.passes == 10 * 64
    assert seen.tokens == 10 * 64 * 164
    assert hidden.tokens == 10 * sum(100 + 16 * (1 + step // 16) for step in range(64))
    cached = generated_answers(100, 10, settings, causal=True, hides=False)
    assert cached.tokens == 10 * 164
    reused = generated_answers(100, 10, settings.model_copy(update={"reuse": "dual"}), causal=False, hides=False)
    assert reused.tokens == 10 * (4 * 164 + 60 * 16)


def test_reading_the_weights_bounds_small_batches():
    settings = GenerateSettings(max_new_tokens=64, block_size=64, batch_size=1)
    answers = generated_answers(1, 1, settings, causal=True, hides=False)
    found = scoring(answers, SHAPE, ONE_GPU).seconds - ONE_GPU.hardware.startup_seconds
    assert found >= 64 * 4 * parameters(SHAPE).total / (ONE_GPU.hardware.bandwidth_gbs * 1e9)


def test_the_hardware_table_has_the_names_that_a_config_may_use():
    assert set(TABLE) == set(HARDWARE)
    assert all(h.name == name and 0 < h.inference <= h.training <= 1 for name, h in TABLE.items())
    assert hardware("h100", 0.5).training == 0.5
    with pytest.raises(ValueError, match="Did you mean 'h100'"):
        hardware("h1000")
    with pytest.raises(ValueError, match="not a share"):
        hardware("h100", 1.5)


# --------------------------------------------------------------------------------------------------------------------
# Rows


def to_prepare(length: int = 512, **entry) -> PrepareConfig:
    dataset = DatasetEntry(**{"world": "alpaca", "kind": "messages", "documents": 10_000, "tokens": 3_000_000} | entry)
    part = DataPart(name="p", path="downloads/p", entry=dataset)
    model = ModelEntry(new={}, tokenizer="world")
    return PrepareConfig(name="x", parts=[part], model_path="downloads/m", model=model, length=length, split="disjoint")


def test_cut_rows_are_those_of_exponential_lengths(tmp_path):
    found = prepared(to_prepare(), tmp_path, 1000)
    lengths = numpy.random.default_rng(0).exponential(300, 400_000).clip(max=512)
    rows = found.train.rows
    assert rows == pytest.approx(9500) and found.test.rows == pytest.approx(500)
    # a mean over 400,000 draws: 0.3 % is more than three of its standard errors
    assert found.train.tokens / rows == pytest.approx(lengths.mean(), rel=3e-3)
    assert found.train.weighted_length == pytest.approx((lengths**2).sum() / lengths.sum(), rel=3e-3)


def test_text_becomes_full_rows(tmp_path):
    found = prepared(to_prepare(kind="text", test_share=0.0), tmp_path, 70_000)
    assert found.train.rows == math.floor(3_000_000 / 512)
    assert found.train.targets == found.train.tokens == found.train.rows * 512
    assert found.bytes_per_token == 4


def test_a_set_without_estimates_is_not_planned_until_it_is_counted(tmp_path):
    config = to_prepare(tokens=None)
    assert prepared(config, tmp_path, 1000) is None
    manifest = tmp_path / "data/x/manifest.json"
    manifest.parent.mkdir(parents=True)
    counts = {"rows": 10, "tokens": 100, "target_tokens": 40, "longest_row": 20}
    manifest.write_text(f'{{"splits": {{"train": {counts}, "test": {counts}}}}}'.replace("'", '"'))
    found = prepared(config, tmp_path, 1000)
    assert found.train.tokens == 100 and found.train.targets == 40
    manifest.write_text("{")
    assert prepared(config, tmp_path, 1000) is None


def test_a_pair_costs_both_answers_forward_and_backward_and_forward_through_the_start():
    chats = Prepared(Split(1000, 64_000, 32_000, 64, 64), Split(), 64_000, 2)

    def cost(**changes):
        return training(a_run(algorithm="dpo", **changes), EXACT, SHAPE, chats, ONE_GPU)

    plain = training(a_run(algorithm="mdlm"), EXACT, SHAPE, chats, ONE_GPU)
    # sixteen passes, four times forward instead of three
    assert cost().flops == pytest.approx(plain.flops * 16 * 4 / 3)
    assert cost(preferences={"passes": 16}).flops == pytest.approx(2 * cost().flops)
    # the start is kept beside the model; micro-batches of more rows than a pair has are as large as any
    more = (
        cost(micro_batch_size=32).device_gib
        - training(
            a_run(algorithm="mdlm", micro_batch_size=32, global_batch_size=32), EXACT, SHAPE, chats, ONE_GPU
        ).device_gib
    )
    assert more == pytest.approx(4 * parameters(SHAPE).total / 2**30)


def test_answers_that_are_rewarded_cost_their_passes_and_a_share_of_being_drawn():
    """FLOPs of `grpo` by its passes, its reuse of answers and the start that it is compared with."""
    chats = Prepared(Split(1000, 64_000, 32_000, 64, 64), Split(), 64_000, 2)

    def flops(**changes) -> float:
        answers = GenerateSettings(max_new_tokens=32, steps=8, temperature=1.0, reveal_rule="entropy")
        policy = {"reward_funcs": ["number"], "num_generations": 4, "generation": answers} | changes
        run = a_run(algorithm="grpo", policy=policy)
        return training(run, EXACT, SHAPE, chats, ONE_GPU).flops

    drawn, steps = flops(), 10 * 8
    assert flops(num_iterations=2) < drawn + 8 * steps * 70 * 2 * parameters(SHAPE).total
    assert flops(beta=0.1) > drawn and flops(likelihood="d1", passes=16) > flops(likelihood="d1", passes=8)
    once = 8 * steps * 64 * forward_flops(SHAPE, 64, causal=False)
    # drawn once; three times as much forward and backward; and the head
    assert 4 * once < drawn < 4 * once + 4 * 8 * steps * 33 * head_flops(SHAPE)


def test_each_answer_to_a_held_out_prompt_costs_the_same():
    chats = Prepared(Split(1000, 64_000, 32_000, 64, 64), Split(100, 6_400, 3_200, 64, 64), 64_000, 2)

    def flops(answers: int) -> float:
        policy = {"reward_funcs": ["number"], "num_generations": 4, "num_generations_eval": answers}
        return training(a_run(algorithm="grpo", policy=policy), EXACT, SHAPE, chats, ONE_GPU).flops

    assert flops(3) - flops(2) == pytest.approx(flops(2) - flops(1)) and flops(2) > flops(1)


@pytest.mark.parametrize(("prompt", "targets"), [(7, 5), (7, 16), (20, 33)])
def test_canvases_are_counted_as_their_objective_forwards_them_and_a_preview_on_top(prompt, targets):
    from dllm.objectives.renoise import Renoise

    recipe, length = Recipe(block_size=16), prompt + targets
    counted = Renoise(recipe).forward_lengths(numpy.array([length]), numpy.array([prompt]))[0]
    assert forwarded_tokens(a_run(algorithm="renoise"), recipe, length, targets) == counted


def test_answers_in_canvases_forward_a_canvas_a_pass_and_what_is_before_it_once():
    settings = GenerateSettings(max_new_tokens=512)
    answers = renoised_answers(100, 3, settings)
    passes = 2 * 48
    assert (answers.passes, answers.tokens) == (3 * (passes + 2), 3 * (100 + 256 + passes * 256))
    short = renoised_answers(100, 1, settings.model_copy(update={"max_new_tokens": 16, "steps": 8}))
    assert (short.passes, short.tokens, short.scored) == (9, 100 + 8 * 16, 8 * 16)
