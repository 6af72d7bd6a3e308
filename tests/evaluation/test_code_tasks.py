import importlib
import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from dllm import synthetic
from dllm.config import EvaluationConfig
from dllm.evaluation import code_tasks, evaluate
from dllm.evaluation.code_tasks import PROGRAMS, EvaluateStandIn, pass_at_k, sandboxed_scoring
from dllm.evaluation.evaluate import evaluate_benchmark
from dllm.evaluation.sandbox import Outcome

from .echo import TEMPLATE

# --- a model that writes what it is told to, and data in the layout of the hub

HUMANEVAL = [
    ("add", "x, y", "Add.", "    return x + y\n", "    assert candidate(2, 3) == 5\n"),
    ("neg", "x", "Negate.", "    return -x\n", "    assert candidate(4) == -4\n"),
    ("two", "x", "Twice x.", "    return 2 * x\n", "    assert candidate(4) == 8\n"),
]
MBPP = [
    (
        "Write a function to add.",
        "def add(x, y):\r\n    return x + y",
        [f"assert add({i}, 3) == {i + 3}" for i in range(3)],
    ),
    ("Write a function to negate.", "def neg(x):\r\n    return -x", [f"assert neg({i}) == {-i}" for i in range(3)]),
]


class Writer:
    """Answers with the text whose key is the last of its keys in the prompt, and counts what it was asked."""

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts, self.prompts = tokenizer, texts, []
        self.max_length = 4096
        self.backbone = SimpleNamespace(max_length=4096)

    def answers(self, prompts, settings):
        texts = [self.tokenizer.decode(prompt) for prompt in prompts]
        self.prompts += texts
        return [SimpleNamespace(text=self.texts[max(self.texts, key=text.rfind)], passes=1, tokens=9) for text in texts]


@pytest.fixture
def workdir(tmp_path) -> Path:
    from dllm.synthetic.tokenizer import make_tokenizer

    checkpoint = tmp_path / "runs/writer/model"
    tokenizer = make_tokenizer(Counter())
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(checkpoint)
    (checkpoint / "config.json").write_text("{}")
    rows = [
        {
            "task_id": f"Test/{i}",
            "prompt": f'def {name}({arguments}):\n    """{words}"""\n',
            "canonical_solution": body,
            "test": f"def check(candidate):\n{test}",
            "entry_point": name,
        }
        for i, (name, arguments, words, body, test) in enumerate(HUMANEVAL)
    ]
    snapshot(tmp_path / "humaneval", "openai_humaneval", rows)
    rows = [
        {"task_id": i, "text": text, "code": code, "test_list": tests, "test_setup_code": "", "challenge_test_list": []}
        for i, (text, code, tests) in enumerate(MBPP)
    ]
    snapshot(tmp_path / "mbpp", "full", rows)
    return tmp_path


