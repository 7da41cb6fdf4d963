"""Which device a rank computes on, and whether ranks have one to themselves."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch

from axonn.device.local_rank import local_rank
from axonn.errors import ConfigError

DeviceType = Literal["cpu", "cuda"]
DeviceChoice = Literal["auto", "cpu", "cuda"]


def device_type(asked: str) -> DeviceType:
    """What "auto" (the GPUs where there are any), "cpu" or "cuda" means on this machine.

    Raises `ConfigError` for another name, and for "cuda" where PyTorch finds no GPU.
    """
    if asked not in get_args(DeviceChoice):
        raise ConfigError(f"unknown device '{asked}'; known are {', '.join(get_args(DeviceChoice))}")
    if asked == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if asked == "auto":
        return "cpu"
    why = "it sees none" if torch.version.cuda or torch.version.hip else "this build of it is for processors alone"
    raise ConfigError(
        f"device 'cuda' needs a GPU that PyTorch {torch.__version__} can use, and {why}; take device 'cpu', or see "
        "axonn doctor"
    )


def ranks_on(device: DeviceType, ranks: int) -> str:
    """In words, where the ranks of a job on this machine compute."""
    said = f"{ranks} rank{'' if ranks == 1 else 's'}"
    if device == "cpu":
        return f"{said} on the CPU"
    gpus = min(ranks, torch.cuda.device_count())
    sharing = f", which they share ({-(-ranks // gpus)} on one)" if ranks > gpus else ""
    return f"{said} on {gpus} GPU{'' if gpus == 1 else 's'} {torch.cuda.get_device_name(0)}{sharing}"


def usable(device: torch.device | None) -> torch.device:
    """`device` (default: the CPU) with its number. Raises `ConfigError` where it cannot be had."""
    if device is None or device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ConfigError(f"the engine computes on 'cpu' or 'cuda', not on '{device}'")
    device_type("cuda")
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def rank_device(asked: str, environment: Mapping[str, str] | None = None) -> torch.device:
    """The device of this rank: the ranks of a node take its GPUs in turn, so that several share one where there are
    more ranks. A launcher that shows each rank one GPU alone is met as well. Raises `ConfigError` as `device_type`."""
    if device_type(asked) == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", local_rank(environment) % torch.cuda.device_count())


def identity(device: torch.device) -> str:
    """A name of the device that no other device of the job has; of a CPU, that of its host."""
    host = socket.gethostname()
    if device.type != "cuda":
        return host
    properties = torch.cuda.get_device_properties(device)
    return f"{host}/{getattr(properties, 'uuid', device.index)}"


def are_shared(identities: Sequence[str]) -> bool:
    """Whether two ranks have the same device, given `identity` of all of them."""
    return len(set(identities)) < len(identities)


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor`, on its way to `device` if it is not there; the host does not wait."""
    if tensor.device.type == device.type:
        return tensor
    # From memory that can be paged out a copy would have the host wait.
    return (tensor.pin_memory() if tensor.is_cpu else tensor).to(device, non_blocking=True)


def peak_bytes(device: torch.device) -> int:
    """Most bytes that this process has had allocated on a GPU, or resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    # Linux counts resident memory in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
