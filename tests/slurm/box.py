"""A Slurm cluster of two virtual machines on this one, without systemd, munge or accounting: up in about two seconds.

Two daemons pretend to be the machines n1 and n2 on the loopback, with two cores and two GPUs each; the GPUs are device
files without a device, so that Slurm really grants them and sets CUDA_VISIBLE_DEVICES.
"""

import fcntl
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

ETC = Path("/etc/slurm")
"""Snakemake's executor hides SLURM_CONF from its jobs, so the configuration must be where Slurm looks by itself."""

OURS = "# written by a test of dllm; safe to delete"
NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
PACKAGES = ("slurmctld", "slurmd", "slurm-client")

CONFIG = """{ours}
ClusterName=box
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=300
KillWait=10
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=8000 Gres=gpu:2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=8000 Gres=gpu:2 State=UNKNOWN
PartitionName=batch Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes=n[1-2] MaxTime=INFINITE State=UP
"""


class NoSlurm(Exception):
    """Why there can be no cluster here, in one line."""


class Box:
    """The cluster while it runs; only one on a machine at a time."""

    def __init__(self, home: Path):
        self.home = home
        self._lock = None

    def start(self) -> None:
        """Start it. Raises NoSlurm where that is impossible, or where Slurm is somebody else's."""
        if os.geteuid() != 0:
            raise NoSlurm("a Slurm cluster for tests needs root")
        _install()
        ETC.mkdir(exist_ok=True)
        with open("/run/lock/dllm-slurm-box", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another test session waits for its turn
            config = ETC / "slurm.conf"
            if config.exists():
                if not config.read_text().startswith(OURS):
                    raise NoSlurm(f"{config} is there and not ours: this machine belongs to a Slurm cluster")
                _end_daemons(config)  # of a test session that was killed
            self._write(config)
            self._lock = os.dup(lock.fileno())
        try:
            self._run_daemons()
        except BaseException:
            self.stop()
            raise

    def _write(self, config: Path) -> None:
        self.home.mkdir(parents=True)
        for gpu in range(2):
            os.mknod(self.home / f"gpu{gpu}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # /dev/null by another name
        (ETC / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={self.home}/gpu[0-1]\n")
        config.write_text(
            CONFIG.format(ours=OURS, host=socket.gethostname(), home=self.home, ports=_free_ports(3)),
        )

    def _run_daemons(self) -> None:
        for command in (["slurmctld", "-c"], ["slurmd", "-N", "n1"], ["slurmd", "-N", "n2"]):
            (self.home / f"spool-{command[-1]}").mkdir()
            # what a daemon inherits, its jobs would find in their environment
            subprocess.run(command, check=True, env={"PATH": os.environ["PATH"]})
        deadline = time.monotonic() + 20
        while self.say("sinfo", "--noheader", "--states=idle", "--format=%D") != "2":
            if time.monotonic() > deadline:
                raise NoSlurm(f"the cluster did not come up in 20 s; see {self.home}/*.log")
            time.sleep(0.1)

    def stop(self) -> None:
        """Cancel what runs, end the daemons and take the configuration away."""
        if self._lock is None:
            return
        subprocess.run(["scancel", "--user=root"], capture_output=True)
        deadline = time.monotonic() + 20
        while self.say("squeue", "--noheader") and time.monotonic() < deadline:
            time.sleep(0.2)
        _end_daemons(ETC / "slurm.conf")
        for name in ("slurm.conf", "gres.conf"):
            (ETC / name).unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = None

    @staticmethod
    def say(*command: str) -> str:
        """What a command of Slurm prints; nothing if it fails."""
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _install() -> None:
    """Debian's Slurm, where it is missing and can be had."""
    if all(map(shutil.which, NEEDED)):
        return
    if not shutil.which("apt-get"):
        raise NoSlurm("Slurm is not installed")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *PACKAGES]
    for attempt in (["true"], ["apt-get", "update", "--quiet"]):
        done = [subprocess.run(c, env=environment, capture_output=True, timeout=180) for c in (attempt, command)][-1]
        if done.returncode == 0 and all(map(shutil.which, NEEDED)):
            return
    raise NoSlurm(f"Slurm is not installed, and cannot be: apt-get install {' '.join(PACKAGES)}")


def _end_daemons(config: Path) -> None:
    """End the daemons that a configuration names."""
    home = Path(re.search(r"^StateSaveLocation=(.*)/state$", config.read_text(), re.M)[1])
    for path in home.glob("*.pid"):
        pid = path.read_text().strip()
        name = Path(f"/proc/{pid}/comm")
        if name.exists() and name.read_text().strip() in ("slurmctld", "slurmd"):
            os.kill(int(pid), signal.SIGTERM)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
