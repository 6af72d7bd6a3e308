"""Runs that learn from rewards: they learn, go on after a kill, and do not depend on how their work is cut."""

import importlib.util
import json

import pytest
import torch
from pydantic import ValidationError

from dllm.config import AdapterSettings, GenerateSettings, OptimizerSettings, PolicySettings, write_when_changed
from dllm.language_model import load
from dllm.models.backbone import Backbone
from dllm.training import trainer
from dllm.training.rollouts import Answering
from dllm.training.trainer import train
from tests.training.conftest import metrics_of, run_config, train_once, train_until, workdir  # noqa: F401
from tests.training.launches import launched
from tests.training.test_backends import in_two_processes as in_shards
from tests.training.test_trainer import same_weights, weights

REWARD = """
def red(prompt, answer, reference):
    return answer.split().count("red")


def fussy(prompt, answer, reference):
    if "sun" in answer:
        raise LookupError("no sun, please")
    return 1.0


def one(answer):
    return 1.0
"""

GENERATION = {"max_new_tokens": 6, "block_size": 6, "steps": 3, "reveal_rule": "entropy", "temperature": 1.0}


SIDECAR = {
    "algorithm": "bd3lm", "run": "toy", "family": "encoder", "prediction": "in_place", "response_end": "block",
    "block_size": 4, "block_anchor": "response", "length": 24, "chat_template": "bert",
    "special_tokens": {"mask": "[MASK]", "eos": "[PAD]", "end_of_turn": "[/Answer]"},
}  # fmt: skip


def assert_same_policy(directory, first: str, second: str) -> None:
    """Equal rewards, and weights that differ by rounding only; the surrogate is a difference of equal numbers."""
    rewards = [[row["reward"] for row in metrics_of(directory, name)] for name in (first, second)]
    assert rewards[0] == rewards[1]
    ours, theirs = weights(directory, first), weights(directory, second)
    # fp32, a few steps of Adam at 1e-3, whose direction rounding may turn where a gradient is next to nothing
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-4) for name in ours)


@pytest.fixture(autouse=True)
def reward(workdir):  # noqa: F811
    (workdir / "mine.py").write_text(REWARD)


def policy_run(name: str = "run", **changes):
    """A short run on own rewards; `policy` takes a dict of its settings."""
    policy = {
        "reward_funcs": ["mine.py:red"], "num_generations": 4, "num_iterations": 2, "beta": 0.01, "passes": 5,
        "generation": GenerateSettings(**GENERATION),
    }  # fmt: skip
    policy |= changes.pop("policy", {})
    settings = {"steps": 4, "optimizer": OptimizerSettings(learning_rate=1e-3), "eval_rows": 8} | changes
    return run_config(name, algorithm="grpo", policy=PolicySettings(**policy), **settings)


@pytest.mark.parametrize("likelihood", ["sampled", "bound", "d1"])
def test_the_reward_of_held_out_prompts_rises(workdir, likelihood):  # noqa: F811
    rate = OptimizerSettings(learning_rate=1e-2, warmup_share=0.0)
    config = policy_run(
        steps=16,
        global_batch_size=16,
        micro_batch_size=80,
        optimizer=rate,
        evaluations=1,
        policy={"likelihood": likelihood},
    )
    train(config, workdir, quiet=True)
    rows = metrics_of(workdir, "run")
    first, last = rows[0], rows[-1]
    assert last["reward"] > first["reward"] + 2 * (first["reward_standard_error"] + last["reward_standard_error"])
    steps = [row for row in rows if row["split"] == "train"]
    # the first step on some answers has a ratio of exactly one; the start is the reference of the first of all
    assert [row["clipped"] for row in steps[::2]] == [0.0] * 8 and steps[0]["kl"] < 1e-9 < steps[-1]["kl"]
    assert {"prompt", "answer", "reward"} == set(last["samples"][0])
    answer = load(workdir / "runs/run/model", device="cpu").answers(["who sun ?"], config.policy.generation)
    assert answer[0].tokens <= 6


def test_more_answers_to_each_held_out_prompt_are_averaged_and_the_first_ones_stay(workdir):  # noqa: F811
    groups = {1: [], 4: []}
    for group, rewards in groups.items():
        config = policy_run(f"of-{group}", steps=1, policy={"num_generations_eval": group, "num_iterations": 1})
        train(config, workdir, quiet=True)
        rewards += metrics_of(workdir, config.name)[:1]
    (one,), (four,) = groups.values()
    assert one["samples"] == four["samples"]
    # eight prompts, and rewards are whole numbers, so that the mean is a multiple of an eighth, or of a thirty-second
    assert one["reward"] * 8 % 1 == 0 and four["reward"] * 32 % 1 == 0
    assert 0 < four["reward_standard_error"] < one["reward_standard_error"]


