"""Device and host memory of a strategy, in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from axonn.config.train_config import FloatType
from axonn.errors import AxonnError
from axonn.perf.layers.kernel_operations import AttentionKernel
from axonn.perf.layers.layer_work import LayerWork, work_of
from axonn.perf.layers.model_outline import ModelOutline
from axonn.perf.machine.kernel_times import SINGLE
from axonn.perf.machine.machine_file import MachineFile
from axonn.perf.strategy import Strategy
from axonn.perf.timing.communication import BYTES


class OptimizerBytes(NamedTuple):
    """Bytes per parameter under AdamW. `kept`: weight and gradient in the compute type; `optimizer`: everything else
    that the step needs; `streamed`: the part of it that the offloaded optimizer keeps in host memory."""

    kept: int
    optimizer: int
    streamed: int


def state_bytes(compute: FloatType) -> OptimizerBytes:
    """Return the bytes per parameter for a compute type.

    Half precision: 2 + 2 for weight and gradient, and 4 + 8 + 4 for the single-precision weight, moments and gradient,
    20 in total (Singh & Bhatele, IPDPS 2022, section V-B). Other types: the weights are the master weights, and only
    the moments are added.
    """
    element = BYTES[compute]
    return OptimizerBytes(4, 16, 12) if element == 2 else OptimizerBytes(2 * element, 2 * element, 2 * element)


class DoesNotFit(AxonnError):
    """A strategy needs more memory than the device or the host has; the message says by how much."""


def model_state_bytes(
    phi: int,
    *,
    optimizer: str = "device",
    bsize: int = 0,
    buckets: int = 1,
    shards: int = 1,
    compute: FloatType = "float16",
) -> int:
    """Return the bytes of parameters, gradients and optimizer state for `phi` parameters on a device.

    In half precision: `20 phi` for "device", `4 phi + 16 buckets bsize` for "offloaded" (IPDPS 2022, section V-B), and
    `4 phi + 16 phi / shards` for "sharded" (ZeRO stage 1, Rajbhandari et al., SC 2020).
    """
    state = state_bytes(compute)
    if optimizer == "offloaded":
        return state.kept * phi + state.optimizer * buckets * min(bsize, phi)
    return state.kept * phi + -(-state.optimizer * phi // (shards if optimizer == "sharded" else 1))


def host_bytes(phi: int, machine: MachineFile, compute: FloatType) -> int:
    """Return the host memory of the offloaded optimizer on a node whose devices hold `phi` parameters each."""
    return state_bytes(compute).streamed * phi * machine.node.gpus.number


def stage_parameters(outline: ModelOutline, strategy: Strategy) -> list[int]:
    """Return the parameters on a rank of each stage. A tied parameter counts once on every stage that holds it."""
    grid = strategy.logical_grid
    return [sum(outline.parameters(spans, grid).values()) for spans in strategy.spans_of_stages(outline)]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of one rank of one stage, in bytes."""

    stage: int
    model_state: int
    checkpoints: int
    """Activations saved for the backwards of the microbatches in flight."""
    working: int
    """Activations of the checkpoint that is being recomputed, and on the last stage the logits."""
    capacity: int
    host: int
    """Host memory for the offloaded optimizer's state, of all ranks of a node together."""
    host_capacity: int

    @property
    def total(self) -> int:
        """Bytes on the device, the sum of `parts`."""
        return self.model_state + self.checkpoints + self.working

    @property
    def parts(self) -> dict[str, int]:
        """Parts of `total`, by name."""
        return {name: getattr(self, name) for name in ("model_state", "checkpoints", "working")}

    @property
    def fits(self) -> bool:
        """True if device and host have enough memory."""
        return self.total <= self.capacity and self.host <= self.host_capacity

    def check(self) -> None:
        """Raise `DoesNotFit`, with the numbers, unless device and host have enough memory."""
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


class RankBytes(NamedTuple):
    """Bytes of one rank of a stage, independent of a machine: see `Memory`. `streamed`: additional bytes that the
    offloaded optimizer keeps in host memory."""

    model_state: int
    checkpoints: int
    working: int
    streamed: int

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.model_state + self.checkpoints + self.working


