import os
import socket
import time

import pytest

from dllm.evaluation import sandbox
from dllm.evaluation.sandbox import ISOLATION, Outcome, isolation, run_program, run_programs

needs_namespaces = pytest.mark.skipif("namespaces" not in isolation(), reason="the kernel makes no namespaces for us")
needs_landlock = pytest.mark.skipif("landlock" not in isolation(), reason="the kernel has no landlock")
needs_one = pytest.mark.skipif(not isolation(), reason="the kernel confines nothing")


@pytest.fixture(params=["as the kernel allows", "without the kernel's help"])
def everywhere(request, monkeypatch):
    """A test runs with all that the kernel can do, and with nothing of it."""
    if request.param == "without the kernel's help":
        monkeypatch.setattr(sandbox, "ISOLATION", ())
    return request.param


def reason(source: str, **limits) -> str:
    outcome = run_program(source, **limits)
    assert not outcome.passed
    return outcome.reason


# --- passing and failing


def test_a_program_passes_if_its_last_statement_is_reached(everywhere):
    assert run_program("def double(x):\n    return 2 * x\n\nassert double(2) == 4") == Outcome(True, "passed")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("assert 1 == 2, 'one is\\nnot two'", "AssertionError: one is not two"),
        ("def f(:", "SyntaxError: invalid syntax (<program>, line 1)"),
        ("undefined", "NameError: name 'undefined' is not defined"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("input()", "EOFError: EOF when reading a line"),
        ("raise ValueError(object())", "ValueError: <object object>"),
        ("import os; raise ValueError(os.getcwd())", "ValueError: ."),
        ("class E(Exception):\n def __str__(self): raise self\nraise E", "E"),
        ("a\x00b", "SyntaxError: source code string cannot contain null bytes"),
        ("'\ud800'", "UnicodeEncodeError"),
    ],
)
def test_a_failure_has_a_reason_of_one_line_that_is_the_same_in_every_run(source, why):
    assert reason(source).startswith(why)
    assert reason(source) == reason(source)


def test_a_long_reason_is_cut():
    assert len(reason("raise ValueError('a' * 10**6)")) == 200


def test_neither_leaving_early_nor_printing_is_a_success(everywhere):
    left = "left by sys.exit before its last statement"
    assert reason("import sys; sys.exit(0)\nassert False") == left
    assert reason("exit()\nassert False") == left
    assert reason("import os; os._exit(0)\nassert False") == "ended before its last statement (exit status 0)"
    said = '{"passed": true, "reason": "passed", "isolation": []}'
    assert reason(f"print('{said}', flush=True)\nassert False") == "AssertionError"
    everything = f"import os\nfor i in range(64):\n  try: os.write(i, b'{said}')\n  except OSError: pass\nos._exit(0)"
    assert "ended before" in reason(everything)


def test_a_fork_that_reaches_the_end_does_not_pass_for_the_program(everywhere):
    assert reason("import os\nif os.fork(): os.wait(); raise ValueError('parent')") == "ValueError: parent"


def test_an_exit_handler_and_a_thread_do_not_hold_the_program_up(everywhere):
    source = "import atexit, threading, time\natexit.register(time.sleep, 99)\n"
    assert run_program(source + "threading.Thread(target=time.sleep, args=(99,)).start()", seconds=1).passed


# --- limits


def test_an_endless_loop_is_ended_by_its_processor_time(everywhere, monkeypatch):
    monkeypatch.setattr(sandbox, "WALL_PER_CPU", 60)  # however busy the machine is
    assert reason("while True: pass", seconds=1) == "timed out after 1 s"
    if everywhere == "as the kernel allows":  # where it may be the first process of a namespace, which signals spare
        deaf = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
        assert reason(deaf, seconds=1) == "timed out after 1 s"


def test_waiting_is_ended_by_the_clock(everywhere, monkeypatch):
    monkeypatch.setattr(sandbox, "WALL_PER_CPU", 1)
    assert reason("import time; time.sleep(99)", seconds=1) == "timed out after 1 s on the clock"
    assert "on the clock" in reason("import os\nos.fork() and os.wait()\nimport time; time.sleep(99)", seconds=1)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="RLIMIT_AS is not kept by every system")
def test_memory_is_limited(everywhere):
    assert reason("x = bytearray(1 << 30)", memory_mib=256) == "memory limit (256 MiB)"
    assert run_program("x = bytearray(1 << 26)", memory_mib=256).passed


@needs_one
def test_a_fork_bomb_runs_into_the_limit_on_processes(monkeypatch):
    """Each process forks until it may not; without isolation the limit counts all processes of the user."""
    monkeypatch.setattr(sandbox, "PROCESSES", 20)
    monkeypatch.setattr(sandbox, "WALL_PER_CPU", 2)
    bomb = "import os, time\nfor _ in range(9):\n  os.fork()\ntime.sleep(1)"  # 512 processes at most
    assert "BlockingIOError" in reason(bomb, seconds=1)


