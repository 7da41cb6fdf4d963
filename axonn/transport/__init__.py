"""Messages between stages: MPI between processes, or in one process for tests. `axonn.transport.mpi` needs mpi4py."""

from axonn.transport.base import Address, Edge, Message, Transport
from axonn.transport.in_process import InProcessCollectives, InProcessTransport, InProcessWorld

__all__ = [
    "Address",
    "Edge",
    "InProcessCollectives",
    "InProcessTransport",
    "InProcessWorld",
    "Message",
    "Transport",
]
