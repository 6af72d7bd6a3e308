"""`dllm serve` as a process: what it prints, how it ends, what it refuses to begin with."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from dllm.cli.main import main
from dllm.serving.app import make_server
from dllm.serving.run import bound, run_server
from tests.serving.servers import OWN, TURNS, ask, process
from tests.serving.test_faults import becomes
from tests.toys import save_toy
from tests.warm_programs import EARLY, warm_interpreter

CHAT = "/v1/chat/completions"
LONG = {"model": "toy", "messages": TURNS, "max_tokens": 40, "block_size": 1, "n": 60, "temperature": 1.0}


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Iterator[Path]:
    """A Python that has loaded what a server loads; the first test takes a real one."""
    real, home, loaded = (
        Path(sys.executable),
        tmp_path_factory.mktemp("commands"),
        ["dllm.language_model", "dllm.serving.run"],
    )
    with warm_interpreter(real, [real], home, os.environ | OWN, EARLY, loaded) as (copy,):
        yield copy


def asks(url: str, body) -> threading.Thread:
    """A request whose answer may never come."""

    def ask_once() -> None:
        try:
            ask(url, CHAT, body)
        except (OSError, http.client.HTTPException):
            pass

    thread = threading.Thread(target=ask_once)
    thread.start()
    return thread


def is_running(url: str) -> bool:
    return 'dllm_running_rows{model="toy"} 0.0' not in ask(url, "/metrics").text


def files_below(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_asked_to_stop_it_finishes_what_runs_and_refuses_what_is_new(checkpoint):
    with process(str(checkpoint), "--port", "0", "--device", "cpu") as (server, url), ThreadPoolExecutor() as pool:
        running = [pool.submit(ask, url, CHAT, LONG | {"stream": stream}) for stream in (False, True)]
        assert becomes(partial(is_running, url))
        server.send_signal(signal.SIGTERM)
        assert becomes(lambda: ask(url, "/ready").status == 503)
        refused = ask(url, CHAT, LONG)
        assert refused.status == 503 and refused.error["code"] == "shutting_down" and "retry-after" in refused.headers
        assert ask(url, "/health").status == 200
        whole, streamed = (answer.result() for answer in running)
        assert whole.status == 200 and len(whole.json["choices"]) == 60
        assert streamed.text.count('"finish_reason":"') == 60 and streamed.text.endswith("data: [DONE]\n\n")
        out, err = server.communicate(timeout=60)
        assert server.returncode == 0, err
        assert "finishing 2 requests" in err and "Traceback" not in err


@pytest.mark.slow
def test_idle_it_stops_at_once_also_with_open_connections(checkpoint, python):
    with process(str(checkpoint), "--port", "0", "--device", "cpu", python=python) as (server, url):
        port = int(url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as half:
            half.sendall(b"POST / HTTP/1.1\r\n")
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=60)
        assert server.returncode == 0


@pytest.mark.slow
def test_asked_twice_it_stops_with_what_runs(checkpoint, python):
    with process(str(checkpoint), "--port", "0", "--device", "cpu", python=python) as (server, url):
        asking = asks(url, LONG | {"stream": True})
        assert becomes(partial(is_running, url))
        server.send_signal(signal.SIGTERM)
        assert becomes(lambda: ask(url, "/ready").status == 503)
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
        asking.join(60)
        assert server.returncode is not None


@pytest.mark.slow
def test_killed_and_started_again_it_answers_the_same_and_no_file_has_changed(checkpoint, python, tmp_path):
    before, answers = files_below(checkpoint), []
    for _ in range(2):
        with process(str(checkpoint), "--port", "0", "--device", "cpu", cwd=tmp_path, python=python) as (server, url):
            answers.append(ask(url, CHAT, {"model": "toy", "messages": TURNS}).json["choices"])
            asking = asks(url, LONG)
            assert becomes(partial(is_running, url))
            server.kill()
            server.communicate()
            asking.join(60)
    assert answers[0] == answers[1]
    assert files_below(checkpoint) == before and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_models_are_served_side_by_side_and_warned_of_where_all_can_ask(checkpoint, python, tmp_path):
    other = save_toy(tmp_path / "other", run="other", length=64)
    (tmp_path / "key").write_text("0123456789abcdef")
    (tmp_path / "key").chmod(0o644)
    words = [str(checkpoint), str(other), "--port", "0", "--device", "cpu", "--host", "0.0.0.0"]
    with process(*words, "--api-key-file", str(tmp_path / "key"), python=python) as (server, url):
        local = url.replace("0.0.0.0", "127.0.0.1")
        key = {"authorization": "Bearer 0123456789abcdef"}
        assert [one["id"] for one in ask(local, "/v1/models", headers=key).json["data"]] == ["toy", "other"]
        for model in ("toy", "other"):
            said = ask(local, CHAT, {"model": model, "messages": TURNS, "max_tokens": 4, "block_size": 4}, headers=key)
            assert said.status == 200 and said.json["model"] == model
        assert ask(local, "/v1/models").status == 401
        server.send_signal(signal.SIGTERM)
        _, err = server.communicate(timeout=60)
    assert err.count("warning") == 2 and "with the key" in err and "chmod 600" in err


def test_what_cannot_be_served_is_one_line(checkpoint, tmp_path, capsys):
    (tmp_path / "short").write_text("secret")
    (tmp_path / "words").write_text("a key of several words")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for words, line in (
            (["--port", str(taken.getsockname()[1])], "in use"),
            (["--port", "99999"], "--port 99999"),
            (["--port", "-1"], "--port -1"),
            (["--host", "no such host"], "--host no such host"),
            (["--api-key-file", str(tmp_path / "none")], "No such file"),
            (["--api-key-file", str(tmp_path / "short")], "openssl rand"),
            (["--api-key-file", str(tmp_path / "words")], "openssl rand"),
            (["--queue", "0"], "--queue 0: give a finite number above 0"),
            (["--time-limit", "-3"], "--time-limit -3.0"),
            (["--time-limit", "nan"], "--time-limit nan"),
            (["--time-limit", "inf"], "--time-limit inf"),
            (["--device", "gpu"], "--device gpu"),
        ):
            assert main(["serve", str(checkpoint), "--port", "0", *words]) == 2, words
            said = [part for part in capsys.readouterr().err.splitlines() if "loading" not in part]
            assert len(said) == 1 and said[0].startswith("dllm serve: error: ") and line in said[0], (words, said)
    assert main(["serve", str(tmp_path / "none"), "--port", "0"]) == 2


def test_of_two_that_take_a_place_at_once_the_later_says_so_and_names_no_address():
    first = bound("127.0.0.1", 0)
    port = first.getsockname()[1]
    with closing(first), closing(bound("127.0.0.1", port)) as second:
        first.listen()
        with pytest.raises(ValueError, match=f"--port {port}: Address already in use; take another port"):
            run_server(make_server([]), second, grace=1.0, ready=pytest.fail)


def test_without_its_packages_it_says_how_to_get_them(checkpoint):
    code = (
        "import sys; sys.modules['starlette'] = None; from dllm.cli.main import main; "
        f"assert main(['serve', '--help']) == 0; sys.exit(main(['serve', {str(checkpoint)!r}]))"
    )
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "pip install 'dllm[serve]'" in done.stderr
