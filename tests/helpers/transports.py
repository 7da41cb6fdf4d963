"""What tests of messages share: jobs that run a body on every rank of a transport, and small helpers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from mpi4py import MPI

from axonn.distributed.runtime import connect
from axonn.distributed.tensor_spec import TensorSpec
from axonn.distributed.transport import InProcessTransport, InProcessWorld, Message, MessageEdge, Transport
from axonn.distributed.transport.mpi import MPITransport
from axonn.distributed.transport.staging import HostPath, StagedPath
from axonn.grid import ProcessGrid
from axonn.schedules import Direction
from tests.helpers.rank_pool import RankPool

Body = Callable[..., Any]
CPU = torch.device("cpu")
GIVE_UP_S = 60.0
"""Only ever reached by a test that fails."""
TRANSPORTS = ["mpi", "mpi, staged", "torch", "in-process", "in-process, random order"]


def over_mpi(comm: MPI.Intracomm, staged: bool, body: Body, *args: Any) -> Any:
    """A job of the rank pool."""
    transport = MPITransport(comm, path=StagedPath(CPU) if staged else HostPath())
    try:
        result = body(transport, *args)
        comm.Barrier()  # Nobody leaves while another still listens.
        return result
    finally:
        transport.close()


def over_torch(comm: MPI.Intracomm, grid: ProcessGrid | None, body: Body, *args: Any) -> Any:
    """A job of the rank pool."""
    with connect(grid or ProcessGrid(inter=comm.Get_size()), comm=comm, transport="torch") as runtime:
        result = body(runtime.transport, *args)
        comm.Barrier()
        return result


def run_over(
    name: str, pool: RankPool, body: Body, ranks: int, *args: Any, grid: ProcessGrid | None = None
) -> list[Any]:
    """Results of `body(transport, *args)` by rank of `grid` (default: all are stages)."""
    if name.startswith("mpi"):
        return pool.run(over_mpi, name == "mpi, staged", body, *args, ranks=ranks)
    if name == "torch":
        return pool.run(over_torch, grid, body, *args, ranks=ranks)
    world = InProcessWorld(ranks, order_seed=3 if "random" in name else None)
    return world.run(lambda rank: body(InProcessTransport(world, rank), *args))


def edge_of(peer: int, direction: Direction, specs: list[TensorSpec]) -> MessageEdge:
    return MessageEdge(peer=peer, direction=direction, tensors=tuple(specs), device=CPU)


def edge(peer: int, direction: Direction, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> MessageEdge:
    """An edge whose messages have one tensor."""
    return edge_of(peer, direction, [TensorSpec(shape, dtype)])


def receive(transport: Transport, count: int) -> list[Message]:
    messages: list[Message] = []
    while len(messages) < count:
        messages += transport.wait()
    return messages


def filled(spec: TensorSpec, number: int) -> torch.Tensor:
    """Some contents for `spec`, others for each `number`; all bit patterns may occur."""
    generator = torch.Generator().manual_seed(number)
    size = torch.empty(spec.shape, dtype=spec.dtype).nbytes
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    return data.view(spec.dtype).reshape(spec.shape)


def compute_until(done: Callable[[], bool]) -> bool:
    """Matrix products, which release the interpreter's lock and know nothing of messages."""
    a = torch.rand(768, 768)
    end = time.monotonic() + GIVE_UP_S
    while time.monotonic() < end:
        a = (a @ a).clamp(0, 1)
        if done():
            return True
    return False


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    same_kind = a.dtype == b.dtype and a.shape == b.shape
    return same_kind and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def own_threads(transport: Transport) -> set[int]:
    """Threads of transports in this process, this one's included."""
    return {t.native_id or 0 for t in threading.enumerate() if t.name.startswith("axonn-")}
