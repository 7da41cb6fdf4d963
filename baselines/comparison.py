"""Evaluation of measured contenders: rows, ratios to ours, and whether ours falls behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import Field

from axonn.config.loading import Loss
from axonn.config.train_config import StrictModel, load_yaml
from axonn.observability.machine_usage import busy_share
from axonn.observability.records import Failure
from baselines.contenders import Contender, Kind
from baselines.coordinator import ContenderResult, Stopped
from baselines.equal_work import difference, disagreement
from baselines.rounds import Condition, Quantity, Turn, counted, processor, ratios, spread_of, wall
from baselines.statistics import Spread, middle_half

TOLERANCES = Path(__file__).parent / "tolerances"


class Tolerances(StrictModel):
    """Share by which ours may be slower than the best other framework of a kind: 0.05 is 5% of the batch time."""

    margin: float = Field(ge=0)
    kinds: dict[Kind, float] = {}

    def of(self, kind: Kind) -> float:
        return self.kinds.get(kind, self.margin)


def load_tolerances(file: Path | None, host: str, folder: Path = TOLERANCES) -> Tolerances:
    """Load `file`, otherwise the file of the host, otherwise the default. Raises `ConfigError`."""
    host_file = folder / f"{host.partition('.')[0]}.yaml"
    return load_yaml(file or (host_file if host_file.exists() else folder / "default.yaml"), Tolerances)


class Result(StrictModel):
    """One contender on one workload under one condition."""

    contender: Contender
    workload: str
    condition: Condition
    ranks: int
    tokens: int
    """Tokens of a batch."""
    turns: list[Turn]
    with_busy: bool = False
    """True if batches of a busy machine count in ratios."""
    stopped: Stopped | None = None
    memory_bytes: int | None = None
    bytes_sent: int | None = None
    """Bytes that a rank sends for a batch: counted on the link (mean over the ranks), or reported by our engine for its
    busiest rank."""
    losses: list[Loss] = []
    loss_difference: Loss | None = None
    failure: Failure | None = None
    """Reason for which it gets no ratio: it died, or did other work."""

    @property
    def seconds(self) -> list[float]:
        return [turn.seconds for turn in self.turns]

    @property
    def counted(self) -> list[Turn]:
        """Turns that its time is made of: those of a machine that was not busy, where there are any."""
        return counted(self.turns, with_busy=self.with_busy) or self.turns

    @property
    def busy_rounds(self) -> int:
        """Number of turns during which the machine was busy with other work."""
        return sum(turn.busy for turn in self.turns)

    @property
    def busy(self) -> bool | None:
        """True if the machine was busy in all turns; None where that is not known."""
        known = all(turn.usage is not None for turn in self.turns)
        return self.busy_rounds == len(self.turns) if self.turns and known else None

    @property
    def processor_s(self) -> float | None:
        """Median of the processor seconds of all ranks for a batch."""
        known = [turn.usage.processor_s for turn in self.counted if turn.usage is not None]
        return median(known) if known else None

    @property
    def comparable(self) -> bool:
        return self.failure is None and bool(self.turns)

    @property
    def time(self) -> Spread:
        return middle_half([turn.seconds for turn in self.counted])


def results_of(
    contender: Contender,
    measured: Sequence[ContenderResult],
    *,
    workload: str,
    conditions: Sequence[Condition],
    ranks: int,
    tokens: int,
    precision: str,
    reference: Sequence[float],
    with_busy: bool = False,
) -> list[Result]:
    """Return one result for each condition, from the groups in which the contender took part."""
    failure = next((m.failure for m in measured if m.failure is not None), None)
    if failure is None:
        disagreements = (disagreement(m.losses, reference, precision) for m in measured)
        failure = next(filter(None, disagreements), None)
    differences = [d for m in measured if (d := difference(m.losses, reference)) is not None]
    results = []
    for condition in conditions:
        turns = [turn for m in measured for turn in m.turns if turn.condition == condition.name]
        crossed = [turn.link_bytes for turn in turns if turn.link_bytes is not None]
        reported = max((sum(m.bytes_per_batch.values()) for m in measured), default=0)
        results.append(
            Result(
                contender=contender,
                workload=workload,
                condition=condition,
                ranks=ranks,
                tokens=tokens,
                turns=turns,
                with_busy=with_busy,
                stopped=next((m.stopped for m in measured if m.stopped is not None), None),
                memory_bytes=max((m.memory_bytes for m in measured if m.memory_bytes is not None), default=None),
                bytes_sent=round(median(crossed) / ranks) if crossed else reported or None,
                losses=measured[0].losses if measured else [],
                loss_difference=max(differences, default=None),
                failure=failure,
            )
        )
    return results


def paired_ratio(over: Result, under: Result, quantity: Quantity = wall) -> Spread | None:
    """Return the median ratio of `under` to `over`, with its interval, over the rounds that count in both.

    `quantity`: the seconds of a turn, or another value of it.
    """
    return spread_of(ratios(over.turns, under.turns, with_busy=under.with_busy, quantity=quantity))


Where = tuple[str, str, Kind]
"""Workload, name of the condition, kind of parallelism."""


def by_place(results: Sequence[Result]) -> dict[Where, list[Result]]:
    """Group results by the place in which they may be compared with each other."""
    places: dict[Where, list[Result]] = {}
    for result in results:
        places.setdefault((result.workload, result.condition.name, result.contender.kind), []).append(result)
    return places


def fastest(results: Sequence[Result], *, ours: bool) -> Result | None:
    """Return the result with the least median among those that may be compared."""
    candidates = [r for r in results if r.comparable and r.contender.ours == ours]
    return min(candidates, key=lambda r: r.time.median, default=None)


class Verdict(StrictModel):
    """Our fastest contender of a kind compared with the fastest other one."""

    workload: str
    condition: str
    kind: Kind
    margin: float
    ours: str | None = None
    theirs: str | None = None
    ratio: float | None = None
    """Median of ours over theirs: below 1, ours is faster."""
    low: float | None = None
    high: float | None = None
    processor_ratio: float | None = None
    """Ratio of the processor seconds of all ranks, which vary far less, and its interval."""
    processor_low: float | None = None
    processor_high: float | None = None
    rounds: int = 0
    """Rounds that the ratio is made of."""
    busy_rounds: int = 0
    """Rounds that are left out, since the machine was busy with other work."""
    stopped: Stopped | None = None
    """Reason for which no more rounds were made."""
    reason: str | None = None
    """Reason for which there is no ratio."""

    @property
    def behind(self) -> bool:
        """True if ours is slower by more than the margin, beyond the spread: the lower end of the interval is above
        it."""
        return self.low is not None and self.low > 1 + self.margin


def verdicts_of(results: Sequence[Result], tolerances: Tolerances) -> list[Verdict]:
    """Return one verdict for each workload, condition and kind."""
    verdicts = []
    for (workload, condition, kind), some in by_place(results).items():
        ours, theirs = fastest(some, ours=True), fastest(some, ours=False)
        about: dict[str, Any] = {
            "workload": workload,
            "condition": condition,
            "kind": kind,
            "margin": tolerances.of(kind),
            "ours": ours and ours.contender.name,
            "theirs": theirs and theirs.contender.name,
        }
        if ours is None or theirs is None:
            missing = "AxoNN's contenders" if ours is None else "the other frameworks"
            about["reason"] = f"none of {missing} can be compared"
        elif (ratio := paired_ratio(over=theirs, under=ours)) is not None:
            about |= {"ratio": ratio.median, "low": ratio.low, "high": ratio.high, **_about_rounds(ours, theirs)}
        elif left_out := _left_out(ours, theirs):
            about["busy_rounds"] = left_out
            about["reason"] = f"the machine was busy with other work in all {left_out} rounds; {AGAIN}"
        else:
            about["reason"] = "they had no round in common"
        verdicts.append(Verdict(**about))
    return verdicts


def _left_out(*results: Result) -> int:
    """Return the number of rounds left out because the machine was busy in a turn of one of these."""
    if any(result.with_busy for result in results):
        return 0
    return len({(turn.group, turn.round) for result in results for turn in result.turns if turn.busy})


def _about_rounds(ours: Result, theirs: Result) -> dict[str, Any]:
    spread = paired_ratio(over=theirs, under=ours, quantity=processor)
    names = ("processor_ratio", "processor_low", "processor_high")
    processor_fields = {} if spread is None else dict(zip(names, spread, strict=True))
    rounds = len(ratios(theirs.turns, ours.turns, with_busy=ours.with_busy))
    return {**processor_fields, "rounds": rounds, "busy_rounds": _left_out(ours, theirs), "stopped": theirs.stopped}


def busy_lines(results: Sequence[Result]) -> list[str]:
    """Return a remark about batches that a busy machine measured, and what to do; nothing where there are none."""
    turns = [turn for result in results for turn in result.turns]
    busy = [turn for turn in turns if turn.busy]
    if not busy:
        return []
    share = busy_share([turn.usage for turn in busy if turn.usage is not None]) or 0.0
    taken_in = any(result.with_busy for result in results)
    use = "in ratios all the same" if taken_in else "left out of ratios"
    return [
        f"the machine was busy with other work during {len(busy)} of {len(turns)} batches (others took {share:.0%} of "
        f"the cores meanwhile): {use}; {AGAIN if not taken_in else AGAIN.partition(',')[0]}"
    ]


AGAIN = "run it again when the machine is idle, or take them in: --with-busy"


def exit_code(results: Sequence[Result], verdicts: Sequence[Verdict]) -> int:
    """Return 1 when ours falls behind anywhere, fails, or nothing could be compared; otherwise 0."""
    compared = [v for v in verdicts if v.ratio is not None]
    failed = [r for r in results if r.contender.ours and r.failure is not None]
    alone = [v for v in verdicts if v.ours is None and v.theirs is not None]
    return int(not compared or any(v.behind for v in compared) or bool(failed) or bool(alone))


def rows_of(results: Sequence[Result], about: Mapping[str, Mapping[str, str | None]]) -> list[dict[str, Any]]:
    """Return the rows of summary.json; `about` has version and disclosure by the contender's framework."""
    rows = []
    for some in by_place(results).values():
        ours = fastest(some, ours=True)
        for result in some:
            if result.turns:
                base = ours if ours is not None and result.comparable else None
                rows.append(_row(result, base, about.get(result.contender.framework, {})))
    return rows