def rank_bytes(outline: ModelOutline, strategy: Strategy, *, stage: int, held: int) -> RankBytes:
    """Return the bytes of one rank of `stage` while it holds activations of `held` (chunk, microbatch) pairs.

    The pairs are assumed to be spread evenly over its chunks.
    """
    grid = strategy.logical_grid
    spans = strategy.spans_of_stages(outline)[stage]
    phi = sum(outline.parameters(spans, grid).values())
    state = model_state_bytes(
        phi,
        optimizer=strategy.optimizer,
        bsize=strategy.bsize,
        buckets=strategy.buckets_resident,
        shards=grid.data,
        compute=strategy.compute,
    )
    links = link_bytes(outline, strategy)
    together = strategy.checkpoint_layers if strategy.recompute == "full" else None
    kept = working = 0
    for span in spans:
        checkpoints, inside = activation_bytes(
            links, span, together=together, selective=strategy.recompute == "selective"
        )
        kept += checkpoints
        working = max(working, inside)
    if any(span.stop == len(outline.links) for span in spans):
        working += loss_bytes(outline, strategy)
    streamed = state_bytes(strategy.compute).streamed * phi if strategy.optimizer == "offloaded" else 0
    return RankBytes(state, -(-held * kept // len(spans)), working, streamed)


def stage_memory(outline: ModelOutline, machine: MachineFile, strategy: Strategy, *, stage: int, held: int) -> Memory:
    """Return the memory of one rank of `stage` on a machine; `held` as in `rank_bytes`."""
    rank = rank_bytes(outline, strategy, stage=stage, held=held)
    return Memory(
        stage=stage,
        model_state=rank.model_state,
        checkpoints=rank.checkpoints,
        working=rank.working,
        capacity=int(machine.gpu.memory.si),
        host=rank.streamed * machine.node.gpus.number,
        host_capacity=int(machine.node.host_memory.si),
    )


class LinkBytes(NamedTuple):
    """Bytes on one rank that a link saves per microbatch for its backward, and that it passes on. `scores`: the part of
    `saved` that selective recomputation drops."""

    block: int | None
    saved: int
    scores: int
    handed_on: int


def link_bytes(outline: ModelOutline, strategy: Strategy) -> list[LinkBytes]:
    """Return the bytes of every link, for a microbatch.

    A transformer layer in half precision saves `s b h (10 + 24 / t + 5 a s / (h t))` (Korthikanti et al., arXiv
    2205.05198, equation 2), the 10 being cut along row; with sequence parallelism `s b h / t (34 + 5 a s / h)`
    (equation 4). Selective recomputation drops the term with 5 a s (equation 6).
    """
    grid, rows, element = strategy.logical_grid, strategy.microbatch_size, BYTES[strategy.compute]
    parts = grid.col if strategy.sequence_parallel else 1
    saved: dict[int, tuple[int, int]] = {}
    found = []
    for link in strategy.laid_out(outline).links:
        if id(link.parts) not in saved:
            works = [work_of(part, grid, rows) for part in link.parts.values()]
            scores = sum(_scores(work, element) for work in works)
            saved[id(link.parts)] = sum(work.saved.bytes(element) for work in works), scores
        handed_on = element * -(-link.message(grid, rows) // parts)
        found.append(LinkBytes(link.block, *saved[id(link.parts)], handed_on))
    return found


def _scores(work: LayerWork, element: int) -> int:
    """Return the bytes of an attention's scores: all that it saves except queries, keys and values."""
    inputs = (3 * o.matrices * o.rows * o.width for o in work.forward if isinstance(o, AttentionKernel))
    return sum(work.saved.bytes(element) - element * of_attention for of_attention in inputs)


def activation_bytes(
    links: Sequence[LinkBytes], span: range, *, together: int | None, selective: bool = False
) -> tuple[int, int]:
    """Return the bytes that the chunk `span` saves of a microbatch until its backward, and those recomputed at once.

    Every `together` blocks save only their input and are recomputed. Links outside of blocks save everything, and so do
    all links without recomputation (`together` None), except the attention scores with `selective`.
    """
    if together is None:
        scores = [links[i].scores for i in span] if selective else []
        return sum(links[i].saved for i in span) - sum(scores), max(scores, default=0)
    kept = working = inside = count = 0
    block = None
    for i in span:
        link = links[i]
        if link.block is None:
            kept += link.saved
            block, count, inside = None, 0, 0
            continue
        if link.block != block:
            if count % together == 0:
                kept += links[i - 1].handed_on if i else 0
                inside = 0
            block, count = link.block, count + 1
        inside += link.saved
        working = max(working, inside)
    return kept, working


def loss_bytes(outline: ModelOutline, strategy: Strategy) -> int:
    """Return the bytes that the loss of a microbatch saves, with its gradient in single precision."""
    loss = work_of(outline.loss, strategy.logical_grid, strategy.microbatch_size).saved
    element = BYTES[strategy.compute]
    # Logits already in single precision are not copied.
    copied = loss.elements if element < SINGLE else 0
    return element * copied + 2 * max(SINGLE, element) * loss.wide
