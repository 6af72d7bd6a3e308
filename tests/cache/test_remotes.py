"""Push, pull and their interruption, damage, an S3 server, and a job that waits; artifacts made up, no workflow."""

import fcntl
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from dllm.provenance import directory_digest, write_record
from tests.cache.conftest import WORK, Checkout, copy_sources, dvc_command

CACHE = "python ../../workflow/cache.py"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, commands) -> Checkout:
    """A repository without results, and an empty remote beside it."""
    return copy_sources(tmp_path_factory.mktemp("fresh") / "project", commands)


@pytest.fixture
def project(fresh, commands, tmp_path) -> Checkout:
    """A copy of both, for the configuration of DVC names the remote by its place beside it."""
    shutil.copytree(fresh.path.parent, tmp_path, symlinks=True, dirs_exist_ok=True)
    return Checkout(tmp_path / "project", commands)


def make_dataset(project: Checkout, name: str, files: int = 3) -> None:
    """An artifact of random bytes, with its record."""
    directory = project.work / "data" / name
    directory.mkdir(parents=True)
    for number in range(files):
        (directory / f"{number}.bin").write_bytes(random.Random(f"{name} {number}").randbytes(2000))
    write_record(directory, kind="data", name=name, config_digest="0" * 64, inputs={})


def track(project: Checkout, *names: str) -> None:
    for name in names:
        project.run(f"cd {WORK} && {CACHE} track data/{name}.json data/{name}")


def content(project: Checkout, name: str) -> str:
    return directory_digest(project.work / "data" / name)["digest"]


def forget(project: Checkout) -> None:
    """As a fresh clone: pointers and records, no data and no cache."""
    shutil.rmtree(project.path / ".dvc/cache")
    for directory in (project.work / "data").glob("*/"):
        shutil.rmtree(directory)


def kill_in_the_middle(project: Checkout, command: str, watched, enough: int) -> None:
    """Start a command and kill it once some files have appeared below a directory."""
    environment = os.environ | {"DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(project.path.parent / "site")}
    words = [dvc_command(), *command.split()[1:]]
    running = subprocess.Popen(
        words, cwd=project.path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while running.poll() is None and sum(len(files) for _, _, files in os.walk(watched)) < enough:
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL, "it had ended before it could be killed"


def test_a_killed_push_and_a_killed_pull_lose_nothing(project):
    make_dataset(project, "many", files=500)
    track(project, "many")
    made, remote = content(project, "many"), project.path.parent / "storage"
    kill_in_the_middle(project, "dvc push -j 1", remote, 20)
    assert sum(path.is_file() for path in remote.rglob("*")) < 500
    assert content(project, "many") == made
    project.run("dvc push -q")
    forget(project)
    kill_in_the_middle(project, "dvc pull -j 1", project.path / ".dvc/cache/files", 20)
    project.run("dvc pull -q")
    assert content(project, "many") == made
    assert "every cached object is what its name says" in project.run(f"cd {WORK} && {CACHE} verify").stdout


def test_damage_in_the_cache_is_found_and_restored(project):
    make_dataset(project, "a")
    track(project, "a")
    project.run("dvc push -q")
    made, file = content(project, "a"), project.work / "data/a/1.bin"
    times = file.stat()
    file.chmod(0o644)
    file.write_bytes(b"x" * 2000)  # the cache's own copy, for it is a link
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    file.chmod(0o444)
    found = project.run("python workflow/cache.py verify", check=False)
    assert found.returncode == 1 and ": damaged, removed\n`dvc pull` brings it back" in found.stdout
    project.run("dvc pull -q")
    assert content(project, "a") == made
    assert project.run("python workflow/cache.py verify").returncode == 0


def test_damage_in_the_remote_is_not_taken_for_data(project):
    make_dataset(project, "a")
    track(project, "a")
    project.run("dvc push -q")
    (damaged,) = [
        path
        for path in project.path.parent.glob("storage/files/md5/*/*")
        if path.read_bytes() == (project.work / "data/a/1.bin").read_bytes()
    ]
    damaged.chmod(0o644)
    damaged.write_bytes(b"x" * 2000)
    forget(project)
    done = project.run(f"cd {WORK} && {CACHE} fetch data/a.json", check=False)
    assert done.returncode == 2 and "data/a.json set aside" in done.stdout
    assert not (project.work / "data/a").exists() or not (project.work / "data/a/1.bin").exists()


def test_a_job_waits_for_another_that_holds_the_lock(project):
    make_dataset(project, "a")
    (project.path / ".dvc/tmp").mkdir(exist_ok=True)
    with open(project.path / ".dvc/tmp/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "../../workflow/cache.py", "track", "data/a.json", "data/a"]
        tools = {"PATH": f"{Path(dvc_command()).parent}:{os.environ['PATH']}", "PYTHONPATH": str(project.path)}
        waiting = subprocess.Popen(command, cwd=project.work, env=os.environ | tools)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(12)  # without waiting, DVC gives up after three seconds
        assert not (project.work / "data/a.dvc").exists()
    assert waiting.wait() == 0
    assert (project.work / "data/a.dvc").exists()


def test_tracking_again_gives_the_same_pointer(project):
    make_dataset(project, "a")
    track(project, "a")
    pointer = project.work / "data/a.dvc"
    first = pointer.read_bytes()
    track(project, "a")
    assert pointer.read_bytes() == first
    record = json.loads((project.work / "data/a.json").read_text())
    assert first.decode().endswith(f"meta:\n  record: {record['digest']}\n")


@pytest.fixture
def s3() -> str:
    """Address of an S3 server on loopback with the bucket `bucket`."""
    server = os.path.join(os.path.dirname(os.path.realpath(dvc_command())), "moto_server")
    if not os.path.exists(server):
        pytest.skip("there is no moto_server beside dvc; `make dvc` installs both")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = subprocess.Popen(
        [server, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT"), timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        running.terminate()
        running.wait()


def test_a_bucket_is_a_remote_like_any_other(project, s3):
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "k", "AWS_DEFAULT_REGION": "us-east-1"}
    make_dataset(project, "a")
    make_dataset(project, "b")
    track(project, "a", "b")
    before = {name: content(project, name) for name in ("a", "b")}
    project.run(f"dvc remote add -f -d storage s3://bucket/dllm && dvc remote modify storage endpointurl {s3}")
    project.run("dvc push -q", **keys)
    forget(project)
    done = project.run(f"cd {WORK} && {CACHE} fetch data/a.json", **keys)
    assert done.stdout == "data/a: fetched from the remote\n"
    assert content(project, "a") == before["a"] and not (project.work / "data/b").exists()
    make_dataset(project, "c")
    track(project, "c")  # and never pushed
    project.run("rm -r .dvc/cache results/paper/data/*/")
    lost = project.run(f"cd {WORK} && {CACHE} fetch data/c.json", check=False, **keys)
    assert lost.returncode == 2 and "data/c.json set aside" in lost.stdout