def _row(result: Result, base: Result | None, about: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the row of a result that has turns. `base`: the result that it is compared with, if any."""
    time = result.time
    ratio = None if base is None else paired_ratio(over=base, under=result)
    processor_ratio = None if base is None else paired_ratio(over=base, under=result, quantity=processor)
    return {
        "framework": result.contender.label,
        "strategy": result.contender.variant,
        "parallelism": result.contender.kind,
        "ours": result.contender.ours,
        "workload": result.workload,
        "condition": result.condition.name,
        "link_kbit_per_s": result.condition.kbit,
        "ranks": result.ranks,
        "batch_time_s": time.median,
        "batch_time_quartiles_s": [time.low, time.high],
        "batch_times_s": result.seconds,
        "tokens_per_s": result.tokens / time.median,
        "memory_bytes": result.memory_bytes,
        "bytes_sent": result.bytes_sent,
        "ratio": None if ratio is None else ratio.median,
        "spread": None if ratio is None else [ratio.low, ratio.high],
        "processor_s": result.processor_s,
        "processor_ratio": None if processor_ratio is None else processor_ratio.median,
        "processor_spread": None if processor_ratio is None else [processor_ratio.low, processor_ratio.high],
        "rounds": len(result.turns),
        "busy_rounds": result.busy_rounds,
        "busy": result.busy,
        "in_ratios": result.with_busy or not result.busy,
        "stopped": result.stopped,
        "losses": result.losses,
        "losses_agree": result.failure is None or result.failure.cause != "not-comparable",
        "loss_difference": result.loss_difference,
        "failure": None if result.failure is None else result.failure.model_dump(exclude_none=True),
        "disclosure": about.get("disclosure"),
        "version": about.get("version"),
        "kind": "measured",
    }
