"""Decisions over MPI, on a communicator of their own, so that decisions and messages do not wait for each other."""

from __future__ import annotations

from dataclasses import dataclass

from mpi4py import MPI

from axonn.distributed.transport.base import DECISION_BYTES, Decision
from axonn.distributed.transport.message_header import open_decision, pack_decision


@dataclass
class _Outgoing:
    """A decision that has not left yet, with the memory that must stay alive until then."""

    peer: int
    packed: bytearray
    request: MPI.Request | None = None
    """None until the decision has been posted."""


@dataclass
class _Receive:
    packed: bytearray
    request: MPI.Request


class MPIDecisions:
    """Decisions that one rank sends and receives, on a duplicate of `comm`; made by all its ranks.

    It has no lock and no thread of its own: `MPITransport` calls `progress`.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm.Dup()
        self._outgoing: list[_Outgoing] = []
        self._peer = MPI.PROC_NULL
        self._to_post = 0
        self._receive: _Receive | None = None
        self.arrived: list[Decision] = []
        """Decisions that have arrived and have not been taken yet."""

    @property
    def expected(self) -> bool:
        """True while decisions are still to come."""
        return self._receive is not None

    @property
    def sending(self) -> bool:
        """True while decisions of this rank have not left yet."""
        return bool(self._outgoing)

    def expect(self, peer: int, count: int) -> None:
        """Receive `count` decisions from `peer`; no earlier ones may still be expected."""
        self._peer, self._to_post = peer, count
        self._post()

    def send(self, peer: int, decision: Decision) -> None:
        """Send a decision at the next `progress`."""
        self._outgoing.append(_Outgoing(peer, pack_decision(decision)))

    def progress(self) -> None:
        """Post pending sends and test every outstanding request. Raises `MPI.Exception`."""
        for out in self._outgoing:
            if out.request is None:
                out.request = self._comm.Isend([out.packed, MPI.BYTE], dest=out.peer)
        self._outgoing = [out for out in self._outgoing if out.request is None or not out.request.Test()]
        while self._receive is not None and self._receive.request.Test():
            self.arrived.append(open_decision(self._receive.packed))
            self._post()

    def abandon(self) -> list[object]:
        """Cancel what can be cancelled; return the rest, whose memory must stay alive until MPI is finalised."""
        under_way: list[object] = list(self._outgoing)
        if self._receive is not None:
            self._receive.request.Cancel()
            if not self._receive.request.Test():
                under_way.append(self._receive)
        return under_way

    def free(self) -> None:
        """Free the communicator; called by all ranks."""
        self._comm.Free()

    def _post(self) -> None:
        self._receive = None
        if self._to_post:
            self._to_post -= 1
            packed = bytearray(DECISION_BYTES)
            self._receive = _Receive(packed, self._comm.Irecv([packed, MPI.BYTE], source=self._peer))
