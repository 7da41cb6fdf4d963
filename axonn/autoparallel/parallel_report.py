"""Report of `parallelize`: the layers that are cut, the redistributions with reasons, and what stays whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from axonn.autoparallel.layouts.shardings import Shard, State, Wanted, describe
from axonn.distributed.collectives import CallKind
from axonn.tensor.context import TensorAxis


class SentCollective(NamedTuple):
    """A collective along `axis` as each rank issues it; `elements`: size of the tensor that a rank contributes."""

    kind: CallKind
    axis: TensorAxis
    elements: int


@dataclass(frozen=True, kw_only=True)
class LayerLine:
    """A layer that is cut. `note`: why it is not cut along more axes; empty if it is cut along all."""

    name: str
    kind: str
    input: State
    output: State
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class RedistributionLine:
    """A redistribution of `value` from layout `source` to layout `target`, for the node `user`.

    `forward`, `backward`: its collectives, for the number of rows of the example. `trained`: True if the value depends
    on trained parameters; otherwise there is a backward only if an input of the module requires gradients.
    """

    value: str
    user: str
    source: State
    target: Wanted
    reason: str
    forward: tuple[SentCollective, ...]
    backward: tuple[SentCollective, ...]
    trained: bool

    @property
    def kind(self) -> Literal["split", "gather", "redistribute", "sum of gradients"]:
        """Kind of redistribution: a whole value is split, a cut one gathered, or one is cut in another way."""
        if isinstance(self.source, Shard):
            return "redistribute" if isinstance(self.target, Shard) else "gather"
        return "split" if isinstance(self.target, Shard) else "sum of gradients"


@dataclass(frozen=True, kw_only=True)
class WholeLine:
    """A module, or a parameter used directly, that stays whole on every rank, and why."""

    name: str
    kind: str
    reason: str


@dataclass(kw_only=True)
class Report:
    """Report about a parallel module.

    `sub_shards`: number of sub-shards in which a batch is computed; `sub_shards_problem`: why not in as many as were
    requested. `outputs`: layout of each output. `exact`: True if no other layouts need less redistribution.
    """

    grid: str
    layers: list[LayerLine] = field(default_factory=list)
    redistributions: list[RedistributionLine] = field(default_factory=list)
    whole: list[WholeLine] = field(default_factory=list)
    outputs: list[State] = field(default_factory=list)
    exact: bool = True
    sub_shards: int = 1
    sub_shards_problem: str = ""

    def of_kind(self, kind: str) -> list[RedistributionLine]:
        """Return the redistributions of one kind."""
        return [line for line in self.redistributions if line.kind == kind]

    def sent(self, *, input_gradients: bool = False) -> list[SentCollective]:
        """Return the collectives of all redistributions in one forward and backward, without those of the layers.

        `input_gradients`: True if all inputs of the module require gradients.
        """
        forward = [call for line in self.redistributions for call in line.forward]
        return forward + [c for line in self.redistributions if line.trained or input_gradients for c in line.backward]

    def __str__(self) -> str:
        forward = sum(call.elements for line in self.redistributions for call in line.forward)
        backward = sum(call.elements for line in self.redistributions if line.trained for call in line.backward)
        parts = [
            f"on {self.grid}",
            _table(
                "layers",
                ["name", "kind", "input", "output", "note"],
                [[x.name, x.kind, describe(x.input), describe(x.output), x.note] for x in self.layers],
            ),
            _table(
                f"redistributed ({forward} elements forward, {backward} backward"
                f"{'' if self.exact else '; search not exhaustive'})",
                ["value", "for", "from", "to", "kind", "forward", "backward", "reason"],
                [_redistribution_line(line) for line in self.redistributions],
            ),
            _table("whole", ["name", "kind", "reason"], [[x.name, x.kind, x.reason] for x in self.whole]),
            f"sub-shards: {self.sub_shards}" + (f" ({self.sub_shards_problem})" if self.sub_shards_problem else ""),
        ]
        return "\n\n".join(part for part in parts if part)


def _redistribution_line(line: RedistributionLine) -> list[str]:
    backward = _elements(line.backward)
    if backward != "0" and not line.trained:
        backward = f"({backward})"
    source, target = describe(line.source), describe(line.target)
    return [line.value, line.user, source, target, line.kind, _elements(line.forward), backward, line.reason]


def _elements(calls: Sequence[SentCollective]) -> str:
    return str(sum(call.elements for call in calls))


def _table(title: str, head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    ]
    return "\n".join([f"{title}:", *lines])
