"""The reference implementation of AxoNN (`axonn` on PyPI), which has the import name of this suite's engine.

Its message-driven pipeline and its data parallelism are offered. Its tensor layers are not: in their default mode each
of them gathers its input and output around the product, which the published measurements do not do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from axonn.config.train_config import PrecisionConfig, TrainConfig
from axonn.errors import ConfigError, LaunchError
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.registry import outline_of
from axonn.schedules import ScheduleSpec
from axonn.training.framework import Adapter, Capabilities, ClusterWork, Framework, Launch, PrintedRun
from axonn.training.run_folder import SPEC
from axonn.training.supervision.cluster_launch import READ_LATER, read_run, spec_of
from baselines.adapters.ignored_settings import OWN_WAY, ignored_note
from baselines.adapters.isolated_framework import RANKS, ForeignFramework, stage_settings, stage_starts
from baselines.environments import Environment

ENVIRONMENT = Environment("reference", "axonn")
DISCLOSURE = (
    "It asks for CUDA and NCCL by name: on a machine without a GPU it is told the CPU and Gloo, and that nothing is to "
    "be waited for on a device. Schedule, messages over MPI and reduction are its own."
)


BYTES_PER_PARAMETER = 16
"""Bytes of parameters, gradients and AdamW's two moments, all float32: autocast halves none of them."""


class Reference(ForeignFramework):
    """Checks and environment that both strategies share. It runs in float32 only: its half precision is CUDA's
    autocast."""

    environment = ENVIRONMENT
    script = "reference_ranks.py"
    disclosure = DISCLOSURE

    def refuses(self, config: TrainConfig) -> str | None:
        grid, precision = config.grid, config.precision.compute
        if precision != "float32":
            return f"the reference implementation is run in float32 here, not in {precision}; set precision: float32"
        if grid.tensor > 1:
            return (
                "the reference implementation's tensor layers gather around every product by default, which is no fair "
                "comparison; set grid.row and grid.col to 1"
            )
        if isinstance(config.model, GPTConfig) and config.model.tied_head:
            return "the reference implementation ties no parameters across stages; untie the head"
        if config.batch_size % (grid.data * config.microbatch_size):
            return (
                f"batch_size {config.batch_size} is no multiple of G_data x microbatch_size = {grid.data} x "
                f"{config.microbatch_size}, and it drops what is left over; change one of them"
            )
        return None

    def settings(self, config: TrainConfig) -> Mapping[str, str]:
        return stage_settings(stage_starts(config))


