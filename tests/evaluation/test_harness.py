"""`dllm lm-eval --model dllm`: lm-eval's own command gives the scores that `dllm evaluate` writes."""

import json
from functools import partialmethod
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

from dllm.cli.main import main
from dllm.config import Scorer
from dllm.core.devices import best_device
from dllm.evaluation.evaluate import answer_settings, evaluate_benchmark
from dllm.evaluation.harness import _device, parse_arguments
from dllm.evaluation.task_files import render
from tests.toys import save_toy

from .echo import evaluation, words_tokenizer

SAMPLER = {"max_new_tokens": 6, "block_size": 3, "steps": 4, "temperature": 1.0, "seed": 5}
LIKELIHOOD = {"estimator": "lattice", "budget": 5, "seed": 3}
ARGUMENTS = [
    *(f"generation.{name}={value}" for name, value in SAMPLER.items()),
    *(f"likelihood.{name}={value}" for name, value in LIKELIHOOD.items()),
]
MINE = {"seed": 1234, "generation": SAMPLER, "scorer": {"likelihood": LIKELIHOOD}}


@pytest.fixture
def toy(workdir, monkeypatch):
    """A work directory with a random BERT in runs/toy/model, and the tasks' files with their data."""
    from lm_eval.tasks import TaskManager

    # lm-eval would read all of its 14,000 files first
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
    save_toy(workdir / "runs/toy/model", words=sorted(words_tokenizer().get_vocab()))
    return workdir


def by_lm_eval(workdir, task: str, *more: str, arguments=ARGUMENTS) -> tuple[dict, dict[int, dict]]:
    """Results, and samples by document, that lm-eval's command writes."""
    tasks = render(workdir / "tasks", workdir / "data", workdir / "rendered")
    out = Path(mkdtemp(dir=workdir))
    options = ["--include_path", str(tasks), "--tasks", task, "--output_path", str(out), "--log_samples"]
    model = ["--model", "dllm", "--model_args", f"pretrained={workdir / 'runs/toy/model'}", *arguments]
    assert main(["lm-eval", *model, *options, *(["--device", "cpu"] if torch.cuda.is_available() else []), *more]) == 0
    (results,) = out.rglob("results_*.json")
    (samples,) = out.rglob("samples_*.jsonl")
    return json.loads(results.read_text()), {
        row["doc_id"]: row for row in map(json.loads, samples.read_text().splitlines())
    }


def by_us(workdir, task: str, **settings) -> tuple[dict, dict[int, dict]]:
    config = evaluation(task, run="toy", checkpoint="runs/toy/model", **{**MINE, **settings})
    result = evaluate_benchmark(config, workdir)
    lines = (workdir / f"evals/toy/{task}.samples.jsonl").read_text().splitlines()
    return result, {row["doc_id"]: row for row in map(json.loads, lines)}


@pytest.mark.parametrize(("task", "shots"), [("choices", 0), ("choices", 2), ("last", 0)])
def test_likelihoods_are_equal_to_the_last_digit(toy, task, shots):
    ours, rows = by_us(toy, task, shots=shots)
    theirs, samples = by_lm_eval(toy, task, "--num_fewshot", str(shots))
    assert theirs["results"][task]["acc,none"] == ours["metrics"]["acc"]["value"]
    for number, row in rows.items():
        answers = [(float(value), greedy == "True") for [[value, greedy]] in samples[number]["resps"]]
        assert answers == list(zip(row["log_likelihoods"], row["is_greedy"], strict=True))
    assert theirs["config"]["dllm"]["passes"] == ours["passes"] > 0


def test_generations_are_equal_with_and_without_the_chat_template(toy):
    for chat in (False, True):
        ours, rows = by_us(toy, "write", chat_template=chat)
        theirs, samples = by_lm_eval(toy, "write", *(["--apply_chat_template"] if chat else []))
        assert {n: row["response"] for n, row in rows.items()} == {n: s["resps"][0][0] for n, s in samples.items()}
        assert theirs["config"]["dllm"]["passes"] == ours["passes"] > 0
        assert all(("[Question]" in s["arguments"]["gen_args_0"]["arg_0"]) == chat for s in samples.values())


