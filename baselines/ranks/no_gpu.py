"""Stand-ins for what megatron-core and the reference implementation use of `torch.cuda`, on a machine without a GPU.

They place tensors on the current CUDA device and order their work by streams, without asking whether there is one. Here
the current device is the CPU, where all work runs in the order in which it is issued: waiting does nothing, and there
is one random generator. What they compute and send is left as it is. Megatron's fused kernels are not here; their
fallbacks are plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch

CPU = torch.device("cpu")


class FakeStream:
    """A stream or an event: everything issued before it is done."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def wait_stream(self, *_: object) -> None:
        pass

    def wait_event(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record(self, *_: object) -> None:
        pass


def _on_the_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return the function that makes a tensor, with "cpu" in place of "cuda"."""

    @wraps(make)
    def made(*arguments: Any, **options: Any) -> torch.Tensor:
        if options.get("device") == "cuda":
            options["device"] = CPU
        return make(*arguments, **options)

    return made


def install() -> None:
    """Replace the functions of `torch.cuda`. Call it before the framework is imported."""
    answers: dict[str, Any] = {
        "current_device": lambda: CPU,
        "set_device": lambda _: None,
        "synchronize": lambda *_: None,
        "current_stream": lambda *_: FakeStream(),
        "default_stream": lambda *_: FakeStream(),
        "stream": lambda _: nullcontext(),
        "Stream": FakeStream,
        "Event": FakeStream,
        # Its state is saved and restored around regions whose dropout differs between ranks.
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    # For code with device="cuda": Megatron's counters in schedules, causal mask, scales and flags in optimizers; the
    # reference implementation's receive buffers.
    for name in ("empty", "zeros", "ones", "tensor"):
        setattr(torch, name, _on_the_cpu(getattr(torch, name)))


def install_in_megatron() -> None:
    """Replace what Megatron does not ask of `torch.cuda`, once it is imported."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    plain = torch.Tensor.type

    def named(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        """Return the name of its type, as of a tensor on a GPU, by which the distributed optimizer recognises
        parameters."""
        if arguments or options:
            return plain(tensor, *arguments, **options)
        return plain(tensor).replace("torch.", "torch.cuda.")

    torch.Tensor.type = named  # type: ignore[assignment]
