"""The training loop of one rank: batches, evaluations, checkpoints, and what is written of them."""

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
"""How often ranks look whether they are to stop: after so many seconds, but at most so many batches, which may become
slower."""


class TrainingLoop:
    """Runs a trainer from one batch to another. Rank 0 writes the metrics.

    A batch takes the seconds from the last finished batch to it, evaluations, checkpoints and metrics left out. With
    `turns` it waits for its turn before each batch, and a batch begins and ends when all ranks do. With `stoppable` the
    ranks look together for the file `STOP`, about once a second and between two batches, which costs no batch time,
    and end when it is there; a trainer that can go on saves its state first. `on_progress` is called whenever something
    is done that has no span. Raises `ConfigError` when the configuration asks for what the trainer cannot do.
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
        self._full = trainer if isinstance(trainer, ResumableTrainer) else None
        asks = {
            "checkpoints": config.checkpoints,
            "evaluation": config.evaluation,
            "initial_weights": config.initial_weights,
        }
        asked = [name for name, value in asks.items() if value is not None]
        if asked and self._full is None:
            raise ConfigError(f"this framework does not support {', '.join(asked)}; remove it from the configuration")
        self._digest: str | None = None
        grid = config.grid
        ranks = grid.size
        work = Workload.of(config.model, gpus=ranks, batch_size=config.batch_size, precision=config.precision.compute)
        self._recompute = config.activation_checkpointing is not None
        self._tflop = {recompute: work.flops(recompute=recompute) / ranks / 1e12 for recompute in (False, True)}

    def start(self, checkpoint: Path | None) -> int:
        """Go on from `checkpoint`, or start from the configured weights; returns the number of the next batch."""
        if self._full is None or (checkpoint is None and self._config.initial_weights is None):
            return 0
        tensors = self._full.state_tensors()
        if checkpoint is None:
            assert self._config.initial_weights is not None
            import_weights(self._config.initial_weights, tensors)
            self._full.state_loaded()
            return 0
        state = load(checkpoint, tensors)
        self._full.state_loaded()
        self._full.load_progress(state.progress)
        return state.batches

    def run(self, first: int) -> bool:
        """Train the batches from `first` to the end of the configuration; whether it was stopped before that."""
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
                    # What this rank would wait for others while they agree on stopping belongs to the batch.
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
                    told, batches = self._told_to_stop(now - before)
                    stopped = told and step + 1 < self._config.steps
                    look_at += batches
                interrupted = self._between(step + 1, stopped=stopped) or looks
                if interrupted:
                    usage.begin()
                before = time.perf_counter() if interrupted else now
                if self._turns is not None:
                    self._turns.finish()
                if stopped:
                    break
            self._flush()
        return stopped

    def _told_to_stop(self, batch_s: float) -> tuple[bool, int]:
        """Whether the ranks are to stop, and after how many batches to look again. Rank 0 looks, since others may see a
        new file of a shared folder later, and its batch has taken `batch_s`."""
        answer = torch.zeros(2)
        if self._runtime.rank == 0:
            answer[0] = (self._folder / STOP).exists()
            answer[1] = max(1.0, min(_LOOK_BATCHES, _LOOK_S // max(batch_s, 1e-9)))
        collectives = self._runtime.collectives
        collectives.all_reduce(answer, collectives.axis_group(AXES)).wait()
        told, batches = answer.tolist()
        return bool(told), int(batches)

    def _between(self, done: int, *, stopped: bool) -> bool:
        """What is to do after `done` batches; whether there was anything."""
        evaluation, checkpoints = self._config.evaluation, self._config.checkpoints
        evaluates = evaluation is not None and done % evaluation.every == 0
        saves = checkpoints is not None and (done % checkpoints.every == 0 or done == self._config.steps)
        saves = saves or (stopped and self._full is not None)
        if evaluates:
            assert evaluation is not None
            self._evaluate(done, evaluation)
        # A file of spans ends at every checkpoint, so that going on from there cuts no file.
        flushed = self._flush(at_least=1 if evaluates or saves else _SPANS_IN_MEMORY)
        if saves:
            self._save(done)
        return evaluates or saves or flushed

    def _check_finite(self, step: int, loss: float) -> None:
        """Raise `NotFiniteError` on every rank where the batch was none to go on from, naming where it began."""
        norm = self._full.result.gradient_norm if self._full is not None else None
        if math.isfinite(loss) and (norm is None or math.isfinite(norm)):
            return
        what = f"the loss of batch {step} is {loss}"
        if math.isfinite(loss):
            what = f"the norm of the gradient of batch {step} is {norm}"
        do = "lower optimizer.lr"
        found = [] if self._full is None else self._full.not_finite()
        everywhere = sorted(place for places in RankGroup(None).gather(found) for place in places)
        if not everywhere:
            raise NotFiniteError(f"{what}; {do}")
        first = everywhere[0]
        ranks = tuple(p.rank for p in everywhere if replace(p, rank=first.rank) == first)
        named = "rank" if len(ranks) == 1 else "ranks"
        raise NotFiniteError(
            f"{what}: {first} on {named} {', '.join(map(str, ranks))} was the first that was not finite; {do}", ranks
        )

    def _check_state(self, done: int, tensors: Mapping[str, LocalShard]) -> None:
        """Raise `NotFiniteError` on every rank where there is something that nobody could go on from."""
        bad = [n for n, p in tensors.items() if p.tensor.is_floating_point() and not p.tensor.isfinite().all()]
        found = {rank: names for rank, names in enumerate(RankGroup(None).gather(bad)) if names}
        if found:
            said = "; ".join(f"rank {rank}: {some_names(names)}" for rank, names in found.items())
            raise NotFiniteError(
                f"after batch {done - 1} some values are no numbers: {said}; nothing was saved; lower optimizer.lr",
                tuple(found),
            )

    def _evaluate(self, done: int, evaluation: EvaluationConfig) -> None:
        assert self._full is not None
        start = time.perf_counter()
        losses = []
        with self._spans.paused():
            for number in range(evaluation.batches):
                losses.append(self._full.evaluate(number))
                self._on_progress()
        row = {"batches": done, "loss": sum(losses) / len(losses), "seconds": time.perf_counter() - start}
        self._write(self._evaluations, row)

    def _save(self, done: int) -> None:
        assert self._full is not None
        checkpoints = self._config.checkpoints
        tensors = self._full.state_tensors()
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
                progress=dict(self._full.progress()),
                config=self._config.model_dump(mode="json"),
                grid=self._config.grid.extents(),
                data_digest=self._data_digest(),
            ),
            # One that was saved because the run was stopped takes the place of the one before.
            keep=1 if checkpoints is None else checkpoints.keep,
        )
        self._on_progress()

    def _data_digest(self) -> str | None:
        # Only rank 0's description of a checkpoint is written.
        if self._digest is None and self._full is not None and self._runtime.rank == 0:
            self._digest = self._full.data_digest()
        return self._digest

    def _row(self, step: int, loss: float, seconds: float) -> Row:
        model = self._config.model
        row: Row = {
            "step": step,
            "loss": loss,
            "seconds": seconds,
            f"{model.sample_unit}_per_s": self._config.batch_size * model.units_per_sample / seconds,
            # With the operations that are computed again, where that is configured: not comparable with the next.
            "tflops_per_gpu": self._tflop[self._recompute] / seconds,
            "tflops_per_gpu_without_recompute": self._tflop[False] / seconds,
            "recompute": self._recompute,
        }
        if self._full is not None:
            result = self._full.result
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
def _writing(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RecordError(
            f"{what} cannot be written: {error.strerror or error}; make room or let the folder be written, and start "
            "again: the run goes on from its newest checkpoint"
        ) from error
