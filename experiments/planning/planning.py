"""Parts of `axonn plan` around the planner: the model, the search space, the table, and the configuration file."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import yaml
from rich import box
from rich.table import Table

from axonn.config.model_config import ModelConfig
from axonn.config.train_config import FloatType, TrainConfig
from axonn.errors import ConfigError
from axonn.grid import AXES, ProcessGrid
from axonn.models.registry import make_model, outline_of
from axonn.optim.algorithms.registry import ALGORITHMS
from axonn.perf.layers.model_outline import ModelOutline
from axonn.perf.machine.machine_file import MachineFile
from axonn.perf.planner.engine_strategy import config_of_strategy
from axonn.perf.planner.planner import Plannable, PlannedStrategy, StrategyPlan
from axonn.perf.planner.search_space import Checkpointing, Space
from axonn.perf.strategy import Strategy
from axonn.schedules import ScheduleSpec, definition_of, make_schedule
from axonn.training.capacity import lacking_here
from experiments.definition import HERE, load_experiment, load_model

TABLE_WIDTH = 160


def plannable(config: ModelConfig) -> Plannable:
    """Return a model of a registered architecture for the planner."""
    model, outline = make_model(config), outline_of(config)

    @cache
    def on(row: int, col: int) -> ModelOutline:
        model.check(ProcessGrid(row=row, col=col))
        return outline

    return Plannable(name=config.name, outline=on)


def described(strategy: Strategy) -> list[str]:
    """Return the cells of a table for grid, microbatch, schedule, checkpointing and optimizer."""
    g, schedule = strategy.grid, strategy.schedule
    how = schedule.name
    if schedule.chunks > 1:
        how += f" {schedule.chunks}{'V' if schedule.placement == 'v' else ''}"
    if g.inter > 1 and definition_of(schedule.name).has_limit:
        how += f" ({schedule.limit_on(g.inter)})"
    optimizer: str = strategy.optimizer
    if optimizer == "offloaded":
        optimizer = f"offloaded {strategy.bsize / 1e6:g}M x {strategy.k}"
    return [
        f"{g.data} x {g.inter} x {g.row} x {g.col}",
        f"{strategy.microbatch_size}" + (f" / {strategy.overdecomposition}" if strategy.overdecomposition > 1 else ""),
        how,
        f"every {strategy.checkpoint_layers}" if strategy.recompute == "full" else "none",
        optimizer,
    ]


def size(nbytes: float) -> str:
    """Return bytes as text with a decimal unit."""
    unit = min(4, int(math.log(max(nbytes, 1), 1000)))
    return f"{nbytes / 1000**unit:.3g} {['B', 'kB', 'MB', 'GB', 'TB'][unit]}"


def table(plan: StrategyPlan, sent: Sequence[Mapping[str, int]], title: str) -> Table:
    """Return the table of the best configurations. `sent`: bytes by axis, for each."""
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in (
        *("#", "data x inter\nx row x col", "micro-\nbatch", "schedule\n(in flight)", "check-\npoints", "optimizer"),
        *("time\ns", "TFLOP/s\nper GPU", "% of\npeak", "memory\nGB", "bubble\n%", "a GPU\nsends"),
    ):
        left = name.startswith(("data", "schedule", "check", "optimizer"))
        result.add_column(name, justify="left" if left else "right", no_wrap=True)
    for number, (choice, by_axis) in enumerate(zip(plan.best, sent, strict=True), start=1):
        p = choice.prediction
        result.add_row(
            str(number),
            *described(choice.strategy),
            f"{p.batch_time_s:.4g}",
            f"{p.tflops_per_gpu:.3g}",
            f"{p.pct_peak:.1f}",
            f"{p.memory.total / 1e9:.3g}",
            f"{100 * p.parts.bubble / p.batch_time_s:.1f}",
            size(sum(by_axis.values())),
        )
    return result


def what_was_searched(plan: StrategyPlan) -> list[str]:
    """Return lines on how many configurations were tried, and which were discarded and why."""
    rate = plan.estimated / max(plan.estimating_s, 1e-9)
    lines = [
        f"{plan.estimated} configurations estimated in {plan.estimating_s:.1f} s ({rate:.0f}/s), "
        f"{plan.simulated} pipelines simulated"
    ]
    if plan.discarded.counts:
        parts = (f"{reason} {count}" for reason, count in plan.discarded.counts.most_common())
        lines.append(f"discarded: {'; '.join(parts)}")
    if plan.discarded.nearest is not None:
        lacking, candidate = plan.discarded.nearest
        data, inter, row, col = candidate.shape.grid
        lines.append(
            f"nearest that does not fit: {size(lacking)} too much ({data} x {inter} x {row} x {col}, microbatch "
            f"{candidate.shape.microbatch_size}, {candidate.schedule.name}, optimizer {candidate.optimizer})"
        )
    return lines


def write_config(
    choice: PlannedStrategy, model: ModelConfig, space: Space, path: Path, *, machine: MachineFile
) -> TrainConfig:
    """Write the configuration file with which `axonn train` runs a choice; return its content."""
    config = config_of_strategy(choice.strategy, model, batch_size=space.batch_size)
    p = choice.prediction
    head = (
        f"# Chosen by axonn plan for {space.gpus} GPUs of {machine.name}: predicted {p.batch_time_s:.4g} s per batch,\n"
        f"# {p.tflops_per_gpu:.3g} TFLOP/s per GPU, {p.memory.total / 1e9:.3g} GB on the fullest GPU.\n"
    )
    content = config.model_dump(mode="json", exclude_defaults=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return config


def where_it_runs(config: TrainConfig, path: Path, machine: MachineFile) -> str:
    """Return a text on where and how the written configuration can be run."""
    how = f"axonn train {path}"
    if not (lacking := lacking_here(config, "auto")):
        return f"run it with: {how}"
    ranks = config.grid.size
    nodes = -(-ranks // machine.node.gpus.number)
    refusal = f"this machine cannot run it: {'; '.join(lacking)}"
    if nodes == 1:
        return f"{refusal}. On a node of {machine.name}: {how}"
    return (
        f"{refusal}. It takes {nodes} nodes of {machine.name}, and axonn train starts ranks on one machine alone: "
        "axonn jobs writes jobs for the points of an experiment, which may have the planner choose as here "
        "(docs/jobs.md)"
    )


def picked(plan: StrategyPlan, number: int) -> PlannedStrategy:
    """Return row `number` of the table, from 1. Raises `ConfigError` for a row that it does not have."""
    if not 1 <= number <= len(plan.best):
        raise ConfigError(f"--pick {number}: the table has {len(plan.best)} rows")
    return plan.best[number - 1]


def default_batch(config: ModelConfig) -> int | None:
    """Return the published batch size of a model, if an experiment of the suite has published points of it."""
    for path in sorted(HERE.glob("*.yaml")):
        experiment = load_experiment(path)
        panel = experiment.predicted
        if panel is None or experiment.published is None:
            continue
        for point in panel.points:
            if point.model == config.name:
                return point.batch_size or panel.batch_size
    return None


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Model or module to plan for. `config`: that of a model for `axonn train`; `batch`: its published batch size."""

    plannable: Plannable
    config: ModelConfig | None = None
    batch: int | None = None


