"""Quantities of a machine file: numbers with unit, source and status.

`value` and `unit` are written as the source gives them; `si` converts to seconds, bytes, bytes/s or FLOP/s.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from axonn.config.train_config import StrictModel

Status = Literal["text", "figure", "fitted", "doc", "measured", "assumed"]
"""Provenance. text, figure: read from a paper; doc: vendor or site documentation; measured: by `axonn calibrate` or the
like."""


_SI: dict[str, float] = {
    "1": 1.0,
    "us": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "bytes": 1.0,
    "MB": 1e6,
    "GB": 1e9,
    "GiB": float(2**30),
    "GB/s": 1e9,
    "GFLOP/s": 1e9,
    "TFLOP/s": 1e12,
}


class Quantity(StrictModel):
    """A number with its unit, source and status."""

    value: float = Field(gt=0)
    unit: str
    source: str
    status: Status

    @property
    def si(self) -> float:
        """The value in SI units."""
        return self.value * _SI[self.unit]


class FlopRate(Quantity):
    """A rate of floating-point operations."""

    unit: Literal["TFLOP/s", "GFLOP/s"]


class Bandwidth(Quantity):
    """A bandwidth in one direction, unless its source says otherwise."""

    unit: Literal["GB/s"]


class Size(Quantity):
    """An amount of memory."""

    unit: Literal["bytes", "MB", "GB", "GiB"]


class Time(Quantity):
    """A duration."""

    unit: Literal["us", "ms", "s"]


class Count(Quantity):
    """A count."""

    unit: Literal["1"] = "1"

    @property
    def number(self) -> int:
        """The count as an integer."""
        return int(self.value)


class FitReport(StrictModel):
    """Data and quality of a fit of coefficients. Errors are mean |predicted / measured - 1| in percent."""

    source: str
    points: int = Field(ge=1)
    in_sample_error_pct: float = Field(ge=0)
    held_out_error_pct: float = Field(ge=0)
    """Mean of a 5-fold cross-validation; with very few points, leave-one-out."""
    note: str = ""
    status: Literal["fitted"] = "fitted"


class Origin(StrictModel):
    """Origin of coefficients that were not fitted: taken from a source, or assumed."""

    source: str
    status: Literal["text", "figure", "doc", "measured", "assumed"]
