"""A real SLURM on this machine: munged, slurmctld and slurmd of our own, on loopback alone."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={lab}/run/munge.sock,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={lab}/state
SlurmdSpoolDir={lab}/spool
SlurmctldPidFile={lab}/run/slurmctld.pid
SlurmdPidFile={lab}/run/slurmd.pid
SlurmctldLogFile={lab}/log/slurmctld.log
SlurmdLogFile={lab}/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
InactiveLimit=0
KillWait=5
MinJobAge=600
Waittime=0
DefMemPerCPU=512
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 \
ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 \
PreemptMode=REQUEUE GraceTime=10
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel")


def missing() -> list[str]:
    """Programs that are not installed."""
    paths = f"{os.environ['PATH']}:/usr/sbin"
    return [tool for tool in TOOLS if shutil.which(tool, path=paths) is None]


@dataclass
class Lab:
    """The daemons, and what a test asks of them."""

    path: Path
    text: str = CONF
    pids: tuple[str, ...] = ("slurmd", "slurmctld", "munged")

    def start(self) -> Lab:
        for name in ("state", "spool", "log", "run"):
            (self.path / name).mkdir(parents=True)
        for folder in (self.path, self.path / "run", self.path / "log"):
            folder.chmod(0o755)
        key = self.path / "run" / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        ports = free_ports(2)
        facts = {"host": socket.gethostname().split(".")[0], "user": getpass.getuser()}
        self.conf.write_text(self.text.format(lab=self.path, ports=ports, **facts))
        os.environ["SLURM_CONF"] = str(self.conf)
        os.environ["PATH"] += ":/usr/sbin"
        run = self.path / "run"
        call("munged", f"--key-file={key}", f"--socket={run}/munge.sock", "--force",
             f"--pid-file={run}/munged.pid", f"--log-file={self.path}/log/munged.log",
             f"--seed-file={run}/munged.seed")  # fmt: skip
        call("slurmctld")
        self.start_slurmd()
        self.until(lambda: call("sinfo", "-h", "-o", "%T").split()[:1] == ["idle"], 30)
        return self

    @property
    def conf(self) -> Path:
        return self.path / "slurm.conf"

    def kill_slurmd(self) -> None:
        """The daemon of the node, without a word; jobs have processes of their own."""
        os.kill(int((self.path / "run" / "slurmd.pid").read_text()), 9)

    def start_slurmd(self) -> None:
        """Starts it, at the beginning or again."""
        call("slurmd")

    def change(self, old: str, new: str) -> None:
        """Changes a line of slurm.conf while the daemons run."""
        text = self.conf.read_text()
        assert f"\n{old}\n" in text
        self.conf.write_text(text.replace(f"\n{old}\n", f"\n{new}\n"))
        call("scontrol", "reconfigure")

    def stop(self) -> None:
        subprocess.run(["scancel", "--user", getpass.getuser()], capture_output=True)
        time.sleep(1)
        for name in self.pids:
            try:
                pid = int((self.path / "run" / f"{name}.pid").read_text())
                os.kill(pid, 15)
            except (OSError, ValueError):
                continue
            end = time.monotonic() + 10
            while time.monotonic() < end and Path(f"/proc/{pid}").exists():
                time.sleep(0.1)

    def job(self, number: str) -> dict[str, str]:
        """What scontrol knows of a job."""
        text = call("scontrol", "-o", "show", "job", number)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def until(self, done: object, seconds: float, what: str = "") -> None:
        """Waits until `done()` is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if done():  # type: ignore[operator]
                    return
            except subprocess.CalledProcessError:
                pass
            time.sleep(0.2)
        logs = "\n".join(
            "\n".join(log.read_text().splitlines()[-8:]) for log in (self.path / "log").iterdir()
        )
        raise AssertionError(f"{what or done} did not come true in {seconds} s\n{logs}")


def call(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, words, done.stdout, done.stderr)
    return done.stdout


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
