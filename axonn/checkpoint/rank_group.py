"""The ranks that read or write files together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from axonn.checkpoint.local_shard import LocalShard, some_names
from axonn.errors import CheckpointError, ConfigError
from axonn.placement import Shape


class RankGroup:
    """The ranks that save or load together: a process group, by default all ranks, or one alone without any."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.alone = not dist.is_initialized()
        self.rank = 0 if self.alone else dist.get_rank(group)
        self.size = 1 if self.alone else dist.get_world_size(group)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank; no rank goes on before all are here."""
        if self.alone:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, act: Callable[[], None], what: str) -> None:
        """Do something on rank 0; an error there is one on every rank. Raises `CheckpointError`."""
        problem = None
        if self.rank == 0:
            try:
                act()
            except OSError as error:
                problem = str(error)
        problem = self.gather(problem)[0]
        if problem is not None:
            raise CheckpointError(f"{what}: {problem}")

    def shapes(self, parts: Mapping[str, LocalShard]) -> dict[str, Shape]:
        """Names and whole shapes of what all ranks hold. Raises `ConfigError` naming what they disagree on."""
        shapes: dict[str, Shape] = {}
        others: dict[str, Shape] = {}
        for one in self.gather({name: part.shape for name, part in parts.items()}):
            for name, shape in one.items():
                if shapes.setdefault(name, shape) != shape:
                    others[name] = shape
        if others:
            named = [f"{name} ({list(shapes[name])} or {list(shape)})" for name, shape in others.items()]
            raise ConfigError(
                f"the ranks give whole tensors of different shapes: {some_names(named)}; build the same model on all"
            )
        return shapes
