"""Two gloo processes, as `accelerate launch` starts them: really, or forked from a test that has the packages loaded.

A launch loads PyTorch three times, which is most of its CPU seconds. `forked` leaves everything to accelerate, from
reading the file to the variables that it sets, but for the last step: where torchrun would start two interpreters, it
forks two copies of this one. `test_backends.py` has one that is real.
"""

import gc
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import accelerate.commands.launch
import torch
import torch.distributed.run
import yaml
from accelerate.state import AcceleratorState, PartialState

LAUNCHES = Path(__file__).resolve().parents[2] / "config/accelerate"
LIMIT = 240


def launched(workdir: Path, launch: str, *command, real: bool = False) -> subprocess.CompletedProcess:
    """`accelerate launch COMMAND` in two processes that a shipped launch file describes, on the CPU."""
    settings = yaml.safe_load((LAUNCHES / f"{launch}.yaml").read_text()) | {"use_cpu": True, "main_process_port": 0}
    (workdir / "launch.yaml").write_text(yaml.safe_dump(settings))
    arguments = ["--config_file", "launch.yaml", "--num_processes", "2", *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    # a driver does not survive a fork, and elsewhere these packages do not
    if not real and sys.platform == "linux" and not torch.accelerator.is_available():
        return forked(workdir, arguments, environment)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *arguments]
    return subprocess.run(launcher, cwd=workdir, env=environment, capture_output=True, text=True, timeout=LIMIT)


def forked(workdir: Path, arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    """The same from a copy of this process."""
    said = [workdir / f"launch.{name}" for name in ("out", "err")]
    launcher = os.fork()
    if not launcher:
        os.setpgid(0, 0)
        _become(lambda: _launch(arguments), workdir, said, environment)
    until = time.monotonic() + LIMIT
    while not (ended := os.waitpid(launcher, os.WNOHANG))[0]:
        if time.monotonic() > until:
            os.killpg(launcher, signal.SIGKILL)
        time.sleep(0.02)
    status = os.waitstatus_to_exitcode(ended[1])
    return subprocess.CompletedProcess(arguments, status, *(path.read_text(errors="replace") for path in said))


def _become(work, workdir: Path, said: list[Path], environment: dict[str, str]) -> NoReturn:
    """Go on as a process that has just started, do the work and end with its status."""
    status = 70
    try:
        gc.freeze()
        for number, path in enumerate(said, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(workdir)
        torch.set_num_threads(1)
        for number in (signal.SIGTERM, signal.SIGUSR1):  # a training of before has set its own
            signal.signal(number, signal.SIG_DFL)
        PartialState._reset_state()
        AcceleratorState._reset_state(True)
        status = _status(work)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _status(work) -> int:
    """The exit status of an interpreter that does this work."""
    try:
        work()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _launch(arguments: list[str]) -> None:
    torch.distributed.run.run = _run
    parser = accelerate.commands.launch.launch_command_parser()
    accelerate.commands.launch.launch_command(parser.parse_args(arguments))


def _run(args) -> None:
    """What torchrun does, for one machine: a process for each rank, and a failure if one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {}
    for rank in range(int(args.nproc_per_node)):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": args.nproc_per_node}
        own |= {"LOCAL_WORLD_SIZE": args.nproc_per_node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if not (process := os.fork()):
            os.environ.update({name: str(value) for name, value in own.items()})
            status = _status(lambda: _work(args))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        ranks[process] = rank
    failed = False
    while ranks:
        ended, status = os.wait()
        status = os.waitstatus_to_exitcode(status)
        rank = ranks.pop(ended)
        if status:
            print(f"rank {rank} ended with exit code {status}", file=sys.stderr)
            if not failed:
                signal.signal(signal.SIGALRM, lambda *_: [os.kill(process, signal.SIGKILL) for process in ranks])
                signal.alarm(20)  # the others may wait for it
            failed = True
    sys.exit(int(failed))


def _work(args) -> None:
    sys.argv[1:] = args.training_script_args
    if args.module:
        runpy.run_module(args.training_script, run_name="__main__", alter_sys=True)
    else:
        sys.argv[0] = args.training_script
        runpy.run_path(args.training_script, run_name="__main__")
