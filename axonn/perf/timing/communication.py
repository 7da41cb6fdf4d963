"""Every collective and every message of a training step, predicted from the configuration alone.

The recorder below the collectives (`axonn.distributed.collectives`, `axonn.observability.traffic`) says what was issued in a run; this says what
has to be, for every rank, to the last flag. The two share no code, and tests hold them against each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from axonn.config.train_config import OptimizerConfig, PrecisionConfig
from axonn.errors import ConfigError
from axonn.grid import AXES, Axis, ProcessGrid
from axonn.optim.algorithms.adamw import AdamWConfig
from axonn.perf.layers.layer_cost import Exchange, Kind, LayerCost
from axonn.perf.layers.model_outline import ModelOutline
from axonn.schedules import ChunkLayout, Direction

BYTES = {"float64": 8, "int64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Of one element."""
_HALF = ("bfloat16", "float16")
_NORM_DIGITS = 268
"""int64 numbers in which the squares of a norm add up exactly: 2,124 bits of float64 at 8 each, and two counts."""


class Collective(NamedTuple):
    """A collective that a rank issues. `axes`: along which its ranks differ. `elements`: of this rank's tensor."""

    kind: Kind
    axes: tuple[Axis, ...]
    ranks: tuple[int, ...]
    elements: int
    dtype: str

    @property
    def sent(self) -> float:
        """Elements that a rank sends in a ring: 2 (n - 1) / n of an all-reduce, half of that when the sum is scattered,
        n - 1 times its part to gather.

        Thakur, Rabenseifner & Gropp, IJHPCA 2005.
        """
        n = len(self.ranks)
        if self.kind == "all-gather":
            return float((n - 1) * self.elements)
        return (1 if self.kind == "reduce-scatter" else 2) * (n - 1) / n * self.elements


class StageMessage(NamedTuple):
    """What a rank sends to a rank of another stage for one microbatch, all its tensors together."""

    peer: int
    direction: Direction
    elements: int
    dtype: str

    @property
    def bytes(self) -> int:
        """Of one message."""
        return self.elements * BYTES[self.dtype]


class Volume(NamedTuple):
    """What one rank sends in rings and as messages."""

    elements: float
    bytes: float


def recomputed(outline: ModelOutline, span: range, together: int) -> list[LayerCost]:
    """The layers of a chunk, the links `span`, whose forward runs again when `together` blocks are checkpointed."""
    return [part for _, part in recomputed_links(outline, span, together)]


