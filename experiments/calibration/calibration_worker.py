"""Program of every rank of a calibration: python -m experiments.calibration.calibration_worker FOLDER.

Rank 0 writes the results.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from axonn.config.train_config import FloatType
from axonn.device.devices import DeviceType

if TYPE_CHECKING:
    from mpi4py import MPI

    from axonn.distributed.runtime import Runtime
    from experiments.calibration.timing import Timer

RESULT = "result.json"
PROGRESS = "progress.txt"


@dataclass(frozen=True, kw_only=True)
class CalibrationJob:
    """Options of a calibration. All ranks measure kernels and memory; one rank alone also the costs of the host,
    several ranks messages and collectives.

    A GPU is measured by one rank alone.
    """

    precision: FloatType
    quick: bool
    device: DeviceType = "cpu"

    def write(self, folder: Path) -> None:
        """Write the options for the ranks that start in `folder`."""
        (folder / "job.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> CalibrationJob:
        """Read the options that `write` wrote."""
        return cls(**json.loads((folder / "job.json").read_text()))


def main() -> None:
    """Measure on this rank."""
    from axonn.device.devices import rank_device
    from axonn.distributed.runtime import connect, launched_as
    from axonn.grid import ProcessGrid
    from experiments.calibration import host_costs
    from experiments.calibration.kernel_timing import measure, sizes_of
    from experiments.calibration.timing import DeviceClock, Timer

    folder = Path(sys.argv[1])
    job = CalibrationJob.read(folder)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rank, size = launched_as()

    def on_part(name: str) -> None:
        if rank == 0:
            with open(folder / PROGRESS, "a", encoding="utf-8") as file:
                file.write(f"{name}\n")

    results: dict[str, Any] = {}
    comm = None
    timer = Timer()
    device = rank_device(job.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        timer = Timer(clock=DeviceClock())
    if size > 1:
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
        most: Callable[[float], float] = lambda x: comm.allreduce(x, op=MPI.MAX)  # noqa: E731
        timer = Timer(barrier=comm.Barrier, agree=most)
    if job.quick:
        timer = replace(timer, samples=4)
    with device:
        kernels = measure(sizes_of(device, quick=job.quick), getattr(torch, job.precision), timer, on_part)
        results["kernels"] = kernels if comm is None else _mean(comm.allgather(kernels))
        on_part("memory")
        results |= _measure_memory(timer, device)
    if comm is None:
        on_part("the engine on small models")
        results["host"] = host_costs.measure(job.precision, batches=20 if job.quick else 60, device=device)
    else:
        for transport in ("mpi", "torch"):
            on_part(f"messages over {transport}")
            with connect(ProcessGrid(inter=size), transport=transport) as runtime:
                results |= _measure_links(runtime, comm, timer, transport, precision=job.precision, quick=job.quick)
    if rank == 0:
        (folder / RESULT).write_text(json.dumps(results))


def _measure_memory(timer: Timer, device: torch.device) -> dict[str, Any]:
    from experiments.calibration.link_timing import copy_rate, empty_kernel, host_link_rate

    if device.type == "cpu":
        return {"copy": copy_rate(timer), "empty_kernel": empty_kernel(timer)}
    properties = torch.cuda.get_device_properties(device)
    return {
        "copy": copy_rate(timer, 1 << 30),
        "empty_kernel": empty_kernel(timer),
        "host_link": host_link_rate(timer, device),
        "gpu": {
            "name": properties.name,
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        },
    }


def _measure_links(
    runtime: Runtime, comm: MPI.Intracomm, timer: Timer, transport: str, *, precision: FloatType, quick: bool
) -> dict[str, Any]:
    from experiments.calibration import host_costs, link_timing

    step = 4 if quick else 2
    sizes = [1 << i for i in range(8, 23, step)]
    repeats = 5 if quick else 9
    assert runtime.transport is not None
    results: dict[str, Any] = {
        "message_bytes": sizes,
        f"messages_{transport}": link_timing.message_seconds(runtime.transport, comm, sizes, repeats=repeats),
        f"host_{transport}": link_timing.host_seconds(runtime.transport, comm, sizes, repeats=repeats),
    }
    if transport == "mpi":
        pipelined = host_costs.measure_pipelined(precision, runtime, stages=comm.size, batches=20 if quick else 60)
        results["pipelined"] = _mean(comm.allgather(pipelined))
        sizes = [1 << i for i in range(6, 25, step)]
        seconds = link_timing.all_reduce_seconds(runtime.collectives, sizes, timer)
        results |= {"all_reduce_bytes": sizes, "all_reduce": _mean(comm.allgather(seconds))}
        slow = [link_timing.slowdown_beside(runtime.collectives, timer, nbytes=1 << i) for i in (18, 20)]
        results["beside"] = _mean(comm.allgather(sum(slow) / len(slow)))
    return results


def _mean(values: list[Any]) -> Any:
    """Return plain data of one shape with each number averaged over the ranks; sizes, which are integers, stay."""
    first = values[0]
    if isinstance(first, dict):
        return {key: _mean([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [_mean(list(items)) for items in zip(*values, strict=True)]
    return sum(values) / len(values) if isinstance(first, float) else first


if __name__ == "__main__":
    main()
