"""Rounds of a comparison: one batch of each contender, and the ratios that are made of them round by round.

Batches during which the machine was busy with other work (`axonn.observability.machine_usage`) are left out of ratios,
by a rule that does not know whose batch it was; `with_busy` includes them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import inf
from statistics import median
from typing import NamedTuple, TypeVar

from axonn.config.train_config import StrictModel
from axonn.observability.machine_usage import BatchUsage, is_busy
from baselines.statistics import LEAST_PAIRS, Spread, median_interval

_T = TypeVar("_T")


class Condition(StrictModel):
    """State of the network between the ranks during a turn."""

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
    """Bytes that crossed the link during the turn, from all ranks."""
    usage: BatchUsage | None = None
    """Processor usage during the turn; None where the ranks did not report it."""

    @property
    def busy(self) -> bool:
        """True if the machine is known to have been busy with other work."""
        return self.usage is not None and is_busy([self.usage]) is True


def turn_order(contenders: Sequence[_T], number: int) -> list[_T]:
    """Return the order of turns in round `number`: in order and reversed by turns, so that drift hits all alike."""
    return list(contenders if number % 2 == 0 else reversed(contenders))


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

    numerators, denominators = by_round(under), by_round(over)
    return [numerators[at] / denominators[at] for at in numerators if at in denominators]


class Widest(NamedTuple):
    """The ratio whose interval is the widest of a comparison."""

    half_width: float
    """Half width of the interval, relative to the median; infinite where there are too few rounds for an interval."""
    key: str
    """Contender that is compared with our fastest."""


def widest(turns: Mapping[str, Sequence[Turn]], ours: Collection[str], *, with_busy: bool) -> Widest | None:
    """Return the widest interval of all ratios, of seconds and of processor seconds, of contenders (by key) to our
    fastest under each condition; None where there are no ratios."""
    intervals: list[Widest] = []
    for condition in dict.fromkeys(turn.condition for some in turns.values() for turn in some):
        by_key = {key: [turn for turn in some if turn.condition == condition] for key, some in turns.items()}
        medians = {key: median(turn.seconds for turn in by_key[key]) for key in by_key if key in ours and by_key[key]}
        if not medians:
            continue
        fastest = min(medians, key=lambda key: medians[key])
        for key, some in by_key.items():
            known = all(turn.usage is not None for turn in [*some, *by_key[fastest]])
            for quantity in (wall, processor) if known else (wall,):
                if key != fastest and some:
                    values = ratios(by_key[fastest], some, with_busy=with_busy, quantity=quantity)
                    intervals.append(Widest(_half_width(values), key))
    return max(intervals, default=None)


def _half_width(values: Sequence[float]) -> float:
    return inf if len(values) < LEAST_PAIRS else median_interval(values).half_width


def spread_of(values: Sequence[float]) -> Spread | None:
    """Return the median with its interval; None of no values."""
    return median_interval(values) if values else None