def chosen_model(model: str | None, module: str | None, inputs: Sequence[str], *, precision: FloatType) -> Chosen:
    """Return the model or module that the command names. Raises `ConfigError` unless it names exactly one."""
    if (model is None) == (module is None):
        raise ConfigError("give --model NAME, or --module package.module:factory with --input")
    if model is not None:
        config = load_model(model)
        return Chosen(plannable=plannable(config), config=config, batch=default_batch(config))
    assert module is not None
    from experiments.planning.plan_module import plannable_module

    return Chosen(plannable=plannable_module(module, inputs))


def without_engine(space: Space) -> Space:
    """Return the space for a module that `axonn.parallelize` cuts: grids, rows at a time and sub-shards.

    Its optimizer is torch's own. Raises `ConfigError` for pins of features that only the engine has.
    """
    pinned = {
        "--schedule": space.schedule is not None,
        "--checkpointing": space.checkpointing not in (None, "none"),
        "--optimizer offloaded": space.optimizer == "offloaded",
    }
    if any(pinned.values()):
        options = ", ".join(option for option, is_pinned in pinned.items() if is_pinned)
        raise ConfigError(f"{options}: the engine does that, for a --model; leave it out for a --module")
    return replace(space, optimizer="device", checkpointing="none")


def space_of(
    *,
    gpus: int,
    batch: int | None,
    precision: FloatType,
    extents: tuple[int | None, int | None, int | None, int | None],
    microbatch: int | None,
    schedule: ScheduleSpec | None,
    checkpointing: str | None,
    optimizer: Literal["device", "offloaded"] | None,
    algorithm: str,
    order: str | None,
    reserve: float,
) -> Space:
    """Return the space that the options of the command leave to search. Raises `ConfigError` for wrong options."""
    if batch is None:
        raise ConfigError("how large is the batch? give --batch")
    if algorithm not in ALGORITHMS:
        raise ConfigError(f"--algorithm {algorithm}: the optimizers are {', '.join(ALGORITHMS)}")
    axes = tuple((order or ",".join(AXES)).split(","))
    if sorted(axes) != sorted(AXES):
        raise ConfigError(f"--order {order}: name each of {', '.join(AXES)} once, separated by commas")
    if checkpointing not in (None, "none", "auto") and not (checkpointing or "").isdigit():
        raise ConfigError(f"--checkpointing {checkpointing}: say none, auto, or a number of blocks")
    blocks: Checkpointing | None = None
    if checkpointing is not None:
        blocks = int(checkpointing) if checkpointing.isdigit() else "none" if checkpointing == "none" else "auto"
    data, inter, row, col = extents
    return Space(
        gpus=gpus,
        batch_size=batch,
        precision=precision,
        algorithm=algorithm,
        order=axes,  # type: ignore[arg-type]
        data=data,
        inter=inter,
        row=row,
        col=col,
        reserve=reserve,
        microbatch_size=microbatch,
        schedule=schedule,
        checkpointing="none" if blocks == 0 else blocks,
        optimizer=optimizer,
    )


