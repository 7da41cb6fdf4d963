"""Description of a machine in one YAML file: every number with its unit, source and status.

The models in this package read a machine only through `MachineFile`; `experiments/machines/summit.yaml` is an example
to copy. `value` and `unit` are written as the source gives them; `si` converts to seconds, bytes, bytes/s or FLOP/s.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from axonn.config.loading import Name
from axonn.config.train_config import StrictModel, load_yaml
from axonn.errors import ConfigError, MachineError
from axonn.perf.machine.kernel_tables import MeasuredKernels
from axonn.perf.machine.quantities import Bandwidth, Count, FitReport, FlopRate, Origin, Size, Time

T = TypeVar("T")


Library = Literal["mpi", "nccl"]
"""Communication library that moves a message: a (device-aware) MPI, or NCCL and the like."""


class Tile(StrictModel):
    """A GEMM kernel that computes blocks of `rows x columns`, at `efficiency` of the peak when its waves are full."""

    rows: int = Field(ge=1)
    columns: int = Field(ge=1)
    efficiency: float = Field(gt=0, le=1)


class GemmCurve(StrictModel):
    """Coefficients of `axonn.perf.machine.kernel_times.gemm_time`.

    `python -m axonn.perf.machine.coefficient_fit` fits them for other hardware.
    """

    launch_us: float = Field(ge=0)
    """Time of an empty GEMM."""
    k_overhead: float = Field(ge=0)
    """Prologue and epilogue of a block, in units of the inner dimension."""
    memory_efficiency: float = Field(gt=0)
    """Fraction of the memory bandwidth that a memory-bound GEMM reaches."""
    wave_quantisation: float = Field(ge=0, le=1)
    """1: a partly filled last wave takes as long as a full one; 0: it takes its share."""
    tiles: list[Tile] = Field(min_length=1)
    fit: FitReport | Origin


class InLayer(StrictModel):
    """Slowdown of kernels inside a training step, relative to each alone.

    Causes: clocks under sustained load, the library's choice of kernels, strided operands. Fitted on measured
    transformer layers (`python -m axonn.perf.machine.coefficient_fit CSV --machine FILE`); 1 if unknown or not needed.
    """

    gemm_slowdown: float = Field(gt=0)
    stream_slowdown: float = Field(gt=0)
    fit: FitReport | Origin


class MessageSegment(StrictModel):
    """One segment of a curve: `latency + bytes / bandwidth` for messages of `min_bytes` to `max_bytes`."""

    min_bytes: float = Field(ge=0)
    max_bytes: float = Field(gt=0)
    latency_us: float = Field(ge=0)
    gb_per_s: float = Field(gt=0)


class Curve(StrictModel):
    """Time of a message by its size, interpolated between two segments; the last segment extends to any size."""

    segments: list[MessageSegment] = Field(min_length=1)
    fit: FitReport | Origin

    def model_post_init(self, context: Any) -> None:
        for before, after in zip(self.segments, self.segments[1:], strict=False):
            if before.max_bytes > after.min_bytes or before.min_bytes > before.max_bytes:
                raise ValueError("segments must be sorted by size and must not overlap")

    def seconds(self, nbytes: float) -> float:
        """Return the seconds of a message of `nbytes`."""
        return self.latency(nbytes) + self.transfer(nbytes)

    def latency(self, nbytes: float) -> float:
        """Return the part of `seconds` that does not grow with the size."""
        return self._both(nbytes)[0]

    def transfer(self, nbytes: float) -> float:
        """Return the part of `seconds` that grows with the size."""
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
        """Bytes per second of a very large message."""
        return self.segments[-1].gb_per_s * 1e9


def _evaluate(segment: MessageSegment, nbytes: float) -> tuple[float, float]:
    return segment.latency_us * 1e-6, nbytes / (segment.gb_per_s * 1e9)


class P2PCurves(StrictModel):
    """Point-to-point messages of one library, within a node and between nodes (None: the machine has one node)."""

    intra_node: Curve
    inter_node: Curve | None = None

    def between(self, *, same_node: bool) -> Curve:
        """Return the curve of a message. Raises `ConfigError` for a message between nodes of a single-node machine."""
        if same_node:
            return self.intra_node
        return one_of_several_nodes(self.inter_node, "network.p2p: inter_node")


class AllReduceCurves(StrictModel):
    """All-reduce of one library, measured on one node and on several (None: the machine has one node)."""

    intra_node: Curve
    intra_node_ranks: Count
    inter_node: Curve | None = None
    inter_node_ranks: Count | None = None
    inter_node_nodes: Count | None = None
    multiprocessors: Count | None = None
    """Multiprocessors of a device that a collective occupies, so that kernels beside it have fewer. None: unknown;
    kernels are then taken to be as fast as without a collective."""
    slowdown: Count | None = None
    """Measured factor by which kernels take longer while a collective runs. None: unknown."""

    def model_post_init(self, context: Any) -> None:
        present = [x is not None for x in (self.inter_node, self.inter_node_ranks, self.inter_node_nodes)]
        if any(present) != all(present):
            raise ValueError(
                "inter_node, inter_node_ranks and inter_node_nodes belong together; give all three or none"
            )

    def over_nodes(self) -> tuple[Curve, int, int]:
        """Return (curve, ranks, nodes) of the measurement on several nodes. Raises `ConfigError` if there is none."""
        where = "network.all_reduce: inter_node"
        ranks = one_of_several_nodes(self.inter_node_ranks, where).number
        nodes = one_of_several_nodes(self.inter_node_nodes, where).number
        return one_of_several_nodes(self.inter_node, where), ranks, nodes


def one_of_several_nodes(value: T | None, key: str) -> T:
    """Return `value`, which describes several nodes. Raises `ConfigError` if it is None."""
    if value is None:
        raise ConfigError(
            f"the machine file describes a single node, and the ranks do not fit on it; use fewer ranks, or give {key}"
        )
    return value


class HostTimes(StrictModel):
    """Host time that a device waits for, in addition to its kernels.

    A machine file leaves this out if the host runs ahead of the device, as with a GPU; a CPU is its own host.
    """

    forward: Time
    """Time per operation of a forward: the call of the layer, and the bookkeeping of autograd."""
    backward: Time
    """Time per operation of a backward."""
    task: Time
    """Time per task of a stage."""
    batch: Time
    """Time per batch: its data, its loss."""
    pipelined: Time | None = None
    """Time per task in a pipeline: to poll for messages, to choose a task, to send; without `messages`."""
    messages: dict[Library, Curve] = {}
    """Time that sending or receiving a message takes from the core's computation, on each side, by its size."""