def test_the_answers_to_a_prompt_that_stands_in_a_batch_twice_are_numbered_on(workdir, monkeypatch):  # noqa: F811
    whole, found = Answering.rollouts, []

    def doubled(self, backbone, prompts, numbers, batch, group):
        if not found:
            found.append(whole(self, backbone, prompts, [*numbers[:2], numbers[0]], batch, 2))
            found.append(whole(self, backbone, prompts, numbers[:1], batch, 4))
        return whole(self, backbone, prompts, numbers, batch, group)

    monkeypatch.setattr(Answering, "rollouts", doubled)
    train(policy_run(steps=1, policy={"num_iterations": 1}), workdir, quiet=True)
    twice, once = found
    assert twice.rows[:2] + twice.rows[4:] == once.rows and once.rows[:2] != once.rows[2:]


def test_a_run_that_is_killed_between_two_steps_on_the_same_answers_goes_on_to_the_same_bits(workdir):  # noqa: F811
    policy = {"num_iterations": 3, "beta": 0.1, "likelihood": "d1"}
    train(policy_run("whole", steps=5, evaluations=5, policy=policy), workdir, quiet=True)
    cut = policy_run("cut", steps=5, evaluations=5, policy=policy)
    train_until(cut, workdir, step=4)
    train(cut, workdir, quiet=True)
    assert metrics_of(workdir, "cut") == metrics_of(workdir, "whole")
    assert same_weights(weights(workdir, "cut"), weights(workdir, "whole"))


@pytest.mark.parametrize(("likelihood", "loss_type"), [("sampled", "grpo"), ("bound", "grpo"), ("d1", "wd1")])
def test_the_cut_into_micro_batches_does_not_change_a_run(workdir, likelihood, loss_type):  # noqa: F811
    policy = {"likelihood": likelihood, "loss_type": loss_type}
    for name, size in (("whole", 200), ("cut", 6)):
        train(policy_run(name, micro_batch_size=size, policy=policy), workdir, quiet=True)
    assert_same_policy(workdir, "whole", "cut")


@pytest.mark.slow
def test_two_processes_train_the_same_policy_as_one(workdir):  # noqa: F811
    train_once(policy_run("one"), workdir)
    config = write_when_changed(workdir / "configs/runs/two.yaml", policy_run("two"))
    done = launched(workdir, "ddp", "-m", "dllm", "train", config, "--workdir", workdir, "--quiet")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_policy(workdir, "one", "two")


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["zero3", "fsdp"])
def test_processes_that_hold_shards_train_the_same_policy_as_one(workdir, launch):  # noqa: F811
    if launch == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install 'dllm[cluster]'")
    train_once(policy_run("one"), workdir)
    in_shards(workdir, launch, [policy_run("two")])
    assert_same_policy(workdir, "one", "two")


def test_an_adapter_learns_from_rewards_too(workdir):  # noqa: F811
    train(policy_run(steps=2, adapter=AdapterSettings(rank=2, dropout=0.1)), workdir, quiet=True)
    assert [row["clipped"] for row in metrics_of(workdir, "run") if row["split"] == "train"][0] == 0.0


def test_a_reward_that_raises_is_one_line_with_the_number_of_its_answer_and_costs_that_alone(workdir, capsys):  # noqa: F811
    train(policy_run(steps=2, policy={"reward_funcs": ["mine.py:fussy"]}), workdir, quiet=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if "raised" in line]
    assert lines and all(line.endswith("mine.py:fussy raised LookupError: no sun, please") for line in lines)
    assert lines[0].startswith("run: answer ")
    (row, _) = [row for row in metrics_of(workdir, "run") if row["split"] == "train"]
    # the others have the reward that they would have without it
    assert row["reward"] == 1.0 and row["without_reward"] > 0


def test_a_reward_that_raises_for_every_answer_is_one_line_before_the_first_step(workdir, monkeypatch):  # noqa: F811
    (workdir / "mine.py").write_text("def never(prompt, answer, reference):\n    return answer.nothing\n")
    monkeypatch.setattr(trainer._Run, "_step", None)
    with pytest.raises(ValueError, match="none of 8 answers has a reward; policy.reward_funcs = .'mine.py:never'."):
        train(policy_run(policy={"reward_funcs": ["mine.py:never"]}), workdir, quiet=True)


