"""`dllm chat --server`: the terminal, with a model that is somewhere else."""

import http.server
import io
import json
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from dllm.chat.remote import remote
from dllm.chat.session import Conversation
from dllm.cli.chat import Chat, Live, Plain
from dllm.cli.main import main
from dllm.config import overlaid
from tests.serving.serial import SerialEngine
from tests.serving.servers import running, served

KEY = "0123456789abcdef"


@pytest.fixture
def typed(monkeypatch):
    """Feed standard input."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def session_of(talker, **changes):
    session = talker.session()
    return type(session)(overlaid(session.settings, changes), session.context, sidecar=session.sidecar)


def test_a_piped_chat_prints_the_same_lines(url, typed, capsys):
    typed("What is the capital of France?\n\nAnd Italy?\n")
    assert main(["chat", "--server", url]) == 0
    lines = ["You: What is the capital of France?", "Bot: Paris.", "You: And Italy?", "Bot: Rome."]
    assert capsys.readouterr().out.splitlines() == lines


def test_once_prints_the_bare_answer_of_the_model_that_is_named(url, capsys):
    assert main(["chat", "--server", f"{url}/v1/", "toy", "--steps", "8", "--once", "Who are you?"]) == 0
    assert capsys.readouterr().out == "I am a toy.\n"


def test_on_a_terminal_the_canvas_is_drawn_until_the_answer_stands(url):
    console, ticks, talker = (
        Console(file=io.StringIO(), force_terminal=True, width=60),
        iter(range(1000)),
        remote(url, None, None),
    )
    chat = Chat(talker, session_of(talker, block_size=8), Live(console, talker, clock=lambda: next(ticks)))
    assert chat.talk(iter(["Who are you?"])) == 0
    screen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    assert "····" in screen and "Bot: I am a toy.\n" in screen and "tokens/s" in screen
    last = screen[screen.rindex("Bot:") :]
    assert "∎" not in last and "[" not in last
    assert chat.session.conversation == Conversation("", (("Who are you?", "I am a toy."),))


def test_the_oldest_turns_are_left_out_when_the_context_is_full(url, capsys):
    talker = remote(url, None, None)
    long = Conversation("", tuple(("Who are you?", "I am a toy.") for _ in range(4)))
    session = talker.session()
    chat = Chat(talker, type(session)(session.settings, session.context, long), Plain())
    for _ in range(3):
        chat.answer("Who are you?")
    assert capsys.readouterr().err.count("oldest turns are forgotten") == 1
    assert len(chat.session.conversation.turns) < 4
    with pytest.raises(ValueError, match="context of 64 tokens"):
        chat.answer("Hello " * 80)


def test_an_interrupt_frees_the_rows(taught, capsys):
    engine = SerialEngine(taught, slow=0.05)

    class Impatient(Plain):
        def answer(self, states):
            next(states)
            states.close()
            raise KeyboardInterrupt

    with running([served(taught, engine=engine)]) as server:
        talker = remote(server.url, None, None)
        chat = Chat(talker, talker.session(), Impatient())
        chat.answer("Hello!")
        assert "stopped" in capsys.readouterr().err and chat.session.conversation == Conversation()
        for _ in range(200):
            if engine.stats().cancelled:
                break
            threading.Event().wait(0.05)
        assert engine.stats().cancelled == 1


def test_the_key_comes_from_a_file(taught, tmp_path, capsys):
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "key").chmod(0o600)
    with running([served(taught)], key=KEY.encode()) as server:
        assert main(["chat", "--server", server.url, "--once", "Hello!"]) == 2
        assert "no valid API key" in capsys.readouterr().err
        words = ["chat", "--server", server.url, "--api-key-file", str(tmp_path / "key"), "--once", "Who are you?"]
        assert main(words) == 0
        captured = capsys.readouterr()
        assert captured.out == "I am a toy.\n" and captured.err == ""
        (tmp_path / "key").chmod(0o644)
        assert main(words) == 0 and "chmod 600" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, line",
    [
        (["--server", "http://127.0.0.1:1"], "is dllm serve running there?"),
        (["--server", "127.0.0.1:8000"], "give an address such as"),
        (["--server", "http://[::1"], "--server http://[::1: give an address such as"),
        (["--server", "http://127.0.0.1:99999"], "is dllm serve running there?"),
        (["--server", "URL", "other"], "'other' is not a model of"),
        (["--server", "URL", "--device", "cpu"], "--device cpu is for a model of this process"),
        (["--api-key-file", "x"], "--api-key-file is for --server"),
        (["--server", "URL", "--api-key-file", "/no/such"], "No such file"),
        (["--server", "URL", "--steps", "0"], "--steps 0"),
    ],
)
def test_a_mistake_is_one_line(url, words, line, typed, capsys):
    typed("Hello!\n")
    assert main(["chat", *(url if word == "URL" else word for word in words)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("dllm chat: error: ") and line in captured.err and captured.err.count("\n") == 1


@contextmanager
def pretending(models: bytes, stream: bytes):
    """A server that answers with these bytes."""

    class Pretends(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + models)

        def do_POST(self):
            self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + stream)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pretends) as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


def test_a_server_of_something_else_is_one_line(capsys):
    for models in (b"<html>", b"[]", b'{"data": []}', b'{"data": [{"id": "gpt", "object": "model"}]}'):
        with pretending(models, b"") as url:
            assert main(["chat", "--server", url, "--once", "Hello!"]) == 2
            assert "this is not a server of dllm" in capsys.readouterr().err


def test_a_stream_that_breaks_off_is_one_line_and_control_characters_stay_out_of_the_terminal(taught, url, capsys):
    from tests.serving.servers import ask

    models = ask(url, "/v1/models").text.encode()
    chunk = {"choices": [{"index": 0, "delta": {"content": "a\x1b[2Jb\x9bc"}, "finish_reason": None}]}
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    whole = b"".join(b"data: " + json.dumps(part).encode() + b"\n\n" for part in (chunk, end))
    with pretending(models, whole) as pretended:
        assert main(["chat", "--server", pretended, "--once", "Hello!"]) == 0
        assert capsys.readouterr().out == "a\ufffd[2Jb\ufffdc\n"
    for broken in (
        b"",
        whole[:40],
        b"data: {\n\n",
        b'data: {"choices": 3}\n\n',
        b'data: {"error": {"message": "full"}}\n\n',
    ):
        with pretending(models, broken) as pretended:
            assert main(["chat", "--server", pretended, "--once", "Hello!"]) == 2
            captured = capsys.readouterr()
            assert captured.err.startswith("dllm chat: error: ") and captured.err.count("\n") == 1


def test_no_torch_is_needed_to_talk_to_a_server(url):
    code = (
        "import sys; from dllm.cli.main import main; "
        f"status = main(['chat', '--server', '{url}', '--once', 'Who are you?']); "
        "assert not {'torch', 'transformers', 'starlette'} & set(sys.modules), 'too much'; sys.exit(status)"
    )
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "I am a toy.\n"), done.stderr
