"""make compare-baselines: the installed frameworks on the same work at the ranks this node has, batch by batch in turn.

Writes results/baselines (summary.json, records, junit.xml). Exit code: 0 fine; 1 when AxoNN falls behind the fastest
other framework of a kind of parallelism by more than the margin of the tolerance file, beyond the spread, when it fails
itself, or when nothing could be compared; 2 for errors; 130 when interrupted (what was measured is kept).
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.markup import escape

from axonn.cli.doc_links import explained
from axonn.config.train_config import TrainConfig, validate
from axonn.durable_files import locked_folder
from axonn.errors import AxonnError, ConfigError, LaunchError
from axonn.models.registry import make_model
from axonn.observability.procfs import available_cores
from axonn.observability.records import Workload
from axonn.training.places import PROJECT, from_here
from axonn.training.provenance import this_machine
from baselines import contenders as who
from baselines.adapters.adapter_common import gpt_of
from baselines.comparison import (
    Result,
    Tolerances,
    busy_lines,
    exit_code,
    load_tolerances,
    results_of,
    rows_of,
    verdicts_of,
)
from baselines.comparison_outcome import about_frameworks, write_records_of, write_summary
from baselines.comparison_progress import Reporter, make_console
from baselines.comparison_session import (
    PartMeasurements,
    SessionPart,
    conditions_over_link,
    run_over_link,
    run_part,
)
from baselines.comparison_tables import show
from baselines.contenders import Contender, Kind, choose, load_contenders, refusal
from baselines.coordinator import LEAST_ROUNDS, PlainLoopback
from baselines.equal_work import reference_losses
from baselines.junit import write_junit
from baselines.rounds import LOOPBACK, Condition
from baselines.statistics import HALF_WIDTH
from experiments.slow_link import stage_seconds, why_no_link
from experiments.workloads import SHAPES, config_of

OUT = PROJECT / "results" / "baselines"
RUNS = PROJECT / "runs" / "baselines"
MINUTES = 40.0
"""Minutes in all, by default; fewer where every interval is narrow enough earlier."""
MOST_RANKS = 4
"""Most ranks by default, since the fixed workloads cannot be cut much further."""
MOST_ROUNDS = 200
QUICK_WORKLOAD, QUICK_MINUTES, QUICK_MARGIN = "tiny", 0.0, 9.0
ERROR, INTERRUPTED = 2, 130


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m baselines.compare", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--frameworks", nargs="+", default=[], help="pytorch, deepspeed/zero-1, ...; AxoNN always runs")
    parser.add_argument("--kinds", nargs="+", default=[], choices=who.KINDS, help="of parallelism")
    parser.add_argument("--workloads", nargs="+", default=["small", "wide"], choices=list(SHAPES))
    parser.add_argument("--ranks", type=int, help=f"default: the cores of this machine, at most {MOST_RANKS}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, help="batches of each contender; default: as many as fit the time")
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        help=f"of all workloads and kinds together (default {MINUTES:g}): rounds go on until the intervals of all "
        f"ratios are narrow enough (--within) or these are spent; {LEAST_ROUNDS + 1} batches are made in any case",
    )
    parser.add_argument(
        "--within",
        type=float,
        default=100 * HALF_WIDTH,
        help=f"percent of a ratio that half of its 95%% interval may be (default {100 * HALF_WIDTH:g})",
    )
    parser.add_argument(
        "--with-busy", action="store_true", help="ratios also of batches while which the machine was busy"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny workload, whose times mean nothing: any pass")
    parser.add_argument("--link", action="store_true", help="all of it over an emulated link, and only that (root)")
    parser.add_argument("--no-link", action="store_true", help="nothing over an emulated link")
    parser.add_argument("--contenders", type=Path, default=who.FILE, help="another list than contenders.yaml")
    parser.add_argument("--tolerances", type=Path, help="another file than that of this machine")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for what comes of it")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder for the ranks' run folders")
    parsed = parser.parse_args(arguments)
    if parsed.rounds is not None and parsed.rounds < LEAST_ROUNDS:
        parser.error(f"--rounds: at least {LEAST_ROUNDS}, so that there is a spread")
    if parsed.link and parsed.no_link:
        parser.error("--link and --no-link contradict each other")
    if parsed.quick:
        parsed.workloads, parsed.minutes, parsed.with_busy = [QUICK_WORKLOAD], QUICK_MINUTES, True
        parsed.no_link = not parsed.link
    return parsed


def default_ranks(device: str) -> int:
    """Return the number of GPUs or cores of this node, at least 2: on one rank nothing is parallel."""
    if device == "cuda":
        import torch

        return max(2, torch.cuda.device_count())
    return max(2, min(available_cores(), MOST_RANKS))


def on_one_rank(workload: str) -> TrainConfig:
    """Return the configuration of a workload on one rank."""
    return validate(config_of(workload, {}), TrainConfig, where=workload)


class Comparison:
    """The requested comparison, and its results so far."""

    def __init__(self, chosen: argparse.Namespace, console: Console) -> None:
        self._options = chosen
        self._console = console
        self._ranks: int = chosen.ranks or default_ranks(chosen.device)
        if self._ranks < 2:
            raise ConfigError("--ranks: contenders are compared on at least 2 ranks")
        self._contenders = choose(
            load_contenders(chosen.contenders), frameworks=chosen.frameworks, kinds=chosen.kinds, ranks=self._ranks
        )
        self.refused: dict[str, list[Contender]] = {}
        self.results: list[Result] = []
        self.remarks: list[str] = []
        self.interrupted = False
        self.failed = False
        self._began = time.monotonic()

    def run(self) -> None:
        """Measure all parts, one after the other."""
        options = self._options
        plan = [(workload, options.link) for workload in options.workloads]
        if not options.link and not options.no_link:
            # Only the smallest one: there is no time for more.
            plan.append((min(options.workloads, key=_weight), True))
        references: dict[str, list[float]] = {}
        for position, (workload, link) in enumerate(plan):
            rest = sum(_weight(name) for name, _ in plan[position:])
            seconds = max(0.0, 60 * options.minutes - (time.monotonic() - self._began)) * _weight(workload) / rest
            if link and (reason := self._no_link(workload, seconds)) is not None:
                self._remark(f"{workload}: not over an emulated link: {reason}")
                continue
            try:
                if workload not in references:
                    self._console.print(f"{workload}: losses of the serial reference", highlight=False)
                    cache, folder = options.out / "reference", options.runs / f"{workload}-reference"
                    references[workload] = reference_losses(workload, cache=cache, folder=folder)
                self._measure(workload, link, seconds, references[workload])
            except KeyboardInterrupt:
                self.interrupted = True
            except AxonnError as error:
                # Earlier measurements count.
                self.failed = True
                self._remark(f"{workload}, {'emulated link' if link else 'loopback'}: {error}")
            if self.interrupted:
                return

    def _no_link(self, workload: str, seconds: float) -> str | None:
        """Return why the workload is not run over a link now, or None."""
        if (reason := why_no_link()) is not None or self._options.link:
            return reason
        measured = [r for r in self.results if r.workload == workload and r.turns]
        # Starting takes about as long as 5 batches of each; over the link each is slower, and one kind has two rates.
        need = sum(r.time.median for r in measured) * (LEAST_ROUNDS * 2 + 5)
        if need > seconds:
            return f"it needs about {need:.0f} s, and {seconds:.0f} s are left of --minutes; --link measures it alone"
        return None

    def _measure(self, workload: str, link: bool, seconds: float, reference: Sequence[float]) -> None:
        options = self._options
        able = self._able(workload)
        conditions = self._conditions(workload) if link else {}
        part = SessionPart(
            workload=workload,
            ranks=self._ranks,
            link=link,
            device=options.device,
            contenders=able,
            least_rounds=options.rounds or LEAST_ROUNDS,
            most_rounds=options.rounds or MOST_ROUNDS,
            seconds=seconds,
            conditions=conditions,
            half_width=None if options.rounds else options.within / 100,
            with_busy=options.with_busy,
            runs=options.runs,
        )
        if link:
            try:
                measurements = run_over_link(part, options.out)
            except LaunchError as error:
                self._remark(f"{workload}: not over an emulated link: {error}")
                return
        else:
            measurements = run_part(part, link=PlainLoopback(), say=Reporter(self._console))
        self.interrupted = measurements.interrupted
        self._take(part, measurements, reference)

    def _able(self, workload: str) -> list[Contender]:
        """Return the contenders that can run; the others are kept in `refused` with their reasons."""
        able = []
        left_out: list[str] = []
        options = self._options
        for contender in self._contenders:
            if workload in contender.left_out_of and not (options.frameworks or options.kinds or options.link):
                left_out.append(contender.name)
                continue
            reason = refusal(contender, workload, self._ranks, options.device)
            if reason is None:
                able.append(contender)
            elif contender not in self.refused.setdefault(reason, []):
                self.refused[reason].append(contender)
        if left_out:
            self._remark(f"{workload}: left out for want of time: {', '.join(left_out)}; --kinds brings them back")
        return able

    def _conditions(self, workload: str) -> dict[Kind, list[Condition]]:
        forward, backward = stage_seconds(workload)
        model = gpt_of(on_one_rank(workload))
        layers = make_model(model).layers
        block_cost = sum(layer.cost for layer in layers if layer.block is not None)
        return conditions_over_link(
            workload,
            self._ranks,
            forward=forward,
            backward=backward,
            parameters=model.parameters,
            layer_share=block_cost / sum(layer.cost for layer in layers) / model.layers,
        )

    def _take(self, part: SessionPart, measurements: PartMeasurements, reference: Sequence[float]) -> None:
        config = on_one_rank(part.workload)
        for contender in part.contenders:
            if contender.key in measurements.measured:
                self.results += results_of(
                    contender,
                    measurements.measured[contender.key],
                    workload=part.workload,
                    conditions=part.conditions.get(contender.kind, [LOOPBACK]),
                    ranks=part.ranks,
                    tokens=config.batch_size * config.model.units_per_sample,
                    precision=config.precision.compute,
                    reference=reference,
                    with_busy=part.with_busy,
                )

    def _remark(self, text: str) -> None:
        self.remarks.append(text)
        self._console.print(f"[yellow]{escape(text)}[/yellow]", soft_wrap=True)


def _weight(workload: str) -> float:
    """Return the share of the time: a larger workload gets more, but not in proportion to its work."""
    config = on_one_rank(workload)
    work = Workload.of(config.model, gpus=1, batch_size=config.batch_size, precision=config.precision.compute)
    return sqrt(work.flops(recompute=False))


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str]) -> int:
    """Measure, write and show. Returns the exit code."""
    chosen = parse_options(arguments)
    console = make_console()
    tolerances = load_tolerances(chosen.tolerances, this_machine().host or "")
    if chosen.quick and chosen.tolerances is None:
        tolerances = Tolerances(margin=QUICK_MARGIN)
    # The signal with which CI systems end a job.
    signal.signal(signal.SIGTERM, _stop)
    comparison = Comparison(chosen, console)
    with locked_folder(chosen.runs, "wait for its end, or choose another --runs"):
        comparison.run()
    results, refused = comparison.results, comparison.refused
    verdicts = verdicts_of(results, tolerances)
    about = about_frameworks([result.contender for result in results])
    rows = rows_of(results, about)
    if comparison.interrupted and not results:
        console.print("[yellow]interrupted before anything was measured; earlier results stay[/yellow]")
        return INTERRUPTED
    summary = write_summary(
        chosen.out,
        rows,
        results,
        verdicts,
        refused,
        remarks=comparison.remarks,
        interrupted=comparison.interrupted,
        quick=chosen.quick,
    )
    write_records_of(chosen.out / "records", results)
    write_junit(chosen.out / "junit.xml", results, verdicts, refused)
    show(console, rows, results, verdicts, refused)
    for remark in [*comparison.remarks, *busy_lines(results)]:
        console.print(f"[yellow]{escape(remark)}[/yellow]", soft_wrap=True)
    console.print(f"written to {from_here(summary)}", soft_wrap=True)
    if comparison.interrupted:
        console.print("[yellow]interrupted: the tables hold what was measured until then[/yellow]")
        return INTERRUPTED
    if not rows:
        console.print("[red]nothing was measured[/red]")
    return ERROR if comparison.failed else exit_code(results, verdicts)


if __name__ == "__main__":
    try:
        with explained("docs/compare.md"):
            sys.exit(main(sys.argv[1:]))
    except Exception:
        # Python's own exit code, 1, would mean that AxoNN falls behind.
        traceback.print_exc()
        sys.exit(ERROR)