def test_the_rolling_likelihood_is_equal(toy):
    ours, _ = by_us(toy, "rolling", metric="word_perplexity")
    theirs, _ = by_lm_eval(toy, "rolling")
    assert theirs["results"]["rolling"]["word_perplexity,none"] == ours["metrics"]["word_perplexity"]["value"]


def test_every_choice_has_its_greedy_check_where_that_is_asked_for(toy):
    plain, few = by_lm_eval(toy, "few")
    theirs, every = by_lm_eval(toy, "few", arguments=[*ARGUMENTS, "is_greedy=all"])
    likelihoods = [[[r[0][0] for r in row["resps"]] for row in samples.values()] for samples in (few, every)]
    assert likelihoods[0] == likelihoods[1]
    assert not any(r[0][1] == "True" for row in few.values() for r in row["resps"])
    # a check takes a pass per token, and each of the three choices has three
    assert theirs["config"]["dllm"]["passes"] == plain["config"]["dllm"]["passes"] + 9 * len(every)


def test_settings_are_those_of_a_configuration():
    generation, scorer = parse_arguments(
        {"generation.steps": 8, "generation.temperature": 1, "likelihood.budget": 3, "precision": "bf16"}
    )
    config = evaluation(
        "choices",
        generation={"steps": 8, "temperature": 1.0},
        scorer={"likelihood": {"budget": 3}, "precision": "bf16"},
    )
    assert generation.model_dump(mode="json") == answer_settings(config)["generation"]
    assert scorer == config.scorer and parse_arguments({})[1] == Scorer()


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        (
            "generation.stepz=3",
            "model_args: generation.stepz = 3: Extra inputs are not permitted. Did you mean 'steps'?",
        ),
        ("likelihood.budget=0", "model_args: likelihood.budget = 0: Input should be greater than 0"),
        ("generation.=5", "model_args: generation. = 5: Extra inputs are not permitted."),
        ("temperature=0", "model_args: temperature is not one of them. Known: "),
        ("likelihood=5", "model_args: likelihood is not one of them. Did you mean 'likelihood.*'?"),
        ("fewshot_as_multiturn=1", "model_args: fewshot_as_multiturn is not one of them. Known: bf16_scores, gen"),
        ("likelihood.rounds=[4]", "model_args: likelihood.rounds needs to know which metrics a task reads"),
        ("is_greedy=some", "is_greedy = 'some'; allowed: auto, all"),
        ("revision=x", "give a directory"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(argument, line, toy, capsys):
    words = ["--model", "dllm", "--model_args", "pretrained=no/such/place", argument, "--tasks", "few"]
    tasks = render(toy / "tasks", toy / "data", toy / "rendered")
    assert main(["lm-eval", *words, "--include_path", str(tasks)]) == 2
    (found,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("dllm")]
    assert line in found


@pytest.mark.parametrize("arguments", ["generation.steps=4", "pretrained=5", "pretrained="])
def test_a_model_without_a_checkpoint_is_one_line_and_status_2(arguments, toy, capsys):
    tasks = render(toy / "tasks", toy / "data", toy / "rendered")
    words = ["--model", "dllm", "--model_args", arguments, "--tasks", "few", "--include_path", str(tasks)]
    assert main(["lm-eval", *words]) == 2
    (found,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("dllm")]
    assert "model_args: pretrained = " in found and "allowed: a checkpoint directory" in found


def test_without_a_device_the_best_one_of_the_machine_is_taken(toy, monkeypatch):
    """lm-eval itself says cuda:0 where nobody named a device."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert _device("cuda:0") == _device(None) == str(best_device())
    with pytest.raises(ValueError, match="cuda:1"):
        _device("cuda:1")


def test_several_processes_are_refused_with_what_to_do(monkeypatch):
    from dllm.evaluation.harness import DiffusionHarness

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="accelerate launch -m dllm evaluate"):
        DiffusionHarness("somewhere")


def test_lm_evals_own_models_and_help_are_there(capsys):
    assert main(["lm-eval", "run", "--help"]) == 0
    assert "--model_args" in capsys.readouterr().out