def test_nothing_outlives_a_program(everywhere):
    """A grandchild in a session of its own, which a killed process group leaves alone."""
    mark = f"{os.getpid()}{time.time_ns()}"
    start = f"os.setsid()\n  os.execl('/bin/sh', 'sh', '-c', 'sleep 99; : {mark}')"
    child = f"import os, time\nif os.fork() == 0:\n  {start}\ntime.sleep(0.1)"
    orphan = f"import os, time\nif os.fork() == 0:\n  if os.fork(): os._exit(0)\n  {start}\nos.wait()\ntime.sleep(0.1)"
    assert run_program(child, seconds=1).passed
    assert run_program(orphan, seconds=1).passed
    assert mark not in command_lines()


def command_lines() -> str:
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        try:
            with open(f"/proc/{name}/cmdline", errors="replace") as file:
                found.append(file.read())
        except OSError:
            pass
    return "\n".join(found)


# --- what lies outside


def test_a_program_begins_in_an_empty_directory_that_is_gone_afterwards(everywhere, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))  # no other test's programs begin there
    where = "import os; assert not os.listdir('.'); open('a', 'w').write('x'); assert os.listdir('.') == ['a']"
    assert run_program(where).passed
    run_program("import os; os.mkdir('d'); open('d/f', 'w').close(); os.chmod('d', 0)")
    assert not os.listdir(tmp_path)


def test_a_file_has_a_largest_size(everywhere, monkeypatch):
    monkeypatch.setattr(sandbox, "FILE_MIB", 1)
    assert "File too large" in reason("f = open('a', 'wb')\nfor _ in range(3): f.write(bytes(1 << 20))")


@needs_landlock
def test_no_file_outside_can_be_written_or_read(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("token")
    os.chmod(tmp_path, 0o777)
    os.chmod(secret, 0o666)
    assert "Permission denied" in reason(f"open({str(secret)!r}).read()")
    assert "Permission denied" in reason(f"open({str(secret)!r}, 'a')")
    assert "Permission denied" in reason(f"open({str(tmp_path / 'new')!r}, 'w')")
    assert "denied" in reason(f"import os; os.remove({str(secret)!r})").lower()
    assert secret.read_text() == "token"


def test_environment_arguments_and_input_are_made_up(everywhere, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    known = (
        "import os, sys\nassert 'hf_secret' not in str(dict(os.environ)) + str(sys.argv)\nassert os.read(0, 9) == b''"
    )
    assert run_program(known).passed


@needs_one
def test_the_environment_of_the_evaluation_cannot_be_read_from_its_processes(monkeypatch):
    """What the secret's holder is: this very process, named by its number."""
    mine = f"import os\ntext = b''\nfor pid in ({os.getpid()}, {os.getppid()}, os.getppid(), 1):\n"
    mine += "  try: text += open(f'/proc/{pid}/environ', 'rb').read()\n  except OSError: pass\nassert not text, text"
    assert run_program(mine).passed


def test_signals_reach_nobody_outside(everywhere):
    for call in (f"kill({os.getpid()}, 0)", f"kill({os.getppid()}, 0)", "kill(os.getppid(), 9)", "killpg(1, 9)"):
        assert reason(f"import os; os.{call}").split(":")[0] in ("PermissionError", "ProcessLookupError")


def test_there_is_no_network(everywhere):
    """A server of this machine is never called, neither by name nor by number."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]
        for call in (
            f"socket.create_connection(('127.0.0.1', {port}), 1)",
            f"socket.create_connection(('localhost', {port}), 1)",
            f"socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))\nassert 0",
        ):
            assert not run_program(f"import socket\n{call}").passed
        fetch = f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}', timeout=1)"
        assert not run_program(fetch).passed
        with pytest.raises(TimeoutError):
            server.accept()


@needs_namespaces
def test_a_program_sees_its_own_processes_only():
    assert run_program("import os; assert os.getpid() < 5").passed


# --- several


def test_outcomes_come_in_the_order_of_the_programs_and_are_told_as_they_come():
    told = []
    sources = [f"import time; time.sleep({0.2 if i == 0 else 0}); assert {i} % 2" for i in range(6)]
    outcomes = run_programs(sources, workers=3, done=lambda i, outcome: told.append((i, outcome.passed)))
    assert [outcome.passed for outcome in outcomes] == [False, True] * 3
    assert told == [(i, outcome.passed) for i, outcome in enumerate(outcomes)]


def test_the_order_of_a_set_is_the_same_in_every_run():
    shown = "raise ValueError(list({'a', 'b', 'c', 'd', 'e', 'f'}))"
    assert reason(shown) == reason(shown)


@pytest.mark.parametrize("limits", [{"seconds": 0}, {"seconds": float("nan")}, {"memory_mib": -1}])
def test_a_limit_that_means_nothing_is_one_line(limits):
    (name,) = limits
    with pytest.raises(ValueError, match=f"sandbox: {name} = .* is not a limit; choose a positive number"):
        run_program("pass", **limits)


def test_isolation_is_a_part_of_what_is_asked_for():
    assert set(isolation()) <= set(ISOLATION)
