"""The command `axonn plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from axonn.cli.console import console, make_console, options_left, progress_bar, say_defaults
from axonn.cli.doc_links import documented
from axonn.errors import ConfigError

if TYPE_CHECKING:
    from axonn.perf.machine.machine_file import MachineFile
    from axonn.perf.planner.planner import Plannable, PlannedStrategy, StrategyPlan
    from axonn.perf.planner.search_space import Space
    from experiments.planning.planning import Chosen

Count = Annotated[int | None, typer.Option(min=1, help="Pin this extent of the grid.")]
Inputs = Annotated[
    list[str] | None, typer.Option("--input", help="Of the module, once each: 'float32[8,3,64,64]'; rows first.")
]
Batch = Annotated[
    int | None,
    typer.Option(min=1, help="Sequences or images in a batch, over all ranks; default as the model was published."),
]
Precision = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of parameters and activations.")
]
Order = Annotated[str | None, typer.Option(help="Axes from the slowest to the fastest on the nodes, with commas.")]
Reserve = Annotated[
    float, typer.Option(min=0, max=0.9, help="Share of a GPU's memory to leave free, for what no model counts.")
]


@documented("docs/plan.md")
def plan(
    context: typer.Context,
    *,
    gpus: Annotated[int, typer.Option(min=1, help="How many GPUs (or ranks) to plan for.")],
    machine: Annotated[str, typer.Option(help="A machine of experiments/machines, or a machine file.")],
    model: Annotated[str | None, typer.Option(help="A model of experiments/models, or a model file.")] = None,
    module: Annotated[str | None, typer.Option(help="package.module:factory of any torch module instead.")] = None,
    inputs: Inputs = None,
    batch: Batch = None,
    precision: Precision = "float16",
    data: Count = None,
    inter: Count = None,
    row: Count = None,
    col: Count = None,
    microbatch: Annotated[int | None, typer.Option(min=1, help="Pin the microbatch size.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Pin the schedule, by name.")] = None,
    chunks: Annotated[int, typer.Option(min=1, help="Chunks per stage of the pinned schedule.")] = 1,
    placement: Annotated[Literal["loop", "v"], typer.Option(help="Of the chunks of the pinned schedule.")] = "loop",
    in_flight: Annotated[int | None, typer.Option(min=1, help="In-flight limit of the pinned schedule.")] = None,
    checkpointing: Annotated[str | None, typer.Option(help="Pin: none, auto, or a number of blocks.")] = None,
    optimizer: Annotated[Literal["device", "offloaded"] | None, typer.Option(help="Pin the optimizer's place.")] = None,
    order: Order = None,
    reserve: Reserve = 0.05,
    pick: Annotated[int, typer.Option(min=1, help="Which row of the table the file is written for.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Configuration file to write for axonn train.")] = None,
) -> None:
    """Find the best configurations of a model for a number of GPUs of a machine: predicted time and memory."""
    from experiments.definition import find_machine
    from experiments.planning import planning

    chosen = planning.chosen_model(model, module, inputs or [], precision=precision)
    machine_file = find_machine(machine)
    space = planning.space_of(
        gpus=gpus,
        batch=batch or chosen.batch,
        precision=precision,
        extents=(data, inter, row, col),
        microbatch=microbatch,
        schedule=planning.pinned_schedule(schedule, chunks, placement, in_flight),
        checkpointing=checkpointing,
        optimizer=optimizer,
        order=order,
        reserve=reserve,
    )
    if chosen.config is None:
        space = planning.without_engine(space)
        if out is not None:
            raise ConfigError(
                "--out writes a configuration of axonn train, which trains no other modules; leave it out"
            )
    result = _search(chosen.plannable, machine_file, space)
    _print_table(result, chosen.plannable, space, machine_file)
    say_defaults(planning.taken_by_default(options_left(context), space, pick=pick))
    for line in planning.what_was_searched(result):
        console.print(escape(line), highlight=False, soft_wrap=True)
    _print_choice(planning.picked(result, pick), chosen, space, out, machine_file)


def _search(plannable: Plannable, machine: MachineFile, space: Space) -> StrategyPlan:
    """Plan, with a progress bar."""
    from axonn.perf.planner.planner import plan as search

    with progress_bar(transient=True) as progress:
        task = progress.add_task("estimating")

        def on_progress(part: str, done: int, total: int) -> None:
            progress.update(task, description=part, completed=done, total=total)

        return search(plannable, machine, space, on_progress=on_progress)


def _print_table(result: StrategyPlan, plannable: Plannable, space: Space, machine: MachineFile) -> None:
    from axonn.perf.timing.bytes_sent import bytes_by_axis
    from experiments.planning import planning

    # On a narrow terminal its lines wrap: a table cut into pieces would be unreadable.
    wide = make_console()
    wide.width = max(console.width, planning.TABLE_WIDTH)
    sent = []
    for choice in result.best:
        outline = plannable.outline(choice.strategy.grid.row, choice.strategy.grid.col)
        sent.append(bytes_by_axis(outline, choice.strategy, batch_size=space.batch_size))
    title = f"{plannable.name} on {space.gpus} GPUs of {machine.name}, batch {space.batch_size}, {space.precision}"
    wide.print(planning.table(result, sent, title))


def _print_choice(
    choice: PlannedStrategy, chosen: Chosen, space: Space, out: Path | None, machine: MachineFile
) -> None:
    """Print how to use a row of the table, and write its configuration where one is asked for."""
    from experiments.planning import planning

    if chosen.config is None:
        g, sub_shards = choice.strategy.grid, choice.strategy.overdecomposition
        turns = f", overdecomposition={sub_shards}" if sub_shards > 1 else ""
        console.print(f"axonn.parallelize(module, ProcessGrid(data={g.data}, row={g.row}, col={g.col}){turns})")
    elif out is not None:
        config = planning.write_config(choice, chosen.config, space, out, machine=machine)
        console.print(f"written to {out}; {planning.where_it_runs(config, out, machine)}", soft_wrap=True)
    else:
        console.print("--out FILE writes the configuration for axonn train (--pick says of which row)")
