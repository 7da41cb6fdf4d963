"""The contenders of `contenders.yaml`, and the configuration of each at a number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from axonn.config.train_config import StrictModel, TrainConfig, load_yaml, validate
from axonn.errors import AxonnError, ConfigError, LaunchError
from axonn.grid import AXES
from axonn.training.capacity import lacking_here
from axonn.training.framework import Framework, load_adapter, load_framework
from experiments.workloads import config_of

FILE = Path(__file__).parent / "contenders.yaml"
Kind = Literal["inter-layer", "tensor", "data", "combined"]
Device = Literal["cpu", "cuda"]
KINDS: tuple[Kind, ...] = ("inter-layer", "tensor", "data", "combined")
OURS = "axonn"
_GRIDS: dict[Kind, dict[str, int | Literal["rest"]]] = {
    "inter-layer": {"inter": "rest"},
    "tensor": {"col": "rest"},
    "data": {"data": "rest"},
}


class Contender(StrictModel):
    """One framework with one strategy."""

    framework: str
    """Name as `load_framework` takes it."""
    label: str = "AxoNN"
    variant: str
    kind: Kind
    options: dict[str, Any] = {}
    """Settings beyond the workload, or in place of it."""
    grid: dict[str, int | Literal["rest"]] = {}
    least_ranks: int = Field(default=2, ge=2)
    left_out_of: list[str] = []
    """Workloads in which it takes no part, for lack of time, unless frameworks or kinds are named."""

    def model_post_init(self, context: object) -> None:
        asked = self.grid or _GRIDS.get(self.kind)
        if asked is None:
            raise ValueError(f"kind '{self.kind}' needs a grid")
        if set(asked) - set(AXES):
            raise ValueError(f"the axes of a grid are {', '.join(AXES)}")
        if list(asked.values()).count("rest") != 1:
            raise ValueError("exactly one axis of the grid takes the 'rest' of the ranks")

    @property
    def ours(self) -> bool:
        return self.framework == OURS

    @property
    def adapter(self) -> str:
        return self.framework.partition("/")[0]

    @property
    def name(self) -> str:
        return f"{self.label} {self.variant}"

    @property
    def key(self) -> str:
        """Part of file names, distinct among all contenders."""
        return "".join(c if c.isalnum() else "-" for c in f"{self.kind} {self.framework} {self.variant}".lower())

    def grid_of(self, ranks: int) -> dict[str, int]:
        """Return the extents of the axes. Raises `ConfigError` when the fixed ones do not divide `ranks`."""
        asked = self.grid or _GRIDS[self.kind]
        fixed = prod(extent for extent in asked.values() if isinstance(extent, int))
        if ranks % fixed:
            raise ConfigError(f"{self.name}: {ranks} ranks are no multiple of {fixed}; choose --ranks so")
        return {axis: ranks // fixed if extent == "rest" else extent for axis, extent in asked.items()}

    def config(self, workload: str, ranks: int, steps: int) -> TrainConfig:
        """Return its configuration, with the same batch for every kind.

        Raises `ConfigError` when the workload cannot be cut so.
        """
        plain = config_of(workload, self.grid_of(ranks)) | serial_work(workload)
        return validate(plain | self.options | {"steps": steps}, TrainConfig, where=self.name)


def serial_work(workload: str) -> dict[str, Any]:
    """Return the settings that all contenders and the serial reference share, beyond model and microbatch.

    AdamW's `eps` is large, so that losses show gradients of another scale; with a small one Adam would hide them.
    """
    return {"batch_size": config_of(workload, {})["batch_size"], "optimizer": {"eps": 1e-3, "weight_decay": 0.1}}


class _File(StrictModel):
    contenders: list[Contender]


def load_contenders(path: Path = FILE) -> list[Contender]:
    """Load all contenders of a file. Raises `ConfigError`."""
    contenders = load_yaml(path, _File).contenders
    keys = [contender.key for contender in contenders]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"{path}: these contenders are given twice: {', '.join(twice)}")
    return contenders


def choose(
    contenders: Sequence[Contender], *, frameworks: Sequence[str], kinds: Sequence[str], ranks: int
) -> list[Contender]:
    """Return the contenders of the named frameworks (`pytorch`, or `pytorch/1f1b`) and kinds for which `ranks` suffice;
    where nothing is named, all of them.

    Ours always take part, since the others are compared with them. Raises `ConfigError` for an unknown name.
    """
    known = {c.framework for c in contenders} | {c.adapter for c in contenders}
    for wanted, names in ((frameworks, known), (kinds, set(KINDS))):
        if unknown := sorted(set(wanted) - names):
            raise ConfigError(f"unknown: {', '.join(unknown)}; known are {', '.join(sorted(names))}")
    return [
        c
        for c in contenders
        if c.least_ranks <= ranks
        and (not kinds or c.kind in kinds)
        and (not frameworks or c.ours or {c.framework, c.adapter} & set(frameworks))
    ]


def refusal(contender: Contender, workload: str, ranks: int, device: Device) -> str | None:
    """Return why this contender cannot run here, or None when it can."""
    try:
        adapter = load_adapter(contender.adapter)
        can = adapter.capabilities()
        if not can.available:
            return can.reason or "it is not installed"
        framework = load_framework(contender.framework)
        config = contender.config(workload, ranks, steps=1)
        if device not in can.devices:
            return f"runs on {', '.join(can.devices)} only here, and --device {device} is asked for"
        if config.precision.compute not in can.precisions:
            return f"does not compute in {config.precision.compute}"
        return framework.unavailable(config) or "; ".join(lacking_here(config, device)) or None
    except AxonnError as error:
        return str(error)
    except Exception as error:
        # One broken adapter does not keep the others from being compared.
        return f"its adapter failed: {type(error).__name__}: {error}"


def framework_of(contender: Contender) -> Framework | None:
    """Return the contender's framework, or None where it does not exist."""
    try:
        return load_framework(contender.framework)
    except LaunchError:
        return None