class GpuSpec(StrictModel):
    """One device: a GPU, or a CPU core. Its kernel times come from the curve `gemm` or from the tables `measured`."""

    name: str
    peak: FlopRate
    """Matrix peak in the compute type (half precision on GPUs), the base of `pct_peak`."""
    vector_peak: FlopRate
    """Peak without matrix units, for GEMMs that the matrix units do not support."""
    alignment: Count
    """Elements of which all dimensions of a GEMM must be multiples for the matrix units."""
    memory: Size
    memory_bandwidth: Bandwidth
    """Peak bandwidth, the base of the GEMM coefficients."""
    stream_bandwidth: Bandwidth
    """Bandwidth that memory-bound kernels reach."""
    kernel_latency: Time
    """Minimum time of any kernel on the device."""
    multiprocessors: Count
    gemm: GemmCurve | None = None
    in_layer: InLayer | None = None
    """None: kernels take as long inside a training step as alone."""
    measured: list[MeasuredKernels] = []
    """Tables, by the number of devices of a node that compute at the same time and by precision."""
    host: HostTimes | None = None

    def model_post_init(self, context: Any) -> None:
        if (self.gemm is None) == (not self.measured):
            raise ValueError("gemm and measured both say how long products take; give one of them")
        for tables in self.measured:
            if tables.best_rate > 1.001 * self.peak.si:
                raise ValueError(
                    f"peak is {self.peak.si / 1e9:.4g} GFLOP/s, but a product in measured reaches "
                    f"{tables.best_rate / 1e9:.4g}; raise peak or measure again"
                )

    def tables(self, *, element: int, busy: int) -> MeasuredKernels | None:
        """Return the tables for `busy` devices computing at once, or the next larger number (else the largest).

        `element`: bytes of the compute type. None if the device has no tables. Raises `ConfigError` when none was
        measured in such a type.
        """
        if not self.measured:
            return None
        tables = sorted((t for t in self.measured if t.element == element), key=lambda t: t.busy)
        if not tables:
            known = ", ".join(sorted({t.precision for t in self.measured}))
            raise ConfigError(
                f"the kernels of {self.name} were measured in {known}, not in a type of {element} bytes; "
                "measure them with axonn calibrate --precision"
            )
        return next((t for t in tables if t.busy >= busy), tables[-1])


