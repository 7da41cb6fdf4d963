"""Uneven compute, the same for every contender: layers after which a rank sleeps a while, forward and backward."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def draw(seed: int, *key: object) -> float:
    """A number between 0 and 1 that is a function of the arguments alone."""
    return random.Random("/".join(map(str, (seed, *key)))).random()


class Sleeps:
    """Sleeps on one rank for one contender; how long is a function of (layer, batch, microbatch, direction).

    `after`: seconds of forward and backward by layer, of which a sleep takes between none and twice `fraction`.
    """

    def __init__(self, *, fraction: float, after: Mapping[str, tuple[float, float]], seed: int) -> None:
        self._fraction = fraction
        self._after = after
        self._seed = seed
        self._step = 0
        self._calls: Counter[str] = Counter()

    def attach(self, layers: Mapping[str, nn.Module]) -> Sleeps:
        """Sleep after those of `layers` (by name) that are named; returns itself."""
        for name in self._after.keys() & layers.keys():

            def hook(module: nn.Module, args: Any, output: torch.Tensor, name: str = name) -> None:
                self._sleep(name, output)

            layers[name].register_forward_hook(hook)
        return self

    def begin(self, step: int) -> None:
        """Batch number `step` begins; its microbatches pass each layer in order."""
        self._step = step
        self._calls.clear()

    def seconds(self, name: str, step: int, microbatch: int) -> tuple[float, float]:
        """Length of the sleeps in forward and backward."""
        forward, backward = (
            2 * self._fraction * draw(self._seed, name, step, microbatch, direction) * self._after[name][direction]
            for direction in (0, 1)
        )
        return forward, backward

    def _sleep(self, name: str, output: torch.Tensor) -> None:
        forward, backward = self.seconds(name, self._step, self._calls[name])
        self._calls[name] += 1
        time.sleep(forward)
        if output.requires_grad:
            # A hook rather than a Function: PyTorch's schedules detach a stage's outputs, which a view would refuse.
            output.register_hook(lambda gradient: time.sleep(backward))
