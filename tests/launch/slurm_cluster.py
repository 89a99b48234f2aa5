"""A Slurm cluster on this machine: a controller and two nodes of one slot each, on ports of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
FirstJobId={ports[3]}  # the ranks meet at a port that follows from it: another in each cluster
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/node-%n.pid
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/node-%n.log
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
MpiDefault=none
KillWait=5
NodeName={nodes[0]} NodeHostname={host} Port={ports[1]} CPUs=1
NodeName={nodes[1]} NodeHostname={host} Port={ports[2]} CPUs=1
PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP
"""
NODES = ("127.0.0.1", "127.0.0.2")  # names that every resolver knows
DAEMONS = "/usr/sbin"


class SlurmCluster:
    """A context manager; its ends end every process of it.

    Args:
        environment: of the commands and of the jobs.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder = folder
        self._environment = {**environment, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> SlurmCluster:
        text = CONFIG.format(host=socket.gethostname(), folder=self._folder, nodes=NODES, ports=free_ports(4))
        (self._folder / "slurm.conf").write_text(text)
        (self._folder / "state").mkdir()
        self.call(f"{DAEMONS}/slurmctld", "-c")
        for node in NODES:
            self.call(f"{DAEMONS}/slurmd", "-N", node)
        end = time.monotonic() + 60
        while self.call("sinfo", "--noheader", "--format=%D %t").split() != ["2", "idle"]:
            assert time.monotonic() < end, "the nodes did not come up"
            time.sleep(0.2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the jobs, then the daemons: those that do not end when they are asked to are killed."""
        with suppress(subprocess.SubprocessError):
            self.call("scancel", "--user=root")
            end = time.monotonic() + 60
            while self.call("squeue", "--noheader") and time.monotonic() < end:
                time.sleep(0.2)
        daemons = [int(file.read_text()) for file in self._folder.glob("*.pid")]
        for sent in (signal.SIGTERM, signal.SIGKILL):
            for process in filter(alive, daemons):
                os.kill(process, sent)
            end = time.monotonic() + 10
            while any(map(alive, daemons)) and time.monotonic() < end:
                time.sleep(0.1)

    def call(self, *command: str, cwd: Path | None = None) -> str:
        """What a command of Slurm prints."""
        return subprocess.run(
            command, cwd=cwd, env=self._environment, capture_output=True, text=True, timeout=60, check=True
        ).stdout


def alive(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
