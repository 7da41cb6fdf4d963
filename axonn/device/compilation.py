"""Small pure functions compiled by `torch.compile` where that helps, which is on GPUs.

A block as a whole cannot be compiled: gradients of weights are added in place, and collectives and the turns of lanes
lie between its operations. What remains is where a chain of elementwise operations passes over large tensors: the loss,
the masks of dropout, norms of images.
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
    """Without what a failing compiler logs, which is pages."""
    loggers = [logging.getLogger(name) for name in ("torch._inductor", "torch._dynamo")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


class Compiler:
    """Compiles functions for one engine, each at its first call. "auto": where their tensors lie on a GPU.

    What cannot be compiled, for want of a compiler for instance, is said in a warning and goes on as it is.
    """

    def __init__(self, mode: CompileMode = "auto") -> None:
        self._mode = mode
        self._compiled: dict[Callable[..., Any], Callable[..., Any] | None] = {}
        """None where it has failed."""

    def wanted(self, function: Callable[..., Any], like: torch.Tensor) -> bool:
        """Whether a call with `like` among its tensors would be compiled."""
        on = self._mode == "always" or (self._mode == "auto" and like.device.type == "cuda")
        return on and self._compiled.get(function, function) is not None

    def run(self, function: Callable[..., T], *arguments: Any, like: torch.Tensor) -> T:
        """`function(*arguments)`. It must be pure, and the same object at every call; `like`: see `wanted`."""
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
            # What is wrong with its arguments is said once more, by the function itself.
            return function(*arguments)
        return result
