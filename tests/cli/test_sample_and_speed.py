"""`dllm sample` and `dllm speed`: answers on the terminal, files for the report."""

import io
import json

import pytest

from dllm.cli.main import main
from dllm.config import GenerateSettings, SampleConfig, SpeedConfig, write_when_changed

OPTIONS = ("--new-tokens", "16", "--block-size", "8", "--device", "cpu")
FACTS = {"run": "chat-toy", "generation": GenerateSettings(max_new_tokens=16, block_size=8)}


def test_sample_prints_one_answer_per_prompt(here, capsys):
    assert main(["sample", "chat-toy", *OPTIONS, "Who are you?", "What is the capital of France?"]) == 0
    assert capsys.readouterr().out == "I am a toy.\nParis.\n"


@pytest.mark.parametrize(
    "words",
    [
        ("--reveal-rule", "threshold", "--threshold", "0.7"),
        ("--reveal-rule", "factor", "--factor", "0.5"),
        ("--reveal-rule", "entropy_bound", "--entropy-bound", "0.2"),
        ("--reuse", "dual", "--refresh", "2"),
    ],
)
def test_sample_takes_the_options_of_fast_decoding(here, capsys, words):
    assert main(["sample", "chat-toy", *OPTIONS, *words, "Who are you?", "What is the capital of France?"]) == 0
    assert capsys.readouterr().out == "I am a toy.\nParis.\n"


def test_sample_reads_prompts_from_standard_input(here, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Who are you?\n"))
    assert main(["sample", "chat-toy", *OPTIONS]) == 0
    assert capsys.readouterr().out == "I am a toy.\n"


def test_sample_continues_a_raw_text(here, capsys):
    text = "[Question]\nWho are you?\n[/Question]\n\n[Answer]\n"
    assert main(["sample", "chat-toy", "--raw", *OPTIONS, "--prompt", text]) == 0
    assert capsys.readouterr().out.strip() == "I am a toy."


def test_sample_writes_what_the_report_reads(here, tmp_path, capsys):
    config = SampleConfig(
        checkpoint="runs/chat-toy/model", conversations=[["Who are you?"]], film_prompt="Hello!", **FACTS
    )
    path = write_when_changed(tmp_path / "sample.yaml", config)
    output = tmp_path / "samples" / "chat-toy.json"
    words = ["sample", "--config", str(path), "--workdir", "results/laptop", "--output", str(output), "--device", "cpu"]
    assert main(words) == 0
    found = json.loads(output.read_text())
    assert found["run"] == "chat-toy" and found["conversations"][0][1]["content"] == "I am a toy."
    assert set(found["film"]) == {"prompt", "answer", "frames"}
    assert set(found["film"]["frames"][0]) == {"step", "nfe", "tokens"}
    first = output.read_bytes()
    assert main(words) == 0 and output.read_bytes() == first
    assert [p.name for p in output.parent.iterdir()] == ["chat-toy.json"]


def test_the_report_can_draw_the_film(here, tmp_path):
    from dllm.report.film import frames

    output = tmp_path / "toy.json"
    assert main(["sample", "chat-toy", "Hello!", "--output", str(output), *OPTIONS]) == 0
    assert frames(json.loads(output.read_text())["film"])[-1].plain.strip() == "Hello! I am a toy."


def test_speed_writes_a_point_per_number_of_steps(here, tmp_path, capsys):
    questions = [("What is the capital of France?", "Paris."), ("Who are you?", "a house")]
    lines = [json.dumps({"question": q, "answer": a}) for q, a in questions]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    checkpoint = str(here / "results/laptop/runs/chat-toy/model")
    config = SpeedConfig(checkpoint=checkpoint, questions="q.jsonl", steps=[16, 4], limit=2, **FACTS)
    path = write_when_changed(tmp_path / "speed.yaml", config)
    assert main(["speed", str(path), "--workdir", str(tmp_path), "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "speed" / "chat-toy.json").read_text())
    fields = "steps metric nfe seconds tokens_per_second quality quality_low quality_high n".split()
    assert [list(point) for point in found["points"]] == [fields] * 2
    first = found["points"][0]
    assert first["quality"] == 0.5 and first["quality_low"] < 0.5 < first["quality_high"] and first["n"] == 2
    assert {"commit", "hardware", "config_digest"} <= set(found["provenance"])
    fields = "name agreement token_agreement nfe seconds tokens_per_second quality quality_low quality_high n".split()
    assert [list(option) for option in found["options"]] == [fields] * 7
    assert found["options"][0]["name"] == "exact" and found["options"][0]["agreement"] == 1
    assert capsys.readouterr().out.count("passes per answer") == 9


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["sample"], "needs a MODEL and a PROMPT"),
        (["sample", "--config", "c.yaml", "--raw"], "leave out --raw"),
        (["sample", "--config", "c.yaml"], "c.yaml: no such file"),
        (["sample", "chat-toy", "a", "--raw", "--output", "x"], "--raw does not make any"),
        (["sample", "chat-toy", "Hello " * 60], "leaves 64"),
        (["speed", "c.yaml"], "c.yaml: no such file"),
        (["sample", "chat-toy", "a", "--threshold", "0.5"], "--threshold 0.5 is for --reveal-rule threshold"),
        (
            ["sample", "chat-toy", "a", "--reveal-rule", "factor", "--factor", "0"],
            "--factor 0.0: input should be",
        ),
        (["sample", "chat-toy", "a", "--refresh", "2"], "refresh = 2 needs something to refresh; set reuse"),
    ],
)
def test_a_mistake_is_one_line(here, words, line, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert line in captured.err and captured.err.count("\n") == 1 and captured.out == ""
