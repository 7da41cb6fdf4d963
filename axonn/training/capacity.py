"""Capacity check: the cores and memory of this machine against what a configuration needs by the performance model.

Nothing in this module loads PyTorch unless the ranks are to compute on a GPU: a run that cannot fit is refused at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from axonn.config.train_config import TrainConfig
from axonn.errors import ConfigError, GridError
from axonn.models.registry import outline_of
from axonn.observability.procfs import PROC, available_cores
from axonn.perf.planner.engine_strategy import strategy_of_config
from axonn.perf.planner.schedule_properties import most_held
from axonn.perf.timing.memory_model import RankBytes, rank_bytes

RANKS_PER_CORE = 4
"""Most ranks on a core; with more, ranks mostly wait for one."""
PROCESS_BYTES = 210_000_000
"""Memory of a rank's process without the model: measured as the private memory (Private_Dirty of
/proc/PID/smaps_rollup) of 4 ranks of a GPT of 14,000 parameters on CPUs, 206 MB each; libraries are shared."""
CGROUPS = Path("/sys/fs/cgroup")
GPU_FILES = ("/dev/nvidia0", "/dev/kfd", "/dev/dxg")
"""Device files, one of which exists where PyTorch can find a GPU: NVIDIA's, AMD's, Windows Subsystem for Linux."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """Resources of this machine that new processes may use. `memory`, `gpus`: free bytes of the host and of each GPU;
    `memory` is None where the host does not say."""

    cores: int
    memory: int | None
    gpus: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Need:
    """Needs of a configuration: ranks, bytes on the device of the fullest rank and of all ranks, and further bytes in
    host memory. On a CPU, device and host share one memory."""

    ranks: int
    fullest: int
    device: int
    host: int


def this_host(device: str) -> Host:
    """Return the free resources of this machine. `device`: "cpu" or "cuda"."""
    return Host(cores=available_cores(), memory=free_memory(), gpus=_free_on_gpus() if device == "cuda" else ())


def need_of(config: TrainConfig) -> Need:
    """Return what `config` needs. Raises `ConfigError` or `GridError` where the engine would refuse it."""
    strategy, outline = strategy_of_config(config), outline_of(config.model)
    grid = strategy.logical_grid
    held = most_held(config.schedule, grid.inter, strategy.microbatches(config.batch_size))
    chunks = config.schedule.chunks
    stages: list[RankBytes] = [
        # `held` counts whole microbatches, of all chunks.
        rank_bytes(outline, strategy, stage=stage, held=count * chunks)
        for stage, count in enumerate(held)
    ]
    each = grid.size // grid.inter
    return Need(
        ranks=grid.size,
        fullest=max(stage.total for stage in stages),
        device=each * sum(stage.total for stage in stages),
        host=grid.size * PROCESS_BYTES + each * sum(stage.streamed for stage in stages),
    )


def shortage(need: Need, host: Host, *, device: str) -> list[str]:
    """Return the parts of `need` that exceed `host`, with the numbers; empty where it fits. `device`: where the ranks
    compute, "cpu" or "cuda"."""
    lacking = []
    if need.ranks > most_ranks(host):
        lacking.append(
            f"{need.ranks} ranks are more than {RANKS_PER_CORE} on each of {host.cores} core{'s' * (host.cores > 1)}"
        )
    memory = need.host + (need.device if device == "cpu" else 0)
    if host.memory is not None and memory > host.memory:
        lacking.append(f"the ranks need {_gb(memory)} of host memory together, and {_gb(host.memory)} are free")
    if device == "cuda" and host.gpus:
        sharing = -(-need.ranks // len(host.gpus))
        least = min(host.gpus)
        if sharing * need.fullest > least:
            ranks = f"{sharing} ranks that share a GPU need" if sharing > 1 else "a rank needs"
            lacking.append(f"{ranks} {_gb(sharing * need.fullest)} of its memory, and {_gb(least)} are free")
    return lacking


def most_ranks(host: Host) -> int:
    """Return the largest number of ranks that `host` takes."""
    return RANKS_PER_CORE * host.cores


def lacking_here(config: TrainConfig, device: str) -> list[str]:
    """Return the needs of `config` that exceed this machine; empty for a configuration that no machine runs, whose
    mistake the engine names. `device`: "cpu", "cuda", or "auto"."""
    try:
        need = need_of(config)
    except (ConfigError, GridError):
        return []
    device = _settled(device)
    return shortage(need, this_host(device), device=device)


def check_capacity(config: TrainConfig, device: str) -> None:
    """Raise `ConfigError`, with the numbers and what to change, where this machine cannot run `config`."""
    if lacking := lacking_here(config, device):
        raise ConfigError(
            f"this machine cannot run it: {'; '.join(lacking)}. Take a smaller grid, model or microbatch_size, or "
            f"axonn plan --gpus {most_ranks(this_host('cpu'))} or fewer for this machine, or run it where it was "
            "planned for; --force starts it all the same"
        )


def _settled(device: str) -> str:
    if device == "auto" and not any(Path(file).exists() for file in GPU_FILES):
        return "cpu"
    if device == "cpu":
        return "cpu"
    from axonn.device.devices import device_type

    return device_type(device)


def _free_on_gpus() -> list[int]:
    import torch

    return [torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())]


def free_memory() -> int | None:
    """Return the bytes that new processes can have without taking any from others; None where the system does not say.

    That is what the system calls available, which counts its cache as free, but no more than the limits of this
    process's control groups leave.
    """
    return min((*_available(), *_left_by_groups()), default=None)


def _available() -> Iterator[int]:
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
        yield next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return


def _left_by_groups() -> Iterator[int]:
    """Yield the bytes left by each control group (version 1 or 2) of this process and by those above it."""
    try:
        entries = [line.split(":", 2) for line in (PROC / "self" / "cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in (entry for entry in entries if len(entry) == 3):
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("memory.max", "memory.current", "inactive_file")
        )
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder == root.parent:
                break
            try:
                limit, used = (int((folder / name).read_text()) for name in names[:2])
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield max(0, limit - used + int(stat.get(names[2], 0)))
            except (OSError, ValueError):
                continue  # No limit ("max"), or none of this controller's folders.


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
