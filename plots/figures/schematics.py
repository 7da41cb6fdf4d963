"""The poster's schematics, drawn from the objects that run. python -m plots.figures.schematics [CONFIG] [--out DIR]

Figure 1: the grid, and which part of the batch and of the network each rank computes. Figure 2: stages and microbatches
over time, as the configured schedule orders them when a backward takes twice as long as a forward and a message a
tenth of it. Figure 4: one layer and the next on the ranks of one stage. CONFIG is the YAML file of a training
configuration; without one, a small example is drawn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from axonn.cli.console import make_console
from axonn.cli.doc_links import explained
from axonn.config.train_config import TrainConfig, load_yaml, validate
from axonn.distributed.collectives import SerialCollectives
from axonn.engine import microbatches_of
from axonn.grid import Axis, ProcessGrid
from axonn.inter_layer.stage import virtual_spans
from axonn.models.registry import make_model
from axonn.perf.machine.network import MessageTime
from axonn.perf.pipeline.simulator import Simulation, simulate
from axonn.placement import Placement
from axonn.schedules import Kind, Task, make_schedule
from axonn.tensor import TRANSPOSED, Linear, TensorContext, placements
from axonn.training.places import from_here
from plots.style import PAGE_IN, colours, save, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXAMPLE = {
    "model": {"name": "example", "layers": 12, "hidden": 256, "heads": 4, "seq_len": 128, "vocab": 8192},
    "grid": {"data": 2, "inter": 3, "row": 2, "col": 2},
    "batch_size": 32,
    "microbatch_size": 2,
    "schedule": {"in_flight_limit": 3},
}
MOST_CELLS = 6
"""Rows and columns of the grid that are drawn; of a larger one, the first and the last."""
MOST_STAGES = 12
"""Stages of the schedule that are drawn."""
MESSAGE = 0.1
"""Time of a message, in forwards."""
DURATIONS = {Kind.FORWARD: 1.0, Kind.BACKWARD: 2.0, Kind.INPUT: 1.0, Kind.WEIGHT: 1.0}
NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT: "backward, inputs",
    Kind.WEIGHT: "backward, weights",
}


def shown(count: int, most: int = MOST_CELLS) -> list[int | None]:
    """Return the numbers below `count`; where there are more than `most`, None stands for those in the middle."""
    if count <= most:
        return list(range(count))
    return [*range(most - 2), None, count - 1]


def draw_grid(config: TrainConfig) -> Figure:
    """Draw Figure 1: one cell per stage and batch shard with the ranks of row x col, coloured by the stage."""
    import matplotlib.pyplot as plt

    grid = config.grid
    model = make_model(config.model)
    layout = config.schedule.layout(grid.inter)
    spans = virtual_spans(model, layout)
    columns, rows = shown(grid.inter), shown(grid.data)
    palette = colours(len(columns))
    width = PAGE_IN
    figure, axes = plt.subplots(
        figsize=(width, 1.2 + width * 0.72 * len(rows) / max(4, len(columns) + 1)), constrained_layout=True
    )
    per_shard = config.batch_size // grid.data
    for y, data in enumerate(rows):
        if data is None:
            axes.text(-0.1, -y - 0.5, "⋮", ha="center", va="center", fontsize=14)
        else:
            first = data * per_shard
            text = f"batch shard {data}\nsamples {first} to {first + per_shard - 1}"
            axes.text(-0.06, -y - 0.5, text, ha="right", va="center", fontsize=8)
        for x, stage in enumerate(columns):
            if data is None or stage is None:
                axes.text(x + 0.5, -y - 0.5, "⋯", ha="center", va="center", fontsize=14)
                continue
            _draw_cell(axes, grid, data=data, stage=stage, corner=(x, -y - 1), colour=palette[x])
    for x, stage in enumerate(columns):
        if stage is None:
            continue
        parts = [spans[layout.virtual(stage, chunk)] for chunk in range(layout.chunks)]
        between = " … " if len(columns) <= 4 else " …\n"
        names = "\n".join(_named([model.layers[i].name for i in span], between) for span in parts)
        axes.text(x + 0.5, 0.06, f"stage {stage}\n{names}", ha="center", va="bottom", fontsize=7, linespacing=1.3)
    for x in range(len(columns) - 1):
        for y in range(len(rows)):
            if rows[y] is not None:
                axes.annotate(
                    "", (x + 1.09, -y - 0.5), (x + 0.91, -y - 0.5), arrowprops={"arrowstyle": "<->", "color": "0.25"}
                )
    for y in range(len(rows) - 1):
        axes.annotate(
            "", (len(columns) + 0.08, -y - 1.4), (len(columns) + 0.08, -y - 0.6),
            arrowprops={"arrowstyle": "<->", "color": "0.25", "linestyle": "dashed"},
        )  # fmt: skip
    axes.set(
        xlim=(-0.75, len(columns) + 0.2),
        ylim=(-len(rows) - 0.02, 0.3 + 0.22 * layout.chunks * (1 if len(columns) <= 4 else 2)),
    )
    axes.axis("off")
    under = f"{grid} = {grid.size} ranks; numbers are ranks"
    legend = "solid arrows: activations and gradients of microbatches"
    if grid.data > 1:
        legend += "; dashed: all-reduce of a stage's weight gradients"
    figure.suptitle(f"Network shards and batch shards\n{under}\n{legend}", fontsize=8.5)
    return figure


def _named(layers: Sequence[str], between: str) -> str:
    return layers[0] if len(layers) == 1 else f"{layers[0]}{between}{layers[-1]}"


def _draw_cell(
    axes: Axes, grid: ProcessGrid, *, data: int, stage: int, corner: tuple[float, float], colour: tuple[float, ...]
) -> None:
    """Draw the ranks of one stage of one replica, row by row."""
    from matplotlib.patches import Rectangle

    margin = 0.09
    x0, y0, side = corner[0] + margin, corner[1] + margin, 1 - 2 * margin
    axes.add_patch(Rectangle((x0, y0), side, side, facecolor=(*colour, 0.25), edgecolor=colour, linewidth=1.2))
    rows, columns = shown(grid.row, 4), shown(grid.col, 4)
    for i, row in enumerate(rows):
        for j, col in enumerate(columns):
            x = x0 + side * j / len(columns)
            y = y0 + side * (1 - (i + 1) / len(rows))
            w, h = side / len(columns), side / len(rows)
            if grid.tensor > 1:
                axes.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=colour, linewidth=0.6))
            text = "…" if row is None or col is None else str(grid.rank(data=data, inter=stage, row=row, col=col))
            axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=8)


def scheduled(config: TrainConfig) -> Simulation:
    """Simulate the configured schedule on a clock on which a forward of a whole stage takes 1."""
    grid = config.grid
    count = microbatches_of(batch_size=config.batch_size, microbatch_size=config.microbatch_size, grid=grid)
    spec = config.schedule
    chunks = spec.layout(grid.inter).chunks

    def seconds(stage: int, task: Task) -> float:
        return DURATIONS[task.kind] / chunks

    return simulate(
        [make_schedule(spec, stage=stage, stages=grid.inter, microbatches=count) for stage in range(grid.inter)],
        seconds=seconds,
        message=lambda sender, receiver: MessageTime(0.0, MESSAGE / chunks),
    )


def draw_schedule(config: TrainConfig) -> Figure:
    """Draw Figure 2: a bar per task with the number of its microbatch; odd chunks are paler."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch, Rectangle

    simulation = scheduled(config)
    stages = shown(len(simulation.busy), MOST_STAGES)
    lines = {stage: i for i, stage in enumerate(stages) if stage is not None}
    end = simulation.makespan
    figure, axes = plt.subplots(figsize=(PAGE_IN, 1.1 + 0.3 * len(stages)), constrained_layout=True)
    palette = dict(zip(DURATIONS, [*colours(3)[:2], *colours(4)[2:4]], strict=True))
    used = {task.kind for _, task, _, _ in simulation.tasks}
    per_inch = end / (PAGE_IN - 1.2)
    for stage, task, start, stop in simulation.tasks:
        if stage not in lines:
            continue
        colour = (*palette[task.kind], 0.85 if task.chunk % 2 == 0 else 0.5)
        place = (start, -lines[stage] - 0.9)
        axes.add_patch(Rectangle(place, stop - start, 0.8, facecolor=colour, edgecolor="white", linewidth=0.4))
        if (stop - start) / per_inch > 0.07 * len(str(task.microbatch)):
            axes.text((start + stop) / 2, place[1] + 0.4, str(task.microbatch), ha="center", va="center", fontsize=6)
    axes.set(xlim=(0, end), ylim=(-len(stages), 0), xlabel="time, in forwards of one stage")
    axes.set_yticks(
        [-i - 0.5 for i in range(len(stages))], ["⋮" if stage is None else f"stage {stage}" for stage in stages]
    )
    axes.grid(False)
    idle = 1 - sum(simulation.busy) / (end * len(simulation.busy))
    spec = config.schedule
    limit = f", at most {spec.in_flight_limit} in flight" if spec.in_flight_limit else ""
    chunks = f", {spec.chunks} chunks per stage" if spec.chunks > 1 else ""
    axes.set_title(f"Microbatches over time: {spec.name}{limit}{chunks}; idle {idle:.0%}", fontsize=8.5)
    handles = [Patch(facecolor=(*palette[kind], 0.85), label=NAMES[kind]) for kind in DURATIONS if kind in used]
    axes.legend(handles=handles, fontsize=6.5, ncols=len(handles), loc="upper right", bbox_to_anchor=(1, -0.18))
    return figure