class NodeSpec(StrictModel):
    """One node: devices, the links between them, and the host."""

    gpus: Count
    gpus_per_socket: Count
    links: Literal["pairs", "switch"] = "pairs"
    """pairs: every two devices of a socket share a link, and a bus joins the sockets; switch: each device has one link
    to a switch that connects all devices of the node."""
    nvlink: Bandwidth
    """Bandwidth of one such link, in one direction."""
    host_link: Bandwidth
    """Bandwidth between a device and its host."""
    host_memory: Size
    host_memory_bandwidth: Bandwidth
    """Memory bandwidth of one socket, reads and writes together."""


class NetworkSpec(StrictModel):
    """Network between nodes, and measured times of the communication libraries."""

    injection: Bandwidth
    """Bandwidth at which all devices of a node together can send to other nodes."""
    nccl_injection: Bandwidth | None = None
    """Bandwidth that NCCL reaches in training runs instead, if that is known to be less."""
    ports: Count
    """Network ports of a node; a message uses one of them."""
    p2p: dict[Library, P2PCurves]
    all_reduce: AllReduceCurves


class MachineFile(StrictModel):
    """Everything that the performance model knows about one machine."""

    name: Name
    about: str
    gpu: GpuSpec
    node: NodeSpec
    network: NetworkSpec
    nodes: Count | None = None
    """Number of nodes of the machine; None if unknown."""

    @property
    def beside_collectives(self) -> float:
        """Factor by which kernels take longer while a collective runs on the device."""
        measured, taken = self.network.all_reduce.slowdown, self.network.all_reduce.multiprocessors
        if measured is not None:
            return max(1.0, measured.value)
        if taken is None:
            return 1.0
        return self.gpu.multiprocessors.number / (self.gpu.multiprocessors.number - taken.number)

    def model_post_init(self, context: Any) -> None:
        slowdown = self.network.all_reduce.slowdown
        if slowdown is not None and slowdown.value < 1:
            raise ValueError("network.all_reduce.slowdown is less than 1: kernels cannot be faster beside a collective")
        taken = self.network.all_reduce.multiprocessors
        if taken is not None and taken.value >= self.gpu.multiprocessors.value:
            raise ValueError("network.all_reduce.multiprocessors must be fewer than gpu.multiprocessors")
        if math.remainder(self.node.gpus.value, self.node.gpus_per_socket.value):
            raise ValueError("gpus_per_socket must divide gpus")
        missing = {"mpi", "nccl"} - set(self.network.p2p)
        if missing:
            raise ValueError(f"network.p2p lacks {', '.join(sorted(missing))}")

    def check_gpus(self, gpus: int) -> None:
        """Raise `ConfigError` when the machine has fewer than `gpus` GPUs."""
        if self.nodes is not None and gpus > self.nodes.number * self.node.gpus.number:
            raise ConfigError(
                f"{self.name} has {self.nodes.number * self.node.gpus.number} GPUs ({self.nodes.number} nodes with "
                f"{self.node.gpus.number}), not {gpus}; ask for fewer, or take a larger machine"
            )


def load_machine(path: Path | str) -> MachineFile:
    """Read a machine file. Raises `MachineError` naming file, key and the nearest valid key."""
    try:
        return load_yaml(path, MachineFile)
    except ConfigError as error:
        raise MachineError(str(error)) from error
