"""The training loop of one rank: batches, evaluations, checkpoints, and the metrics of them."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch

from axonn.checkpoint.checkpoints import CheckpointState, load, save
from axonn.checkpoint.local_shard import LocalShard, some_names
from axonn.checkpoint.rank_group import RankGroup
from axonn.config.train_config import EvaluationConfig, TrainConfig
from axonn.distributed.runtime import Runtime
from axonn.errors import ConfigError, NotFiniteError, RecordError
from axonn.grid import AXES
from axonn.models.weights_file import import_weights
from axonn.observability.rank_usage import UsageLog, usage_file
from axonn.observability.records import Workload
from axonn.spans import SpanRecorder
from axonn.training.framework import ResumableTrainer, Trainer
from axonn.training.metrics import BATCHES, EVALUATIONS, Row
from axonn.training.resumption import CHECKPOINTS
from axonn.training.run_folder import STOP, Turns

_SPANS_IN_MEMORY = 50_000
_LOOK_S, _LOOK_BATCHES = 1.0, 16
"""Interval at which ranks look for the stop file: seconds, but at most so many batches, since batches may slow down."""


class TrainingLoop:
    """A trainer's run from one batch to another. Rank 0 writes the metrics.

    The time of a batch is measured from the end of the previous batch to its own, without evaluations, checkpoints and
    metrics. With `turns` the loop waits for its turn before each batch, and all ranks begin and end a batch at once.
    With `stoppable` the ranks look for the file `STOP` together, about once a second and between two batches, which
    costs no batch time, and end when it exists; a `ResumableTrainer` saves its state first. `on_progress` is called
    whenever something without a span is finished. Raises `ConfigError` when the configuration asks for something that
    the trainer cannot do.
    """

    def __init__(
        self,
        config: TrainConfig,
        trainer: Trainer,
        *,
        runtime: Runtime,
        spans: SpanRecorder,
        folder: Path,
        turns: Turns | None = None,
        stoppable: bool = False,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._trainer = trainer
        self._runtime = runtime
        self._spans = spans
        self._folder = folder
        self._turns = turns
        self._stoppable = stoppable
        self._on_progress = on_progress
        self._resumable = trainer if isinstance(trainer, ResumableTrainer) else None
        optional = {
            "checkpoints": config.checkpoints,
            "evaluation": config.evaluation,
            "initial_weights": config.initial_weights,
        }
        requested = [name for name, value in optional.items() if value is not None]
        if requested and self._resumable is None:
            names = ", ".join(requested)
            raise ConfigError(f"this framework does not support {names}; remove it from the configuration")
        self._digest: str | None = None
        grid = config.grid
        ranks = grid.size
        work = Workload.of(config.model, gpus=ranks, batch_size=config.batch_size, precision=config.precision.compute)
        self._recompute = config.activation_checkpointing is not None
        self._tflop = {recompute: work.flops(recompute=recompute) / ranks / 1e12 for recompute in (False, True)}

    def start(self, checkpoint: Path | None) -> int:
        """Go on from `checkpoint`, or start from the configured weights; return the number of the next batch."""
        if self._resumable is None or (checkpoint is None and self._config.initial_weights is None):
            return 0
        tensors = self._resumable.state_tensors()
        if checkpoint is None:
            assert self._config.initial_weights is not None
            import_weights(self._config.initial_weights, tensors)
            self._resumable.state_loaded()
            return 0
        state = load(checkpoint, tensors)
        self._resumable.state_loaded()
        self._resumable.load_progress(state.progress)
        return state.batches

    def run(self, first: int) -> bool:
        """Train the batches from `first` to the end of the configuration; return True if stopped before that."""
        stopped = False
        self._spans.step = first
        with ExitStack() as files:
            self._batches = self._open(files, BATCHES)
            self._evaluations = self._open(files, EVALUATIONS) if self._config.evaluation is not None else None
            usage = files.enter_context(self._usage_log())
            self._runtime.barrier()
            usage.begin()
            look_at = first
            before = time.perf_counter()
            for step in range(first, self._config.steps):
                if self._turns is not None:
                    if not self._turns.wait():
                        break
                    self._runtime.barrier()
                    usage.begin()
                    before = time.perf_counter()
                loss = self._trainer.train_batch(step)
                looks = self._stoppable and step == look_at
                if self._turns is not None or looks:
                    # Time spent waiting for slower ranks belongs to this batch, not to the agreement on stopping.
                    self._runtime.barrier()
                now = time.perf_counter()
                self._write(
                    self._batches, self._row(step, loss, now - before) | ({"first": True} if step == first else {})
                )
                with _writing(str(usage_file(self._folder, self._runtime.rank))):
                    usage.note(step)
                self._check_finite(step, loss)
                self._on_progress()
                if looks:
                    requested, batches = self._stop_requested(now - before)
                    stopped = requested and step + 1 < self._config.steps
                    look_at += batches
                interrupted = self._evaluate_and_save(step + 1, stopped=stopped) or looks
                if interrupted:
                    usage.begin()
                before = time.perf_counter() if interrupted else now
                if self._turns is not None:
                    self._turns.finish()
                if stopped:
                    break
            self._flush()
        return stopped

    def _stop_requested(self, batch_s: float) -> tuple[bool, int]:
        """Return True if the ranks are to stop, and the number of batches until the next look.

        Rank 0, whose last batch took `batch_s` seconds, looks for all: other ranks may see a new file of a shared
        folder later.
        """
        answer = torch.zeros(2)
        if self._runtime.rank == 0:
            answer[0] = (self._folder / STOP).exists()
            answer[1] = max(1.0, min(_LOOK_BATCHES, _LOOK_S // max(batch_s, 1e-9)))
        collectives = self._runtime.collectives
        collectives.all_reduce(answer, collectives.axis_group(AXES)).wait()
        requested, batches = answer.tolist()
        return bool(requested), int(batches)

    def _evaluate_and_save(self, done: int, *, stopped: bool) -> bool:
        """Do the work that is due after `done` batches; return True if there was any."""
        evaluation, checkpoints = self._config.evaluation, self._config.checkpoints
        evaluates = evaluation is not None and done % evaluation.every == 0
        saves = checkpoints is not None and (done % checkpoints.every == 0 or done == self._config.steps)
        saves = saves or (stopped and self._resumable is not None)
        if evaluates:
            assert evaluation is not None
            self._evaluate(done, evaluation)
        # A file of spans ends at every checkpoint, so that going on from there cuts no file.
        flushed = self._flush(at_least=1 if evaluates or saves else _SPANS_IN_MEMORY)
        if saves:
            self._save(done)
        return evaluates or saves or flushed

    def _check_finite(self, step: int, loss: float) -> None:
        """Raise `NotFiniteError` on every rank if the loss or gradient norm of a batch is not finite, with the ranks
        and the place where that began."""
        norm = self._resumable.result.gradient_norm if self._resumable is not None else None
        if math.isfinite(loss) and (norm is None or math.isfinite(norm)):
            return
        symptom = f"the loss of batch {step} is {loss}"
        if math.isfinite(loss):
            symptom = f"the norm of the gradient of batch {step} is {norm}"
        advice = "lower optimizer.lr"
        own_places = [] if self._resumable is None else self._resumable.not_finite()
        places = sorted(place for of_rank in RankGroup(None).gather(own_places) for place in of_rank)
        if not places:
            raise NotFiniteError(f"{symptom}; {advice}")
        first = places[0]
        ranks = tuple(place.rank for place in places if replace(place, rank=first.rank) == first)
        named = f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
        raise NotFiniteError(f"{symptom}: {first} on {named} was the first that was not finite; {advice}", ranks)

    def _check_state(self, done: int, tensors: Mapping[str, LocalShard]) -> None:
        """Raise `NotFiniteError` on every rank if a tensor of the state is not finite on any: no run could resume from
        such a checkpoint."""
        bad = [n for n, p in tensors.items() if p.tensor.is_floating_point() and not p.tensor.isfinite().all()]
        bad_by_rank = {rank: names for rank, names in enumerate(RankGroup(None).gather(bad)) if names}
        if bad_by_rank:
            tensors_by_rank = "; ".join(f"rank {rank}: {some_names(names)}" for rank, names in bad_by_rank.items())
            raise NotFiniteError(
                f"after batch {done - 1} some values are no numbers: {tensors_by_rank}; nothing was saved; lower "
                "optimizer.lr",
                tuple(bad_by_rank),
            )

    def _evaluate(self, done: int, evaluation: EvaluationConfig) -> None:
        assert self._resumable is not None
        start = time.perf_counter()
        losses = []
        with self._spans.paused():
            for number in range(evaluation.batches):
                losses.append(self._resumable.evaluate(number))
                self._on_progress()
        row = {"batches": done, "loss": sum(losses) / len(losses), "seconds": time.perf_counter() - start}
        self._write(self._evaluations, row)

    def _save(self, done: int) -> None:
        assert self._resumable is not None
        checkpoints = self._config.checkpoints
        tensors = self._resumable.state_tensors()
        self._check_state(done, tensors)
        # Metrics are never behind the checkpoint that they belong to.
        for file in (self._batches, self._evaluations):
            if file is not None:
                os.fsync(file.fileno())
        save(
            self._folder / CHECKPOINTS,
            tensors=tensors,
            state=CheckpointState(
                batches=done,
                samples=done * self._config.batch_size,
                seed=self._config.seed,
                progress=dict(self._resumable.progress()),
                config=self._config.model_dump(mode="json"),
                grid=self._config.grid.extents(),
                data_digest=self._data_digest(),
            ),
            # Without periodic checkpoints, the one saved for a stop replaces the one before.
            keep=1 if checkpoints is None else checkpoints.keep,
        )
        self._on_progress()

    def _data_digest(self) -> str | None:
        # Only rank 0's description of a checkpoint is written.
        if self._digest is None and self._resumable is not None and self._runtime.rank == 0:
            self._digest = self._resumable.data_digest()
        return self._digest

    def _row(self, step: int, loss: float, seconds: float) -> Row:
        model = self._config.model
        row: Row = {
            "step": step,
            "loss": loss,
            "seconds": seconds,
            f"{model.sample_unit}_per_s": self._config.batch_size * model.units_per_sample / seconds,
            # Counts recomputed operations where recompute is configured, so it is not comparable with the next one.
            "tflops_per_gpu": self._tflop[self._recompute] / seconds,
            "tflops_per_gpu_without_recompute": self._tflop[False] / seconds,
            "recompute": self._recompute,
        }
        if self._resumable is not None:
            result = self._resumable.result
            row |= {
                "learning_rate": result.learning_rate,
                "gradient_norm": result.gradient_norm,
                "loss_scale": result.loss_scale,
                "applied": result.applied,
            }
        return row

    def _open(self, files: ExitStack, name: str) -> IO[str] | None:
        if self._runtime.rank != 0:
            return None
        with _writing(str(self._folder / name)):
            return files.enter_context(open(self._folder / name, "a", buffering=1, encoding="utf-8"))

    def _usage_log(self) -> AbstractContextManager[UsageLog]:
        with _writing(str(usage_file(self._folder, self._runtime.rank))):
            return closing(UsageLog(self._folder, self._runtime.rank))

    def _flush(self, *, at_least: int = 1) -> bool:
        with _writing(f"{self._folder}: spans"):
            return self._spans.flush(at_least=at_least)

    def _write(self, file: IO[str] | None, row: Row) -> None:
        if file is not None:
            with _writing(file.name):
                file.write(json.dumps(row) + "\n")


@contextmanager
def _writing(place: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RecordError(
            f"{place} cannot be written: {error.strerror or error}; make room or let the folder be written, and start "
            "again: the run goes on from its newest checkpoint"
        ) from error