def taken_by_default(left: Collection[str], space: Space, *, pick: int) -> list[str]:
    """Return the defaults that a plan depends on, each with its option. `left`: options that were not given; those that
    the planner searches instead are in its table."""
    defaults = {
        "batch": f"batch {space.batch_size}, that of the model's published points",
        "precision": f"precision {space.precision}",
        "reserve": f"{space.reserve:.0%} of a GPU's memory left free",
        "order": f"axes from the slowest to the fastest {' '.join(space.order)}",
        "algorithm": f"optimizer {space.algorithm}",
        "pick": f"row {pick} for --out",
    }
    if space.schedule is not None:
        defaults["chunks"] = f"{space.schedule.chunks} chunk per stage"
        defaults["placement"] = f"placement {space.schedule.placement}"
        if definition_of(space.schedule.name).has_limit:
            defaults["in_flight"] = "in-flight limit 2 G_inter"
    return [f"{text} (--{name.replace('_', '-')})" for name, text in defaults.items() if name in left]


def pinned_schedule(
    name: str | None, chunks: int, placement: Literal["loop", "v"], in_flight: int | None
) -> ScheduleSpec | None:
    """Return the schedule that the options pin. Raises `ConfigError` for one that does not exist."""
    if name is None:
        if chunks > 1 or placement != "loop" or in_flight is not None:
            raise ConfigError("--chunks, --placement and --in-flight are those of a pinned schedule: give --schedule")
        return None
    pinned = ScheduleSpec(name=name, chunks=chunks, placement=placement, in_flight_limit=in_flight)
    make_schedule(pinned, stage=0, stages=2, microbatches=2)
    return pinned
