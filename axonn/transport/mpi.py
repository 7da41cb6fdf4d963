"""Messages over MPI.

Each direction has a communicator of its own and the tag says which microbatch a message is, so receives with any tag
are matched in send order (MPI's non-overtaking rule). MPI libraries advance large messages only inside MPI calls, so
a thread of ours tests the outstanding requests while the rank computes; while the rank waits, it tests them itself.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from mpi4py import MPI

from axonn.errors import TransportError
from axonn.schedules import Direction
from axonn.transport.base import Address, Edge, Message, Transport

_PROGRESS_INTERVAL_S = 1e-3
_SPINS = 200
"""Tests without a sleep before a waiting rank begins to back off."""
_LONGEST_SLEEP_S = 1e-3
_CHUNKS = 64
_TENSORS = 4


def _as_bytes(tensor: torch.Tensor) -> Any:
    """The memory of a contiguous CPU tensor, of any type: MPI has no bfloat16, and moving bytes needs none."""
    return [tensor.view(-1).view(torch.uint8).numpy(), MPI.BYTE]


@dataclass
class _Incoming:
    """The receiving end of an edge."""

    edge: Edge
    to_post: int = 0
    request: MPI.Request | None = None
    buffer: torch.Tensor | None = None


@dataclass
class _Outgoing:
    request: MPI.Request
    tensor: torch.Tensor
    address: Address
    start: float


class MPITransport(Transport):
    """Point-to-point over `comm` (collective over it). Raises `TransportError` without thread support in MPI."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        super().__init__(comm.Get_rank())
        if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            raise TransportError("MPI was initialised without MPI_THREAD_SERIALIZED; use an MPI built with threads")
        self._comms = {direction: comm.Dup() for direction in Direction}
        self._incoming: dict[tuple[int, Direction], _Incoming] = {}
        self._outgoing: list[_Outgoing] = []
        self._arrived: deque[Message] = deque()
        self._lock = threading.Lock()
        self._busy = threading.Event()
        """Set while requests are outstanding: the thread sleeps without it."""
        self._failure: BaseException | None = None
        self._closing = False
        node = comm.Split_type(MPI.COMM_TYPE_SHARED)
        self._oversubscribed = node.Get_size() > len(os.sched_getaffinity(0))
        node.Free()
        self._thread = threading.Thread(target=self._keep_going, name="axonn-progress", daemon=True)
        self._thread.start()

    def expect(self, edge: Edge, count: int) -> None:
        with self._lock:
            incoming = self._incoming.setdefault((edge.peer, edge.direction), _Incoming(edge))
            if incoming.request is not None or incoming.to_post:
                raise TransportError(f"rank {self.rank} still expects messages from rank {edge.peer}")
            incoming.edge = edge
            incoming.to_post = count
            self._post(incoming)
        self._busy.set()

    def send(self, peer: int, address: Address, tensor: torch.Tensor) -> None:
        start = time.perf_counter()
        tag = (address.microbatch * _CHUNKS + address.chunk) * _TENSORS + address.tensor
        with self._lock:
            request = self._comms[address.direction].Isend(_as_bytes(tensor), dest=peer, tag=tag)
            self._outgoing.append(_Outgoing(request, tensor, address, start))
            self._progress()
        self._busy.set()

    def poll(self) -> list[Message]:
        self._raise_failure()
        with self._lock:
            self._progress()
            arrived = list(self._arrived)
            self._arrived.clear()
        return arrived

    def wait(self) -> list[Message]:
        spins = 0
        while True:
            arrived = self.poll()
            if arrived:
                return arrived
            with self._lock:
                # The thread may have taken the last message since.
                nothing = not self._arrived and all(i.request is None for i in self._incoming.values())
            if nothing:
                raise TransportError(f"rank {self.rank} waits for a message, but none is expected")
            self._back_off(spins)
            spins += 1

    def flush(self) -> None:
        spins = 0
        while self._outgoing:
            self._raise_failure()
            with self._lock:
                self._progress()
            self._back_off(spins)
            spins += 1

    def close(self) -> None:
        self._closing = True
        self._busy.set()
        self._thread.join()
        for comm in self._comms.values():
            comm.Free()

    def _back_off(self, spins: int) -> None:
        if self._oversubscribed:
            # Another rank may need this core to produce what is waited for.
            time.sleep(min(_LONGEST_SLEEP_S, 2e-5 * (spins + 1)))
        elif spins > _SPINS:
            time.sleep(min(_LONGEST_SLEEP_S, 1e-5 * (spins - _SPINS)))

    def _post(self, incoming: _Incoming) -> None:
        edge = incoming.edge
        incoming.to_post -= 1
        incoming.buffer = torch.empty(edge.shape, dtype=edge.dtype)
        incoming.request = self._comms[edge.direction].Irecv(_as_bytes(incoming.buffer), source=edge.peer)

    def _progress(self) -> None:
        """Test every outstanding request once; the caller holds the lock."""
        status = MPI.Status()
        for incoming in self._incoming.values():
            while incoming.request is not None and incoming.request.Test(status):
                rest, tensor = divmod(status.Get_tag(), _TENSORS)
                microbatch, chunk = divmod(rest, _CHUNKS)
                assert incoming.buffer is not None
                address = Address(incoming.edge.direction, chunk, microbatch, tensor)
                self._arrived.append(Message(address, incoming.buffer))
                incoming.request = incoming.buffer = None
                if incoming.to_post:
                    self._post(incoming)
        if self._outgoing:
            pending = []
            for out in self._outgoing:
                if out.request.Test():
                    self._sent(out.address, out.start)
                else:
                    pending.append(out)
            self._outgoing = pending

    def _keep_going(self) -> None:
        while True:
            self._busy.wait()
            if self._closing:
                return
            time.sleep(_PROGRESS_INTERVAL_S)
            # Whoever holds the lock is making progress itself.
            if not self._lock.acquire(blocking=False):
                continue
            try:
                self._progress()
                if not self._outgoing and all(i.request is None for i in self._incoming.values()):
                    self._busy.clear()
                    if self._closing:
                        return
            except MPI.Exception as error:
                self._failure = error
                return
            finally:
                self._lock.release()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise TransportError(f"rank {self.rank}: MPI failed: {self._failure}") from self._failure
