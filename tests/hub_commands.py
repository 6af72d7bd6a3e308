"""Command lines of dllm against a loopback hub, in a process of their own: its address is read at import.

The process reads command lines, each a line of JSON, and prints [status, output, error] of each as a line of JSON. What
stands first in a command line and is an object changes variables from there on; HF_ENDPOINT then of `HfApi` alone.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parent.parent


def hub_environment(url: str, home: Path, **more: str) -> dict[str, str]:
    """Variables of a process that knows no hub but the one at `url`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    fixed = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    return kept | fixed | more


Told = tuple[int, str, str]
"""Status, output and error of a command."""


@contextmanager
def commands_of(environment: dict[str, str], *, loaded: str = "") -> Iterator[Callable[[list], Told]]:
    """Runs command lines `dllm ...` one after another in one process, which has loaded its packages once.

    loaded: modules that it loads first; then every command runs in a copy of it, as in a process of its own.
    """
    command = [sys.executable, "-m", "tests.hub_commands", *loaded.split()]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, **pipes, stderr=errors, text=True, env=environment, cwd=ROOT) as process,
    ):

        def run(words: list) -> Told:
            process.stdin.write(json.dumps(words) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            errors.seek(0)
            assert answer, errors.read()[-4000:]
            return tuple(json.loads(answer))

        yield run
        process.stdin.close()


def run_commands(commands: list[list], environment: dict[str, str]) -> list[Told]:
    """(status, output, error) of command lines `dllm ...`, run one after another in one process."""
    with commands_of(environment) as run:
        return [run(words) for words in commands]


def _main() -> None:
    time.sleep = lambda seconds: None  # the hub's client waits between its attempts
    loaded = [import_module(name) for name in sys.argv[1:]]
    for line in sys.stdin:
        if loaded and (copy := os.fork()):
            assert os.waitpid(copy, 0)[1] == 0
            continue
        print(json.dumps(_told(json.loads(line))), flush=True)
        if loaded:
            os._exit(0)


def _told(words: list) -> Told:
    from huggingface_hub import constants

    from dllm.cli.main import main

    if isinstance(words[0], dict):
        os.environ.update(words.pop(0))
        constants.ENDPOINT = os.environ["HF_ENDPOINT"]
    output, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        status = main(words)
    return status, output.getvalue(), error.getvalue()


if __name__ == "__main__":
    _main()
