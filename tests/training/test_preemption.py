"""Preemption: whatever ends an attempt, the next one goes on from the last complete checkpoint, to the same bits."""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from functools import partial

import pytest

from dllm.cli.main import main
from dllm.config import write_when_changed
from dllm.provenance import file_lock, read_record, remove_directory
from dllm.training import trainer
from dllm.training.state import KEEP, StateDirectory
from dllm.training.trainer import train
from tests.training.conftest import metrics_of, run_config


def complete(state: StateDirectory, step: int) -> None:
    """Write a checkpoint, as the trainer does."""
    (state.begin(step) / "weights").write_text(str(step))
    state.finish(step)


def test_old_checkpoints_go_and_the_newest_stay(tmp_path):
    state = StateDirectory(tmp_path / "run")
    state.path.mkdir()
    for step in (2, 4, 6, 8):
        complete(state, step)
    assert state.steps() == [6, 8] and len(state.steps()) == KEEP
    complete(state, 8)
    assert (state.checkpoint(8) / "weights").read_text() == "8"
    assert sorted(path.name for path in state.path.iterdir()) == ["step-6", "step-8"]


def test_what_a_killed_attempt_left_half_written_is_no_checkpoint_and_goes(tmp_path):
    state = StateDirectory(tmp_path / "run")
    state.path.mkdir()
    complete(state, 2)
    (state.begin(4) / "weights").write_text("torn")
    (tmp_path / ".run.doomed").mkdir()
    assert state.steps() == [2]
    state.tidy()
    assert [path.name for path in state.path.iterdir()] == ["step-2"] and not (tmp_path / ".run.doomed").exists()


def test_a_directory_is_deleted_whole_or_not_at_all(tmp_path, monkeypatch):
    directory = tmp_path / "run"
    (directory / "step-2").mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None)  # the attempt is killed as it begins to delete
    remove_directory(directory)
    assert not directory.exists()


def hold(lock, held, seconds):
    with file_lock(lock):
        held.set()
        time.sleep(seconds)


def test_a_second_attempt_waits_and_a_killed_one_lets_go(tmp_path, capfd):
    lock = tmp_path / "state" / "lock"
    context = multiprocessing.get_context("fork")
    held = context.Event()
    other = context.Process(target=hold, args=(lock, held, 600))
    other.start()
    assert held.wait(60)
    threading.Timer(0.5, other.kill).start()
    started = time.monotonic()
    with file_lock(lock) as waited:
        assert waited and time.monotonic() - started > 0.4
    assert "another attempt is at work here; waiting" in capfd.readouterr().out
    other.join()
    with file_lock(lock) as waited:
        assert not waited


def test_whoever_waited_for_a_deleted_lock_makes_a_new_one(tmp_path):
    lock = tmp_path / "state" / "lock"
    order = []

    def second():
        with file_lock(lock):
            order.append(("second", lock.exists()))

    with file_lock(lock):
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(0.3)
        shutil.rmtree(lock.parent)
        order.append("first")
    waiting.join(10)
    assert order == ["first", ("second", True)]


def test_an_attempt_that_waited_takes_the_result_of_the_one_before(workdir, monkeypatch, capsys):
    """An orphan of an earlier workflow finishes the run while the next workflow waits for it."""
    config = run_config()
    orphan = threading.Event()
    step = trainer._Run._step

    def slow(self, number):
        orphan.set()
        time.sleep(0.2)
        return step(self, number)

    monkeypatch.setattr(trainer._Run, "_step", slow)
    first = threading.Thread(target=train, args=(config, workdir), kwargs={"quiet": True})
    first.start()
    assert orphan.wait(60)
    monkeypatch.setattr(trainer, "_train", lambda *a: pytest.fail("trained again"))
    train(config, workdir, quiet=True, replace=True)
    first.join()
    assert "the attempt before this one has finished it" in capsys.readouterr().out
    assert (workdir / "runs/run/model/model.safetensors").exists()


@pytest.mark.slow
def test_a_training_killed_at_twenty_moments_ends_with_the_same_bits(workdir):
    """SIGKILL while it loads, steps, evaluates, writes a checkpoint, prunes old ones, or puts the artifact in place."""
    train(run_config("warm", steps=1), workdir, quiet=True)
    started = time.monotonic()
    train(run_config("whole", evaluations=6), workdir, quiet=True)
    seconds = time.monotonic() - started
    whole = metrics_of(workdir, "whole"), (workdir / "runs/whole/model/model.safetensors").read_bytes()
    config, moments, kills = run_config("cut", evaluations=6), random.Random(1), 0
    attempt = partial(multiprocessing.get_context("fork").Process, target=train, args=(config, workdir))
    while kills < 20:
        running = attempt(kwargs={"quiet": True, "replace": True})
        running.start()
        running.join(seconds * moments.uniform(0.1, 1.1))
        if running.is_alive():
            running.kill()
            kills += 1
        running.join()
        assert running.exitcode in (0, -signal.SIGKILL)
    train(config, workdir, quiet=True, replace=True)
    assert (metrics_of(workdir, "cut"), (workdir / "runs/cut/model/model.safetensors").read_bytes()) == whole
    assert not list((workdir / ".work").iterdir())


@contextlib.contextmanager
def small_disk(place, mebibytes):
    """A file system of its own of a few MiB, so that it can really be full."""
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("a full disk needs a file system of its own, and mounting one needs root")
    size = f"size={mebibytes}m"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", place], capture_output=True).returncode:
        pytest.skip("a full disk needs a file system of its own, which cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.parametrize(("free_kib", "evaluations", "what"), [
    (40, 3, "the checkpoint of step 2"), (600, 3, "the checkpoint of step 4"), (40, 1, "the artifact"),
])  # fmt: skip
def test_a_full_disk_is_one_line_damages_nothing_and_the_run_goes_on(
    workdir, tmp_path, capfd, free_kib, evaluations, what
):
    """With room again, the run ends as if it had never been cut off."""
    config = run_config(evaluations=evaluations)
    train(config, workdir, quiet=True)
    whole = metrics_of(workdir, "run"), read_record(workdir / "runs/run.json")
    with small_disk(tmp_path / "disk", 16) as disk:
        for name in ("downloads", "data"):
            shutil.copytree(workdir / name, disk / name)
        command = ["train", str(write_when_changed(disk / "run.yaml", config)), "--workdir", str(disk), "--quiet"]
        room = os.statvfs(disk)
        (disk / "ballast").write_bytes(bytes(room.f_bavail * room.f_frsize - free_kib * 1024))
        capfd.readouterr()
        assert main(command) == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
        assert line.startswith(f"dllm train: error: run: {what} could not be written to {disk}")
        assert "make room and start the same command again" in line
        assert not (disk / "runs/run.json").exists()
        (disk / "ballast").unlink()
        assert main(command) == 0
        assert (metrics_of(disk, "run"), read_record(disk / "runs/run.json")) == whole
        assert not list((disk / ".work").iterdir())
