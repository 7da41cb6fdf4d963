"""Planning for any module that `axonn.parallelize` accepts: its factory by name, its inputs by shape."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from functools import cache

import torch
from torch import nn

from axonn.autoparallel.module_outline import outline_of_module
from axonn.errors import ConfigError
from axonn.grid import ProcessGrid
from axonn.perf.layers.model_outline import ModelOutline
from axonn.perf.planner.planner import Plannable

_INPUT = re.compile(r"(\w+)\[(\d+(?:,\s*\d+)*)\]")


def plannable_module(name: str, inputs: Sequence[str]) -> Plannable:
    """Return the module of factory `name` (package.module:factory) for the planner. `inputs`: as `--input` takes them.

    Raises `ConfigError` for a factory that does not exist, or without inputs.
    """
    module = _module_of(name)
    example = tuple(_example(text) for text in inputs)
    if not example:
        raise ConfigError(
            "the layouts of a module follow from its inputs: give --input 'float32[8,3,64,64]', rows first"
        )

    @cache
    def outline(row: int, col: int) -> ModelOutline:
        return outline_of_module(module, ProcessGrid(row=row, col=col), example)

    outline(1, 1)
    return Plannable(name=name, outline=outline, stages=False)


def _module_of(name: str) -> nn.Module:
    package, _, factory = name.partition(":")
    try:
        with torch.device("meta"):
            module = getattr(importlib.import_module(package), factory)()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--module {name}: {error}; give package.module:factory") from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"--module {name}: the factory returns {type(module).__name__}, not a torch.nn.Module")
    return module


def _example(text: str) -> torch.Tensor:
    match = _INPUT.fullmatch(text.strip())
    dtype = getattr(torch, match[1], None) if match else None
    if match is None or not isinstance(dtype, torch.dtype):
        raise ConfigError(f"--input {text}: write a type of torch and a shape, rows first: 'float32[8,3,64,64]'")
    return torch.empty([int(n) for n in match[2].split(",")], dtype=dtype, device="meta")
