"""Stand-ins for programs do what the programs do: else tests that use them would test something else."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.warm_programs import interpreter_of, warm_interpreter

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stand-ins are forked, on Linux only")

SCRIPT = f"""#!{sys.executable}
import os, subprocess, sys
import own
with open("parent", "w") as file:
    print(os.getppid(), file=file)
print(sys.argv, os.getcwd(), os.environ["ASKED"], own.VALUE, __name__, sys.stdin.read(), flush=True)
print("failed", file=sys.stderr)
if sys.argv[1:] == ["again"]:
    subprocess.run([sys.executable, sys.argv[0], "deeper"])
if sys.argv[1:] == ["killed"]:
    os.kill(os.getpid(), 9)
if sys.argv[1:] == ["raised"]:
    raise LookupError
sys.exit(3)
"""


def said(directory: Path, *command, **more: str) -> tuple[int, str, str]:
    """Exit status and output of a command, started in a directory with a module that it uses."""
    environment = {"ASKED": "yes", "PYTHONPATH": str(directory), "PATH": "/usr/bin:/bin"} | more
    done = subprocess.run(command, cwd=directory, env=environment, input="in", capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr.splitlines()[-1] if done.stderr else ""


def parent(directory: Path) -> int:
    """The process that started the last script there."""
    return int((directory / "parent").read_text())


def test_a_stand_in_does_what_its_program_does(tmp_path):
    program, python, commands = tmp_path / "program", Path(sys.executable), tmp_path / "commands"
    program.write_text(SCRIPT)
    program.chmod(0o755)
    assert interpreter_of(program) == python
    commands.mkdir()
    with warm_interpreter(python, [python, program], commands, {}, ("EARLY",)) as (python_copy, copy):
        for value in ("one", "two"):  # a module of a checkout is never that of another
            directory = tmp_path / value
            directory.mkdir()
            (directory / "own.py").write_text(f"VALUE = {value!r}")
            for words in ((), ("a b", "--c"), ("again",), ("killed",), ("raised",)):
                assert said(directory, copy, *words) == said(directory, program, *words)
            assert said(directory, python_copy, "-m", "own") == (0, "", "")
            assert said(directory, python_copy, program)[:2] == said(directory, program)[:2]
        said(directory, copy)
        assert parent(directory) != os.getpid()  # but that of all copies
        said(directory, copy, EARLY="another")
        assert parent(directory) == os.getpid()
    assert said(directory, copy) == said(directory, program)
    assert parent(directory) == os.getpid()


WAITS = f"""#!{sys.executable}
import os, signal, sys
if sys.argv[1:] == ["finishes"]:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
print(os.getpid(), flush=True)
signal.pause()
"""


def test_what_ends_a_stand_in_ends_its_copy(tmp_path):
    program = tmp_path / "program"
    program.write_text(WAITS)
    program.chmod(0o755)
    (tmp_path / "commands").mkdir()
    with warm_interpreter(Path(sys.executable), [program], tmp_path / "commands", {}) as (copy,):
        for words, number in (
            ((), signal.SIGTERM),
            (("finishes",), signal.SIGTERM),
            ((), signal.SIGINT),
            ((), signal.SIGKILL),
        ):
            ended = []
            for command in (copy, program):
                running = subprocess.Popen([command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                there = Path("/proc") / running.stdout.readline().strip()
                running.send_signal(number)
                _, wrong = running.communicate(timeout=60)
                ended.append((running.returncode, wrong.splitlines()[-1:]))
                while there.exists():
                    pass
            assert ended[0] == ended[1]
