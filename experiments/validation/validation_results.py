"""Content of results/predicted/validation.json: predictions of the performance model and published measurements."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from axonn.config.train_config import StrictModel
from axonn.perf.machine.machine_file import MachineFile
from axonn.perf.machine.quantities import FitReport
from experiments.validation.published_sets import Open


class ValidationRow(StrictModel):
    """One published number and its predictions, in the quantity's unit. Errors are predicted / measured - 1, in
    percent."""

    label: str
    group: str
    quantity: str
    """A `Quantity`, or "ratio"."""
    model: str
    measured: float
    predicted: float
    error_pct: float
    constant: float | None = None
    """Prediction of the constant-TFLOP/s predictor, its rate fitted on all points of the set; None if it has none."""
    constant_error_pct: float | None = None
    constant_held_out_error_pct: float | None = None
    """Error with the rate fitted on the points of the other models; None when there is only one model."""
    chosen: list[str] = []
    """Outcomes of the rules for open settings."""
    memory_gb: float | None = None
    """Predicted memory of the device that needs most."""
    fits: bool = True
    note: str = ""

    @property
    def key(self) -> str:
        """Name of the number in the set."""
        return self.label if self.quantity == "ratio" else f"{self.label}: {self.quantity}"


class Goal(StrictModel):
    """A bound, in percent, that the project set itself."""

    what: str
    bound: float
    reached: float
    met: bool


class VariantRow(StrictModel):
    """Predictions under an alternative to an assumption, by `ValidationRow.key`, or label for an unpublished point."""

    label: str
    predicted: dict[str, float]
    mean_pct: float | None = None
    """Mean error of the whole set."""
    chosen: list[str] = []
    fits: bool = True


class SetResult(StrictModel):
    """Results of one data set. Means are of absolute errors in percent: of the rows, or without rows of the ratios."""

    name: str
    title: str
    source: str
    status: str
    machine: str
    rows: list[ValidationRow]
    ratios: list[ValidationRow] = []
    mean_pct: float | None = None
    max_pct: float | None = None
    bias_pct: float | None = None
    """Mean of the errors with their signs."""
    rank_correlation: float | None = None
    """Spearman's rank correlation of measured and predicted; None with fewer than three numbers of one quantity."""
    constant_mean_pct: float | None = None
    constant_held_out_pct: float | None = None
    groups: dict[str, float] = {}
    """Mean error by group."""
    goals: list[Goal] = []
    open: list[Open] = []
    variants: list[VariantRow] = []


class Fitted(StrictModel):
    """Fitted constants of a machine file, with their errors."""

    machine: str
    what: str
    points: int
    in_sample_error_pct: float
    held_out_error_pct: float
    source: str


class Validation(StrictModel):
    """Root of results/predicted/validation.json."""

    schema_: Literal["axonn-validation/1"] = Field(default="axonn-validation/1", alias="schema")
    command: str
    commit: str | None
    created: str
    fingerprint: str | None = None
    """Hash of everything that the predictions depend on."""
    sets: list[SetResult]
    fitted: list[Fitted]


def fitted_constants(machine: MachineFile) -> list[Fitted]:
    """Return all fitted constants of a machine file, with their errors in sample and held out."""
    fitted: list[Fitted] = []

    def search(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, FitReport):
            fitted.append(
                Fitted(
                    machine=machine.name,
                    what=".".join(path[:-1]),
                    points=value.points,
                    in_sample_error_pct=value.in_sample_error_pct,
                    held_out_error_pct=value.held_out_error_pct,
                    source=value.source,
                )
            )
        elif isinstance(value, BaseModel):
            for name in type(value).model_fields:
                search(getattr(value, name), (*path, name))
        elif isinstance(value, dict):
            for name, inside in value.items():
                search(inside, (*path, str(name)))
        elif isinstance(value, list | tuple):
            for number, inside in enumerate(value):
                search(inside, (*path, str(number)))

    search(machine, ())
    return fitted
