"""Prediction of every collective and message of a training step from the configuration alone.

`axonn.distributed.collectives` and `axonn.observability.traffic` record what a run issued; this module computes what
every rank has to issue, down to the last flag. The two share no code, and tests compare them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from axonn.config.train_config import OptimizerConfig, PrecisionConfig
from axonn.errors import ConfigError
from axonn.grid import AXES, Axis, ProcessGrid
from axonn.perf.layers.layer_cost import Exchange, Kind, LayerCost
from axonn.perf.layers.model_outline import ModelOutline
from axonn.schedules import ChunkLayout, Direction

BYTES = {"float64": 8, "int64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes per element of each type."""
_HALF = ("bfloat16", "float16")
_NORM_DIGITS = 268
"""int64 values that sum the squares of a norm exactly: 2,124 bits of float64 at 8 per value, and two counts."""


class Collective(NamedTuple):
    """A collective that a rank issues. `axes`: along which its ranks differ. `elements`: of this rank's input."""

    kind: Kind
    axes: tuple[Axis, ...]
    ranks: tuple[int, ...]
    elements: int
    dtype: str

    @property
    def sent(self) -> float:
        """Elements that a rank sends over a ring.

        2 (n - 1) / n of the elements in an all-reduce, half of that in a reduce-scatter, and n - 1 times its shard in
        an all-gather (Thakur, Rabenseifner & Gropp, IJHPCA 2005).
        """
        n = len(self.ranks)
        if self.kind == "all-gather":
            return float((n - 1) * self.elements)
        return (1 if self.kind == "reduce-scatter" else 2) * (n - 1) / n * self.elements


class StageMessage(NamedTuple):
    """All tensors that a rank sends to a rank of another stage for one microbatch."""

    peer: int
    direction: Direction
    elements: int
    dtype: str

    @property
    def bytes(self) -> int:
        """Bytes of one message."""
        return self.elements * BYTES[self.dtype]


class Volume(NamedTuple):
    """Amount that one rank sends, over rings and as messages."""

    elements: float
    bytes: float


def recomputed(outline: ModelOutline, span: range, blocks_each: int) -> list[LayerCost]:
    """Return the layers of a chunk (the links `span`) whose forward is recomputed, `blocks_each` per checkpoint."""
    return [layer for _, layer in recomputed_links(outline, span, blocks_each)]


