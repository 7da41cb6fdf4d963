"""Connection of the ranks of a running job: this rank's number and its ways to the others. One rank needs no MPI."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

from axonn.device.devices import are_shared, identity, usable
from axonn.distributed.collectives import Collectives, SerialCollectives, StagedCollectives, TorchCollectives
from axonn.distributed.launch import LAUNCHERS
from axonn.distributed.transport import Transport
from axonn.errors import LaunchError
from axonn.grid import AXES, ProcessGrid
from axonn.spans import SpanRecorder

if TYPE_CHECKING:
    from mpi4py import MPI

TransportName = Literal["mpi", "torch"]
_CLOCK_ROUNDS = 10


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """One rank of a job: its number, transport, collectives, clock and device."""

    rank: int
    transport: Transport | None
    collectives: Collectives
    clock_offset: float
    """Seconds to add to this rank's clock to get rank 0's."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Device on which this rank computes."""

    def barrier(self) -> None:
        """Wait until every rank has called it."""
        group = self.collectives.axis_group(AXES)
        self.collectives.all_reduce(torch.zeros(1), group).wait()


def launched_as(environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Return (rank, number of ranks) from the launcher's environment; (0, 1) without a launcher."""
    env = os.environ if environment is None else environment
    for rank, size in LAUNCHERS:
        if rank in env and size in env:
            return int(env[rank]), int(env[size])
    return 0, 1


@contextmanager
def connect(
    grid: ProcessGrid,
    *,
    comm: MPI.Intracomm | None = None,
    transport: TransportName = "mpi",
    device: torch.device | None = None,
    timeout_s: float = 1800.0,
) -> Iterator[Runtime]:
    """Connect this process to the other ranks of `grid`, over `comm` or all ranks of the job.

    Messages between stages go over MPI or `torch.distributed`; `device` is where this rank computes (default: the CPU).
    Collectives go over NCCL if every rank has a GPU of its own, and otherwise over Gloo: NCCL refuses two ranks on one
    GPU, so ranks that share one communicate through host memory. Raises `GridError` when the grid does not fit the
    ranks and `LaunchError` when there is no MPI or it does not see the ranks that were launched.
    """
    device = usable(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    size = launched_as()[1] if comm is None else comm.Get_size()
    grid.check_world(size)
    if size == 1:
        yield Runtime(rank=0, transport=None, collectives=SerialCollectives(grid, 0), clock_offset=0.0, device=device)
        return
    world = _world(comm, size)
    rank = world.Get_rank()
    store = _rendezvous(world, timeout_s)
    timeout = timedelta(seconds=timeout_s)
    # Without NCCL too, everything passes through host memory.
    shared = device.type == "cuda" and (are_shared(world.allgather(identity(device))) or not dist.is_nccl_available())
    if shared and transport == "torch":
        raise LaunchError(
            "several ranks share a GPU, where NCCL, which transport 'torch' sends messages with, refuses to run; take "
            "transport 'mpi', or as many GPUs as ranks"
        )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" and not shared else "gloo"
    with ExitStack() as cleanup:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        cleanup.callback(dist.destroy_process_group)
        messages = _transport(transport, grid, world, store=store, device=device, timeout=timeout)
        cleanup.callback(messages.close)
        yield Runtime(
            rank=rank,
            transport=messages,
            collectives=collectives_of(grid, rank, device, shared=shared),
            clock_offset=_clock_offset(world),
            device=device,
        )


def _world(comm: MPI.Intracomm | None, size: int) -> MPI.Intracomm:
    """Return `comm`, or MPI's communicator of all ranks. Raises `LaunchError` without MPI or with other than `size`."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"{size} ranks need MPI, which cannot be loaded ({error}); "
            "install it with: pip install 'axonn-reproduction[mpi]'"
        ) from error
    world = MPI.COMM_WORLD if comm is None else comm
    if world.Get_size() != size:
        raise LaunchError(
            f"the launcher started {size} ranks, but MPI sees {world.Get_size()}: launcher and MPI library do not "
            "belong together; use the mpiexec that came with the MPI that mpi4py loads"
        )
    return world


def _transport(
    name: TransportName,
    grid: ProcessGrid,
    world: MPI.Intracomm,
    *,
    store: Any,
    device: torch.device,
    timeout: timedelta,
) -> Transport:
    """Connect the transport `name` over the ranks of `world`, which meet at `store`."""
    if name == "torch":
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        from axonn.distributed.transport.torch_distributed import TorchTransport

        keys = PrefixStore("transport", store)
        return TorchTransport(grid, world.Get_rank(), store=keys, device=device, timeout=timeout)
    from axonn.distributed.transport.mpi import MPITransport
    from axonn.distributed.transport.staging import path_for

    return MPITransport(world, path=path_for(device))


def collectives_of(grid: ProcessGrid, rank: int, device: torch.device, *, shared: bool) -> Collectives:
    """Return the collectives for `device`, which other ranks may share; `torch.distributed` must be initialised."""
    if shared:
        return StagedCollectives(grid, rank)
    return TorchCollectives(grid, rank, device_type=device.type)


def _rendezvous(world: MPI.Intracomm, timeout_s: float) -> Any:
    """Return a store on rank 0 that all ranks reach; its address is broadcast over MPI."""
    from mpi4py import MPI
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    one_node = node.Get_size() == world.Get_size()
    node.Free()
    if one_node:
        # Keeps working where the host's own name does not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    host = "127.0.0.1" if one_node else socket.gethostname()
    timeout = timedelta(seconds=timeout_s)
    if world.Get_rank() == 0:
        store = TCPStore(host, 0, world.Get_size(), is_master=True, timeout=timeout, wait_for_workers=False)
        world.bcast((host, store.port), root=0)
        return store
    host, port = world.bcast(None, root=0)
    return TCPStore(host, port, world.Get_size(), is_master=False, timeout=timeout, wait_for_workers=False)


def _clock_offset(world: MPI.Intracomm) -> float:
    """Return the offset to rank 0's clock from the ping-pong with the least round trip (Cristian's algorithm)."""
    rank = world.Get_rank()
    offset = 0.0
    for peer in range(1, world.Get_size()):
        if rank == 0:
            for _ in range(_CLOCK_ROUNDS):
                world.recv(source=peer)
                world.send(SpanRecorder.now(), dest=peer)
        elif rank == peer:
            rounds = []
            for _ in range(_CLOCK_ROUNDS):
                sent = SpanRecorder.now()
                world.send(None, dest=0)
                rank0_time = world.recv(source=0)
                received = SpanRecorder.now()
                rounds.append((received - sent, rank0_time - (sent + received) / 2))
            offset = min(rounds)[1]
    world.Barrier()
    return offset
