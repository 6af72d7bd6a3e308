import json

import pytest

from dllm.evaluation import evaluate
from dllm.evaluation.evaluate import evaluate_benchmark
from dllm.numbers import wilson_interval

from .echo import EchoModel, choice_row, evaluation, write_rows


def written(workdir, benchmark):
    """The two files of a benchmark, without what may differ between two identical runs."""
    result = json.loads((workdir / f"evals/echo/{benchmark}.json").read_text())
    samples = (workdir / f"evals/echo/{benchmark}.samples.jsonl").read_text()
    return {k: v for k, v in result.items() if k not in ("wall_seconds", "provenance")}, samples


def forget(workdir):
    """Remove all stored answers."""
    import shutil

    shutil.rmtree(workdir / ".work" / "answers", ignore_errors=True)


# --- scores


def test_a_group_counts_every_document_once_and_agrees_with_lm_eval(workdir, echo, monkeypatch):
    harness = {}
    original = evaluate._run_harness
    monkeypatch.setattr(evaluate, "_run_harness", lambda *a: harness.update(original(*a)) or harness)
    result = evaluate_benchmark(evaluation("both", chance=0.25), workdir)
    assert result["metrics"]["acc"]["value"] == harness["results"]["both"]["acc,none"] == 25 / 30
    assert (result["metrics"]["acc"]["low"], result["metrics"]["acc"]["high"]) == wilson_interval(25, 30)
    assert result["subtasks"] == {"choices": {"value": 0.75, "n": 20}, "few": {"value": 1.0, "n": 10}}
    assert (result["n"], result["chance"], result["metric"], result["filter"]) == (30, 0.25, "acc", "none")
    assert set(result["metrics"]) == {"acc", "acc_norm"}


def test_the_version_of_each_task_stands_beside_its_score(workdir, echo):
    """Lm-eval changes its tasks: scores of other versions are not those of the same benchmark."""
    path = workdir / "tasks" / "few.yaml"
    path.write_text(path.read_text() + "metadata: {version: 3.1}\n")
    found = evaluate_benchmark(evaluation("both"), workdir)["inputs"]["task_versions"]
    assert found["few"] == "3.1" and found["choices"] != "3.1" and len(found) == 2


def test_a_sample_row_says_what_was_asked_and_answered(workdir, echo):
    evaluate_benchmark(evaluation("choices"), workdir)
    rows = [json.loads(line) for line in written(workdir, "choices")[1].splitlines()]
    assert [row["doc_id"] for row in rows] == list(range(20))
    assert rows[3] | {"prompt_sha256": ""} == {
        "doc_id": 3,
        "subtask": "choices",
        "prompt": "what is w3 in 3",
        "prompt_sha256": "",
        "target": 1,
        "continuations": [" w38", " w3", " w39"],
        "log_likelihoods": [-2.0, 0.0, -2.0],
        "is_greedy": [False, False, False],
        "standard_errors": [0.5, 0.5, 0.5],
        "passes": 3,
        "scores": {"acc,none": 1.0, "acc_norm,none": 1.0},
    }


def test_raced_questions_say_how_they_ended_and_widen_the_interval(workdir, echo):
    race = evaluation("both", scorer={"likelihood": {"rounds": [6, 12]}})
    result = evaluate_benchmark(race, workdir)
    assert result["race"] == {"rounds": {"1": 25, "2": 5}, "undecided": {"acc": 5}}
    low, high = wilson_interval(25, 30)
    more = 1.96 * (5 * 0.25) ** 0.5 / 30
    accuracy = result["metrics"]["acc"]
    assert accuracy["low"] == pytest.approx(25 / 30 - ((25 / 30 - low) ** 2 + more**2) ** 0.5, abs=1e-5)
    assert (result["metrics"]["acc_norm"]["low"], result["metrics"]["acc_norm"]["high"]) == (low, high)
    whole = written(workdir, "both")
    assert '"rounds": 2, "doubt": {"acc": 0.5}' in whole[1]
    forget(workdir)
    for shard in range(3):
        evaluate_benchmark(race, workdir, shard=(shard, 3), score=False)
    evaluate_benchmark(race, workdir, compute=False)
    assert written(workdir, "both") == whole


def test_accuracy_of_a_last_word_is_the_greedy_match(workdir, echo):
    result = evaluate_benchmark(evaluation("last", further_metrics=["perplexity"]), workdir)
    assert result["metrics"]["acc"]["value"] == 8 / 12
    assert result["metrics"]["perplexity"]["value"] == pytest.approx(2.718281828 ** (2 * 4 / 12))


