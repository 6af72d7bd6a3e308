"""Command lines of dllm against a loopback hub, in a process of their own: its address is read at import.

The process reads a JSON list of command lines and prints [status, output, error] of each as a line of JSON. What stands
first in a command line and is an object changes variables from there on; HF_ENDPOINT is then that of `HfApi` only.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def hub_environment(url: str, home: Path, **more: str) -> dict[str, str]:
    """Variables of a process that knows no hub but the one at `url`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    fixed = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    return kept | fixed | more


def run_commands(commands: list[list], environment: dict[str, str]) -> list[tuple[int, str, str]]:
    """(status, output, error) of command lines `dllm ...`, run one after another in one process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.hub_commands"],
        input=json.dumps(commands), capture_output=True, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def _main() -> None:
    time.sleep = lambda seconds: None  # the hub's client waits between its attempts
    from huggingface_hub import constants

    from dllm.cli.main import main

    told = []
    for command in json.load(sys.stdin):
        if isinstance(command[0], dict):
            os.environ.update(command.pop(0))
            constants.ENDPOINT = os.environ["HF_ENDPOINT"]
        output, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
            status = main(command)
        told.append([status, output.getvalue(), error.getvalue()])
    print("\n".join(json.dumps(line) for line in told))


if __name__ == "__main__":
    _main()