def recomputed_links(outline: ModelOutline, span: range, blocks_each: int) -> list[tuple[int, LayerCost]]:
    """Return what `recomputed` does, each layer with the number of its link.

    The recomputation of a checkpoint ends as soon as the backward has all it needs, so the layers after the last one
    that saves anything are left out. That last layer saves its input only when its output is complete, so its
    collective is issued again, although the output is not needed.
    """
    layers: list[tuple[int, LayerCost]] = []
    blocks = sorted({b for i in span if (b := outline.links[i].block) is not None})
    for first in range(0, len(blocks), blocks_each):
        links = [i for i in span if outline.links[i].block in blocks[first : first + blocks_each]]
        of_checkpoint = [(i, layer) for i in links for layer in outline.links[i].parts.values()]
        while of_checkpoint and not of_checkpoint[-1][1].saves:
            of_checkpoint.pop()
        layers += of_checkpoint
    return layers


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training configuration, for which the methods predict the communication.

    `spans`: the links of each virtual stage of `layout`, required if there are several. `recompute`: blocks per
    activation checkpoint; None without checkpointing. `sub_shards`: of a microbatch. Raises `ConfigError` when the
    sizes are inconsistent.
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
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

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
        """Layout of the chunks on the stages."""
        return self.layout or ChunkLayout(stages=self.grid.inter)

    @property
    def virtual_spans(self) -> Sequence[range]:
        """Links of every virtual stage."""
        return [range(len(self.outline.links))] if self.spans is None else self.spans

    @property
    def microbatches(self) -> int:
        """Number of microbatches per pipeline."""
        return self.batch_size // (self.grid.data * self.microbatch_size)

    def step(self, rank: int) -> Counter[Collective]:
        """Return the collectives that `rank` issues to train on one batch, also if gradients overflow."""
        calls = self._pipeline(rank, training=True) + self._loss_of_batch()
        return calls + self._flag() + self._tied(rank) + self._gradients(rank) + self._norm(rank)

    def evaluation(self, rank: int) -> Counter[Collective]:
        """Return the collectives that `rank` issues to evaluate one batch."""
        return self._pipeline(rank, training=False) + self._loss_of_batch()

    def messages(self, rank: int, *, training: bool = True) -> Counter[StageMessage]:
        """Return the messages that `rank` sends to other stages for one batch; an evaluation has no backward."""
        messages: Counter[StageMessage] = Counter()
        coordinates = self.grid.coordinates(rank)
        for direction in Direction if training else [Direction.FORWARD]:
            for chunk in range(self.chunks.chunks):
                target = self.chunks.target(coordinates.inter, chunk, direction)
                if target is None or target[0] == coordinates.inter:
                    continue
                span = self.virtual_spans[self.chunks.virtual(coordinates.inter, chunk)]
                # A gradient has the size of its activation, which the link before this chunk passed on.
                link = self.outline.links[span.stop - 1 if direction == Direction.FORWARD else span.start - 1]
                elements = link.message(self.grid, self.microbatch_size)
                peer = self.grid.rank(data=coordinates.data, inter=target[0], row=coordinates.row, col=coordinates.col)
                messages[StageMessage(peer, direction, elements, self.precision.compute)] += self.microbatches
        return messages

    def decisions(self, rank: int, *, kinds: int) -> int:
        """Return the number of scheduling decisions that `rank` sends, under a schedule that depends on arrivals.

        The leader of a stage sends every task, `kinds` per microbatch and chunk, to each of its other ranks.
        """
        coordinates = self.grid.coordinates(rank)
        leads = self.grid.inter > 1 and coordinates.row == coordinates.col == 0
        return kinds * self.chunks.chunks * self.microbatches * (self.grid.tensor - 1) if leads else 0

    def volume(self, rank: int = 0) -> dict[str, Volume]:
        """Return the volume that `rank` sends per training step, by axis; several axes are joined by "+"."""
        volumes = [
            ("+".join(c.axes), count * c.sent, count * c.sent * BYTES[c.dtype]) for c, count in self.step(rank).items()
        ]
        volumes += [
            ("inter", float(count * m.elements), float(count * m.bytes)) for m, count in self.messages(rank).items()
        ]
        total: dict[str, Volume] = {}
        for axis, elements, size in volumes:
            before = total.get(axis, Volume(0.0, 0.0))
            total[axis] = Volume(before.elements + elements, before.bytes + size)
        return total

    def _pipeline(self, rank: int, *, training: bool) -> Counter[Collective]:
        """Return the collectives of the layers."""
        share, rest = divmod(self.microbatch_size, self.sub_shards)
        calls: Counter[Collective] = Counter()
        for rows, sub_shards in ((share + 1, rest), (share, self.sub_shards - rest)):
            for exchange, count in Counter(self._of_sub_shard(rank, rows, training=training)).items():
                calls[self._placed(rank, exchange)] += count * sub_shards * self.microbatches
        return +calls

    def _of_sub_shard(self, rank: int, rows: int, *, training: bool) -> Iterable[Exchange]:
        stage = self.grid.coordinates(rank).inter
        for chunk in range(self.chunks.chunks):
            span = self.virtual_spans[self.chunks.virtual(stage, chunk)]
            layers = [layer for i in span for layer in self.outline.links[i].parts.values()]
            if self.chunks.is_sink(stage, chunk):
                layers.append(self.outline.loss)
            for layer in layers:
                yield from layer.forward(self.grid, rows)
                if training:
                    yield from layer.backward(self.grid, rows)
            if training:
                for layer in self._recomputed(span):
                    yield from layer.forward(self.grid, rows)

    def _recomputed(self, span: range) -> list[LayerCost]:
        """Return the layers of a chunk whose forward is recomputed."""
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
        call = self._collective(0, AXES, 1, dtype, kind)
        return Counter({call: 1}) if self.grid.size > 1 else Counter()

    def _loss_of_batch(self) -> Counter[Collective]:
        """Return the all-reduce of the mean loss, which every rank then knows."""
        return self._over_everything("float64", "all-reduce sum")

    def _flag(self) -> Counter[Collective]:
        """Return the all-reduce of the overflow flag, which half types with a scaled loss and dynamic scales need."""
        scaling = self.precision.scaling
        half = self.precision.compute in _HALF or self.precision.gradient_type in _HALF
        watched = scaling == "dynamic" or (half and scaling != 1.0)
        return self._over_everything("float32", "all-reduce max") if watched else Counter()

    def _norm(self, rank: int) -> Counter[Collective]:
        """Return the all-reduce of the squared gradient norm, for clipping, over ranks with different parameters."""
        axes = tuple(axis for axis in AXES if axis != "data" and self.grid.extent(axis) > 1)
        if self.optimizer.clip_norm is None or not axes:
            return Counter()
        return Counter({self._collective(rank, axes, _NORM_DIGITS, "int64"): 1})

    def _gradients(self, rank: int) -> Counter[Collective]:
        """Return the all-reduces of this rank's gradients over the replicas, in chunks of k buckets."""
        if self.grid.data == 1:
            return Counter()
        elements = sum(self._parameters(self.grid.coordinates(rank).inter).values())
        k = self.optimizer.k
        length = elements if k is None else k * self.optimizer.bsize
        full_chunks, rest = divmod(elements, max(length, 1))
        dtype = self.precision.gradient_type
        calls = Counter({self._collective(rank, ("data",), length, dtype): full_chunks})
        calls[self._collective(rank, ("data",), rest, dtype)] += rest > 0
        return +calls

    def _tied(self, rank: int) -> Counter[Collective]:
        """Return the all-reduces of the gradients of tied parameters, to which several stages contribute."""
        coordinates = self.grid.coordinates(rank)
        held = [self._parameters(stage) for stage in range(self.grid.inter)]
        calls: Counter[Collective] = Counter()
        for name in {first for first, _ in self.outline.ties}:
            stages = [stage for stage, parameters in enumerate(held) if name in parameters]
            if len(stages) > 1 and coordinates.inter in stages:
                ranks = tuple(
                    self.grid.rank(data=coordinates.data, inter=stage, row=coordinates.row, col=coordinates.col)
                    for stage in stages
                )
                elements, dtype = held[coordinates.inter][name], self.precision.gradient_type
                calls[Collective("all-reduce sum", ("inter",), ranks, elements, dtype)] += 1
        return calls

    def _parameters(self, stage: int) -> Mapping[str, int]:
        """Return the elements of each parameter on a rank of `stage`; a tied one counts once, under its first name."""
        spans = [self.virtual_spans[self.chunks.virtual(stage, chunk)] for chunk in range(self.chunks.chunks)]
        return self.outline.parameters(spans, self.grid)