def test_every_filter_of_a_metric_is_reported(workdir, echo):
    result = evaluate_benchmark(evaluation("write", further_metrics=["exact_match,flexible"]), workdir)
    assert (result["metrics"]["exact_match"]["value"], result["passes"]) == (0.6, 30)
    assert result["metrics"]["exact_match,flexible"]["value"] == 0.0
    row = json.loads(written(workdir, "write")[1].splitlines()[0])
    assert (row["response"], row["scores"]) == ("w0 w1", {"exact_match,strict": 1.0, "exact_match,flexible": 0.0})


def test_a_rolling_task_is_scored(workdir, echo):
    result = evaluate_benchmark(evaluation("rolling", metric="word_perplexity"), workdir)
    assert result["metrics"]["word_perplexity"]["value"] == pytest.approx(2.718281828**2)


def test_a_limit_scores_the_first_documents_of_each_task(workdir, echo):
    result = evaluate_benchmark(evaluation("both", limit=4), workdir)
    assert result["subtasks"] == {"choices": {"value": 1.0, "n": 4}, "few": {"value": 1.0, "n": 4}}
    assert result["limit"] == 4


def test_chat_prompts_carry_the_template(workdir, echo):
    evaluate_benchmark(evaluation("choices", chat_template=True, shots=1, fewshot_as_multiturn=True), workdir)
    row = json.loads(written(workdir, "choices")[1].splitlines()[0])
    assert row["prompt"].startswith("<user> what is") and row["prompt"].endswith("<user> what is w0 in 0 <answer>\n")
    assert row["continuations"][1] == "w0"


# --- processes and resuming


@pytest.mark.parametrize("task", ["both", "last", "write"])
def test_shards_merged_equal_the_whole_byte_for_byte(workdir, echo, task):
    config = evaluation(task, shots=2 if task == "both" else 0)
    evaluate_benchmark(config, workdir)
    whole, rows = written(workdir, task), echo.rows
    forget(workdir)
    computed = [evaluate_benchmark(config, workdir, shard=(i, 3), score=False)["computed"] for i in range(3)]
    assert sum(computed) == rows and echo.rows == 2 * rows and all(computed)
    evaluate_benchmark(config, workdir, compute=False)
    assert echo.rows == 2 * rows
    assert written(workdir, task) == whole


def test_the_first_of_several_processes_waits_for_the_others_and_scores(workdir, echo):
    config = evaluation("both", shots=2)
    evaluate_benchmark(config, workdir)
    whole = written(workdir, "both")
    forget(workdir)
    evaluate_benchmark(config, workdir, shard=(1, 2), score=False)
    evaluate_benchmark(config, workdir, shard=(0, 2), wait=True)
    assert written(workdir, "both") == whole


def test_a_killed_evaluation_resumes_and_asks_nothing_twice(workdir, echo, monkeypatch):
    from dllm.evaluation import stored

    monkeypatch.setattr(stored, "LIKELIHOODS_PER_CHUNK", 10)
    evaluate_benchmark(evaluation("both"), workdir)
    whole, rows = written(workdir, "both"), echo.rows
    forget(workdir)
    echo.rows, echo.die_after = 0, 40
    with pytest.raises(KeyboardInterrupt):
        evaluate_benchmark(evaluation("both"), workdir)
    kept = 36  # three chunks of four documents, three requests each
    echo.rows, echo.die_after = 0, None
    evaluate_benchmark(evaluation("both"), workdir)
    assert echo.rows == rows - kept
    assert written(workdir, "both") == whole


def test_an_evaluation_done_again_asks_the_model_nothing_and_writes_the_same(workdir, echo):
    evaluate_benchmark(evaluation("write"), workdir)
    first, rows = written(workdir, "write"), echo.rows
    evaluate_benchmark(evaluation("write"), workdir)
    assert (written(workdir, "write"), echo.rows) == (first, rows)


@pytest.mark.parametrize("change", ["checkpoint", "estimator", "code"])
def test_another_model_setting_or_code_finds_no_answers(workdir, echo, monkeypatch, change):
    config = evaluation("choices")
    evaluate_benchmark(config, workdir)
    if change == "checkpoint":
        (workdir / "runs/echo/model/config.json").write_text('{"other": 1}')
    elif change == "estimator":
        config = evaluation("choices", scorer={"likelihood": {"estimator": "mc"}})
    else:
        monkeypatch.setattr(evaluate, "code_digest", lambda: "other")
    with pytest.raises(ValueError, match="60 of 60 answers are missing"):
        evaluate_benchmark(config, workdir, compute=False)


