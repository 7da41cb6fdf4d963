"""DeepSpeed's pipeline engine (`PipelineModule`, 1F1B) as an extra: pip install 'axonn-reproduction[deepspeed]'."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from axonn.config import ScheduleConfig, TrainConfig
from axonn.errors import LaunchError
from axonn.inter_layer.stage import virtual_spans
from axonn.models.gpt import GPT
from axonn.runtime import Runtime
from axonn.schedules import ChunkLayout
from axonn.trace import SpanRecorder
from baselines.common import Batches, Layers, beyond, layers_of, loss_of, make_optimizer

_MISSING = "DeepSpeed is not installed; install it with: pip install 'axonn-reproduction[deepspeed]'"
_NEVER = 10**9


class DeepSpeedPipelineTrainer:
    """The same layers, cut at the same places, from the same initial weights, run by DeepSpeed's pipeline engine."""

    def __init__(self, config: TrainConfig) -> None:
        import deepspeed
        from deepspeed.pipe import LayerSpec, PipelineModule

        model = GPT(config.model)
        stages = config.grid.inter
        spans = virtual_spans(model, ChunkLayout(stages=stages))
        # One of its layers is one of our stages: so it cuts where we cut.
        specs = [LayerSpec(Layers, model, span, config) for span in spans]
        module = PipelineModule(specs, num_stages=stages, loss_fn=loss_of(model), partition_method="uniform")
        self._size = config.microbatch_size
        self._batches = Batches(config)
        self._chunks = [part for part in module.modules() if isinstance(part, Layers)]
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=make_optimizer(module.parameters(), config),
            config=_settings(config),
            dist_init_required=False,
        )

    def layers(self) -> dict[str, nn.Module]:
        return layers_of(self._chunks)

    def train_batch(self, step: int) -> float:
        inputs, targets = self._batches(step)
        microbatches = zip(inputs.split(self._size), targets.split(self._size), strict=True)
        loss: torch.Tensor = self._engine.train_batch(data_iter=microbatches)
        return float(loss)


def _settings(config: TrainConfig) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": config.microbatch_size,
        "gradient_accumulation_steps": config.batch_size // config.microbatch_size,
        # Its default clips at 1.
        "gradient_clipping": 0.0,
        "steps_per_print": _NEVER,
    }


@contextlib.contextmanager
def _on_this_machine(rank: int) -> Iterator[None]:
    """DeepSpeed on the CPU with the process group that is there, and without its talk.

    It keeps its connection in a global and reads the local rank from the environment: both are put back.
    """
    # It refuses a local rank that is not Open MPI's.
    local_rank = os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", str(rank))
    settings = {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": local_rank}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    try:
        from deepspeed.comm import comm, init_distributed

        logger.setLevel(logging.ERROR)
        comm.cdb = None
        with contextlib.redirect_stdout(io.StringIO()):
            init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        yield
        comm.cdb = None
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class DeepSpeedPipeline:
    label = "DeepSpeed pipeline"

    def version(self) -> str:
        """Raises `LaunchError` when it is not installed."""
        try:
            return f"deepspeed {version('deepspeed')}, torch {torch.__version__}"
        except PackageNotFoundError as error:
            raise LaunchError(_MISSING) from error

    def unavailable(self, config: TrainConfig) -> str | None:
        grid = config.grid
        if find_spec("deepspeed") is None:
            return _MISSING
        if grid.data * grid.row * grid.col > 1:
            return "DeepSpeed's pipeline is run with G_inter only here; set the other axes to 1"
        if grid.inter == 1:
            return "DeepSpeed's pipeline engine needs at least 2 stages; raise G_inter"
        if (reason := beyond(config)) is not None:
            return reason
        if config.model.tied_head:
            return "DeepSpeed ties whole layers, not an embedding with a head that also has a norm; untie the head"
        return None

    def schedule(self, config: TrainConfig) -> ScheduleConfig | None:
        return ScheduleConfig(name="1f1b")

    @contextlib.contextmanager
    def trainer(
        self, config: TrainConfig, runtime: Runtime, spans: SpanRecorder | None
    ) -> Iterator[DeepSpeedPipelineTrainer]:
        with _on_this_machine(runtime.rank):
            with contextlib.redirect_stdout(io.StringIO()):
                trainer = DeepSpeedPipelineTrainer(config)
            yield trainer