def weights_of(grid: ProcessGrid, hidden: int) -> list[tuple[str, Placement]]:
    """Return the placement of the weights, stored [out, in], of a normal layer and of the transposed one after it."""
    # The layers are only inspected, and send nothing.
    context = TensorContext(grid, 0, SerialCollectives(grid, 0))
    with torch.device("meta"):
        first = Linear(hidden, 4 * hidden, context=context)
        second = Linear(4 * hidden, hidden, context=context, layout=TRANSPOSED)
    return [("normal", placements(first)["weight"]), ("transposed", placements(second)["weight"])]


def draw_layer(config: TrainConfig) -> Figure:
    """Draw Figure 4: input, weight and output of two consecutive layers, each block with the ranks that hold it."""
    import matplotlib.pyplot as plt

    grid = ProcessGrid(row=config.grid.row, col=config.grid.col)
    hidden = 12 * grid.tensor
    weights = weights_of(grid, hidden)
    figure, panels = plt.subplots(2, 1, figsize=(PAGE_IN, 3.6), constrained_layout=True)
    palette = colours(min(10, grid.size))
    for panel, (kind, placement) in zip(panels, weights, strict=True):
        cut = {c.dim: c.axis for c in placement.cuts}
        out_axis, in_axis = cut.get(0), cut.get(1)
        for left, name, down, across in (
            (0.0, "input", None, in_axis),
            (1.55, "weight [in, out]", in_axis, out_axis),
            (3.1, "output", None, out_axis),
        ):
            _draw_matrix(panel, grid, corner=(left, 1.0), name=name, down=down, across=across, palette=palette)
        for x, sign in ((1.28, "x"), (2.83, "=")):
            panel.text(x, 0.5, sign, ha="center", va="center", fontsize=13)
        collectives = [
            f"forward: all-reduce of the output over {in_axis}" if grid.extent(in_axis or "data") > 1 else "",
            f"backward: all-reduce of the input's gradient over {out_axis}"
            if grid.extent(out_axis or "data") > 1
            else "",
        ]
        panel.text(
            4.25, 0.5, "\n".join(filter(None, collectives)) or "no collective", fontsize=7.5, va="center", wrap=True
        )
        panel.set(xlim=(-0.1, 6.6), ylim=(-0.18, 1.35))
        panel.set_title(f"{kind} layer", fontsize=8.5, loc="left")
        panel.axis("off")
    ranks = f"G_row={grid.row} x G_col={grid.col}"
    figure.suptitle(
        f"One layer and the next on the ranks of a stage, {ranks}: a block names the (row, col) that hold it",
        fontsize=8.5,
    )
    return figure


