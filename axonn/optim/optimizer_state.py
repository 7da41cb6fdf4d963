"""Where master weights and an algorithm's state lie, and how the step gets them one bucket at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from axonn.config.train_config import OptimizerConfig, PrecisionConfig
from axonn.device.pinned_memory import pinned_zeros
from axonn.device.streams import DeviceEvent, Timeline
from axonn.optim.flat_buffers import FlatParameters
from axonn.spans import SpanKind


class Bucket(NamedTuple):
    """Consecutive elements of the state, on the device.

    `states`: in the order in which the algorithm names them. `gradient`: room for the gradient in the master type; None
    where gradients already have that type.
    """

    master: torch.Tensor
    states: Sequence[torch.Tensor]
    gradient: torch.Tensor | None


class StateBytes(NamedTuple):
    """Bytes of the tensors that hold optimizer state. `gradients`: a full copy of them in the master type."""

    state: int
    gradients: int
    buckets: int
    host: int


class OptimizerState(ABC):
    """Flat master weights and state tensors of all elements, in the master type.

    `master` is the buffer of the parameters themselves where these have the master type. `names`: of the algorithm's
    state tensors.
    """

    def __init__(
        self, flat: FlatParameters, precision: PrecisionConfig, names: Sequence[str], *, home: torch.device
    ) -> None:
        self._flat = flat
        self.dtype: torch.dtype = getattr(torch, precision.master_type)
        self.has_own_master = self.dtype != flat.parameters.dtype
        self.converts_gradients = self.dtype != flat.gradients.dtype

        def zeros() -> torch.Tensor:
            if home.type == flat.parameters.device.type:
                return torch.zeros(flat.elements, dtype=self.dtype, device=home)
            return pinned_zeros(flat.elements, self.dtype)

        self.master = zeros() if self.has_own_master else flat.parameters
        self.states = {name: zeros() for name in names}

    @abstractmethod
    def stream(self, parts: Sequence[slice]) -> Iterator[Bucket]:
        """The buckets of `parts` in turn. Each is the caller's to change until it asks for the next."""

    @abstractmethod
    def memory(self) -> StateBytes:
        """Bytes allocated here."""

    @abstractmethod
    def settle(self) -> None:
        """Let the host wait until the state is complete where it lies."""

    @property
    def stored(self) -> list[torch.Tensor]:
        """The flat buffers that are not the parameters'."""
        return [*([self.master] if self.has_own_master else []), *self.states.values()]


class ResidentState(OptimizerState):
    """Everything on the device, with a whole copy of the gradients where these must be converted."""

    def __init__(self, flat: FlatParameters, precision: PrecisionConfig, names: Sequence[str]) -> None:
        super().__init__(flat, precision, names, home=flat.parameters.device)
        self._gradient = torch.empty_like(self.master) if self.converts_gradients else None

    def stream(self, parts: Sequence[slice]) -> Iterator[Bucket]:
        for part in parts:
            gradient = None if self._gradient is None else self._gradient[part]
            yield Bucket(self.master[part], [state[part] for state in self.states.values()], gradient)

    def memory(self) -> StateBytes:
        return StateBytes(
            state=_bytes(self.stored),
            gradients=0 if self._gradient is None else self._gradient.nbytes,
            buckets=0,
            host=0,
        )

    def settle(self) -> None:
        return None


class OffloadedState(OptimizerState):
    """Everything in host memory; the step streams it through a few buckets on the device.

    While one bucket is computed on, the next are copied in and the last is copied out (Singh & Bhatele, IPDPS 2022,
    section V-B, with `buckets_resident` 1; with 2 or more, copies and computation overlap).
    """

    def __init__(
        self,
        flat: FlatParameters,
        precision: PrecisionConfig,
        names: Sequence[str],
        config: OptimizerConfig,
        timeline: Timeline,
    ) -> None:
        device = flat.parameters.device
        super().__init__(flat, precision, names, home=torch.device("cpu"))
        self._timeline = timeline
        # A link carries both ways at once.
        self._inwards, self._outwards = timeline.side_stream(), timeline.side_stream()
        bsize = min(config.bsize, flat.elements)

        def empty() -> torch.Tensor:
            return torch.empty(bsize, dtype=self.dtype, device=device)

        self._slots = [[empty() for _ in self.stored] for _ in range(config.buckets_resident)]
        self._left: list[DeviceEvent | None] = [None] * len(self._slots)
        """When what each slot last held was out of it."""
        self._gradients = [empty() for _ in self._slots] if self.converts_gradients else []

    def stream(self, parts: Sequence[slice]) -> Iterator[Bucket]:
        resident = len(self._slots)
        arrived = {i: self._load(parts[i], i) for i in range(min(resident, len(parts)))}
        for i, part in enumerate(parts):
            arrived.pop(i).wait()
            yield self._bucket(part, i)
            computed = self._timeline.now()
            self._store(part, i, computed)
            if i + resident < len(parts):
                arrived[i + resident] = self._load(parts[i + resident], i + resident)

    def _bucket(self, part: slice, number: int) -> Bucket:
        size = part.stop - part.start
        slot = [tensor[:size] for tensor in self._slots[number % len(self._slots)]]
        master = slot.pop(0) if self.has_own_master else self.master[part]
        gradient = self._gradients[number % len(self._slots)][:size] if self._gradients else None
        return Bucket(master, slot, gradient)

    def _load(self, part: slice, number: int) -> DeviceEvent:
        """Copy in, once the slot's last store is done, and so every store before it: also that of this part."""
        slot = number % len(self._slots)
        left = self._left[slot]
        with self._inwards:
            if left is not None:
                left.wait()
            start = self._timeline.now()
            for there, here in zip(self.stored, self._slots[slot], strict=True):
                here[: part.stop - part.start].copy_(there[part], non_blocking=True)
            end = self._timeline.now()
        self._timeline.span(SpanKind.COPY, start, end)
        return end

    def _store(self, part: slice, number: int, computed: DeviceEvent) -> None:
        slot = number % len(self._slots)
        with self._outwards:
            computed.wait()
            start = self._timeline.now()
            for there, here in zip(self.stored, self._slots[slot], strict=True):
                there[part].copy_(here[: part.stop - part.start], non_blocking=True)
            end = self._timeline.now()
        self._left[slot] = end
        self._timeline.span(SpanKind.COPY, start, end)

    def memory(self) -> StateBytes:
        slots = [tensor for slot in self._slots for tensor in slot]
        return StateBytes(state=0, gradients=0, buckets=_bytes(slots + self._gradients), host=_bytes(self.stored))

    def settle(self) -> None:
        self._outwards.synchronize()


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