class ReferencePipeline(Reference):
    """Message-driven pipeline over MPI, G_inter microbatches in flight; with replicas, gradients reduced at the end."""

    label = "AxoNN reference"
    strategy = "pipeline"

    def refuses(self, config: TrainConfig) -> str | None:
        if config.grid.inter == 1:
            return "a pipeline needs at least 2 stages; raise grid.inter, or take reference/data"
        if (reason := super().refuses(config)) is not None:
            return reason
        if (reason := _one_microbatch(config.batch_size // config.grid.data // config.microbatch_size)) is not None:
            return reason
        try:
            stage_starts(config)
        except ConfigError as error:
            return str(error)
        return None

    def schedule(self, config: TrainConfig) -> ScheduleSpec | None:
        return ScheduleSpec(name="message-driven", in_flight_limit=config.grid.inter)


class ReferenceData(Reference):
    """Data parallelism: each parameter's gradient all-reduced by itself, after the last microbatch."""

    label = "AxoNN reference, data parallel"
    strategy = "data"

    def refuses(self, config: TrainConfig) -> str | None:
        if config.grid.inter > 1:
            return "this is data parallelism: set grid.inter to 1, or take reference/pipeline"
        return super().refuses(config)


class ReferenceAdapter(Adapter):
    name = "reference"
    label = "AxoNN reference"
    strategies: ClassVar[dict[str, type[Framework]]] = {"pipeline": ReferencePipeline, "data": ReferenceData}

    def capabilities(self) -> Capabilities:
        reason = ENVIRONMENT.missing
        return Capabilities(
            version=ENVIRONMENT.version() if reason is None else None,
            reason=reason,
            strategies={name: kind.__doc__ or "" for name, kind in self.strategies.items()},
            disclosure=DISCLOSURE,
        )

    def framework(self, strategy: str | None) -> Framework:
        return self.pick(strategy, self.strategies)

    def launch(self, work: ClusterWork) -> Launch:
        """Return the launch in which every rank runs our script for it; it is a library.

        The run folder is the folder in which the script is started.
        """
        if (reason := _refusal(work)) is not None:
            raise LaunchError(f"{work.name} cannot be launched with the reference implementation: {reason}")
        strategy = work.strategy
        config = TrainConfig(
            model=work.gpt.model_copy(update={"tied_head": False, "dropout": 0.0, "attention_dropout": 0.0}),
            grid=strategy.grid,
            batch_size=work.batch_size,
            microbatch_size=strategy.microbatch_size,
            schedule=ScheduleSpec(name="message-driven", in_flight_limit=strategy.grid.inter),
            precision=PrecisionConfig(compute=strategy.compute),
            activation_checkpointing=strategy.checkpoint_layers if strategy.recompute == "full" else None,
            steps=work.steps,
        )
        starts = [span.start for span in strategy.virtual_spans(outline_of(config.model))]
        kind = ReferencePipeline if strategy.grid.inter > 1 else ReferenceData
        return Launch(
            command=["python", str(RANKS / kind.script), ".", kind.strategy],
            files={SPEC: spec_of(f"{self.name}/{kind.strategy}", config, device="cuda")},
            environment=stage_settings(starts),
            mpi_on_device=True,
            notes=_notes(work, config),
        )

    def read(self, lines: Iterable[str]) -> PrintedRun:
        return read_run(lines)


def _one_microbatch(microbatches: int) -> str | None:
    """Return why it cannot run `microbatches` of a batch, or None.

    It posts no receive for the last message of a batch, and so none at all where there is only one.
    """
    if microbatches > 1:
        return None
    return "its pipeline fails with a single microbatch; raise batch_size, or lower microbatch_size"


def _refusal(work: ClusterWork) -> str | None:
    """Return why it cannot run `work`, and what to change; None when it can."""
    strategy = work.strategy
    grid, schedule = strategy.grid, strategy.schedule
    asked = {
        "tensor parallelism (its layers gather around every product by default); set row and col to 1": (
            strategy.tensor > 1
        ),
        f"a schedule '{schedule.name}'; it has message-driven, one chunk per stage": (
            grid.inter > 1
            and (schedule.name != "message-driven" or schedule.chunks > 1 or schedule.placement != "loop")
        ),
        f"pick '{schedule.pick}'; it has a rule of its own: remove pick": schedule.pick != ScheduleSpec().pick,
        "messages over NCCL; its go over MPI: set message_library: mpi": (
            grid.inter > 1 and strategy.message_library != "mpi"
        ),
        "sub-shards of microbatches; set overdecomposition to 1": strategy.overdecomposition > 1,
        f"an in-flight limit of {schedule.in_flight_limit}; its is G_inter = {grid.inter}": (
            grid.inter > 1 and schedule.in_flight_limit not in (None, grid.inter)
        ),
        "a sharded optimizer; set optimizer: device": strategy.optimizer == "sharded",
        f"an optimizer '{strategy.algorithm}'; it is run with AdamW: remove algorithm": strategy.algorithm != "adamw",
        "selective recompute; set recompute to full or none": strategy.recompute == "selective",
        "gradient clipping; leave it out": work.gradient_clipping is not None,
        "training in float64; set compute: float32": strategy.compute == "float64",
        "a data set here, its script draws random tokens; leave data out": work.data is not None,
    }
    if (lacking := next((name for name, is_asked in asked.items() if is_asked), None)) is not None:
        return f"it is asked for {lacking}"
    microbatches = strategy.microbatches(work.batch_size)
    return _one_microbatch(microbatches) if grid.inter > 1 else None


def _notes(work: ClusterWork, config: TrainConfig) -> list[str]:
    """Return what differs from the requested work, and what must be provided."""
    strategy, outline = work.strategy, outline_of(config.model)
    largest = max(
        sum(outline.parameters([span], strategy.logical_grid).values()) for span in strategy.virtual_spans(outline)
    )
    notes = [
        "the reference implementation is a library: the script is this suite's, and gives it GPT layers in plain "
        "PyTorch with PyTorch's initial weights; the tokens are random, so losses mean nothing",
        f"python is that of an environment with {ENVIRONMENT.distribution} (make baselines), its mpi4py built against "
        "a GPU-aware MPI: stages send what lies on the GPU over MPI; the folder is one that all ranks see",
    ]
    if strategy.optimizer == "offloaded":
        notes.append(
            "the optimizer stays on the GPU: what 0.2.0 has left of its offloaded one asks for names that are gone; "
            f"parameters, gradients and moments of the largest stage take {largest * BYTES_PER_PARAMETER / 1e9:.1f} GB"
        )
    if work.gpt.tied_head:
        notes.append(f"the head is not tied to the embedding: {work.gpt.vocab * work.gpt.hidden:,} parameters more")
    if work.gpt.dropout or work.gpt.attention_dropout:
        notes.append("there is no dropout")
    moved = [axis for axis in strategy.order if axis in ("data", "inter")]
    if strategy.grid.data > 1 and strategy.grid.inter > 1 and moved != ["data", "inter"]:
        notes.append("neighbouring ranks are neighbouring stages, always")
    # Its stages are cut as the strategy says.
    return [*notes, ignored_note(strategy, [name for name in OWN_WAY if name != "partition"]), READ_LATER]
