"""Bytes of device memory that a strategy needs."""

from __future__ import annotations

from dataclasses import dataclass

from axonn.config import GPTConfig
from axonn.errors import AxonnError
from axonn.perf.kernels import KernelTimes
from axonn.perf.machine import MachineFile
from axonn.perf.strategy import Strategy

FULL_STATE = 20
"""Bytes per parameter of mixed precision with Adam: 4 + 4 single-precision weights and gradients, 2 + 2 half-precision
ones, 8 moments (Singh & Bhatele, IPDPS 2022, section V-B)."""
HALF_STATE = 4
"""Bytes per parameter of half-precision weights and gradients only."""
BUCKET_STATE = 16
"""Bytes per element of a resident bucket: 4 weights, 8 moments, 4 descaled gradients (same source)."""

HOST_STATE = 12
"""Bytes per parameter that the offloaded optimizer keeps on the host: single-precision weight and two moments."""


class DoesNotFit(AxonnError):
    """A strategy whose memory exceeds the device's. Says by how much."""


def model_state_bytes(
    phi: int,
    *,
    optimizer: str = "device",
    bsize: int = 0,
    buckets: int = 1,
    shards: int = 1,
) -> int:
    """Bytes of parameters, gradients and optimizer state for `phi` parameters on a device.

    device: `20 phi`; offloaded: `4 phi + 16 buckets bsize` (IPDPS 2022, section V-B); sharded (ZeRO stage 1,
    Rajbhandari et al., SC 2020): `4 phi + 16 phi / shards`.
    """
    if optimizer == "offloaded":
        return HALF_STATE * phi + BUCKET_STATE * buckets * bsize
    if optimizer == "sharded":
        return HALF_STATE * phi + -(-(FULL_STATE - HALF_STATE) * phi // shards)
    return FULL_STATE * phi


def stage_parameters(model: GPTConfig, strategy: Strategy) -> list[int]:
    """Parameters of one rank of each stage. The embedding lies where the network begins, the head where it ends.

    A tied head counts on both stages, since each holds a copy, and once where they are one (one stage, or a V).
    """
    h, tensor = model.hidden, strategy.tensor
    counts = []
    sink = sink_of(strategy)
    for stage, count in enumerate(strategy.layers_of(model)):
        elements = count * (12 * h * h + 13 * h)
        if stage == 0:
            elements += (model.vocab + model.seq_len) * h
        if stage == sink:
            elements += 2 * h + (0 if model.tied_head and sink == 0 else model.vocab * h)
        counts.append(-(-elements // tensor))
    return counts


def sink_of(strategy: Strategy) -> int:
    """The stage that computes the loss."""
    layout = strategy.schedule.spec().layout(strategy.grid.inter)
    return layout.place(layout.virtual_stages - 1)[0]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank of one stage."""

    stage: int
    model_state: int
    checkpoints: int
    """Kept for the backwards of the microbatches in flight."""
    working: int
    """Activations of the part that is being recomputed, and on the last stage the logits."""
    capacity: int
    host: int
    """Host memory that the ranks of a node need together, for the offloaded optimizer's state."""
    host_capacity: int

    @property
    def total(self) -> int:
        return self.model_state + self.checkpoints + self.working

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity and self.host <= self.host_capacity

    def check(self) -> None:
        """Raise `DoesNotFit`, with numbers, when the memory exceeds the device's."""
        if self.host > self.host_capacity:
            raise DoesNotFit(
                f"stage {self.stage} needs {self.host / 1e9:.2f} GB of host memory per node for the optimizer, the "
                f"node has {self.host_capacity / 1e9:.2f} GB; use more stages"
            )
        if not self.fits:
            raise DoesNotFit(
                f"stage {self.stage} needs {self.total / 1e9:.2f} GB ({self.model_state / 1e9:.2f} model state, "
                f"{self.checkpoints / 1e9:.2f} checkpoints, {self.working / 1e9:.2f} working), the device has "
                f"{self.capacity / 1e9:.2f} GB; use more stages, a smaller microbatch or the offloaded optimizer"
            )


def stage_memory(model: GPTConfig, machine: MachineFile, strategy: Strategy, *, stage: int, held: int) -> Memory:
    """Memory of one rank of `stage` while it holds `held` microbatches."""
    grid = strategy.grid
    phi = stage_parameters(model, strategy)[stage]
    state = model_state_bytes(
        phi,
        optimizer=strategy.optimizer,
        bsize=strategy.bsize,
        buckets=strategy.buckets_resident,
        shards=grid.data,
    )
    rows = strategy.microbatch_size * model.seq_len
    boundary = 2 * rows * model.hidden // grid.row
    layers = strategy.layers_of(model)[stage]
    inside = _block_activations(model, strategy)
    if strategy.recompute:
        checkpoints = held * -(-layers // strategy.checkpoint_layers) * boundary
        working = min(layers, strategy.checkpoint_layers) * inside
    else:
        checkpoints = held * layers * inside
        working = 0
    if stage == sink_of(strategy):
        vocabulary = KernelTimes(machine.gpu, model, strategy.microbatch_size, grid.row, grid.col).vocabulary
        working += 10 * rows * vocabulary  # logits in half, loss and its gradient in single precision
    return Memory(
        stage=stage,
        model_state=state,
        checkpoints=checkpoints,
        working=working,
        capacity=int(machine.gpu.memory.si),
        host=HOST_STATE * phi * machine.node.gpus.number if strategy.optimizer == "offloaded" else 0,
        host_capacity=int(machine.node.host_memory.si),
    )


def _block_activations(model: GPTConfig, strategy: Strategy) -> int:
    """Bytes that one block keeps between its forward and its backward.

    `s b h (10 + 24 / t + 5 a s / (h t))` (Korthikanti et al., arXiv 2205.05198, equation 2), the 10 cut along row.
    """
    row, col = strategy.grid.row, strategy.grid.col
    tokens = strategy.microbatch_size * model.seq_len
    scores = 5 * model.heads * model.seq_len / model.hidden
    return int(tokens * model.hidden * (10 / row + (24 + scores) / col))