def test_merging_says_how_many_answers_are_missing(workdir, echo):
    config = evaluation("choices")
    evaluate_benchmark(config, workdir, shard=(0, 2), score=False)
    with pytest.raises(ValueError, match="30 of 60 answers are missing; run the shards that are not done"):
        evaluate_benchmark(config, workdir, compute=False)


def test_merging_never_opens_the_model(workdir, echo, monkeypatch):
    evaluate_benchmark(evaluation("choices"), workdir)
    monkeypatch.setattr(evaluate, "open_diffusion", lambda *_: pytest.fail("the model was opened"))
    evaluate_benchmark(evaluation("choices"), workdir, compute=False)


def test_changed_data_are_read_anew(workdir, echo):
    import os

    path = workdir / "data" / "choices.jsonl"
    evaluate_benchmark(evaluation("choices"), workdir)
    time = path.stat()
    write_rows(path, [choice_row(i, known=i < 10) for i in range(20)])
    os.utime(path, ns=(time.st_atime_ns, time.st_mtime_ns))
    assert evaluate_benchmark(evaluation("choices"), workdir)["metrics"]["acc"]["value"] == 0.5


def test_progress_ends_with_all_requests(workdir, echo):
    seen = []
    evaluate_benchmark(evaluation("choices"), workdir, progress=lambda answered, asked: seen.append((answered, asked)))
    assert seen == [(0, 60), (60, 60)]


# --- mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "choises"}, r"task = 'choises' is not in tasks. Did you mean 'choices'\?"),
        ({"checkpoint": "runs/none/model"}, "checkpoint = 'runs/none/model' is not in .*run the workflow"),
        (
            {"metric": "acc_nrom"},
            r"'acc_nrom,none' .* gives acc,none, acc_norm,none. Did you mean 'acc_norm,none'\?",
        ),
        ({"further_metrics": ["f1"]}, "metric 'f1,none' .* does not come out of task 'choices'"),
        ({"filter": "strict"}, "metric 'acc,strict' "),
        ({"task_directory": "none"}, "task_directory = 'none' holds no task files"),
        ({"data": "none"}, "data = 'none' is not in"),
        ({"expected_documents": 21}, r"task 'choices' has 20 documents, and the benchmark's size says 21"),
        ({"data": None}, r"reads \{DATA\}, but the evaluation has no `data`"),
        ({"data": "tasks"}, "its data cannot be read"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(workdir, echo, settings, message):
    with pytest.raises(ValueError, match=message) as fault:
        evaluate_benchmark(evaluation("choices", **settings), workdir)
    assert "\n" not in str(fault.value)


def test_a_tokenizer_without_a_chat_template_cannot_chat(workdir, monkeypatch):
    (workdir / "runs/echo/model/chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template; set chat_template: false"):
        evaluate_benchmark(evaluation("choices", chat_template=True), workdir)


def test_an_encoder_that_was_never_tuned_gets_the_template_that_tuning_would_give_it(workdir, echo):
    (workdir / "runs/echo/model/chat_template.jinja").unlink()
    (workdir / "runs/echo/model/config.json").write_text('{"architectures": ["ModernBertForMaskedLM"]}')
    evaluate_benchmark(evaluation("choices", chat_template=True), workdir)
    row = json.loads((workdir / "evals/echo/choices.samples.jsonl").read_text().splitlines()[0])
    assert row["prompt"].startswith("[Question]\nwhat is") and row["prompt"].endswith("[Answer]\n")


def test_a_wrong_metric_is_found_before_the_model_is_asked(workdir, echo):
    with pytest.raises(ValueError):
        evaluate_benchmark(evaluation("choices", metric="f1"), workdir)
    assert echo.rows == 0


def test_the_echo_model_is_not_asked_about_greedy_where_it_is_not_read(workdir, echo, monkeypatch):
    monkeypatch.setattr(EchoModel, "greedy_match", lambda *_: pytest.fail("asked"))
    evaluate_benchmark(evaluation("choices"), workdir)


@pytest.mark.parametrize(("trained", "kind", "right"), [("mdlm", "hf", "dllm"), ("ar", "dllm", "hf")])
def test_a_checkpoint_is_scored_as_what_it_was_trained_for(workdir, trained, kind, right):
    note = {"algorithm": trained, "special_tokens": {"mask": "m", "eos": "e"}}
    (workdir / "runs/echo/model/dllm.json").write_text(json.dumps(note))
    with pytest.raises(ValueError, match=f"trained with '{trained}', .*; set kind: {right}") as fault:
        evaluate_benchmark(evaluation("choices", model_kind=kind), workdir)
    assert "\n" not in str(fault.value)
