"""Environment in which a run took place: hosts, GPUs, versions, commit, time, from the files in its folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from axonn.errors import ConfigError
from axonn.observability.records import Machine
from experiments.definition import find_machine


@dataclass(frozen=True, kw_only=True)
class RunEnvironment:
    """Machine and packages of a run. `created`: start of the newest attempt. `packages`: version by name."""

    machine: Machine
    created: str | None
    packages: dict[str, str] = field(default_factory=dict)

    def version(self, adapter: str) -> str:
        """Return the version of a framework, as its packages were installed where it ran."""
        names = [name for name in self.packages if adapter in name.lower() or name == "torch"]
        return ", ".join(f"{name} {self.packages[name]}" for name in names) or "not known"


def environment_of(starts: Sequence[Path], *, machine: str, on_cpu: bool) -> RunEnvironment:
    """Return the environment of a run from the newest of its attempts; what was not written is None."""
    texts = {} if not starts else {path.name: path for path in starts[-1].glob("*.txt")}

    def lines(name: str) -> list[str]:
        return texts[name].read_text(encoding="utf-8", errors="replace").splitlines() if name in texts else []

    freeze = [line.partition("==") for line in lines("versions.txt")]
    packages = {name.strip(): version.strip() for name, _, version in freeze if version.strip()}
    hosts = list(dict.fromkeys(line.strip() for line in lines("nodes.txt") if line.strip()))
    python = [match[1] for line in lines("versions.txt") if (match := re.match(r"Python (\d[\w.+]*)", line))]
    commits = [line.strip() for line in lines("commit.txt") if re.fullmatch(r"[0-9a-f]{7,40}\+?", line.strip())]
    threads = [match[1] for line in lines("environment.txt") if (match := re.match(r"OMP_NUM_THREADS=(\d+)$", line))]
    return RunEnvironment(
        machine=Machine(
            name=machine,
            host=f"{hosts[0]} and {len(hosts) - 1} more" if len(hosts) > 1 else hosts[0] if hosts else None,
            device="cpu"
            if on_cpu
            else _gpu([line for name in sorted(texts) if name.startswith("clocks-") for line in lines(name)])
            or _device(machine),
            python=python[0] if python else None,
            torch=packages.get("torch"),
            mpi=f"Open MPI {packages['openmpi']}" if "openmpi" in packages else None,
            commit=commits[0] if commits else None,
            threads_per_rank=int(threads[0]) if threads else None,
        ),
        created=_moment(lines("started.txt")),
        packages=packages,
    )


def changes(starts: Sequence[Path], *, adapter: str, machine: str, on_cpu: bool) -> str | None:
    """Return the differences between the attempts of a run, as text; an attempt that did not write a value is not
    compared."""
    each = [environment_of([start], machine=machine, on_cpu=on_cpu) for start in starts]
    values_of = {
        "commit": [one.machine.commit for one in each],
        "device": [one.machine.device for one in each],
        "Python": [one.machine.python for one in each],
        "versions": [one.version(adapter) if one.packages else None for one in each],
    }
    distinct = {name: list(dict.fromkeys(filter(None, values))) for name, values in values_of.items()}
    differences = [f"{name} {', then '.join(values)}" for name, values in distinct.items() if len(values) > 1]
    return f"its starts differ: {'; '.join(differences)}" if differences else None


def _gpu(lines: Sequence[str]) -> str | None:
    """Return the name of the first GPU from the output of nvidia-smi: index, name, clocks."""
    for line in lines:
        columns = [text.strip() for text in line.split(",")]
        if len(columns) > 2 and columns[0].isdecimal() and columns[1]:
            return columns[1]
    return None


def _device(machine: str) -> str | None:
    try:
        return find_machine(machine).gpu.name
    except ConfigError:
        return None


def _moment(lines: Sequence[str]) -> str | None:
    try:
        return datetime.fromisoformat(lines[0].strip()).astimezone(UTC).isoformat(timespec="seconds")
    except (IndexError, ValueError):
        return None
