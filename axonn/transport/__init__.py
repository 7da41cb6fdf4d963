"""Messages between stages: over MPI (`mpi`), `torch.distributed` (`torch_distributed`), or within one process.

`axonn.runtime.connect` picks between the first two, which need mpi4py to find each other; the last is for tests.
"""

from axonn.transport.base import Address, Decision, Decisions, Edge, Message, Sent, Transport
from axonn.transport.in_process import InProcessCollectives, InProcessTransport, InProcessWorld

__all__ = [
    "Address",
    "Decision",
    "Decisions",
    "Edge",
    "InProcessCollectives",
    "InProcessTransport",
    "InProcessWorld",
    "Message",
    "Sent",
    "Transport",
]
