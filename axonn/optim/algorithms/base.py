"""What an optimizer's algorithm is to the engine and to the performance model. Nothing here imports torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from axonn.config.optimizer_config import OptimizerConfig

if TYPE_CHECKING:
    import torch

C = TypeVar("C", bound=OptimizerConfig)
_SINGLE = 4
"""Bytes of an element of master weights and state where less than single precision is computed in."""


class Algorithm(ABC, Generic[C]):
    """One algorithm, elementwise: its update of an element depends on no other one.

    The engine does the rest for all of them: master weights, loss scale, reduction, clipping, the learning rate of each
    batch, streaming of offloaded state, and checkpoints. Its modules that need torch are imported by `update`, so that
    the performance model can read what it costs.
    """

    config: ClassVar[type[OptimizerConfig]]
    """Class of its configurations, whose default `name` is the name under which this is registered."""
    states: ClassVar[tuple[str, ...]]
    """Names of its state tensors, which checkpoints have them by. Each has an element of the master type for every
    element of the parameters, 0 before the first update."""
    fused: ClassVar[bool] = False
    """Whether `update` is one kernel, which leaves everything as it is where it is given an overflow of 1. Otherwise
    the host waits, where gradients may overflow, until it is known that none did."""
    kernel: ClassVar[str]
    """Name under which machine files have the measured times of its step on the device; "-offloaded" is added for the
    step that streams its state from host memory."""
    separate_bytes: ClassVar[int]
    """Bytes per parameter that the device moves for an update in single precision, one kernel for each operation. What
    it computes takes no time beside that."""

    @abstractmethod
    def update(
        self,
        config: C,
        master: torch.Tensor,
        gradient: torch.Tensor,
        states: Sequence[torch.Tensor],
        *,
        rate: float,
        number: int,
        overflow: torch.Tensor | None,
    ) -> None:
        """Update consecutive elements in place: `master`, and `states` in the order in which they are named.

        All tensors have one dim, one length, the master type and one device; `gradient` may be used up. What is
        allocated beside them, for as many elements, no memory model counts. `rate`: learning rate of this batch.
        `number`: of this update, from 1. `overflow`: float32 [], 1 where nothing is to change; given only to a fused
        update.
        """

    @property
    def fused_bytes(self) -> int:
        """Bytes per parameter that one kernel moves for an update in single precision: the gradient in; weight and
        state in and out."""
        return _SINGLE * (1 + 2 * (1 + len(self.states)))

    @property
    def streamed_bytes(self) -> int:
        """Bytes per parameter of weight and state in single precision."""
        return _SINGLE * (1 + len(self.states))

    def stream(self, *, offloaded: bool) -> str:
        """Return the name of the measured times of its step."""
        return f"{self.kernel}-offloaded" if offloaded else self.kernel
