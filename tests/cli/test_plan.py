"""`dllm plan` as a person runs it: a table, JSON, and one line for a mistake."""

import json
from pathlib import Path

import pytest

from dllm.cli.main import main

ROOT = Path(__file__).parent.parent.parent
PAPER, LAPTOP = (str(ROOT / f"config/{name}.yaml") for name in ("paper", "laptop"))


def test_the_plan_is_a_table_with_its_assumptions(capsys):
    assert main(["plan", PAPER]) == 0
    printed = capsys.readouterr().out
    assert "a100-80gb: peak 312 TFLOP/s bf16" in printed and "assumed 40% of it in training" in printed
    assert "GPU h" in printed and "\ntotal " in printed and "the chain" in printed


def test_verbose_has_a_line_for_every_job(capsys):
    assert main(["plan", LAPTOP, "-v"]) == 0
    printed = capsys.readouterr().out
    assert "\n  chat-large/mmlu " in printed and "\n  chat--world--128 " in printed


def test_an_overlay_and_other_hardware_change_the_plan(tmp_path, capsys):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("runs: {chat-large: {epochs: 20}}\n")
    assert main(["plan", PAPER, str(overlay), "--json", "--hardware", "h200", "--workdir", str(tmp_path)]) == 0
    longer = json.loads(capsys.readouterr().out)
    assert main(["plan", PAPER, "--json", "--hardware", "h200", "--workdir", str(tmp_path)]) == 0
    shorter = json.loads(capsys.readouterr().out)
    flops = [
        next(j["predicted"]["flops"] for j in plan["jobs"] if (j["rule"], j["name"]) == ("train", "chat-large"))
        for plan in (longer, shorter)
    ]
    assert flops[0] == pytest.approx(2 * flops[1], rel=0.1)
    assert longer["hardware"]["name"] == "h200"
    resources = {"mem_mb", "runtime", "disk_mb", "gpu", "nodes", "cpus_per_task"}
    assert all(set(job["resources"]) == resources for job in longer["jobs"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((PAPER, "--hardware", "h1000"), "hardware = 'h1000' is not known"),
        ((PAPER, "--utilisation", "1.5"), "utilisation = 1.5 is not a share"),
        ((PAPER, "--utilisation", "much"), "invalid float value: 'much'"),
        ((PAPER, "--verbos"), "Did you mean --verbose?"),
        (("nowhere/paper.yaml", "--config-directory", "nowhere"), "no models.yaml there"),
        ((str(ROOT / "config/none.yaml"),), "none.yaml: no such file"),
        ((), "CONFIG"),
    ],
)
def test_a_mistake_is_one_line_and_status_two(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *words]) == 2
    told = capsys.readouterr()
    assert said in told.err and told.err.count("\n") == 1 and told.out == ""


def test_a_mistake_in_an_overlay_names_file_and_key(tmp_path, capsys):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("runs: {chat-large: {lenght: 3}}\n")
    assert main(["plan", PAPER, str(overlay)]) == 2
    assert "runs.chat-large.lenght is not a setting. Did you mean 'length'?" in capsys.readouterr().err
