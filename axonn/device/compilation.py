"""Compilation of small pure functions by `torch.compile` where it pays, which is on GPUs.

A whole block cannot be compiled: weight gradients are added in place, and collectives and the switches between lanes
lie between its operations. Compilation pays where a chain of elementwise operations passes over large tensors: the
loss, the masks of dropout, norms of images.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch

CompileMode = Literal["auto", "always", "never"]
T = TypeVar("T")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the pages that a failing compiler logs inside the block."""
    loggers = [logging.getLogger(name) for name in ("torch._inductor", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Compiler:
    """Compiler of one engine's functions, each at its first call. "auto": only for tensors on a GPU.

    A function that cannot be compiled, for instance because there is no C compiler, runs uncompiled after a warning.
    """

    def __init__(self, mode: CompileMode = "auto") -> None:
        self._mode = mode
        self._compiled: dict[Callable[..., Any], Callable[..., Any] | None] = {}
        """Compiled functions; None where compilation has failed."""

    def wanted(self, function: Callable[..., Any], like: torch.Tensor) -> bool:
        """Return True if a call with `like` among its tensors would be compiled."""
        enabled = self._mode == "always" or (self._mode == "auto" and like.device.type == "cuda")
        return enabled and self._compiled.get(function, function) is not None

    def run(self, function: Callable[..., T], *arguments: Any, like: torch.Tensor) -> T:
        """Return `function(*arguments)`. It must be pure and the same object at every call; `like`: see `wanted`."""
        if not self.wanted(function, like):
            return function(*arguments)
        compiled = self._compiled.get(function)
        if compiled is None:
            compiled = self._compiled[function] = torch.compile(function)
        try:
            with _quiet():
                result: T = compiled(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._compiled[function] = None
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            warnings.warn(f"{function.__name__} runs uncompiled, since compiling it failed: {reason}", stacklevel=2)
            # If the arguments are wrong, the function itself raises the error again.
            return function(*arguments)
        return result
