"""Group of ranks that read or write the same files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from axonn.checkpoint.local_shard import LocalShard, some_names
from axonn.errors import CheckpointError, ConfigError
from axonn.placement import Shape


class RankGroup:
    """The ranks that save or load together: a process group (default: all ranks), or one process without any group."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.alone = not dist.is_initialized()
        self.rank = 0 if self.alone else dist.get_rank(group)
        self.size = 1 if self.alone else dist.get_world_size(group)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, on every rank; blocks until all ranks have called it."""
        if self.alone:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, act: Callable[[], None], failure: str) -> None:
        """Run `act` on rank 0. An error there raises `CheckpointError`, which begins with `failure`, on every rank."""
        problem = None
        if self.rank == 0:
            try:
                act()
            except OSError as error:
                problem = str(error)
        problem = self.gather(problem)[0]
        if problem is not None:
            raise CheckpointError(f"{failure}: {problem}")

    def shapes(self, shards: Mapping[str, LocalShard]) -> dict[str, Shape]:
        """Return the names and global shapes of the tensors of all ranks. Raises `ConfigError` naming conflicts."""
        shapes: dict[str, Shape] = {}
        conflicts: dict[str, Shape] = {}
        for of_rank in self.gather({name: shard.shape for name, shard in shards.items()}):
            for name, shape in of_rank.items():
                if shapes.setdefault(name, shape) != shape:
                    conflicts[name] = shape
        if conflicts:
            named = [f"{name} ({list(shapes[name])} or {list(shape)})" for name, shape in conflicts.items()]
            raise ConfigError(
                f"the ranks give whole tensors of different shapes: {some_names(named)}; build the same model on all"
            )
        return shapes