def snapshot(directory: Path, name: str, rows: list[dict]) -> None:
    """A dataset of one split as the hub keeps it."""
    directory.mkdir()
    files = "  data_files:\n  - {split: test, path: test.jsonl}\n"
    (directory / "README.md").write_text(f"---\nconfigs:\n- config_name: {name}\n  default: true\n{files}---\n")
    (directory / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def writes(workdir, monkeypatch):
    """writes({key: text}): the model that every checkpoint opens as."""
    from dllm.models.tokenizers import load_tokenizer

    def opened(texts) -> Writer:
        writer = Writer(load_tokenizer(workdir / "runs/writer/model"), texts)
        monkeypatch.setattr(evaluate, "open_diffusion", lambda *_: writer)
        return writer

    return opened


def evaluation(task: str, /, **settings) -> EvaluationConfig:
    human = task.startswith("humaneval")
    base = {
        "run": "writer",
        "checkpoint": "runs/writer/model",
        "benchmark": task,
        "task": task,
        "data": task.split("_")[0],
        "shots": 0 if human else 3,
        "chat_template": task.endswith("_instruct"),
        "metric": "pass@1" if human else "pass_at_1",
        "filter": "create_test" if human else "none",
        "generation": {"max_new_tokens": 32},
    }
    return EvaluationConfig.model_validate(base | settings)


def outcomes(workdir, benchmark) -> list[dict]:
    lines = (workdir / f"evals/writer/{benchmark}.samples.jsonl").read_text().splitlines()
    return [json.loads(line)["outcomes"] for line in lines]


RIGHT = {f"def {name}(": body for name, _, _, body, _ in HUMANEVAL}

# --- lm-eval's own tasks


def test_humaneval_passes_what_is_right_and_says_why_the_rest_fails(workdir, writes):
    writes(RIGHT | {"def neg(": "    return x\n\nprint('not part of it')", "def two(": "    import sys; sys.exit(0)\n"})
    result = evaluate_benchmark(evaluation("humaneval"), workdir)
    assert result["metrics"]["pass@1"]["value"] == pytest.approx(1 / 3)
    assert (result["n"], result["task"]) == (3, "humaneval")
    assert result["programs"]["seconds"] == 3
    left = "left by sys.exit before its last statement"
    assert outcomes(workdir, "humaneval") == [{"create_test": [r]} for r in ("passed", "AssertionError", left)]


def test_mbpp_shows_its_own_examples_and_runs_all_tests(workdir, writes):
    writer = writes({"to add.": MBPP[0][1] + "\n[DONE] and more", "to negate.": "def neg(x):\n    return x\n"})
    result = evaluate_benchmark(evaluation("mbpp"), workdir)
    assert result["metrics"]["pass_at_1"]["value"] == 0.5
    assert outcomes(workdir, "mbpp") == [{"none": ["passed"]}, {"none": ["AssertionError"]}]
    assert all(prompt.count("[BEGIN]") == 4 for prompt in writer.prompts)


def test_an_answer_in_a_chat_is_begun_with_the_head_and_ends_at_its_fence(workdir, writes):
    writer = writes({key: f"{body}```\nThat was it." for key, body in RIGHT.items()})
    result = evaluate_benchmark(evaluation("humaneval_instruct"), workdir)
    assert result["metrics"]["pass@1"]["value"] == 1.0
    assert all(prompt.rstrip().endswith('"""') and "<assistant>" in prompt for prompt in writer.prompts)


def test_the_examples_of_mbpp_are_turns_of_a_chat(workdir, writes):
    writer = writes({"to add.": f"{MBPP[0][1]}\n[DONE]", "to negate.": MBPP[1][1]})
    result = evaluate_benchmark(evaluation("mbpp", chat_template=True, fewshot_as_multiturn=True), workdir)
    assert result["metrics"]["pass_at_1"]["value"] == 1.0
    assert all(prompt.count("<assistant>") == 3 and prompt.endswith("<answer>\n") for prompt in writer.prompts)


def test_the_published_metric_is_never_loaded(workdir, writes, monkeypatch):
    monkeypatch.setattr(code_tasks.EvaluateStandIn, "_real", lambda self: pytest.fail("`evaluate` was asked"))
    writes(RIGHT)
    evaluate_benchmark(evaluation("humaneval"), workdir)


# --- resuming


def test_a_scored_benchmark_runs_no_program_again_and_is_the_same(workdir, writes, monkeypatch):
    writes(RIGHT)
    first = evaluate_benchmark(evaluation("humaneval"), workdir)
    monkeypatch.setattr(code_tasks, "run_programs", lambda programs, done: programs and pytest.fail("ran"))
    again = evaluate_benchmark(evaluation("humaneval"), workdir)
    assert {k: v for k, v in again.items() if k not in ("wall_seconds", "provenance")} == {
        k: v for k, v in first.items() if k not in ("wall_seconds", "provenance")
    }


def test_a_killed_scoring_goes_on_with_the_programs_that_are_left(workdir, writes, monkeypatch):
    writer = writes(RIGHT)
    ran = []

    def dies_after_two(programs, done):
        for i, program in enumerate(programs):
            if len(ran) == 2:
                raise KeyboardInterrupt
            ran.append(program)
            done(i, Outcome(True, "passed"))

    monkeypatch.setattr(code_tasks, "run_programs", dies_after_two)
    with pytest.raises(KeyboardInterrupt):
        evaluate_benchmark(evaluation("humaneval"), workdir)
    asked = len(writer.prompts)
    left = []
    monkeypatch.setattr(
        code_tasks,
        "run_programs",
        lambda programs, done: [left.append(p) or done(i, Outcome(False, "x")) for i, p in enumerate(programs)],
    )
    result = evaluate_benchmark(evaluation("humaneval"), workdir)
    assert len(writer.prompts) == asked == 3
    assert len(left) == 1 and left[0] not in ran
    assert result["metrics"]["pass@1"]["value"] == pytest.approx(2 / 3)


def test_the_same_program_is_run_once(monkeypatch):
    ran = []
    monkeypatch.setattr(PROGRAMS, "_outcomes", {})
    monkeypatch.setattr(PROGRAMS, "_store", None)
    monkeypatch.setattr(
        code_tasks,
        "run_programs",
        lambda programs, done: [ran.append(p) or done(i, Outcome(True, "passed")) for i, p in enumerate(programs)],
    )
    assert len(PROGRAMS.outcomes(["a", "b", "a", "a"])) == 4
    assert ran == ["a", "b"]


# --- the metric


@pytest.mark.parametrize(("n", "passed"), [(5, 0), (5, 2), (5, 5), (4, 1)])
def test_pass_at_k_is_the_share_of_draws_with_a_program_that_passes(n, passed):
    for k in range(1, n + 1):
        draws = list(itertools.combinations([i < passed for i in range(n)], k))
        assert pass_at_k(n, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("numbers", [(3, 4, 1), (3, 1, 4), (3, 1, 0)])
def test_pass_at_k_of_impossible_numbers_is_one_line(numbers):
    with pytest.raises(ValueError, match="pass_at_k: n = 3, .* give 0 <= passed <= n and 1 <= k <= n"):
        pass_at_k(*numbers)


def test_the_scorer_takes_and_gives_what_the_published_one_does(monkeypatch):
    monkeypatch.setattr(PROGRAMS, "_outcomes", {})
    monkeypatch.setattr(PROGRAMS, "_store", None)
    right, wrong = "def add(a, b): return a + b", "def add(a, b): return a * b"
    rates, found = PROGRAMS.compute(references=["assert add(2, 3) == 5"], predictions=[[right, wrong]], k=[1, 2, 3])
    assert rates == {"pass@1": 0.5, "pass@2": 1.0}
    assert [[outcome.passed for outcome in row] for row in found] == [[True, False]]


# --- the stand-in


def test_other_requests_reach_the_real_module_and_it_is_left_as_it_was(monkeypatch):
    real = SimpleNamespace(load=lambda path: f"real {path}", combine="combine")
    for before in (None, real):
        monkeypatch.delitem(sys.modules, "evaluate", raising=False)
        if before:
            monkeypatch.setitem(sys.modules, "evaluate", before)
        with sandboxed_scoring():
            inside = sys.modules["evaluate"]
            assert isinstance(inside, EvaluateStandIn) and inside.load("code_eval") is PROGRAMS
        assert sys.modules.get("evaluate") is before
        monkeypatch.setattr(importlib, "import_module", lambda name: {"evaluate": real}[name])
        with sandboxed_scoring():
            assert sys.modules["evaluate"].load("accuracy") == "real accuracy"
            inside = EvaluateStandIn(before)
            assert inside.combine == "combine"
        monkeypatch.undo()


# --- mistakes


def test_a_wrong_metric_is_found_before_the_model_is_asked(workdir, writes):
    writer = writes(RIGHT)
    with pytest.raises(ValueError, match=r"'pass@10,create_test' .* gives pass@1,create_test. Did you mean"):
        evaluate_benchmark(evaluation("humaneval", metric="pass@10"), workdir)
    with pytest.raises(ValueError, match="'pass@1,none' .* gives pass_at_1,none"):
        evaluate_benchmark(evaluation("mbpp", metric="pass@1"), workdir)
    assert not writer.prompts


def test_a_task_that_runs_code_outside_the_sandbox_is_refused(workdir, writes):
    tasks = workdir / "tasks"
    tasks.mkdir()
    (tasks / "own.py").write_text("def runs_it(references, predictions):\n    exec(predictions[0])\n    return 1.0\n")
    (tasks / "own.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs: {data_files: {test: '{DATA}/test.jsonl'}}\ntest_split: test\n"
        "unsafe_code: true\noutput_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: '{{test}}'\n"
        "generation_kwargs: {until: []}\n"
        "metric_list: [{metric: !function own.runs_it, aggregation: mean, higher_is_better: true}]\n"
    )
    writer = writes(RIGHT)
    with pytest.raises(
        ValueError, match="task 'own' runs generated code by itself, outside the sandbox; .*humaneval"
    ) as e:
        evaluate_benchmark(evaluation("own", task_directory="tasks", data="humaneval"), workdir)
    assert "\n" not in str(e.value) and not writer.prompts


# --- the miniatures


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    synthetic.build(directory, seed=7)
    return directory


def test_the_miniatures_pass_with_their_solutions_and_fail_with_those_of_others(world, workdir, writes):
    rows = [json.loads(line) for line in (world / "benchmarks/humaneval/test.jsonl").read_text().splitlines()]
    settings = {"task_directory": "miniature", "data": str(world / "benchmarks"), "limit": 6}
    right = {f"def {row['entry_point']}(": row["canonical_solution"] for row in rows}
    writes(right)
    config = evaluation("humaneval", task="humaneval_mini", **settings)
    assert evaluate_benchmark(config, workdir)["metrics"]["pass@1"]["value"] == 1.0
    writes(dict(zip(right, [*list(right.values())[1:], "    return None\n"], strict=True)))
    config = evaluation("humaneval", task="humaneval_mini", run="other", **settings)
    assert evaluate_benchmark(config, workdir)["metrics"]["pass@1"]["value"] == 0.0
    writes({row["entry_point"] + "(": row["prompt"] + row["canonical_solution"] for row in rows})
    config = evaluation("mbpp", task="mbpp_mini", shots=0, **settings)
    assert evaluate_benchmark(config, workdir)["metrics"]["pass_at_1"]["value"] == 1.0
