"""A Slurm cluster on one machine: its own munged, slurmctld and slurmds, files in one folder, ports that are free.

python -m tests.slurm.cluster start|stop FOLDER, as root; then SLURM_CONF=FOLDER/slurm.conf sbatch ...
Nothing of the system is changed, and stopping ends exactly what was started.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
PATIENCE_S = 60
DAEMONS = "daemons.json"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the nodes of a cluster claim to have. `started`: nodes with a daemon; others are there on paper."""

    nodes: int
    started: int
    node: str
    lines: tuple[str, ...]
    generic: tuple[str, ...] = ()
    """Lines of gres.conf."""


FOUR_NODES = Layout(
    nodes=4,
    started=4,
    node="CPUs=8 RealMemory=4000",
    lines=("PartitionName=regular Nodes=ALL Default=YES MaxTime=INFINITE State=UP",),
)
# Nodes, cores (hardware threads), GPUs, features and partitions of the GPU nodes: NERSC documentation, "Perlmutter
# architecture" and "Queues and charges". Partitions stand for the qualities of service, which need a database.
PERLMUTTER = Layout(
    nodes=1536,
    started=0,
    node="Sockets=1 CoresPerSocket=64 ThreadsPerCore=2 RealMemory=245000 Feature=gpu,a100,hbm40g Gres=gpu:a100:4 "
    "State=CLOUD",
    lines=(
        "GresTypes=gpu",
        # Nodes that could be started are taken for what they claim; those that never registered are not.
        "SuspendProgram=/bin/true",
        "ResumeProgram=/bin/true",
        "SuspendTime=1",
        "SuspendTimeout=1",
        "PartitionName=regular Nodes=ALL Default=YES MaxTime=2-00:00:00 State=UP",
        "PartitionName=debug Nodes=ALL MaxNodes=8 MaxTime=00:30:00 State=UP",
    ),
    generic=("Name=gpu Type=a100 Count=4",),
)