def _draw_matrix(
    axes: Axes,
    grid: ProcessGrid,
    *,
    corner: tuple[float, float],
    name: str,
    down: Axis | None,
    across: Axis | None,
    palette: Sequence[tuple[float, float, float]],
) -> None:
    """Draw a unit square whose rows are cut along axis `down` and its columns along `across` (None: not cut)."""
    from matplotlib.patches import Rectangle

    x0, top = corner
    heights = shown(1 if down is None else grid.extent(down), 4)
    widths = shown(1 if across is None else grid.extent(across), 4)
    for i, a in enumerate(heights):
        for j, b in enumerate(widths):
            w, h = 1 / len(widths), 1 / len(heights)
            held = {axis: part for axis, part in ((down, a), (across, b)) if axis is not None}
            elided = None in held.values()
            place = "".join(str(held.get(axis, ":")) + ("," if axis == "row" else "") for axis in ("row", "col"))
            index = sum((held.get(axis) or 0) * (grid.col if axis == "row" else 1) for axis in ("row", "col"))
            colour = (*palette[index % len(palette)], 0.15 if elided else 0.45)
            axes.add_patch(
                Rectangle((x0 + j * w, top - (i + 1) * h), w, h, facecolor=colour, edgecolor="0.3", linewidth=0.7)
            )
            label = "…" if elided else f"({place})"
            axes.text(x0 + (j + 0.5) * w, top - (i + 0.5) * h, label, ha="center", va="center", fontsize=6.5)
    axes.text(x0 + 0.5, top + 0.05, name, ha="center", va="bottom", fontsize=7.5)


def draw_all(config: TrainConfig, folder: Path | None = None) -> list[Path]:
    """Draw all three into `folder` and return the files."""
    files: list[Path] = []
    for name, draw in (("grid", draw_grid), ("schedule", draw_schedule), ("layer", draw_layer)):
        with styled(name):
            files += save(draw(config), f"schematic-{name}", folder)
    return files


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m plots.figures.schematics", description=__doc__)
    parser.add_argument("config", nargs="?", type=Path, help="training configuration; default an example")
    parser.add_argument("--out", type=Path, help="folder for the pictures; default plots/out")
    options = parser.parse_args(arguments)
    config = (
        validate(EXAMPLE, TrainConfig, where="the example")
        if options.config is None
        else load_yaml(options.config, TrainConfig)
    )
    make_model(config.model).check(config.grid)
    for path in draw_all(config, options.out):
        make_console().print(from_here(path), soft_wrap=True)


if __name__ == "__main__":
    with explained():
        main(sys.argv[1:])
