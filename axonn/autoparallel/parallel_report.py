"""What has become of a module: its layers, what is laid out another way and why, and what has stayed whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from axonn.autoparallel.layouts.shardings import Shard, State, Wanted, describe
from axonn.distributed.collectives import CallKind
from axonn.tensor.context import TensorAxis


class SentCollective(NamedTuple):
    """A collective, as each rank issues it: `elements` are those of the tensor that it contributes, along `axis`."""

    kind: CallKind
    axis: TensorAxis
    elements: int


@dataclass(frozen=True, kw_only=True)
class LayerLine:
    """A layer that is cut. `note`: why it is not cut along more axes; empty when it is cut along all."""

    name: str
    kind: str
    input: State
    output: State
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class RedistributionLine:
    """`value`, which lies as `source` says, is laid out as `target` says for `user`.

    `forward`, `backward`: the collectives of it, for as many rows as the example has. `trained`: whether the value
    depends on trained parameters; otherwise there is a backward only if an input of the module requires gradients.
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
    def kind(self) -> Literal["split", "gather", "re-layout", "sum of gradients"]:
        """Whether a whole value is cut, a cut one is made whole, or one is cut in another way."""
        if isinstance(self.source, Shard):
            return "re-layout" if isinstance(self.target, Shard) else "gather"
        return "split" if isinstance(self.target, Shard) else "sum of gradients"


@dataclass(frozen=True, kw_only=True)
class WholeLine:
    """A module, or a parameter that is used directly, that stays as it is: whole, on every rank."""

    name: str
    kind: str
    reason: str


@dataclass(kw_only=True)
class Report:
    """`sub_shards`: how many each batch is computed in, and `sub_shards_problem` why not in as many as was asked.
    `outputs`: how each output lies. `exact`: whether no other layouts make smaller re-layouts."""

    grid: str
    layers: list[LayerLine] = field(default_factory=list)
    redistributions: list[RedistributionLine] = field(default_factory=list)
    whole: list[WholeLine] = field(default_factory=list)
    outputs: list[State] = field(default_factory=list)
    exact: bool = True
    sub_shards: int = 1
    sub_shards_problem: str = ""

    def of_kind(self, kind: str) -> list[RedistributionLine]:
        """The lines of one kind."""
        return [line for line in self.redistributions if line.kind == kind]

    def sent(self, *, input_gradients: bool = False) -> list[SentCollective]:
        """The collectives of all lines in one forward and backward, apart from those of the layers themselves.

        `input_gradients`: whether all inputs of the module require gradients.
        """
        found = [call for line in self.redistributions for call in line.forward]
        return found + [c for line in self.redistributions if line.trained or input_gradients for c in line.backward]

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
                f"laid out another way ({forward} elements forward, {backward} backward"
                f"{'' if self.exact else '; not searched to the end'})",
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
