"""Rounds of a comparison: one batch of each contender, and the ratios that are made of them round by round.

Batches while which the machine was busy with other work (`axonn.usage`) are left out of ratios, by a rule that does not
know whose batch it was; `with_busy` takes them in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import inf
from statistics import median
from typing import NamedTuple

from axonn.config import StrictModel
from axonn.usage import BatchUsage, is_busy
from baselines.paired import LEAST_PAIRS, Spread, median_interval

CLEARLY = 1.05
"""Who takes so many times as long as the fastest, in each of `ENOUGH` rounds or more, needs no further ones."""
ENOUGH = 4


class Condition(StrictModel):
    """What is between the ranks during a turn."""

    name: str
    kbit: int | None = None
    """Rate of the link that all ranks share, kbit/s; None where nothing limits it."""


LOOPBACK = Condition(name="loopback")


class Turn(StrictModel):
    """One batch. Turns of the same group and round are pairs."""

    condition: str
    group: int
    round: int
    seconds: float
    link_bytes: int | None = None
    """What crossed the link meanwhile, from all ranks."""
    usage: BatchUsage | None = None
    """What the processors did meanwhile; None where the ranks did not say it."""

    @property
    def busy(self) -> bool:
        """Whether the machine is known to have been busy with other work."""
        return self.usage is not None and is_busy([self.usage]) is True


Quantity = Callable[[Turn], float | None]


def wall(turn: Turn) -> float | None:
    """Return the seconds of the batch."""
    return turn.seconds


def processor(turn: Turn) -> float | None:
    """Return the processor seconds of all ranks."""
    return None if turn.usage is None else turn.usage.processor_s


def counted(turns: Iterable[Turn], *, with_busy: bool) -> list[Turn]:
    """Return the turns that ratios are made of."""
    return [turn for turn in turns if with_busy or not turn.busy]


def ratios(over: Sequence[Turn], under: Sequence[Turn], *, with_busy: bool, quantity: Quantity = wall) -> list[float]:
    """Return the ratios of `under` to `over` in the rounds that count in both."""

    def by_round(turns: Sequence[Turn]) -> dict[tuple[str, int, int], float]:
        values = ((turn, quantity(turn)) for turn in counted(turns, with_busy=with_busy))
        return {(turn.condition, turn.group, turn.round): value for turn, value in values if value}

    base, other = by_round(over), by_round(under)
    return [other[at] / base[at] for at in other if at in base]


class Widest(NamedTuple):
    """The ratio whose interval is the widest of a comparison."""

    half_width: float
    """Of the interval, relative to the median; infinite where there are too few rounds for an interval."""
    key: str
    """The contender beside our fastest."""


def widest(turns: Mapping[str, Sequence[Turn]], ours: Collection[str], *, with_busy: bool) -> Widest | None:
    """Return the widest interval of all ratios, of seconds and of processor seconds, of contenders (by key) to our
    fastest under each condition; None where there are none to be made."""
    found: list[Widest] = []
    for condition in dict.fromkeys(turn.condition for some in turns.values() for turn in some):
        mine = {key: [turn for turn in some if turn.condition == condition] for key, some in turns.items()}
        middle = {key: median(turn.seconds for turn in mine[key]) for key in mine if key in ours and mine[key]}
        if not middle:
            continue
        base = min(middle, key=lambda key: middle[key])
        for key, some in mine.items():
            known = all(turn.usage is not None for turn in [*some, *mine[base]])
            for quantity in (wall, processor) if known else (wall,):
                if key != base and some:
                    values = ratios(mine[base], some, with_busy=with_busy, quantity=quantity)
                    found.append(Widest(_half_width(values), key))
    return max(found, default=None)


def still_racing(turns: Mapping[str, Sequence[Turn]], ours: Collection[str], *, with_busy: bool) -> list[str]:
    """Return the contenders (by key) that may yet be the fastest of ours, or of the others, under some condition: those
    that were not `CLEARLY` slower than the fastest of their side in every round in which both counted."""
    left = set()
    for condition in dict.fromkeys(turn.condition for some in turns.values() for turn in some):
        for side in (set(ours) & set(turns), set(turns) - set(ours)):
            mine = {key: [turn for turn in turns[key] if turn.condition == condition] for key in side}
            middle = {key: median(turn.seconds for turn in some) for key, some in mine.items() if some}
            if not middle:
                continue
            fastest = min(middle, key=lambda key: middle[key])
            for key in middle:
                values = ratios(mine[fastest], mine[key], with_busy=with_busy)
                if len(values) < ENOUGH or min(values) <= CLEARLY:
                    left.add(key)
    return [key for key in turns if key in left]


def _half_width(values: Sequence[float]) -> float:
    return inf if len(values) < LEAST_PAIRS else median_interval(values).half_width


def spread_of(values: Sequence[float]) -> Spread | None:
    """Return the median with its interval; None of no values."""
    return median_interval(values) if values else None
