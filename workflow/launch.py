"""Run `dllm` on all that a job was given: one process per accelerator, on one machine or on several.

    python workflow/launch.py --with config/accelerate/ddp.yaml --nodes 4 --gpus 8 --cpus 64 -- train CONFIG

The same command runs everywhere. In a Slurm job of several machines it starts itself once on each of them (`srun`), and
there finds out who is who; elsewhere it uses the machine it is on. Machines and accelerators that were not granted are
done without: their number does not change an experiment. How many processes there are to be is left in DLLM_PROCESSES,
so that a run refuses to start in a smaller world.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import yaml

from dllm.surroundings import check_surroundings

PLAIN = ("NO", "MULTI_GPU")
"""What accelerate calls one process and data parallelism; one process of these needs no launcher."""

PORTS = range(20000, 32000)
"""Where the processes of a job meet: below the ports that the system hands out by itself."""


def main() -> int:
    """Turn this process into the launcher, or into `dllm` itself where one process is enough."""
    args = parser().parse_args()
    try:
        check_surroundings()
        command, environment = plan(args, dict(os.environ))
    except ValueError as error:
        print(f"launch: error: {error}", file=sys.stderr)
        return 2
    os.execvpe(command[0], command, os.environ | environment)


def parser() -> argparse.ArgumentParser:
    """The arguments of this script."""
    found = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    found.add_argument("--with", dest="config", required=True, help="accelerate configuration")
    found.add_argument("--nodes", type=int, default=1, help="machines of the job")
    found.add_argument("--gpus", type=int, default=0, help="accelerators of the job on each machine")
    found.add_argument("--cpus", type=int, default=1, help="cores of the job on each machine")
    found.add_argument("--on-each-node", action="store_true", help=argparse.SUPPRESS)
    found.add_argument("command", nargs="+", help="what follows `dllm`, after --")
    return found


def plan(args: argparse.Namespace, environment: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """The command that takes over, and what it finds in its environment besides.

    environment: that of this process. Raises ValueError, one line, if there is no accelerator where one is needed.
    """
    if args.on_each_node:
        nodes = int(environment["SLURM_STEP_NUM_NODES"])
    else:
        nodes = 1 if args.nodes == 1 else min(args.nodes, granted(environment))
        if nodes > 1:
            return on_each_node(args, nodes), {}
    settings = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))
    on_cpu = bool(settings.get("use_cpu"))
    here = 1 if on_cpu or args.gpus < 2 else devices(args)
    added = {"DLLM_PROCESSES": str(nodes * here)} | ({"ACCELERATE_USE_CPU": "true"} if on_cpu else {})
    if nodes * here == 1 and settings.get("distributed_type") in PLAIN:
        return [sys.executable, "-m", "dllm", *args.command], added
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", args.config]
    launcher += ["--multi_gpu"] if on_cpu else []  # accelerate's name for torchrun; `--cpu` would start lone processes
    launcher += ["--num_machines", str(nodes), "--num_processes", str(nodes * here)]
    launcher += ["--main_process_port", "0"] if nodes == 1 else meeting_point(environment)
    return [*launcher, "-m", "dllm", *args.command], added


def granted(environment: dict[str, str]) -> int:
    """How many machines this process may use: those of its Slurm job, else one."""
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        return 1
    # Slurm is asked, because Snakemake's executor hides most of SLURM_* from its jobs
    return int(environment.get("SLURM_JOB_NUM_NODES") or output("squeue", "--noheader", "--jobs", job, "--format=%D"))


def on_each_node(args: argparse.Namespace, nodes: int) -> list[str]:
    """`srun` of this script, once on each machine of the job; when one fails, the others end too."""
    step = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={args.cpus}"]
    itself = [sys.executable, __file__, "--on-each-node", "--with", args.config, f"--gpus={args.gpus}"]
    return [*step, "--kill-on-bad-exit=1", *itself, "--", *args.command]


def meeting_point(environment: dict[str, str]) -> list[str]:
    """accelerate's arguments for this machine's number, and for address and port of the first one."""
    first = output("scontrol", "show", "hostnames", environment["SLURM_STEP_NODELIST"]).splitlines()[0]
    facts = dict(word.split("=", 1) for word in output("scontrol", "show", "node", first).split() if "=" in word)
    port = PORTS[int(environment["SLURM_JOB_ID"]) % len(PORTS)]
    address = ["--main_process_ip", facts["NodeAddr"], "--main_process_port", str(port)]
    return ["--machine_rank", environment["SLURM_NODEID"], *address]


def devices(args: argparse.Namespace) -> int:
    """Accelerators to use on this machine: the visible ones, at most `--gpus`."""
    import torch

    visible = torch.accelerator.device_count()
    if not visible:
        raise ValueError(
            f"--gpus {args.gpus}: no accelerator is visible here, and {args.config} needs one; set `launch: cpu` for "
            "the run, or resources.gpus_per_node: 0 for the evaluation"
        )
    return min(args.gpus, visible)


def output(*command: str) -> str:
    """What a command prints. Raises ValueError, one line, if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        raise ValueError(f"{' '.join(command)}: {' '.join(str(reason).split())}") from None


if __name__ == "__main__":
    sys.exit(main())
