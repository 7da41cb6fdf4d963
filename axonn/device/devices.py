"""Choice of the device a rank computes on, and whether ranks share one."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch

from axonn.device.local_rank import local_rank
from axonn.errors import ConfigError

DeviceType = Literal["cpu", "cuda"]
DeviceChoice = Literal["auto", "cpu", "cuda"]


def device_type(choice: str) -> DeviceType:
    """Resolve "auto" (GPUs if there are any), "cpu" or "cuda" to the type of device on this machine.

    Raises `ConfigError` for another name, and for "cuda" where PyTorch finds no GPU.
    """
    if choice not in get_args(DeviceChoice):
        raise ConfigError(f"unknown device '{choice}'; known are {', '.join(get_args(DeviceChoice))}")
    if choice == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if choice == "auto":
        return "cpu"
    reason = "it sees none" if torch.version.cuda or torch.version.hip else "this build of it is for processors alone"
    raise ConfigError(
        f"device 'cuda' needs a GPU that PyTorch {torch.__version__} can use, and {reason}; take device 'cpu', or see "
        "axonn doctor"
    )


def ranks_on(device: DeviceType, ranks: int) -> str:
    """Describe where the ranks of a job on this machine compute, for instance "2 ranks on the CPU"."""
    count = f"{ranks} rank{'' if ranks == 1 else 's'}"
    if device == "cpu":
        return f"{count} on the CPU"
    gpus = min(ranks, torch.cuda.device_count())
    sharing = f", which they share ({-(-ranks // gpus)} on one)" if ranks > gpus else ""
    return f"{count} on {gpus} GPU{'' if gpus == 1 else 's'} {torch.cuda.get_device_name(0)}{sharing}"


def usable(device: torch.device | None) -> torch.device:
    """Return `device` (default: the CPU) with its index. Raises `ConfigError` when it is not available."""
    if device is None or device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ConfigError(f"the engine computes on 'cpu' or 'cuda', not on '{device}'")
    device_type("cuda")
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def rank_device(choice: str, environment: Mapping[str, str] | None = None) -> torch.device:
    """Return the device of this rank.

    The ranks of a node take its GPUs in turn, and share them if there are more ranks than GPUs. This also works with
    launchers that show each rank a single GPU. Raises `ConfigError` as `device_type`.
    """
    if device_type(choice) == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", local_rank(environment) % torch.cuda.device_count())


def identity(device: torch.device) -> str:
    """Return a name that no other device of the job has; for a CPU the name of its host."""
    host = socket.gethostname()
    if device.type != "cuda":
        return host
    properties = torch.cuda.get_device_properties(device)
    return f"{host}/{getattr(properties, 'uuid', device.index)}"


def are_shared(identities: Sequence[str]) -> bool:
    """Return True if two ranks have the same device, given the `identity` of each."""
    return len(set(identities)) < len(identities)


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `tensor` on `device`, copied there if need be without making the host wait."""
    if tensor.device.type == device.type:
        return tensor
    # A copy from pageable memory would make the host wait.
    return (tensor.pin_memory() if tensor.is_cpu else tensor).to(device, non_blocking=True)


def peak_bytes(device: torch.device) -> int:
    """Return the peak bytes that this process has had allocated on a GPU, or resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    # Linux counts resident memory in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
