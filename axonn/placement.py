"""How a parameter lies on the grid, as a typed statement from which reduction, counting and checkpoints follow."""

from __future__ import annotations

from dataclasses import dataclass

from axonn.grid import Axis


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One parameter's place.

    `partial`: axes along which its gradient still is a partial sum after the backward pass.
    `tied_stages`: stages that hold a copy of it (an embedding tied to the head), whose gradients add up; empty for a
    parameter that lives on one stage only.
    """

    partial: tuple[Axis, ...] = ("data",)
    tied_stages: tuple[int, ...] = ()
