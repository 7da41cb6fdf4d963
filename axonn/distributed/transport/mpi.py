"""Transport over MPI.

Each direction has a communicator of its own, and receives are posted and matched in send order (MPI's non-overtaking
rule). A message is a short header that names its microbatch and its tensors, followed by the tensors, which are
received once the header is known to match: Open MPI 5.0 writes beyond a receive buffer that is too short before it
reports the error. MPI libraries advance large messages only inside MPI calls, so a progress thread tests the
outstanding requests while the rank computes; while the rank waits, it tests them itself.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from mpi4py import MPI

from axonn.distributed.transport.base import Address, Decision, Message, MessageEdge, Transport
from axonn.distributed.transport.message_header import HEADER_BYTES, open_header, pack_header
from axonn.distributed.transport.mpi_decisions import MPIDecisions
from axonn.distributed.transport.staging import HostPath, MemoryPath, ReceivedTensors
from axonn.errors import TransportError
from axonn.schedules import Direction

_PROGRESS_INTERVAL_S = 1e-3
_SPINS = 200
"""Polls without a sleep before a waiting rank begins to back off."""
_LONGEST_SLEEP_S = 1e-3
_HEADER_TAG = 0
_TENSOR_TAG = 1


def _as_bytes(tensor: torch.Tensor) -> Any:
    """Return the memory of a contiguous tensor as bytes, so that types MPI lacks (bfloat16) can be sent."""
    return [MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes), MPI.BYTE]


@dataclass
class _Receive:
    """A message that is being received."""

    header: bytearray
    request: MPI.Request
    """Request of the header."""
    address: Address | None = None
    """None until the header has arrived; from then on the tensors are received."""
    buffers: tuple[torch.Tensor, ...] = ()
    requests: list[MPI.Request] = field(default_factory=list)


@dataclass
class _Incoming:
    """The receiving end of an edge."""

    edge: MessageEdge
    to_post: int = 0
    receive: _Receive | None = None


@dataclass
class _Outgoing:
    """A message that has not left yet, with the memory that must stay alive until then."""

    peer: int
    address: Address
    header: bytearray
    tensors: tuple[torch.Tensor, ...]
    memory: tuple[torch.Tensor, ...]
    ready: Callable[[], bool]
    """Returns True once `memory` may be read."""
    start: float
    requests: list[MPI.Request] | None = None
    """None until the message has been posted."""


class MPITransport(Transport):
    """Transport over `comm`, with tensors on the device of `path` (default: in host memory); made by all its ranks.

    Raises `TransportError` if MPI lacks thread support.
    """

    def __init__(self, comm: MPI.Intracomm, *, path: MemoryPath | None = None) -> None:
        self._path = path or HostPath()
        super().__init__(comm.Get_rank(), device=self._path.device)
        if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            raise TransportError("MPI was initialised without MPI_THREAD_SERIALIZED; use an MPI built with threads")
        self._comms = {direction: comm.Dup() for direction in Direction}
        self._decisions = MPIDecisions(comm)
        self._incoming: dict[tuple[int, Direction], _Incoming] = {}
        self._outgoing: list[_Outgoing] = []
        self._arrived: deque[tuple[Address, ReceivedTensors]] = deque()
        self._lock = threading.Lock()
        self._busy = threading.Event()
        """Set while requests are outstanding; otherwise the progress thread sleeps."""
        self._failure: MPI.Exception | TransportError | None = None
        self._closing = False
        node = comm.Split_type(MPI.COMM_TYPE_SHARED)
        self._oversubscribed = node.Get_size() > len(os.sched_getaffinity(0))
        node.Free()
        self._thread = threading.Thread(target=self._run_progress, name="axonn-progress", daemon=True)
        self._thread.start()

    def expect(self, edge: MessageEdge, count: int) -> None:
        self._check_device(edge.device)
        with self._lock:
            incoming = self._incoming.setdefault((edge.peer, edge.direction), _Incoming(edge))
            if incoming.receive is not None or incoming.to_post:
                raise TransportError(f"rank {self.rank} still expects messages from rank {edge.peer}")
            incoming.edge = edge
            incoming.to_post = count
            if count:
                self._post(incoming)
        self._busy.set()

    def _send(self, peer: int, address: Address, tensors: tuple[torch.Tensor, ...]) -> None:
        start = time.perf_counter()
        self._raise_failure()
        with self._lock:
            memory, ready = self._path.outgoing(tensors)
            header = pack_header(address, tensors)
            self._outgoing.append(_Outgoing(peer, address, header, tensors, memory, ready, start))
            self._progress()
        self._busy.set()

    def expect_decisions(self, peer: int, count: int) -> None:
        with self._lock:
            if self._decisions.expected:
                raise self._still_expected(peer)
            self._decisions.expect(peer, count)
        self._busy.set()

    def _send_decision(self, peer: int, decision: Decision) -> None:
        self._raise_failure()
        with self._lock:
            self._decisions.send(peer, decision)
            self._progress()
        self._busy.set()

    def poll_decisions(self) -> list[Decision]:
        self._raise_failure()
        with self._lock:
            self._progress()
            arrived, self._decisions.arrived = self._decisions.arrived, []
        self._raise_failure()
        return arrived

    def poll(self) -> list[Message]:
        self._raise_failure()
        with self._lock:
            self._progress()
            arrived = list(self._arrived)
            self._arrived.clear()
        self._raise_failure()
        return [Message(address, self._path.hand_over(landed)) for address, landed in arrived]

    def wait(self) -> list[Message]:
        spins = 0
        while True:
            arrived = self.poll()
            if arrived or self._decisions.arrived:
                return arrived
            with self._lock:
                # The progress thread may have received the last message since.
                nothing_expected = not self._arrived and not self._decisions.arrived and not self._expects()
            if nothing_expected:
                raise self._nothing_expected()
            self._back_off(spins)
            spins += 1

    def flush(self) -> None:
        spins = 0
        while self._outgoing or self._decisions.sending:
            self._raise_failure()
            with self._lock:
                self._progress()
            self._back_off(spins)
            spins += 1

    def close(self) -> None:
        self._closing = True
        self._busy.set()
        self._thread.join()
        self._abandon_requests()
        for comm in self._comms.values():
            comm.Free()
        self._decisions.free()

    def _expects(self) -> bool:
        return self._decisions.expected or any(i.receive is not None for i in self._incoming.values())

    def _abandon_requests(self) -> None:
        """Cancel receives after an aborted batch; keep alive the memory that MPI may still access."""
        under_way: list[object] = [out for out in self._outgoing if out.requests] + self._decisions.abandon()
        for incoming in self._incoming.values():
            receive = incoming.receive
            if receive is None:
                continue
            if receive.request != MPI.REQUEST_NULL:
                receive.request.Cancel()
            if not receive.request.Test() or receive.requests:
                under_way.append(receive)
        if under_way:
            # A message that has begun cannot be cancelled. MPI keeps these references until it is finalised.
            MPI.COMM_SELF.Set_attr(MPI.Comm.Create_keyval(), under_way)

    def _back_off(self, spins: int) -> None:
        if self._oversubscribed:
            # Another rank may need this core to produce the awaited message.
            time.sleep(min(_LONGEST_SLEEP_S, 2e-5 * (spins + 1)))
        elif spins > _SPINS:
            time.sleep(min(_LONGEST_SLEEP_S, 1e-5 * (spins - _SPINS)))

    def _post(self, incoming: _Incoming) -> None:
        edge = incoming.edge
        incoming.to_post -= 1
        header = bytearray(HEADER_BYTES)
        request = self._comms[edge.direction].Irecv([header, MPI.BYTE], source=edge.peer, tag=_HEADER_TAG)
        incoming.receive = _Receive(header, request)

    def _post_tensors(self, edge: MessageEdge, receive: _Receive) -> None:
        receive.address = open_header(receive.header, edge, rank=self.rank)
        receive.buffers = self._path.buffers(edge.tensors)
        comm = self._comms[edge.direction]
        receive.requests = [comm.Irecv(_as_bytes(b), source=edge.peer, tag=_TENSOR_TAG) for b in receive.buffers]

    def _progress(self) -> None:
        """Test every outstanding request once; the caller holds the lock."""
        try:
            for incoming in self._incoming.values():
                self._progress_receive(incoming)
            self._post_ready()
            self._outgoing = [out for out in self._outgoing if not self._has_left(out)]
            self._decisions.progress()
        except (MPI.Exception, TransportError) as error:
            # From here on the posted requests are inconsistent, so the transport has failed.
            self._failure = error

    def _progress_receive(self, incoming: _Incoming) -> None:
        while (receive := incoming.receive) is not None:
            if receive.address is None:
                if not receive.request.Test():
                    return
                self._post_tensors(incoming.edge, receive)
            if receive.address is None or not MPI.Request.Testall(receive.requests):
                return
            self._arrived.append((receive.address, self._path.incoming(receive.buffers)))
            incoming.receive = None
            if incoming.to_post:
                self._post(incoming)

    def _post_ready(self) -> None:
        blocked: set[tuple[int, Direction]] = set()
        for out in self._outgoing:
            route = (out.peer, out.address.direction)
            if out.requests is not None or route in blocked:
                continue
            if not out.ready():
                blocked.add(route)  # Later messages must not overtake it.
                continue
            comm = self._comms[out.address.direction]
            out.requests = [comm.Isend([out.header, MPI.BYTE], dest=out.peer, tag=_HEADER_TAG)]
            out.requests += [comm.Isend(_as_bytes(t), dest=out.peer, tag=_TENSOR_TAG) for t in out.memory]

    def _has_left(self, out: _Outgoing) -> bool:
        if out.requests is None or not MPI.Request.Testall(out.requests):
            return False
        self._sent(out.peer, out.address, out.start)
        return True

    def _run_progress(self) -> None:
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
                if self._failure is not None:
                    return
                if not (self._outgoing or self._decisions.sending or self._expects()):
                    self._busy.clear()
                    if self._closing:
                        return
            finally:
                self._lock.release()

    def _raise_failure(self) -> None:
        if isinstance(self._failure, TransportError):
            raise self._failure
        if self._failure is not None:
            raise TransportError(f"rank {self.rank}: MPI failed: {self._failure}") from self._failure