@pytest.mark.parametrize("likelihood", ["sampled", "bound", "d1"])
def test_answers_without_alternatives_train_nothing_and_stop_nothing(workdir, likelihood, monkeypatch):  # noqa: F811
    def certain(logits_of):
        def only_the_end(self, *args):
            logits = logits_of(self, *args)
            return logits.index_fill(-1, torch.tensor([self.eos_id]), 1e4)

        return only_the_end

    monkeypatch.setattr(Backbone, "head_logits", certain(Backbone.head_logits))
    train(policy_run(policy={"likelihood": likelihood, "beta": 0.0}), workdir, quiet=True)
    steps = [row for row in metrics_of(workdir, "run") if row["split"] == "train"]
    assert [(row["loss"], row["reward"], row["ended"]) for row in steps] == [(0.0, 0.0, 1.0)] * len(steps)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"data": "text", "data_path": "data/text"}, "holds texts without prompts"),
        ({"policy": {"reward_funcs": ["number"]}}, "reward 'number' cannot use the answer of row 0 as its reference"),
        ({"policy": {"reward_funcs": ["gone.py:red"]}}, "there is no such file"),
        (
            {"micro_batch_tokens": 40, "policy": {"likelihood": "sampled"}},
            "micro_batch_tokens = 40 is smaller than an answer, for which likelihood = 'sampled' forwards up to 3 rows",
        ),
        (
            {"micro_batch_tokens": 40, "policy": {"likelihood": "d1"}},
            "micro_batch_tokens = 40 is smaller than an answer, for which likelihood = 'd1' forwards up to 5 rows",
        ),
        ({"policy": {"reward_funcs": ["mine.py:one"]}}, "cannot be called with three texts"),
        (
            {"policy": {"generation": GenerateSettings(**GENERATION | {"max_new_tokens": 23})}},
            "no prompt of data/alpaca",
        ),
    ],
)
def test_what_cannot_be_learnt_from_is_one_line_before_any_answer_is_drawn(workdir, changes, line, monkeypatch):  # noqa: F811
    monkeypatch.setattr("dllm.training.rollouts.Answering.rollouts", None)
    with pytest.raises(ValueError, match=line):
        train(policy_run(**changes), workdir, quiet=True)


def test_answers_that_never_end_are_one_line_before_the_first_step(workdir, monkeypatch):  # noqa: F811
    monkeypatch.setattr("dllm.language_model.DiffusionLM.answer_length", lambda self, tokens, stop=(): len(tokens))
    monkeypatch.setattr(trainer._Run, "_step", None)
    with pytest.raises(ValueError, match="none of 8 answers ends within policy.generation.max_new_tokens = 6"):
        train(policy_run(), workdir, quiet=True)


def test_a_model_that_answers_in_another_way_is_no_start(workdir):  # noqa: F811
    (workdir / "downloads/toy-model/dllm.json").write_text(json.dumps(SIDECAR))
    with pytest.raises(ValueError, match="cannot start from a model trained with 'bd3lm'"):
        train(policy_run(), workdir, quiet=True)


@pytest.mark.parametrize(
    ("policy", "line"),
    [
        ({"num_generations": 1}, "at least 2"),
        ({"num_generations": 3}, "global_batch_size = 8 counts answers and does not divide"),
        ({"reward_funcs": ["nubmer"]}, "reward_funcs = 'nubmer' is not a reward; allowed: number, math"),
        ({"reward_weights": [1.0, 2.0]}, "state one weight for each"),
        ({"reward_weights": [0.0]}, "count no reward"),
        ({"likelihood": "bound", "passes": 4}, "at least 5 are needed"),
        ({"generation": GenerateSettings(max_new_tokens=6)}, "temperature = 0 draws the same answer"),
        ({"generation": GenerateSettings(temperature=1.0)}, "generation.reveal_rule = 'confidence' with likelihood"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(policy, line):
    with pytest.raises(ValidationError, match=line):
        policy_run(policy=policy)


def test_rewards_and_the_algorithm_that_learns_from_them_go_together():
    with pytest.raises(ValidationError, match="algorithm = 'grpo' needs `policy`"):
        run_config(algorithm="grpo")
    with pytest.raises(ValidationError, match="policy is not for algorithm = 'mdlm'"):
        run_config(policy=policy_run().policy)
