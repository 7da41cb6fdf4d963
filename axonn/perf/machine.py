"""A machine described in one YAML file: every number with its unit, its source and its status.

The models in this package read a machine only through `MachineFile`; `experiments/machines/summit.yaml` is an example
to copy. `value` and `unit` are written as the source gives them; `si` converts to seconds, bytes, bytes/s or FLOP/s.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from axonn.config import StrictModel, load_yaml

Status = Literal["text", "figure", "fitted", "doc", "measured", "assumed"]
"""text, figure: read from a paper; doc: vendor or site documentation; measured: by `axonn calibrate` or the like."""

Library = Literal["mpi", "nccl"]
"""Who moves a message: a (device-aware) MPI, or NCCL and its kin."""

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
    """A number, its unit, and where it comes from."""

    value: float = Field(gt=0)
    unit: str
    source: str
    status: Status

    @property
    def si(self) -> float:
        """The value in SI units."""
        return self.value * _SI[self.unit]


class FlopRate(Quantity):
    """Floating-point operations per second."""

    unit: Literal["TFLOP/s", "GFLOP/s"]


class Bandwidth(Quantity):
    """Bytes per second in one direction, unless its source says otherwise."""

    unit: Literal["GB/s"]


class Size(Quantity):
    """Bytes."""

    unit: Literal["bytes", "MB", "GB", "GiB"]


class Time(Quantity):
    """Seconds."""

    unit: Literal["us", "ms", "s"]


class Count(Quantity):
    """A number of things."""

    unit: Literal["1"] = "1"

    @property
    def number(self) -> int:
        """The count as an integer."""
        return int(self.value)


class FitReport(StrictModel):
    """What coefficients were fitted on and how well. Errors are mean |predicted / measured - 1| in percent."""

    source: str
    points: int = Field(ge=1)
    in_sample_error_pct: float = Field(ge=0)
    held_out_error_pct: float = Field(ge=0)
    """Mean over 5 folds, each predicted by a fit on the other four; with very few points, point by point."""
    note: str = ""
    status: Literal["fitted"] = "fitted"


class Tile(StrictModel):
    """A GEMM kernel that computes blocks of `rows x columns`, at `efficiency` of the peak when its waves are full."""

    rows: int = Field(ge=1)
    columns: int = Field(ge=1)
    efficiency: float = Field(gt=0, le=1)


class GemmCurve(StrictModel):
    """Coefficients of `axonn.perf.kernels.gemm_time`; print them for other hardware with `python -m axonn.perf.fit`."""

    launch_us: float = Field(ge=0)
    """Time of an empty GEMM."""
    k_overhead: float = Field(ge=0)
    """Prologue and epilogue of a block, in units of the inner dimension."""
    memory_efficiency: float = Field(gt=0)
    """Share of the memory bandwidth that a memory-bound GEMM reaches."""
    wave_quantisation: float = Field(ge=0, le=1)
    """1: a partly filled last wave takes as long as a full one; 0: only its share."""
    tiles: list[Tile] = Field(min_length=1)
    fit: FitReport


class InLayer(StrictModel):
    """How much longer kernels take inside a training step than alone.

    Clocks under sustained load, kernels that the library picks, strided operands. Fitted on measured transformer layers
    (`python -m axonn.perf.fit CSV --machine FILE`); both are 1 where nothing is known.
    """

    gemm_slowdown: float = Field(gt=0)
    stream_slowdown: float = Field(gt=0)
    fit: FitReport


class Segment(StrictModel):
    """`latency + bytes / bandwidth` for messages of at least `min_bytes` and at most `max_bytes`."""

    min_bytes: float = Field(ge=0)
    max_bytes: float = Field(gt=0)
    latency_us: float = Field(ge=0)
    gb_per_s: float = Field(gt=0)


class Curve(StrictModel):
    """Time of a message by its size. Between two segments the time is interpolated; the last one has no upper end."""

    segments: list[Segment] = Field(min_length=1)
    fit: FitReport

    def model_post_init(self, context: Any) -> None:
        for before, after in zip(self.segments, self.segments[1:], strict=False):
            if before.max_bytes > after.min_bytes or before.min_bytes > before.max_bytes:
                raise ValueError("segments must be sorted by size and must not overlap")

    def seconds(self, nbytes: float) -> float:
        """Seconds for a message of `nbytes`."""
        return self.latency(nbytes) + self.transfer(nbytes)

    def latency(self, nbytes: float) -> float:
        """The part of `seconds` that does not grow with the size."""
        return self._both(nbytes)[0]

    def transfer(self, nbytes: float) -> float:
        """The part of `seconds` that grows with the size."""
        return self._both(nbytes)[1]

    def _both(self, nbytes: float) -> tuple[float, float]:
        if nbytes <= 0:
            return 0.0, 0.0
        below = self.segments[0]
        for segment in self.segments:
            if nbytes < segment.min_bytes:
                left, right = _evaluate(below, below.max_bytes), _evaluate(segment, segment.min_bytes)
                share = (nbytes - below.max_bytes) / (segment.min_bytes - below.max_bytes)
                return left[0] + share * (right[0] - left[0]), left[1] + share * (right[1] - left[1])
            below = segment
            if nbytes <= segment.max_bytes:
                break
        return _evaluate(below, nbytes)

    @property
    def asymptotic_bandwidth(self) -> float:
        """Bytes per second of a very long message."""
        return self.segments[-1].gb_per_s * 1e9


def _evaluate(segment: Segment, nbytes: float) -> tuple[float, float]:
    return segment.latency_us * 1e-6, nbytes / (segment.gb_per_s * 1e9)


class P2PCurves(StrictModel):
    """Point-to-point messages of one library, between two devices of a node and of two nodes."""

    intra_node: Curve
    inter_node: Curve


class AllReduceCurves(StrictModel):
    """All-reduce of one library, measured on one node and on several."""

    intra_node: Curve
    intra_node_ranks: Count
    inter_node: Curve
    inter_node_ranks: Count
    inter_node_nodes: Count


class GpuSpec(StrictModel):
    """One device."""

    name: str
    peak: FlopRate
    """Half-precision matrix peak, the base of `pct_peak`."""
    vector_peak: FlopRate
    """Half-precision peak without matrix units; GEMMs that the matrix units cannot take run at it."""
    alignment: Count
    """The matrix units take a GEMM whose dimensions are multiples of this many elements."""
    memory: Size
    memory_bandwidth: Bandwidth
    """Peak, the base of the GEMM coefficients."""
    stream_bandwidth: Bandwidth
    """What kernels that only read and write reach."""
    kernel_latency: Time
    """Least time of any kernel on the device."""
    multiprocessors: Count
    gemm: GemmCurve
    in_layer: InLayer


class NodeSpec(StrictModel):
    """One node: devices, the links between them, and the host."""

    gpus: Count
    gpus_per_socket: Count
    nvlink: Bandwidth
    """Between two devices of one socket."""
    host_link: Bandwidth
    """Between a device and its host."""
    host_memory: Size
    host_memory_bandwidth: Bandwidth
    """Of one socket, reads and writes together."""


class NetworkSpec(StrictModel):
    """Between nodes, and the measured behaviour of the communication libraries."""

    injection: Bandwidth
    """What all devices of a node together can send to other nodes."""
    ports: Count
    """Network ports of a node; one message goes through one of them."""
    p2p: dict[Library, P2PCurves]
    all_reduce: AllReduceCurves


class MachineFile(StrictModel):
    """Everything that the performance model knows about a machine."""

    name: str
    about: str
    gpu: GpuSpec
    node: NodeSpec
    network: NetworkSpec

    def model_post_init(self, context: Any) -> None:
        if math.remainder(self.node.gpus.value, self.node.gpus_per_socket.value):
            raise ValueError("gpus_per_socket must divide gpus")
        missing = {"mpi", "nccl"} - set(self.network.p2p)
        if missing:
            raise ValueError(f"network.p2p lacks {', '.join(sorted(missing))}")


def load_machine(path: Path | str) -> MachineFile:
    """Read a machine file. Raises `ConfigError` naming file, key and the nearest valid key."""
    return load_yaml(path, MachineFile)
