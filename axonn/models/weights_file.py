"""Weights of a model in one safetensors file: "<layer>.<parameter>" -> value, a tied parameter once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from axonn.checkpoint.checkpoints import load_whole, verify
from axonn.checkpoint.local_shard import LocalShard, compare_shapes
from axonn.checkpoint.rank_group import RankGroup
from axonn.durable_files import opened, reason_of
from axonn.errors import CheckpointError, ConfigError
from axonn.models.base import PipelineModel
from axonn.placement import Shape
from axonn.tensor import TensorContext

_TYPES = ("F64", "F32", "F16", "BF16")
"""Types of weights, by their names in safetensors."""
MASTER = "master."
"""Prefix of the master weights among the tensors of an engine's state."""


def export_weights(checkpoint: Path | str, out: Path | str) -> int:
    """Write the master weights of a checkpoint to the file `out`, atomically; return the number of parameters.

    Raises `CheckpointError` when the checkpoint is damaged or `out` cannot be written.
    """
    out = Path(out)
    state = verify(checkpoint)
    weights = read_weights(checkpoint)
    temporary = out.with_name(f".{out.name}.writing")
    try:
        save_file(weights, temporary, metadata={"format": "pt", "batches": str(state.batches)})
        temporary.replace(out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out}: cannot be written: {reason_of(error)}") from error
    return sum(weight.numel() for weight in weights.values())


def read_weights(checkpoint: Path | str) -> dict[str, torch.Tensor]:
    """Read the full master weights of a checkpoint into host memory, by parameter name. Raises `CheckpointError`."""
    weights = load_whole(checkpoint, MASTER)
    if not weights:
        raise CheckpointError(f"{checkpoint}: holds no master weights")
    return {name.removeprefix(MASTER): weight for name, weight in weights.items()}


def import_weights(
    path: Path | str, tensors: Mapping[str, LocalShard], *, group: dist.ProcessGroup | None = None
) -> None:
    """Fill this rank's shards of the master weights from a safetensors file, converting to their type.

    Collective over `group`; a rank reads only its shards. `tensors`: the state of an engine; tensors whose names do not
    begin with `MASTER` are left alone. Raises `ConfigError`, before anything is changed, naming the parameters that are
    missing from the file, unknown to the model, or of another shape.
    """
    weights = {name.removeprefix(MASTER): shard for name, shard in tensors.items() if name.startswith(MASTER)}
    wanted = RankGroup(group).shapes(weights)
    with _opened(path) as file:
        _compare(path, file, wanted)
        for name, target in weights.items():
            _fill(target, file.get_slice(name))


def check_weights(path: Path | str, model: PipelineModel) -> None:
    """Raise `ConfigError` unless the file holds the weights of `model`. Reads only names and shapes."""
    tied = {second for _, second in model.ties}
    serial = TensorContext.serial()
    with torch.device("meta"):
        wanted = {
            f"{layer.name}.{name}": tuple(parameter.shape)
            for layer in model.layers
            for name, parameter in layer.build(serial).named_parameters()
            if f"{layer.name}.{name}" not in tied
        }
    with _opened(path) as file:
        _compare(path, file, wanted)


@contextmanager
def _opened(path: Path | str) -> Iterator[Any]:
    try:
        with opened(path):
            pass  # Refuses what is no regular file; the library would not.
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be read as safetensors: {reason_of(error, path)}") from error


def _compare(path: Path | str, file: Any, wanted: Mapping[str, Shape]) -> None:
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    differences = compare_shapes(shapes, wanted, have="the file", want="the model")
    if differences:
        raise ConfigError(f"{path}: holds the weights of another model: {differences}")
    for name in wanted:
        if (kind := file.get_slice(name).get_dtype()) not in _TYPES:
            raise ConfigError(f"{path}: {name} holds {kind}; weights are {', '.join(_TYPES)}")


@torch.no_grad()
def _fill(target: LocalShard, stored: Any) -> None:
    for piece in target.pieces:
        target.view(piece).copy_(stored[piece.whole])
