"""A real Slurm on this machine: a controller, and virtual nodes whose GPUs are null devices."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

CONFIG = Path("/etc/slurm")  # jobs lose SLURM_CONF on their way, so Slurm's own place is the only one that works
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scancel", "scontrol")
NODES, CPUS, GPUS = 2, 8, 2
_NAME = "prefopt_tests"
_PIDS = Path("/run")  # in a place that outlives the tests' folder, for the run that has to clean up after a killed one


def why_not() -> str | None:
    """What keeps a Slurm from starting here; None where nothing does."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"needs Slurm ({missing[0]} is not installed; Debian: slurm-wlm, munge)"
    if os.geteuid() != 0:
        return "needs root to start Slurm's daemons"
    if (CONFIG / "slurm.conf").exists() and not _left_behind():
        return f"{CONFIG}/slurm.conf exists: this machine has a Slurm of its own"
    return None


def _left_behind() -> bool:
    """End the daemons that a killed test run left, and remove its configuration; False where it is not one of ours."""
    text = (CONFIG / "slurm.conf").read_text()
    if f"ClusterName={_NAME}" not in text:
        return False
    Slurm(CONFIG).stop()
    return True


def _end(pid: str) -> None:
    """SIGTERM to a daemon, unless its number is another process's by now."""
    name = Path("/proc") / pid / "comm"
    if name.exists() and name.read_text().startswith(("slurm", "munged")):
        os.kill(int(pid), signal.SIGTERM)


def _path() -> str:
    return os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])


@dataclass(frozen=True)
class Slurm:
    """The daemons, and what tests ask of them."""

    folder: Path

    def start(self) -> None:
        """Write the configuration, start munge, controller and nodes, wait until the nodes are idle."""
        host = socket.gethostname().split(".")[0]
        for name in ("state", "log", "dev", *(f"spool-n{number}" for number in range(1, NODES + 1))):
            (self.folder / name).mkdir(parents=True)
        for number in range(GPUS):
            os.mknod(self.folder / "dev" / f"gpu{number}", 0o20666, os.makedev(1, 3))
        CONFIG.mkdir(exist_ok=True)
        (CONFIG / "slurm.conf").write_text(self._configuration(host))
        (CONFIG / "gres.conf").write_text(
            "AutoDetect=off\n"
            + "".join(
                f"NodeName=n{number} Name=gpu Type=a100 File={self.folder}/dev/gpu[0-{GPUS - 1}]\n"
                for number in range(1, NODES + 1)
            )
        )
        if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode:
            Path("/run/munge").mkdir(exist_ok=True)
            shutil.chown("/run/munge", "munge", "munge")
            self._run("runuser", "-u", "munge", "--", "/usr/sbin/munged", f"--pid-file={_PIDS}/munge/{_NAME}.pid")
        self._run("slurmctld", "-c")
        for number in range(1, NODES + 1):
            self._run("slurmd", "-c", "-N", f"n{number}")
        self._wait_for(lambda: set(self.ask("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"})

    def stop(self) -> None:
        """Cancel what runs and end every daemon that ``start`` started."""
        subprocess.run(["scancel", "--full", "--user=root"], capture_output=True, check=False, env=self.environment())
        for path in [*_PIDS.glob(f"{_NAME}-*.pid"), *(_PIDS / "munge").glob(f"{_NAME}.pid")]:
            _end(path.read_text().strip())
        for name in ("slurm.conf", "gres.conf"):
            (CONFIG / name).unlink(missing_ok=True)

    def ask(self, *words: str) -> str:
        """Output of one of Slurm's commands."""
        return subprocess.run(words, capture_output=True, text=True, check=True, env=self.environment()).stdout

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": _path()}

    def jobs(self) -> list[dict[str, str]]:
        """Every job that the controller remembers, with its comment (the rule) and its request."""
        shown = self.ask("scontrol", "show", "job", "-o")
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in shown.splitlines()]

    def _run(self, *command: str) -> None:
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=self.environment())
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)}: {run.stderr.strip() or run.stdout.strip()}")

    def _wait_for(self, condition, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"Slurm's nodes did not come up:\n{self.ask('sinfo', '-R')}")
            time.sleep(0.2)

    def _configuration(self, host: str) -> str:
        folder = self.folder
        return f"""
ClusterName={_NAME}
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5
SlurmctldPort=16817
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={_PIDS}/{_NAME}-slurmctld.pid
SlurmdPidFile={_PIDS}/{_NAME}-slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=100000
MinJobAge=3600
ReturnToService=2
MpiDefault=none
KillWait=5
JobRequeue=1
PreemptMode=REQUEUE
PreemptType=preempt/partition_prio
GresTypes=gpu
NodeName=DEFAULT CPUs={CPUS} RealMemory=30000 Gres=gpu:a100:{GPUS} State=UNKNOWN
NodeName=n[1-{NODES}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[16821-{16820 + NODES}]
PartitionName=normal Nodes=n[1-{NODES}] Default=YES MaxTime=INFINITE PriorityTier=1 State=UP
PartitionName=urgent Nodes=n[1-{NODES}] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
""".lstrip()
