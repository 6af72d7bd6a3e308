import argparse
import io

import pytest

from dllm.cli import evaluate as command
from dllm.cli.progress import ProgressLine
from dllm.config import write_when_changed

from .echo import evaluation


def parse(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


@pytest.fixture
def configs(workdir):
    return [write_when_changed(workdir / f"configs/evals/{t}.yaml", evaluation(t)) for t in ("choices", "last")]


def test_several_benchmarks_in_one_process_print_a_line_each(configs, workdir, echo, capsys):
    assert command.run(parse(*configs, "--device", "cpu")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("echo choices: acc 75.0 [53.1, 88.8] (n 20,")
    assert lines[1].startswith("echo last: acc 66.7 [39.1, 86.2] (n 12,")
    assert (workdir / "evals/echo/last.json").is_file()


def test_shards_by_hand_and_a_merge_give_the_scores(configs, workdir, echo, capsys):
    for i in range(2):
        command.run(parse(configs[0], "--shard", f"{i}/2", "--device", "cpu"))
    assert not (workdir / "evals").exists() and capsys.readouterr().out == ""
    command.run(parse(configs[0], "--merge", "--device", "cpu"))
    assert "acc 75.0" in capsys.readouterr().out


def test_a_launcher_deals_the_requests_to_its_processes(configs, workdir, echo, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):  # one after the other, so the first one need not wait
        monkeypatch.setenv("RANK", str(rank))
        command.run(parse(configs[0], "--device", "cpu"))
    assert capsys.readouterr().out.count("acc 75.0") == 1
    assert len(list((workdir / ".work/answers/echo/choices").glob("*/shard-*-of-2.jsonl"))) == 2


@pytest.mark.parametrize("shard", ["2/2", "-1/2", "x", "1", "0/0"])
def test_a_shard_that_is_none_is_refused(shard, capsys):
    with pytest.raises(SystemExit):
        parse("c.yaml", f"--shard={shard}")
    assert "is not I/N with 0 <= I < N" in capsys.readouterr().err


def test_shard_and_merge_exclude_each_other():
    with pytest.raises(ValueError, match="--shard and --merge do not go together"):
        command.run(parse("c.yaml", "--shard", "0/2", "--merge"))


def test_a_missing_config_and_an_unknown_key_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        command.run(parse(tmp_path / "none.yaml"))
    path = write_when_changed(tmp_path / "c.yaml", evaluation("choices").model_dump() | {"shotz": 1})
    with pytest.raises(ValueError, match="shotz"):
        command.run(parse(path))


def test_the_work_directory_is_above_configs(tmp_path):
    assert command.workdir_of(tmp_path / "configs/evals/a.yaml", None) == tmp_path
    assert str(command.workdir_of(tmp_path / "a.yaml", None)) == "."
    assert str(command.workdir_of(tmp_path / "configs/evals/a.yaml", "w")) == "w"


def test_without_a_terminal_progress_is_a_line_per_tenth():
    stream = io.StringIO()
    progress = ProgressLine("a b", "answer", stream)
    for answered in (0, 5, 10, 11, 100):
        progress(answered, 100)
    assert stream.getvalue() == "a b: 10 of 100 answers\na b: 100 of 100 answers\n"


def test_progress_says_speed_and_time_left_from_where_this_attempt_began(monkeypatch):
    clock, stream = iter((0, 0, 10, 80)), io.StringIO()
    monkeypatch.setattr("dllm.cli.progress.time.monotonic", lambda: next(clock))
    progress = ProgressLine("a b", "row", stream)
    for done in (4000, 4500, 4800):  # the last is no tenth, but a minute later
        progress(done, 8000)
    assert stream.getvalue().splitlines()[1:] == ["a b: 4,800 of 8,000 rows, 10 a second, 5 min left"]