class Cluster:
    """A cluster that runs in a folder. `environment` is what programs need to speak to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.config)}

    def run(self, *command: str) -> str:
        """What a program of Slurm printed. Raises `RuntimeError` with what it said when it fails."""
        result = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, check=False, timeout=PATIENCE_S
        )
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {(result.stderr or result.stdout).strip()}")
        return result.stdout

    def kill_node(self, name: str) -> None:
        """End the daemon of a node, as if the node had lost its power, and tell the controller."""
        _end(self._daemons().pop(name), signal.SIGKILL)
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=test")

    def revive_node(self, name: str) -> None:
        """Start the daemon of a node again."""
        self._start(name, "slurmd", "-D", "-N", name)
        self.run("scontrol", "update", f"nodename={name}", "state=resume")
        self.wait_for_nodes(1, names=name)

    def wait_for_nodes(self, count: int, *, names: str | None = None) -> None:
        """Until so many nodes are idle or have work."""
        asked = ["sinfo", "-h", "-N", "-o", "%N %T", *(["-n", names] if names else [])]
        ready = ("idle", "mixed", "allocated", "completing")
        _wait(
            lambda: sum(line.split()[1] in ready for line in set(self.run(*asked).splitlines())) == count,
            f"{count} nodes are ready",
            self.folder,
        )

    def start(self, layout: Layout) -> None:
        """Start every daemon and wait for the nodes. Raises `RuntimeError` saying what is missing."""
        if said := unavailable():
            raise RuntimeError(said)
        for name in ("state", "spool", "log"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        # munged and the controller want to own what they trust.
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.config.write_text("\n".join(self._lines(layout)) + "\n", encoding="utf-8")
        (self.folder / "gres.conf").write_text("".join(f"{line}\n" for line in layout.generic), encoding="utf-8")
        munge = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid"}
        munge |= {"log-file": "log/munge.log", "seed-file": "munge.seed"}
        options = [f"--{option}={self.folder / file}" for option, file in munge.items()]
        self._start("munged", "munged", "--foreground", "--force", "--num-threads=2", *options)
        _wait((self.folder / "munge.socket").exists, "munged listens", self.folder)
        self._start("slurmctld", "slurmctld", "-D")
        for number in range(1, layout.started + 1):
            self._start(f"n{number}", "slurmd", "-D", "-N", f"n{number}")
        _wait(self._answers, "slurmctld answers", self.folder)
        if layout.started:
            self.wait_for_nodes(layout.started)

    def stop(self) -> None:
        """End the jobs, then every daemon that was started; the folder stays."""
        try:
            self.run("scancel", "--user=root")
            _wait(lambda: not self.run("squeue", "-h"), "all jobs ended", self.folder, seconds=20)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            print(f"some jobs did not end in time: {error}", file=sys.stderr)
        for pid in reversed(list(self._daemons().values())):
            _end(pid, signal.SIGTERM)
        for pid in self._leftovers():
            _end(pid, signal.SIGKILL)
        (self.folder / DAEMONS).unlink(missing_ok=True)

    def _lines(self, layout: Layout) -> Iterator[str]:
        host = socket.gethostname().partition(".")[0]
        controller, *ports = _free_ports(1 + max(layout.started, 1))
        yield from (
            "ClusterName=local",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={controller}",
            "SlurmUser=root",
            "SlurmdUser=root",
            "AuthType=auth/munge",
            f"AuthInfo=socket={self.folder / 'munge.socket'}",
            f"StateSaveLocation={self.folder / 'state'}",
            f"SlurmdSpoolDir={self.folder / 'spool' / '%n'}",
            f"SlurmctldLogFile={self.folder / 'log' / 'slurmctld.log'}",
            f"SlurmdLogFile={self.folder / 'log' / '%n.log'}",
            f"SlurmctldPidFile={self.folder / 'slurmctld.pid'}",
            f"SlurmdPidFile={self.folder / '%n.pid'}",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "ReturnToService=2",
            # Nodes may claim more than the machine has, and those without a daemon are taken for what they claim.
            "SlurmdParameters=config_overrides",
            "SlurmdTimeout=0",
            # Jobs that ended are remembered: there is no database to ask.
            "MinJobAge=86400",
            "KillWait=5",
            "OverTimeLimit=0",
            "SchedulerParameters=sched_interval=2,bf_interval=5",
            *layout.lines,
        )
        place = f"NodeHostname={host} NodeAddr=127.0.0.1"
        if not layout.started:
            yield f"NodeName=n[1-{layout.nodes}] {place} Port={ports[0]} {layout.node}"
        for number, port in enumerate(ports[: layout.started], start=1):
            yield f"NodeName=n{number} {place} Port={port} {layout.node}"

    def _answers(self) -> bool:
        try:
            return "is UP" in self.run("scontrol", "ping")
        except RuntimeError:
            return False

    def _start(self, name: str, program: str, *arguments: str) -> None:
        with open(self.folder / "log" / f"{name}.out", "ab") as out:
            process = subprocess.Popen(
                [_found(program), *arguments],
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        (self.folder / DAEMONS).write_text(json.dumps(self._daemons() | {name: process.pid}), encoding="utf-8")

    def _daemons(self) -> dict[str, int]:
        """Process of each daemon that was started."""
        path = self.folder / DAEMONS
        found: dict[str, int] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {name: pid for name, pid in found.items() if self._is_ours(pid)}

    def _is_ours(self, pid: int) -> bool:
        """A number may have gone to another process since."""
        return f"SLURM_CONF={self.config}" in _environment(pid)

    def _leftovers(self) -> list[int]:
        """Processes of jobs whose node died, and what watched over them."""
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [
            pid
            for pid in pids
            if self._is_ours(pid)
            and ("slurmstepd" in _command(pid) or any(line.startswith("SLURM_JOB_ID=") for line in _environment(pid)))
        ]


@contextmanager
def cluster(folder: Path, layout: Layout) -> Iterator[Cluster]:
    """One that is stopped in any case."""
    running = Cluster(folder)
    try:
        running.start(layout)
        yield running
    finally:
        running.stop()


def unavailable() -> str | None:
    """Why no cluster can be started here, and what to do."""
    if missing := [program for program in PROGRAMS if _found(program) == program]:
        return f"there is no {', '.join(missing)}: apt-get install -y --no-install-recommends slurm-wlm munge"
    return None if os.geteuid() == 0 else "the daemons of Slurm have to be started as root"


def _found(program: str) -> str:
    """Its path; daemons are not on the PATH of everybody."""
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin") or program


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _environment(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _gone(pid: int) -> bool:
    """Ended; one that waits for its parent to ask counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _end(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
        for _ in range(200):
            if _gone(pid):
                return
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _wait(ready: Callable[[], bool], what: str, folder: Path, *, seconds: float = PATIENCE_S) -> None:
    """Raises `RuntimeError` with the ends of the logs."""
    until = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > until:
            ends = [f"{path.name}: {path.read_text(errors='replace')[-500:]}" for path in (folder / "log").iterdir()]
            raise RuntimeError(f"not in {seconds} s: {what}\n" + "\n".join(ends))
        time.sleep(0.1)


def main() -> None:
    """Start or stop the four nodes."""
    match sys.argv[1:]:
        case ["start", folder]:
            started = Cluster(Path(folder).resolve())
            started.start(FOUR_NODES)
            print(f"export SLURM_CONF={started.config}")
        case ["stop", folder]:
            Cluster(Path(folder).resolve()).stop()
        case _:
            sys.exit("python -m tests.slurm.cluster start|stop FOLDER")


if __name__ == "__main__":
    main()
