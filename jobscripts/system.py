"""Systems: how jobs are run on a machine, with its scheduler, its launcher, and the environment of its ranks.

One file of jobscripts/systems for each machine of experiments/machines; a site file goes over it.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from axonn.config.loading import Line, Name, is_plain
from axonn.config.train_config import StrictModel, load_yaml
from axonn.errors import ConfigError
from jobscripts.site import Option

FOLDER = Path(__file__).parent / "systems"


class System(StrictModel):
    """Settings that all users of a machine share."""

    machine: Name
    """Name of the machine in records. Published points are checked against the machine of this name in
    experiments/machines."""
    scheduler: str
    launcher: str
    needs: list[str] = []
    """Keys of the site file without which the scheduler takes no job."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Device that the ranks compute on; for cpu no GPUs are requested."""
    ranks_per_node: int | None = Field(default=None, ge=1)
    """Ranks of a node. Default: a rank for each GPU of a node."""
    nodes: int | None = Field(default=None, ge=1)
    """Most nodes that a job may have. Default: all of the machine."""
    cores_per_rank: int = Field(ge=1)
    """Cores that a rank has to itself."""
    constraint: str | None = None
    options: list[Option] = []
    """Options for the scheduler."""
    launcher_options: list[Option] = []
    sees_one_gpu: bool = False
    """True if these options leave each rank a GPU that it alone sees, whatever its number on the node."""
    environment: dict[str, str] = {}
    mpi_on_device: dict[str, str] = {}
    """Further environment under which MPI takes buffers that lie on GPUs."""
    provide: dict[str, str] = {}
    """Requirements on the site file, by a word that its modules, setup or environment then contain; otherwise a warning
    says so."""
    queue_is: Literal["partition", "qos"] = "partition"
    """Meaning of a queue for users of a Slurm machine: a partition, or a quality of service."""
    clocks: Line | None = None
    """Command that prints the state of a node's GPUs."""
    ended: Line | None = None
    """Date since when the machine takes no jobs, and its source; None while it runs. Scripts for it are written all the
    same, to be read, or changed for a machine like it."""
    source: str
    """Source of these settings."""

    @field_validator("constraint")
    @classmethod
    def _is_word(cls, value: str | None) -> str | None:
        if value is not None and not (re.fullmatch(r"\S+", value) and value.isprintable()):
            raise ValueError(f"{value!r} is not one word, which is all that a scheduler takes here")
        return value

    @field_validator("environment", "mpi_on_device")
    @classmethod
    def _are_lines(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", name, flags=re.ASCII):
                raise ValueError(f"{name!r} is no name of a variable")
            if not text.isprintable():
                raise ValueError(f"{name}: {text!r} is more than one line, or has control characters")
        return value


def systems() -> list[str]:
    """Return the machines that jobs can be written for."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_system(name: str) -> System:
    """Load the system of a machine by name, or a file by path. Raises `ConfigError` with the nearest name."""
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.exists() or not (name.endswith(".yaml") or is_plain(name)):
        near = get_close_matches(name, systems(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"there is no machine '{name}' to write jobs for; {hint}known are {', '.join(systems())}")
    return load_yaml(path, System)
