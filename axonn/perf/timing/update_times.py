"""Seconds of each stage, after its last task, to reduce its gradients over the replicas and update its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

from axonn.perf.layers.kernel_operations import MemoryBoundKernel
from axonn.perf.layers.model_outline import ModelOutline
from axonn.perf.machine.kernel_times import stream_time
from axonn.perf.machine.machine_file import MachineFile
from axonn.perf.machine.network import PAYLOAD_SHARE, GroupPlacement, all_reduce_time, place, ranks_of_node, shared_with
from axonn.perf.strategy import Strategy
from axonn.perf.timing.communication import BYTES
from axonn.perf.timing.memory_model import stage_parameters
from axonn.perf.timing.stage_times import StageTimes, kernels_of

_STREAMED = 12
"""Bytes per parameter that the offloaded optimizer moves over the host link each way: weight and two moments."""
_CLIPPING = 12
"""Bytes per parameter of clipping: the norm (4), and the scaling (4 in, 4 out)."""


class _Passes(NamedTuple):
    """Bytes per parameter that the device moves in each pass."""

    descale: int
    update: int


_PASSES = {
    # Descaling in place with the overflow check (6 + 4), zeroing of gradients (2); gradient (4), weight and two
    # moments in and out (24), half-precision weight (2 out; 4 in for a separate cast), descaled copy (4).
    "fused": _Passes(12, 38),
    # Cast of the half-precision gradient to single precision (6), division (8), overflow check (4); weight decay (8),
    # two moments (20 + 20), denominator (24), update (16), and the half-precision weight (6).
    "separate": _Passes(18, 94),
}


class StepTime(NamedTuple):
    """Seconds of one stage; `optimizer` excludes the part that overlaps the reduction."""

    reduction: float
    optimizer: float


def stage_steps(
    outline: ModelOutline, machine: MachineFile, strategy: Strategy, *, stages: Sequence[StageTimes] | None = None
) -> list[StepTime]:
    """Return the time of each stage. `stages`: times of the last backward, which the reduction may overlap."""
    grid = strategy.process_grid(machine)
    sizes = stage_parameters(outline, strategy)
    found = []
    for stage, phi in enumerate(sizes):
        rank = grid.rank(inter=stage)
        on_node = [sizes[grid.coordinates(r).inter] for r in ranks_of_node(grid, rank)]
        where = shared_with(place(grid, ("data",), rank, machine), phi, on_node)
        step = step_time(machine, strategy, phi, where)
        if strategy.overlap_reduction and stages is not None:
            beside = min(step.reduction, stages[stage].backward)
            step = step._replace(reduction=step.reduction - beside / machine.beside_collectives)
        found.append(step)
    return found


def step_time(machine: MachineFile, strategy: Strategy, phi: int, where: GroupPlacement) -> StepTime:
    """Return the time of a rank with `phi` parameters, whose replicas are placed at `where`."""
    of_placement = _offloaded if strategy.optimizer == "offloaded" else _on_device
    return of_placement(machine, strategy, phi, where)


def step_times(outline: ModelOutline, machine: MachineFile, strategy: Strategy) -> StepTime:
    """Return the time of the stage that takes longest (`stage_steps`)."""
    return max(stage_steps(outline, machine, strategy), key=sum)


def _on_device(machine: MachineFile, strategy: Strategy, phi: int, where: GroupPlacement) -> StepTime:
    """Return the time with the optimizer on the device.

    Descaling all gradients at once counts as reduction, as in the reference implementation of AxoNN.
    """
    # Sharded: reduce-scatter the gradients and all-gather the weights, together as much as one all-reduce.
    reduction = all_reduce_time(machine, BYTES[strategy.gradient_type] * phi, where)
    mine = ceil(phi / where.ranks) if strategy.optimizer == "sharded" else phi
    passes = _PASSES[strategy.optimizer_kernels]
    moved = passes.update + (_CLIPPING if strategy.clip_norm else 0)
    if BYTES[strategy.compute] < 4:
        reduction += stream_time(machine.gpu, passes.descale * mine)
    adam = MemoryBoundKernel("adam", mine, 0, mask=moved * mine)
    return StepTime(reduction, kernels_of(machine, strategy).alone(adam)[1])


def _offloaded(machine: MachineFile, strategy: Strategy, phi: int, where: GroupPlacement) -> StepTime:
    """Return the time with the offloaded optimizer, which updates a chunk while the next one is reduced.

    Chunks of k buckets are all-reduced one after the other. A device reaches other nodes and its host over the same
    link, so copies delay the all-reduce: of 1.75 s that the optimizer takes alone, overlap saved 0.5 s at most (IPDPS
    2022, Figures 6 and 8).
    """
    chunk = strategy.k * strategy.bsize
    reduced = done = held_up = 0.0
    left = phi
    while left > 0:
        size = min(chunk, left)
        update, copies = _streamed(machine, strategy, size)
        reduced += held_up + all_reduce_time(machine, BYTES[strategy.gradient_type] * size, where)
        done = max(done, reduced) + update
        held_up = copies if where.nodes > 1 else 0.0
        left -= size
    return StepTime(reduced, done - reduced)


def _streamed(machine: MachineFile, strategy: Strategy, size: int) -> tuple[float, float]:
    """Return the seconds in which the offloaded optimizer updates `size` parameters, and those of its copies."""
    copies, compute = _seconds_per_offloaded(machine, strategy)
    per_element = max(copies, compute) if strategy.buckets_resident > 1 else copies + compute
    full, rest = divmod(size, strategy.bsize)
    kernels = kernels_of(machine, strategy)
    update = 0.0
    for count, elements in ((full, strategy.bsize), (1, rest)):
        bucket = kernels.measured(MemoryBoundKernel("adam-offloaded", elements, 0)) if count and elements else None
        update += count * (elements * per_element if bucket is None else bucket)
    return update, size * copies


def _seconds_per_offloaded(machine: MachineFile, strategy: Strategy) -> tuple[float, float]:
    """Return the seconds (of copies, of computation) per parameter of the offloaded optimizer.

    One resident bucket is copied in and out in turn, several concurrently. The devices of a socket share the bandwidth
    of its host memory.
    """
    node = machine.node
    host = node.host_memory_bandwidth.si / node.gpus_per_socket.number
    one_way = _STREAMED / min(PAYLOAD_SHARE * node.host_link.si, host)
    compute = sum(_PASSES[strategy.optimizer_kernels]) / machine.gpu.stream_bandwidth.si
    if strategy.buckets_resident == 1:
        return 2 * one_way, compute
    return max(one_way, 2 * _STREAMED / host), compute