def recomputed_links(outline: ModelOutline, span: range, together: int) -> list[tuple[int, LayerCost]]:
    """As `recomputed`, each with the number of its link.

    The recomputation of several blocks ends as soon as it has all that their backward needs. So what follows the last
    layer that saves anything is left out. That layer saves its input once its output is complete: its own collective is
    issued again, though nobody needs the output.
    """
    found: list[tuple[int, LayerCost]] = []
    blocks = sorted({b for i in span if (b := outline.links[i].block) is not None})
    for first in range(0, len(blocks), together):
        links = [i for i in span if outline.links[i].block in blocks[first : first + together]]
        parts = [(i, part) for i in links for part in outline.links[i].parts.values()]
        while parts and not parts[-1][1].saves:
            parts.pop()
        found += parts
    return found


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training configuration whose communication is asked for.

    `spans`: the links of each virtual stage of `layout`; needed when there are several. `recompute`: how many blocks
    are computed again together in the backward, if any. `sub_shards`: parts of a microbatch. Raises `ConfigError` when
    the sizes do not fit each other.
    """

    outline: ModelOutline
    grid: ProcessGrid
    batch_size: int
    microbatch_size: int
    sub_shards: int = 1
    layout: ChunkLayout | None = None
    spans: Sequence[range] | None = None
    recompute: int | None = None
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig = field(default_factory=AdamWConfig)

    def __post_init__(self) -> None:
        if self.batch_size % (self.grid.data * self.microbatch_size):
            raise ConfigError(
                f"batch_size {self.batch_size} is no multiple of G_data x microbatch_size = "
                f"{self.grid.data} x {self.microbatch_size}; change one of them"
            )
        if not 1 <= self.sub_shards <= self.microbatch_size:
            raise ConfigError(f"{self.microbatch_size} rows of a microbatch cannot be cut into {self.sub_shards}")
        if self.chunks.stages != self.grid.inter:
            raise ConfigError(f"a layout of {self.chunks.stages} stages on a grid with {self.grid.inter}")
        if len(self.virtual_spans) != self.chunks.virtual_stages:
            raise ConfigError(
                f"{self.chunks.virtual_stages} virtual stages need as many spans of links, "
                f"not {len(self.virtual_spans)}; give `spans`"
            )

    @property
    def chunks(self) -> ChunkLayout:
        """How chunks lie on the stages."""
        return self.layout or ChunkLayout(stages=self.grid.inter)

    @property
    def virtual_spans(self) -> Sequence[range]:
        """Links of every virtual stage."""
        return [range(len(self.outline.links))] if self.spans is None else self.spans

    @property
    def microbatches(self) -> int:
        """Per pipeline."""
        return self.batch_size // (self.grid.data * self.microbatch_size)

    def step(self, rank: int) -> Counter[Collective]:
        """What `rank` issues to train on one batch, also where gradients overflow and nothing is updated."""
        found = self._pipeline(rank, training=True) + self._loss_of_batch()
        return found + self._flag() + self._tied(rank) + self._gradients(rank) + self._norm(rank)

    def evaluation(self, rank: int) -> Counter[Collective]:
        """What `rank` issues to evaluate one batch."""
        return self._pipeline(rank, training=False) + self._loss_of_batch()

    def messages(self, rank: int, *, training: bool = True) -> Counter[StageMessage]:
        """What `rank` sends to other stages for one batch; an evaluation has no backward."""
        found: Counter[StageMessage] = Counter()
        here = self.grid.coordinates(rank)
        for direction in Direction if training else [Direction.FORWARD]:
            for chunk in range(self.chunks.chunks):
                target = self.chunks.target(here.inter, chunk, direction)
                if target is None or target[0] == here.inter:
                    continue
                span = self.virtual_spans[self.chunks.virtual(here.inter, chunk)]
                # A gradient is like the activation that it belongs to, which the link before this chunk handed on.
                link = self.outline.links[span.stop - 1 if direction == Direction.FORWARD else span.start - 1]
                elements = link.message(self.grid, self.microbatch_size)
                peer = self.grid.rank(data=here.data, inter=target[0], row=here.row, col=here.col)
                found[StageMessage(peer, direction, elements, self.precision.compute)] += self.microbatches
        return found

    def decisions(self, rank: int, *, kinds: int) -> int:
        """How often `rank` tells another what runs next, where arrivals of messages decide.

        The first rank of a stage tells each of the others every task, of which there are `kinds` for each microbatch.
        """
        here = self.grid.coordinates(rank)
        leads = self.grid.inter > 1 and here.row == here.col == 0
        return kinds * self.chunks.chunks * self.microbatches * (self.grid.tensor - 1) if leads else 0

    def volume(self, rank: int = 0) -> dict[str, Volume]:
        """What `rank` sends in one training step by axis: "data", "inter", "row", "col", others joined by "+"."""
        parts = [
            ("+".join(c.axes), count * c.sent, count * c.sent * BYTES[c.dtype]) for c, count in self.step(rank).items()
        ]
        parts += [
            ("inter", float(count * m.elements), float(count * m.bytes)) for m, count in self.messages(rank).items()
        ]
        total: dict[str, Volume] = {}
        for axis, elements, size in parts:
            before = total.get(axis, Volume(0.0, 0.0))
            total[axis] = Volume(before.elements + elements, before.bytes + size)
        return total

    def _pipeline(self, rank: int, *, training: bool) -> Counter[Collective]:
        """The collectives of the layers."""
        share, rest = divmod(self.microbatch_size, self.sub_shards)
        found: Counter[Collective] = Counter()
        for rows, parts in ((share + 1, rest), (share, self.sub_shards - rest)):
            for exchange, count in Counter(self._of_sub_shard(rank, rows, training=training)).items():
                found[self._placed(rank, exchange)] += count * parts * self.microbatches
        return +found

    def _of_sub_shard(self, rank: int, rows: int, *, training: bool) -> Iterable[Exchange]:
        here = self.grid.coordinates(rank)
        for chunk in range(self.chunks.chunks):
            span = self.virtual_spans[self.chunks.virtual(here.inter, chunk)]
            parts = [part for i in span for part in self.outline.links[i].parts.values()]
            if self.chunks.is_sink(here.inter, chunk):
                parts.append(self.outline.loss)
            for part in parts:
                yield from part.forward(self.grid, rows)
                if training:
                    yield from part.backward(self.grid, rows)
            if training:
                for part in self._recomputed(span):
                    yield from part.forward(self.grid, rows)

    def _recomputed(self, span: range) -> list[LayerCost]:
        """The layers of a chunk whose forward runs again."""
        return [] if self.recompute is None else recomputed(self.outline, span, self.recompute)

    def _placed(self, rank: int, exchange: Exchange) -> Collective:
        compute = self.precision.compute
        dtype = "float32" if exchange.wide and compute in _HALF else compute
        return self._collective(rank, (exchange.axis,), exchange.elements, dtype, exchange.kind)

    def _collective(
        self, rank: int, axes: tuple[Axis, ...], elements: int, dtype: str, kind: Kind = "all-reduce sum"
    ) -> Collective:
        return Collective(kind, axes, self.grid.group(rank, axes), elements, dtype)

    def _over_everything(self, dtype: str, kind: Kind) -> Counter[Collective]:
        found = self._collective(0, AXES, 1, dtype, kind)
        return Counter({found: 1}) if self.grid.size > 1 else Counter()

    def _loss_of_batch(self) -> Counter[Collective]:
        """Each pipeline's part of the mean, so that every rank knows it."""
        return self._over_everything("float64", "all-reduce sum")

    def _flag(self) -> Counter[Collective]:
        """Whether any gradient overflowed, where that can be: half types whose loss is scaled, and dynamic scales."""
        scaling = self.precision.scaling
        half = self.precision.compute in _HALF or self.precision.gradient_type in _HALF
        watched = scaling == "dynamic" or (half and scaling != 1.0)
        return self._over_everything("float32", "all-reduce max") if watched else Counter()

    def _norm(self, rank: int) -> Counter[Collective]:
        """Sum of squares of the gradient over all ranks that hold different parameters, for clipping."""
        axes = tuple(axis for axis in AXES if axis != "data" and self.grid.extent(axis) > 1)
        if self.optimizer.clip_norm is None or not axes:
            return Counter()
        return Counter({self._collective(rank, axes, _NORM_DIGITS, "int64"): 1})

    def _gradients(self, rank: int) -> Counter[Collective]:
        """Chunks of k buckets of this rank's gradients, over the replicas."""
        if self.grid.data == 1:
            return Counter()
        elements = sum(self._parameters(self.grid.coordinates(rank).inter).values())
        k = self.optimizer.k
        length = elements if k is None else k * self.optimizer.bsize
        whole, rest = divmod(elements, max(length, 1))
        dtype = self.precision.gradient_type
        found = Counter({self._collective(rank, ("data",), length, dtype): whole})
        found[self._collective(rank, ("data",), rest, dtype)] += rest > 0
        return +found

    def _tied(self, rank: int) -> Counter[Collective]:
        """Gradients of parameters that several stages hold: what one of them has is not all."""
        here = self.grid.coordinates(rank)
        held = [self._parameters(stage) for stage in range(self.grid.inter)]
        found: Counter[Collective] = Counter()
        for name in {first for first, _ in self.outline.ties}:
            stages = [stage for stage, parameters in enumerate(held) if name in parameters]
            if len(stages) > 1 and here.inter in stages:
                ranks = tuple(self.grid.rank(data=here.data, inter=s, row=here.row, col=here.col) for s in stages)
                elements, dtype = held[here.inter][name], self.precision.gradient_type
                found[Collective("all-reduce sum", ("inter",), ranks, elements, dtype)] += 1
        return found

    def _parameters(self, stage: int) -> Mapping[str, int]:
        """Elements of each parameter on a rank of `stage`; a tied one counts once on it, by its first name."""
        spans = [self.virtual_spans[self.chunks.virtual(stage, chunk)] for chunk in range(self.chunks.chunks)]
        return self.outline.parameters(spans, self.grid)
