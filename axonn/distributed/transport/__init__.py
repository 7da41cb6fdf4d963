"""Messages between stages: over MPI (`mpi`), `torch.distributed` (`torch_distributed`), or within one process.

`axonn.distributed.runtime.connect` picks between the first two, which need mpi4py to find each other; the last is for tests.
"""

from axonn.distributed.transport.base import Address, Decision, Decisions, Message, MessageEdge, SentMessage, Transport
from axonn.distributed.transport.in_process import InProcessCollectives, InProcessTransport, InProcessWorld

__all__ = [
    "Address",
    "Decision",
    "Decisions",
    "MessageEdge",
    "InProcessCollectives",
    "InProcessTransport",
    "InProcessWorld",
    "Message",
    "SentMessage",
    "Transport",
]
