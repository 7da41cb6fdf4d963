"""The commands `axonn train` and `axonn export`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from axonn.cli.console import command_line, console, launched_once, say_defaults, warn
from axonn.cli.doc_links import documented
from axonn.errors import RunFailed
from axonn.training.places import check_owner, find_run, recorded, run_folder
from axonn.training.run_folder import STOPPED
from axonn.training.supervision.interruption import exit_status

if TYPE_CHECKING:
    from axonn.config.train_config import TrainConfig
    from axonn.observability.records import Record
    from axonn.training.trainer import Session


@documented("docs/train-a-gpt.md")
def train(
    config_file: Annotated[Path, typer.Argument(help="Training configuration (YAML)")],
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default runs/NAME where you stand (a/my.yaml: runs/a/my).")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew, and remove the checkpoints of the run folder.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="What to compute on: cpu, cuda, or auto: the GPUs where there are any.")
    ] = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Start it also where it does not fit on this machine.")
    ] = False,
) -> None:
    """Train a model as a configuration says; goes on from the newest checkpoint of the run folder if there is one."""
    from axonn.config.train_config import TrainConfig, load_yaml
    from axonn.training.capacity import check_capacity

    written = load_yaml(config_file, TrainConfig)
    if not force:
        # Before PyTorch is loaded, which takes longer.
        check_capacity(written, device)
    session = _prepare(written, config_file, out=out, fresh=fresh, device=device)
    if session.resume is not None:
        if session.first >= session.config.steps:
            console.print(f"nothing to do: {session.first} batches are done; raise steps, or start anew with --fresh")
            return
        console.print(f"going on after batch {session.first} from {session.resume.folder}", soft_wrap=True)
    _print_result(_train(session, fresh=fresh), session.folder)


def _prepare(written: TrainConfig, config_file: Path, *, out: Path | None, fresh: bool, device: str) -> Session:
    """Return the session that the options ask for, and print what it trains. Raises for every mistake that can be found
    before ranks start."""
    from axonn.device.devices import device_type, ranks_on
    from axonn.engine import microbatches_of
    from axonn.models.registry import make_data
    from axonn.training import trainer
    from axonn.training.engine_framework import layers_of_chunks

    config = trainer.resolved(written)
    grid = config.grid
    launched_once()
    chosen_device = device_type(device)
    stages = layers_of_chunks(config)
    count = microbatches_of(batch_size=config.batch_size, microbatch_size=config.microbatch_size, grid=grid)
    data = make_data(config)
    folder = out or run_folder(config_file)
    if out is None:
        check_owner(folder, config_file)
    session = trainer.prepare(
        config,
        folder,
        data=data,
        command=command_line(),
        fresh=fresh,
        warn=warn,
        device=chosen_device,
        config_file=recorded(config_file, folder),
    )
    console.print(
        f"{config.model.parameters / 1e6:.1f}M parameters, {ranks_on(chosen_device, grid.size)} ({grid}), "
        f"{count} microbatch(es) per pipeline, layers per chunk {[len(s) for s in stages]}, {data.summary}"
    )
    say_defaults(f"{key} {value}" for key, value in trainer.taken_by_default(written).items())
    return session


def _train(session: Session, *, fresh: bool) -> Record:
    """Train with progress on the console. Raises `typer.Exit` for an interruption and `RunFailed` for a failure."""
    from axonn.cli.training_progress import TrainingProgress
    from axonn.training import trainer

    config, folder = session.config, session.folder
    unit = config.model.sample_unit
    try:
        with TrainingProgress(console, folder, first=session.first, steps=config.steps, unit=unit) as progress:
            record = trainer.train(session, fresh=fresh, on_batch=progress, on_stop=_say_that_it_stops, on_warning=warn)
    except KeyboardInterrupt as interruption:
        _say_how_to_go_on(folder)
        raise typer.Exit(exit_status(interruption)) from None
    if record.failure is not None:
        _say_how_to_go_on(folder)
        if record.failure.cause == "interrupted":
            console.print(record.failure.detail, soft_wrap=True)
            raise typer.Exit(STOPPED)
        raise RunFailed(f"{record.failure.detail}; {len(record.losses)} batches are kept in {folder}")
    return record


def _print_result(record: Record, folder: Path) -> None:
    console.print(f"loss {record.losses[0]:.4f} -> {record.losses[-1]:.4f} in {len(record.losses)} batches; {folder}")
    console.print(_time_of(record.batch_time_s, record.parts_s), soft_wrap=True)
    if len(record.bytes_per_batch) > 1:
        console.print(_sent_by_axis(record.bytes_per_batch), soft_wrap=True, highlight=False)


def _say_that_it_stops(why: str) -> None:
    console.print(f"{why}: saving a checkpoint after this batch; the same once more ends it at once", soft_wrap=True)


def _say_how_to_go_on(folder: Path) -> None:
    from axonn.checkpoint.checkpoints import latest
    from axonn.training.resumption import CHECKPOINTS

    newest = latest(folder / CHECKPOINTS, read_all=False)
    how = (
        "there is no checkpoint: the next start begins anew (see the key 'checkpoints')"
        if newest is None
        else f"the newest checkpoint is of batch {newest.state.batches}; the same command goes on from there"
    )
    console.print(f"stopped; {how}", soft_wrap=True)


def _time_of(seconds: float | None, parts: Mapping[str, float]) -> str:
    """Return one line on where the time of a batch went."""
    total = sum(parts.values())
    shares = ", ".join(f"{name.replace('_', '-')} {part / total:.0%}" for name, part in parts.items() if part > 0)
    return f"{seconds:.3f} s per batch" + (f": {shares}" if shares else "")


def _sent_by_axis(sizes: Mapping[str, int]) -> str:
    """Return one line on the bytes that a rank sends for a batch."""
    parts = ", ".join(f"{axis} {size:,}" for axis, size in sorted(sizes.items(), key=lambda item: -item[1]))
    return f"bytes sent per batch by a rank, at most: {parts}"


@documented("docs/resume.md")
def export(
    source: Annotated[
        Path | None,
        typer.Argument(
            help="Run folder (its newest checkpoint), configuration file of a run, or one checkpoint; default the "
            "newest run below runs/ where you stand."
        ),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="File to write, for instance model.safetensors")],
) -> None:
    """Write the master weights of a checkpoint as one safetensors file, for initial_weights or other programs."""
    from axonn.checkpoint.checkpoints import latest
    from axonn.errors import CheckpointError
    from axonn.models.weights_file import export_weights
    from axonn.training.resumption import CHECKPOINTS

    checkpoint = run = find_run(source)
    if not (run / "state.json").exists():
        newest = latest(run / CHECKPOINTS, warn=warn)
        if newest is None:
            raise CheckpointError(f"{run}: is neither a checkpoint nor a run folder with a good one")
        checkpoint = newest.folder
    count = export_weights(checkpoint, out)
    console.print(f"{count} parameters of {checkpoint} written to {out}", soft_wrap=True)
