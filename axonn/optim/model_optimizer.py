"""The optimizer of one rank's parameters: mixed precision, loss scaling, chunked reduction, clipping and the update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from axonn.checkpoint.local_shard import LocalShard
from axonn.config.train_config import OptimizerConfig, PrecisionConfig
from axonn.device.streams import DeviceToHostCopy, Timeline
from axonn.distributed.collectives import Collectives
from axonn.errors import ConfigError
from axonn.grid import ProcessGrid
from axonn.inter_layer.stage import ParameterSpec
from axonn.optim.algorithms.registry import algorithm_of
from axonn.optim.flat_buffers import FlatParameters, cut, pieces, replicas
from axonn.optim.learning_rate import learning_rate
from axonn.optim.loss_scale import LossScale
from axonn.optim.optimizer_state import Bucket, OffloadedState, OptimizerState, ResidentState
from axonn.optim.reduction import GradientReduction, Reduction
from axonn.optim.vectors import whole_vectors
from axonn.spans import SpanKind


class StepResult(NamedTuple):
    """One step. `applied` is False where gradients overflowed on some rank, so that no rank changed anything.

    `gradient_norm`: of the whole model, before clipping; None without clipping. `loss_scale`: the one of this step.
    """

    applied: bool
    gradient_norm: float | None
    learning_rate: float
    loss_scale: float


class Step:
    """A step that the device has been given."""

    def __init__(
        self,
        finish: Callable[[bool], None],
        *,
        overflow: torch.Tensor | None,
        norm: torch.Tensor | None,
        learning_rate: float,
        loss_scale: float,
    ) -> None:
        self._finish = finish
        self._overflow = None if overflow is None else DeviceToHostCopy(overflow)
        self._norm = None if norm is None else DeviceToHostCopy(norm)
        self._learning_rate = learning_rate
        self._loss_scale = loss_scale

    def wait(self) -> StepResult:
        """What came of it, when the device has done it. To be called once."""
        overflow = self._overflow is not None and self._overflow.wait() != [0.0]
        norm = None if self._norm is None else self._norm.wait()[0]
        self._finish(overflow)
        return StepResult(
            applied=not overflow,
            gradient_norm=None if overflow else norm,
            learning_rate=self._learning_rate,
            loss_scale=self._loss_scale,
        )


class ModelMemory(NamedTuple):
    """Bytes of the model state of one rank, as allocated. All but `host` lie on the device."""

    parameters: int
    gradients: int
    """With the copy of them in the master type, where the whole of it is kept."""
    optimizer_state: int
    buckets: int
    host: int

    @property
    def device(self) -> int:
        """Bytes on the device, all categories together."""
        return self.parameters + self.gradients + self.optimizer_state + self.buckets


class ModelOptimizer:
    """The configured algorithm on the parameters of `specs`, in step with the optimizers of the other ranks of `grid`.

    The parameters, whose storage may be on the meta device or of any content, become views of one buffer on the
    device of `timeline`, and their gradients of another. `initialise(name, tensor)` fills master weights, which
    parameters are rounded from; where the master type is the compute type, the parameters are the masters. The caller
    multiplies the loss with `loss_scale` and divides it by the number of microbatches in the whole batch, so that
    gradients of the replicas add up to that of the mean. `steps`: batches of the run, where a decay of the learning
    rate ends by default.
    `ties`: the stages of each parameter of the model that several stages hold, the same list on every rank.
    Raises `ConfigError` for a parameter of another type or a decay without an end.
    """

    def __init__(
        self,
        specs: Sequence[ParameterSpec],
        *,
        grid: ProcessGrid,
        rank: int,
        collectives: Collectives,
        config: OptimizerConfig,
        precision: PrecisionConfig,
        initialise: Callable[[str, torch.Tensor], None],
        timeline: Timeline,
        steps: int | None = None,
        ties: Sequence[tuple[int, ...]] = (),
    ) -> None:
        learning_rate(config, config.schedule.warmup, steps)  # A decay without an end is an error now.
        self._grid = grid
        self._here = grid.coordinates(rank)
        self._config = config
        self._steps = steps
        device = timeline.device
        self._timeline = timeline
        self._flat = FlatParameters(specs, grid=grid, precision=precision, device=device)
        self._algorithm = algorithm_of(config)
        names = self._algorithm.states
        self._state: OptimizerState
        if config.placement == "offloaded":
            self._state = OffloadedState(self._flat, precision, names, config, self._timeline)
        else:
            self._state = ResidentState(self._flat, precision, names)
        for entry in self._flat.entries:
            initialise(entry.spec.name, entry.view(self._state.master))
        self._round_masters()
        # Launches are what small buckets cost. A CPU has none.
        few = config.placement == "device" and device.type != "cpu"
        self._chunks = cut(self._flat, bsize=config.bsize, k=config.k, few=few)
        self._reduction = GradientReduction(
            self._flat, self._chunks, ties=ties, grid=grid, rank=rank, collectives=collectives, timeline=self._timeline
        )
        self._replicas = replicas(self._flat, grid)
        self._scale = LossScale(precision)
        self._updates = 0

    @property
    def loss_scale(self) -> float:
        """What the caller multiplies the loss of the next batch with."""
        return self._scale.value

    def zero(self) -> None:
        """Forget the gradients of the last batch."""
        self._flat.zero_gradients()

    def reduce(self) -> None:
        """Only complete the gradients: each `.grad` then is that of the mean loss of the batch, without loss scale."""
        self._reduction.complete_locally()
        for reduction in self._reduction.start():
            reduction.wait()
        if self._scale.value != 1.0:
            self._flat.gradients.mul_(1.0 / self._scale.value)
        self._timeline.flush()

    @property
    def may_skip(self) -> bool:
        """Whether all gradients are tested before each update, which is skipped where one overflowed."""
        return self._scale.watched

    def step(self, batch: int) -> StepResult:
        """Reduce the gradients of batch number `batch` and update the parameters. `.grad` is used up by it."""
        return self.begin_step(batch).wait()

    def begin_step(self, batch: int) -> Step:
        """As `step`, but the host does not wait for the device. Wait for what is returned before anything else."""
        rate = learning_rate(self._config, batch, self._steps)
        scale = self._scale.value
        self._reduction.complete_locally()
        overflow = None
        if self._scale.watched:
            # One answer for all ranks before anything is reduced or updated, so that none is ahead of the others.
            largest = torch.finfo(self._flat.gradients.dtype).max
            overflow = self._reduction.overflow(largest=largest, replicas=self._replicas)
        reductions = self._reduction.start()
        factor: float | torch.Tensor = 1.0 / scale
        norm = None
        if self._config.clip_norm is not None:
            for reduction in reductions:
                reduction.wait()
            norm = self._reduction.norm(self._config.bsize).div_(scale)
            # As torch.nn.utils.clip_grad_norm_; NaN stays NaN.
            factor = factor * (self._config.clip_norm / (norm + 1e-6)).clamp_(max=1.0)
        self._updates += 1
        if overflow is None or self._algorithm.fused:
            self._update(reductions, rate, factor, overflow)
        elif DeviceToHostCopy(overflow).wait() == [0.0]:
            self._update(reductions, rate, factor, None)
        else:
            for reduction in reductions:
                reduction.wait()
        return Step(self._finish, overflow=overflow, norm=norm, learning_rate=rate, loss_scale=scale)

    def _finish(self, overflow: bool) -> None:
        """What the host learns of a step only when the device has done it."""
        self._scale.update(overflow=overflow)
        self._updates -= overflow
        self._timeline.flush()

    def _update(
        self,
        reductions: Sequence[Reduction],
        rate: float,
        factor: float | torch.Tensor,
        overflow: torch.Tensor | None,
    ) -> None:
        """Each chunk's buckets as soon as the chunk is reduced; copies of state run ahead, across chunks."""
        buckets = self._state.stream([part for chunk in self._chunks for part in chunk.buckets])
        for chunk, reduction in zip(self._chunks, reductions, strict=True):
            reduction.wait()
            start = self._timeline.now()
            for part in chunk.buckets:
                self._update_bucket(part, next(buckets), rate, factor, overflow)
            self._timeline.span(SpanKind.OPTIMIZER, start, self._timeline.now())
        # Exhausted only now is the last bucket copied out.
        next(buckets, None)

    def _update_bucket(
        self, part: slice, bucket: Bucket, rate: float, factor: float | torch.Tensor, overflow: torch.Tensor | None
    ) -> None:
        gradient = self._flat.gradients[part]
        if bucket.gradient is not None:
            gradient = bucket.gradient.copy_(gradient)
        if isinstance(factor, torch.Tensor) or factor != 1.0:
            gradient.mul_(factor)
        # The same bits wherever buckets begin: on every stage that holds a tied parameter, and on any number of them.
        for master, reduced, *states in whole_vectors((bucket.master, gradient, *bucket.states)):
            self._algorithm.update(
                self._config,
                master,
                reduced,
                states,
                rate=rate,
                number=self._updates,
                overflow=None if overflow is None else overflow.view(()),
            )
        if self._state.has_own_master:
            self._flat.parameters[part].copy_(bucket.master)

    def _round_masters(self) -> None:
        if self._state.has_own_master:
            for part in pieces(slice(0, self._flat.elements), self._config.bsize):
                self._flat.parameters[part].copy_(self._state.master[part])

    def memory(self) -> ModelMemory:
        """Bytes of parameters, gradients and optimizer state, from the tensors that hold them."""
        state = self._state.memory()
        return ModelMemory(
            parameters=self._flat.parameters.nbytes,
            gradients=self._flat.gradients.nbytes + self._flat.shared_gradients.nbytes + state.gradients,
            optimizer_state=state.state,
            buckets=state.buckets,
            host=state.host,
        )

    def state_tensors(self) -> dict[str, LocalShard]:
        """ "master.NAME" and, for each state tensor of the algorithm, "STATE.NAME" of each parameter: its part here,
        where it lies.

        After writing into them call `state_loaded`.
        """
        self._state.settle()
        kinds = {"master": self._state.master, **self._state.states}
        return {
            f"{kind}.{entry.spec.name}": LocalShard.placed(
                entry.view(flat), entry.spec.placement, self._grid, self._here
            )
            for kind, flat in kinds.items()
            for entry in self._flat.entries
        }

    def state_loaded(self) -> None:
        """Go on from what was written into `state_tensors`."""
        self._round_masters()

    def progress(self) -> dict[str, int | float]:
        """What else a checkpoint needs: number of updates, loss scale and steps since it last changed."""
        return {"updates": self._updates, "loss_scale": self._scale.value, "good_steps": self._scale.good_steps}

    def load_progress(self, progress: Mapping[str, int | float]) -> None:
        """Go on from what `progress` said. Raises `ConfigError` when something is missing."""
        missing = self.progress().keys() - progress.keys()
        if missing:
            raise ConfigError(f"the optimizer's progress lacks {', '.join(sorted(missing))}; use a complete checkpoint")
        self._updates = int(progress["updates"])
        self._scale.load(float(progress["loss_scale"]), int(progress["good_steps"]))
