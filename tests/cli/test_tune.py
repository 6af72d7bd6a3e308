"""`dllm tune`: one command from a checkpoint and a file to a model that chats, the same as the workflow's rules."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml

from dllm.chat.settings import find_checkpoint
from dllm.cli.main import main
from dllm.config import download_configs, load_project, prepare_configs, run_configs
from dllm.tuning import follow
from tests.training.conftest import entry_for, make_model

CONFIG = Path(__file__).parent.parent.parent / "config"
WORDS = ("cat", "dog", "sun", "moon")
SHORT = ("--steps", "3", "--batch-size", "4", "--length", "48", "--quiet")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A directory with a checkpoint `toy-bert` and some files, which is the current one."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "toy-bert", entry_for())
    pairs = [(f"who likes {word} ?", f"the {word}") for word in WORDS] * 6
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in chats))
    (tmp_path / "pairs.csv").write_text("question,answer\n" + "".join(f"{q},{a}\n" for q, a in pairs))
    (tmp_path / "notes.txt").write_text("the cat sees a dog and one red sun\n" * 60)
    return tmp_path


def tune(capsys, *words: str) -> tuple[int, str, str]:
    """(status, standard output, standard error) of a command line."""
    status = main(["tune", *words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def error_of(capsys, *words: str) -> str:
    status, _, err = tune(capsys, *words)
    lines = [line for line in err.splitlines() if line.startswith("dllm tune: error: ")]
    assert status == 2 and len(lines) == 1, err
    return lines[0].removeprefix("dllm tune: error: ")


def test_one_command_says_what_it_takes_the_data_for_and_ends_with_the_line_that_opens_the_chat(here, capsys):
    status, out, _ = tune(capsys, "toy-bert", "chats.jsonl", "pairs.csv", *SHORT)
    assert status == 0
    assert "model    toy-bert: BertForMaskedLM" in out
    assert "48 rows look like conversations: column messages; prompts and responses: columns question, answer" in out
    assert "prepared 40 rows to train on" in out and "8 are held out" in out
    assert out.count("\nasked ") == out.count("\nreference ") == out.count("\nmodel  ") == 3
    assert "held-out loss" in out and "before training" in out
    assert out.endswith("\nTalk to it:\n  dllm chat results/chat-toy-bert\n")
    assert find_checkpoint("results/chat-toy-bert") == "results/chat-toy-bert/runs/chat-toy-bert/model"
    assert find_checkpoint("chat-toy-bert") == find_checkpoint()
    sidecar = json.loads(Path("results/chat-toy-bert/runs/chat-toy-bert/model/dllm.json").read_text())
    assert sidecar["special_tokens"]["mask"] == "[MASK]"
    before = Path("results/chat-toy-bert/runs/chat-toy-bert.json").stat().st_mtime_ns
    again = tune(capsys, "toy-bert", "chats.jsonl", "pairs.csv", *SHORT)
    assert again[0] == 0 and "trained already" in again[1] and "prepared" not in again[1]
    assert Path("results/chat-toy-bert/runs/chat-toy-bert.json").stat().st_mtime_ns == before
    other = error_of(capsys, "toy-bert", "chats.jsonl", *SHORT)
    assert "holds a run of other data or settings" in other and "--replace" in other


def test_changed_files_are_copied_prepared_and_trained_on_again(here, capsys):
    assert tune(capsys, "toy-bert", "pairs.csv", *SHORT)[0] == 0
    with open("pairs.csv", "a") as file:
        file.write("who is one ?,the moon\n" * 10)
    status, out, _ = tune(capsys, "toy-bert", "pairs.csv", *SHORT, "--replace")
    assert status == 0 and "34 rows look like" in out and "trained already" not in out


def test_the_entries_that_are_shown_make_the_same_jobs_in_the_workflow(here, capsys):
    words = ("toy-bert", "chats.jsonl", "--epochs", "2", "--block-size", "8", "--seed", "5", "--held-out", "0.2")
    status, out, err = tune(capsys, *words, "--show-config")
    assert status == 0 and "model    toy-bert" in err and not Path("results/chat-toy-bert/runs").exists()
    overlay = yaml.safe_load(out)
    (here / "mine.yaml").write_text(out)
    project = load_project(CONFIG, here / "mine.yaml")
    wishes = follow.Wishes(
        "toy-bert", ("chats.jsonl",), run={"epochs": 2.0, "seed": 5}, dataset={"test_share": 0.2}, block_size=8
    )
    ours = follow.set_up(wishes, lambda line: None)
    assert overlay == ours.overlay
    for jobs in (download_configs, prepare_configs, run_configs):
        assert jobs(project) == jobs(ours.project), jobs.__name__
    (run,) = run_configs(project).values()
    assert run.seed == 5 and run.recipe.block_size == 8


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_plain_text_is_continued_by_encoders_and_by_causal_models(here, capsys, kind):
    make_model(here / "start", entry_for(kind))
    more = ("--prediction", "next") if kind == "llama" else ()
    status, out, _ = tune(capsys, "start", "notes.txt", "--steps", "2", "--quiet", *more)
    assert status == 0 and "60 rows look like plain text: column text" in out
    sidecar = json.loads(Path("results/chat-start/runs/chat-start/model/dllm.json").read_text())
    assert sidecar["prediction"] == ("next" if kind == "llama" else "in_place")


@pytest.mark.parametrize("algorithm", ["bd3lm", "edit_flows"])
def test_other_algorithms_are_trained_from_the_same_command(here, capsys, algorithm):
    status, out, err = tune(capsys, "toy-bert", "chats.jsonl", "--algorithm", algorithm, *SHORT)
    assert status == 0 and f"plan     {algorithm}" in out, err


def test_entries_of_the_configuration_are_used_by_name_and_several_datasets_are_mixed(here, capsys):
    new = entry_for().new
    models = {"models": {"toy": {"path": "toy-bert"}, "fresh": {"new": new, "tokenizer": "toy"}}}
    data = {"datasets": {"mine": {"files": ["chats.jsonl"]}, "more": {"files": ["pairs.csv"], "kind": "pairs"}}}
    (here / "config").mkdir()
    (here / "config/models.yaml").write_text(yaml.safe_dump(models))
    (here / "config/datasets.yaml").write_text(yaml.safe_dump(data))
    status, out, err = tune(capsys, "fresh", "mine", "more", *SHORT)
    assert status == 0, err
    assert "24 rows look like conversations" in out and "pairs.csv: 24 rows are read as pairs" in out
    assert "prepared 32 rows to train on" in out and Path("results/chat-fresh/data/data--toy--48").is_dir()


def test_what_is_stated_of_the_rows_counts_for_entries_and_for_each_of_several_datasets(here, capsys):
    own = {"files": ["pairs.csv"], "kind": "pairs"}
    sets = {
        "mine": own,
        "few": own | {"rows": 2},
        "both": {"mix": ["mine", "few"], "rows": 10},
        "split": {"hub": "a/b", "revision": "0" * 40, "test_split": "test"},
    }
    (here / "config").mkdir()
    (here / "config/models.yaml").write_text("models: {}")
    (here / "config/datasets.yaml").write_text(yaml.safe_dump({"datasets": sets}))
    status, out, err = tune(capsys, "toy-bert", "mine", "chats.jsonl", "--rows", "5", "--held-out", "0.5", *SHORT)
    assert status == 0 and "prepared 10 rows to train on" in out and "; 24 are held out" in out, err
    status, out, err = tune(capsys, "toy-bert", "both", "--output", "results/both", *SHORT)
    assert status == 0 and "prepared 12 rows to train on" in out, err
    status, out, err = tune(capsys, "toy-bert", "both", "chats.jsonl", "--output", "results/three", *SHORT)
    assert status == 0 and "prepared 28 rows to train on" in out, err
    assert "--kind 'pairs': both is a mixture" in error_of(capsys, "toy-bert", "both", "--kind", "pairs")
    assert "--held-out 0.1: split has a test split" in error_of(capsys, "toy-bert", "split", "--held-out", "0.1")


def test_datasets_of_one_name_are_all_used_and_a_name_too_long_for_a_file_is_shortened(here, capsys):
    sets = {"data": {"files": ["chats.jsonl"]}, "d" * 50: {"files": ["chats.jsonl"]}}
    (here / "config").mkdir()
    (here / "config/models.yaml").write_text("models: {}")
    (here / "config/datasets.yaml").write_text(yaml.safe_dump({"datasets": sets}))
    file = f"{'D' * 240}.jsonl"
    (here / file).write_bytes((here / "chats.jsonl").read_bytes())
    words = ("toy-bert", "data", "d" * 50, file, "--show-config")
    status, out, err = tune(capsys, *words)
    assert status == 0, err
    assert yaml.safe_load(out)["datasets"]["data-2"] == {"mix": ["data", "d" * 50, f"{'d' * 50}-2"]}
    for name in ("x" * 100, "data"):
        os.rename("toy-bert" if name.startswith("x") else "x" * 100, name)
        status, out, err = tune(capsys, name, file, *SHORT)
        assert status == 0, err


def test_an_encoder_without_a_head_is_given_one_and_that_is_said_in_one_line(here, capsys):
    from transformers import AutoModel

    AutoModel.from_pretrained("toy-bert").save_pretrained("toy-bert")
    original = Path("toy-bert/config.json").read_bytes(), Path("toy-bert/model.safetensors").read_bytes()
    status, out, _ = tune(capsys, "toy-bert", "chats.jsonl", *SHORT)
    assert status == 0 and out.count("BertModel was saved without an LM head") == 1
    assert original == (Path("toy-bert/config.json").read_bytes(), Path("toy-bert/model.safetensors").read_bytes())


def test_a_language_that_the_tokenizer_does_not_know_is_said(here, capsys):
    (here / "far.csv").write_text("question,answer\n" + "who likes the cat ?,ไม่รู้\n" * 20)
    status, out, err = tune(capsys, "toy-bert", "far.csv", *SHORT)
    assert status == 0 and "% of the tokens to learn are unknown to the tokenizer of toy-bert" in out, err
    assert "unknown to" not in tune(capsys, "toy-bert", "pairs.csv", "--output", "results/other", *SHORT)[1]


def test_what_was_tuned_can_be_tuned_further(here, capsys):
    assert tune(capsys, "toy-bert", "chats.jsonl", *SHORT)[0] == 0
    status, out, _ = tune(
        capsys, "results/chat-toy-bert/runs/chat-toy-bert/model", "pairs.csv", *SHORT, "--output", "b"
    )
    assert status == 0 and out.endswith("dllm chat b\n")


def test_an_interrupt_saves_and_says_how_to_go_on(here, capsys, monkeypatch):
    def interrupted(config, workdir, **options):
        signal.signal(signal.SIGTERM, lambda number, frame: found.append(number))
        os.kill(os.getpid(), signal.SIGINT)
        assert found == [signal.SIGTERM], "Ctrl-C does what SIGTERM does"
        (workdir / ".work" / f"{config.name}-00" / "step-2").mkdir(parents=True)
        raise follow.Interrupted(143)

    found: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(follow, "train", interrupted)
    status, out, _ = tune(capsys, "toy-bert", "chats.jsonl", *SHORT)
    assert status == 130 and "stopped and saved after step 2; the same command goes on from there:" in out
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("tyo", "chats.jsonl"), "MODEL = 'tyo' is neither a directory, nor a hub id such as"),
        (("toy-bert", "chat.jsonl"), "DATA = 'chat.jsonl' is neither a file, nor a hub dataset"),
        (("toy-bert", ""), "DATA = '' is neither a file, nor a hub dataset"),
        (("toy-bert", "no/*.jsonl"), "datasets.data.files"),
        (("toy-bert", "empty"), "a directory without files that are read; allowed: .jsonl"),
        (("toy-bert", "chats.jsonl", "notes.txt"), "holds both texts and conversations"),
        (("toy-bert", "toy-bert/vocab.bin"), "is neither a file"),
        (("toy-bert", "strange.csv"), "strange: rows with the columns titel, inhalt are of no known kind; allowed: "),
        (("toy-bert", "empty.jsonl"), "empty.jsonl: has no rows"),
        (("toy-bert", "chats.jsonl", "--kind", "poem"), "--kind 'poem': allowed: auto, preference, messages, "),
        (("toy-bert", "chats.jsonl", "--kind", "world"), "--kind 'world': allowed: auto, preference, messages, "),
        (("toy-bert", "chats.jsonl", "--subset", "en"), "--subset 'en': is for datasets of the hub, and none is named"),
        (("toy-bert", "chats.jsonl", "--rows", "9" * 20), "--rows 99999999999999999999: input should be at most"),
        (("toy-bert", "chats.jsonl", "--block-size", "9" * 20), "--block-size 99999999999999999999 is longer than"),
        (("toy-bert", "chats.jsonl", "--block-size", "65"), "--block-size 65 is longer than a row (64); lower it"),
        (("toy-bert", "chats.jsonl", "--algorithm", "ar"), "--algorithm 'ar' has no sampler"),
        (("toy-bert", "chats.jsonl", "--algorithm", "foo"), "--algorithm 'foo'; allowed: mdlm, "),
        (("toy-bert", "chats.jsonl", "--held-out", "0"), "no row is left for it; raise --held-out 0, or give"),
        (("toy-bert", "chats.jsonl", "--length", "3"), "fill the length of 3 tokens; raise --length"),
        (("toy-bert", "chats.jsonl", "--output", os.fsdecode(b"\xe9")), "this path is no text in UTF-8; rename it"),
        (
            ("toy-bert", "one.jsonl"),
            "the test split is empty after tokenizing; no row is left for it; raise --held-out",
        ),
        (("toy-bert", "chats.jsonl", "--steps", "0"), "--steps 0: input should be greater than 0"),
        (("toy-bert", "chats.jsonl", "--held-out", "2"), "--held-out 2.0: input should be less than 1"),
        (
            ("toy-bert", "chats.jsonl", "--learning-rate", "inf"),
            "--learning-rate inf: input should be a f",
        ),
        (("toy-bert", "chats.jsonl", "--length", "9999"), "--length 9999 is longer than the model allows (64)"),
        (("toy-bert", "chats.jsonl", "--steps", "3", "--epochs", "1"), "--steps and --epochs both say how long"),
        (("toy-bert", "chats.jsonl", "--prediction", "next"), "prediction = 'next' is for causal models"),
        (("chats.jsonl", "chats.jsonl"), "MODEL = 'chats.jsonl' is neither a directory"),
        (("empty", "chats.jsonl"), "no checkpoint there"),
        (("toy-bert", os.fsdecode(b"caf\xe9.jsonl")), "caf\\udce9.jsonl': this path is no text in UTF-8; rename it"),
    ],
)
def test_what_cannot_work_says_why_in_one_line(here, capsys, words, line):
    (here / "strange.csv").write_text("titel,inhalt\na,b\n")
    (here / "empty.jsonl").write_text("\n")
    (here / "one.jsonl").write_text((here / "chats.jsonl").read_text().splitlines()[0])
    (here / "empty").mkdir()
    (here / os.fsdecode(b"caf\xe9.jsonl")).write_text("{}")
    assert line in error_of(capsys, *words)


@pytest.mark.slow
def test_model_and_data_of_the_hub_are_pinned_and_an_earlier_start_is_gone_on_with_without_the_hub(tmp_path):
    from tests.hub_commands import commands_of, hub_environment
    from tests.loopback_hub import LoopbackHub

    make_model(tmp_path / "hub/models/a/toy-bert", entry_for())
    data = tmp_path / "hub/datasets/a/answers"
    data.mkdir(parents=True)
    rows = [{"instruction": f"who likes {word} ?", "input": "", "output": f"the {word}"} for word in WORDS] * 6
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "README.md").write_text("---\nlicense: mit\n---\n# Answers\n")
    words = ["tune", "a/toy-bert", "a/answers", *SHORT, "--output", str(tmp_path / "out")]
    hub = LoopbackHub(tmp_path / "hub")
    environment = hub_environment(hub.url, tmp_path / "home", HF_DATASETS_CACHE=str(tmp_path / "cache"))
    with commands_of(environment, loaded="dllm.tuning.follow datasets accelerate torch._dynamo") as run:
        with hub:
            done, missing = run(words), run(["tune", "a/nothing", "a/answers"])
        again = run(words)
    assert done[0] == 0, done[2]
    assert "24 rows look like instructions and answers (Alpaca): columns instruction, input, output" in done[1]
    assert "licence  answers: mit" in done[1]
    assert missing[0] == 2 and "a/nothing: no such model on the hub" in missing[2]
    config = yaml.safe_load((tmp_path / "out/configs/downloads/toy-bert.yaml").read_text())
    assert config["model"]["hub"] == "a/toy-bert" and len(config["model"]["revision"]) == 40
    assert again[0] == 0 and "trained already" in again[1], again[2]
