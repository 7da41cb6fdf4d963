"""Decisions over MPI: on a communicator of their own, so that no message waits for one or is waited for."""

from __future__ import annotations

from dataclasses import dataclass

from mpi4py import MPI

from axonn.distributed.transport.base import DECISION_BYTES, Decision
from axonn.distributed.transport.message_header import open_decision, pack_decision


@dataclass
class _Outgoing:
    """A decision that has not left yet, with the memory that must stay until then."""

    peer: int
    packed: bytearray
    request: MPI.Request | None = None
    """None until it has been posted."""


@dataclass
class _Receive:
    packed: bytearray
    request: MPI.Request


class MPIDecisions:
    """One rank's decisions, told and heard, on a duplicate of `comm` (collective over it).

    It has no lock and no thread: whoever makes progress for the messages does so here.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm.Dup()
        self._outgoing: list[_Outgoing] = []
        self._peer = MPI.PROC_NULL
        self._to_post = 0
        self._receive: _Receive | None = None
        self.told: list[Decision] = []
        """What has arrived and was not taken yet."""

    @property
    def expected(self) -> bool:
        """Whether more are to come."""
        return self._receive is not None

    @property
    def leaving(self) -> bool:
        """Whether some that were told here have not left yet."""
        return bool(self._outgoing)

    def expect(self, peer: int, count: int) -> None:
        """Receive `count` decisions from `peer`; none may be expected still."""
        self._peer, self._to_post = peer, count
        self._post()

    def tell(self, peer: int, decision: Decision) -> None:
        """Send a decision with the next `progress`."""
        self._outgoing.append(_Outgoing(peer, pack_decision(decision)))

    def progress(self) -> None:
        """Test every outstanding request. Raises `MPI.Exception`."""
        for out in self._outgoing:
            if out.request is None:
                out.request = self._comm.Isend([out.packed, MPI.BYTE], dest=out.peer)
        self._outgoing = [out for out in self._outgoing if out.request is None or not out.request.Test()]
        while self._receive is not None and self._receive.request.Test():
            self.told.append(open_decision(self._receive.packed))
            self._post()

    def give_up(self) -> list[object]:
        """Cancel what can be; the rest, whose memory must stay as long as MPI lives."""
        under_way: list[object] = list(self._outgoing)
        if self._receive is not None:
            self._receive.request.Cancel()
            if not self._receive.request.Test():
                under_way.append(self._receive)
        return under_way

    def free(self) -> None:
        """Give its communicator back; collective."""
        self._comm.Free()

    def _post(self) -> None:
        self._receive = None
        if self._to_post:
            self._to_post -= 1
            packed = bytearray(DECISION_BYTES)
            self._receive = _Receive(packed, self._comm.Irecv([packed, MPI.BYTE], source=self._peer))
