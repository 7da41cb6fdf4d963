"""Frameworks that live in environments of their own, and the files from which they get the same work.

Their ranks run scripts of `baselines/ranks`, which import nothing of this suite (one of the frameworks has its import
name): weights and batches reach them as one file in the run folder.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file

from axonn.config.train_config import FloatType, TrainConfig
from axonn.inter_layer.stage import virtual_spans
from axonn.models.gpt.gpt_model import GPT
from axonn.schedules import ChunkLayout, ScheduleSpec
from axonn.training.framework import Framework, RankProgram
from axonn.training.places import ROOT
from baselines.adapters.adapter_common import EXACT, Batches, Layers, gpt_of, layers_of, unsupported
from baselines.environments import Environment

WORK = "work.safetensors"
RANKS = ROOT / "baselines" / "ranks"


def stage_starts(config: TrainConfig) -> list[int]:
    """Return the first layer of each stage, cut as in our engine. Raises `ConfigError` where there are too few
    layers."""
    return [span.start for span in virtual_spans(GPT(gpt_of(config)), ChunkLayout(stages=config.grid.inter))]


def stage_settings(starts: Iterable[int]) -> dict[str, str]:
    """Return the environment variable that gives ranks the first layer of each stage (`plain_gpt.stages`)."""
    return {"STAGE_STARTS": ",".join(map(str, starts))}


def write_work(config: TrainConfig, path: Path) -> None:
    """Write initial weights ("<layer>.<parameter>") and all batches ("inputs", "targets": [steps, batch, seq])."""
    model = GPT(gpt_of(config))
    chunk = Layers(model, range(len(model.layers)), config)
    tensors = {
        f"{layer}.{name}": value.contiguous()
        for layer, module in layers_of([chunk]).items()
        for name, value in module.state_dict().items()
    }
    batches = Batches(config)
    drawn = [batches(step) for step in range(config.steps)]
    tensors["inputs"] = torch.stack([inputs for inputs, _ in drawn])
    tensors["targets"] = torch.stack([targets for _, targets in drawn])
    save_file(tensors, path)


class ForeignFramework(Framework):
    """One strategy of a framework that is run by a script in its own environment."""

    environment: ClassVar[Environment]
    script: ClassVar[str]
    """File in `baselines/ranks`."""
    strategy: ClassVar[str]
    """Second argument of the script: the strategy to run."""
    precisions: ClassVar[Sequence[FloatType]] = ("float32",)
    """Types that it computes in."""

    def version(self) -> str:
        return self.environment.version()

    def unavailable(self, config: TrainConfig) -> str | None:
        return (
            self.environment.missing
            or unsupported(config, schedule=self.schedule(config), precisions=(*EXACT, *self.precisions))
            or self.refuses(config)
        )

    @abstractmethod
    def refuses(self, config: TrainConfig) -> str | None:
        """Return why this strategy cannot run `config`, or None when it can."""

    def schedule(self, config: TrainConfig) -> ScheduleSpec | None:
        return None

    def settings(self, config: TrainConfig) -> Mapping[str, str]:
        """Return the environment variables of its ranks."""
        return {}

    def source_modules(self) -> list[str]:
        """Return its adapter, and the script that its ranks run, with the modules that this loads by their paths."""
        script = f"baselines.ranks.{self.script.removesuffix('.py')}"
        return [type(self).__module__, script, "axonn.observability.rank_usage", "axonn.training.run_folder"]

    @contextmanager
    def program(self, config: TrainConfig, folder: Path) -> Iterator[RankProgram]:
        files = [folder / WORK, folder / "store"]
        for stale in files:
            stale.unlink(missing_ok=True)
        write_work(config, files[0])
        try:
            yield RankProgram(
                command=[str(self.environment.python), str(RANKS / self.script), str(folder), self.strategy],
                mpiexec=self.environment.mpiexec,
                # The caller's additions to the path could hide a package of the environment, as our own `axonn` would.
                environment={"PYTHONPATH": "", **self.settings(config)},
            )
        finally:
            for file in files:
                file.unlink(missing_ok=True)
