"""Transports of messages between stages: over MPI, over `torch.distributed`, or within one process.

`axonn.distributed.runtime.connect` picks between the first two, whose ranks find each other over mpi4py; the last is
for tests.
"""

from axonn.distributed.transport.base import Address, Decision, Decisions, Message, MessageEdge, SentMessage, Transport
from axonn.distributed.transport.in_process import InProcessCollectives, InProcessTransport, InProcessWorld

__all__ = [
    "Address",
    "Decision",
    "Decisions",
    "InProcessCollectives",
    "InProcessTransport",
    "InProcessWorld",
    "Message",
    "MessageEdge",
    "SentMessage",
    "Transport",
]
