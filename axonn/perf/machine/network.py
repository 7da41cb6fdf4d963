"""Seconds of messages and all-reduces, given where their ranks are placed.

A placement says which links a message or a group crosses and with whom it shares them. Measured curves (`Curve`) give
the time of the configuration they were measured in; another configuration moves other amounts over other links, and
its time per byte is scaled by the load of its busiest link.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, log2

from axonn.errors import ConfigError
from axonn.grid import TENSOR_AXES, Axis, ProcessGrid
from axonn.perf.machine.machine_file import Library, MachineFile


@dataclass(frozen=True)
class MessageTime:
    """Time of one message: it arrives `latency + transfer` after it was sent; the link is busy for `transfer`.

    Both in seconds.
    """

    latency: float
    transfer: float

    @property
    def seconds(self) -> float:
        """Until the message is there."""
        return self.latency + self.transfer


@dataclass(frozen=True)
class GroupPlacement:
    """Where the ranks of a group are, and with how many like groups it shares its links."""

    ranks: int
    nodes: int
    most_per_node: int
    """Ranks of the group on the node that holds most of them."""
    sockets_per_node: int
    """Sockets of one node that the group touches."""
    sharing_network: float
    """Groups that cross nodes and have a rank on the same node, this one included; see `shared_with`."""
    sharing_bus: int
    """Groups that cross sockets inside the same node, this one included."""


def place(grid: ProcessGrid, axes: Sequence[Axis], rank: int, machine: MachineFile) -> GroupPlacement:
    """Placement of the group of `rank` along `axes`, all groups along these axes being active at once."""
    group = grid.group(rank, axes)
    home = grid.node(rank)
    per_socket = machine.node.gpus_per_socket.number
    per_node = grid.ranks_per_node or grid.size

    def sockets(ranks: Sequence[int], node: int) -> set[int]:
        return {(r % per_node) // per_socket for r in ranks if grid.node(r) == node}

    neighbours = {grid.group(other, axes) for other in ranks_of_node(grid, rank)}
    counts = grid.nodes_of(group)
    return GroupPlacement(
        ranks=len(group),
        nodes=len(counts),
        most_per_node=max(counts.values()),
        sockets_per_node=len(sockets(group, home)),
        sharing_network=max(1, sum(len(grid.nodes_of(g)) > 1 for g in neighbours)),
        sharing_bus=max(1, sum(len(sockets(g, home)) > 1 for g in neighbours)),
    )


def ranks_of_node(grid: ProcessGrid, rank: int) -> range:
    """The ranks on the node of `rank`."""
    per_node = grid.ranks_per_node or grid.size
    first = grid.node(rank) * per_node
    return range(first, min(first + per_node, grid.size))


def shared_with(placement: GroupPlacement, own: float, others: Sequence[float]) -> GroupPlacement:
    """The placement when the groups of the node reduce unequal sizes: `own`, and `others` by rank of the node.

    They share the node's links while they last, so the largest group is done when all bytes are through.
    """
    if placement.sharing_network <= 1:
        return placement
    together = placement.sharing_network * sum(others) / (len(others) * own)
    return replace(placement, sharing_network=min(placement.sharing_network, together))


def ring_factor(ranks: int) -> float:
    """Bytes that each rank of a ring sends in an all-reduce, over the bytes reduced: 2 (n - 1) / n.

    Thakur, Rabenseifner & Gropp, IJHPCA 2005.
    """
    return 2 * (ranks - 1) / ranks


PAYLOAD_SHARE = 370 / 450
"""Of the bandwidth of a link between devices, or of a device and its host, what data get; the rest is protocol.
Rings of NCCL get 370 of NVLink's 450 GB/s (a maintainer in github.com/NVIDIA/nccl-tests, issue 212), copies from device
to device 376 to 380 (github.com/NVIDIA/nccl, issue 1264)."""


def _load(machine: MachineFile, placement: GroupPlacement, injection: float) -> float:
    """Seconds per byte reduced that the busiest link of the group is occupied. `injection`: bytes per second that its
    node can send."""
    ring = ring_factor(placement.ranks)
    loads = [0.0]
    switched = machine.node.links == "switch"
    if placement.most_per_node > 1:
        link = machine.node.nvlink.si * PAYLOAD_SHARE
        if not switched:
            # Between n devices of a socket there are rings over all of their n - 1 links to each other.
            link *= max(1, min(placement.most_per_node, machine.node.gpus_per_socket.number) - 1)
        loads.append(ring / link)
    if placement.most_per_node > 1 and placement.sockets_per_node > 1 and not switched:
        loads.append(ring * placement.sharing_bus / _bus_bandwidth(machine))
    if placement.nodes > 1:
        # Between two nodes a tree sends every byte once each way, a ring 2 (n - 1) / n times; the library takes the
        # better one (NCCL 2.4 and later: double binary trees). With more nodes an inner rank of a tree sends it twice.
        crossing = min(ring, 1.0 if placement.nodes == 2 else 2.0)
        port = machine.network.injection.si / machine.network.ports.number
        share = min(injection / placement.sharing_network, port * placement.most_per_node)
        loads.append(crossing / share)
    return max(loads)


def _bus_bandwidth(machine: MachineFile) -> float:
    """Bytes per second and rank of a ring over all devices of a node, from the measured all-reduce."""
    curves = machine.network.all_reduce
    return curves.intra_node.asymptotic_bandwidth * ring_factor(curves.intra_node_ranks.number)


def all_reduce_time(machine: MachineFile, nbytes: float, placement: GroupPlacement) -> float:
    """Seconds to all-reduce `nbytes` in a group: the measured curve of one or of several nodes, its time per byte
    scaled by the group's load over that of the group it was measured with; the latency grows with log2 of the nodes.
    The curve was measured alone, the group is in a training run (`NetworkSpec.nccl_injection`).
    """
    if placement.ranks < 2 or nbytes <= 0:
        return 0.0
    curves = machine.network.all_reduce
    node, socket = machine.node.gpus.number, machine.node.gpus_per_socket.number
    if placement.nodes == 1:
        curve, ranks, nodes, hops = curves.intra_node, curves.intra_node_ranks.number, 1, 1.0
    else:
        curve, ranks, nodes = curves.over_nodes()
        hops = max(1.0, log2(placement.nodes) / log2(nodes))
    per_node = ceil(ranks / nodes)
    if per_node > node:
        raise ConfigError(f"the machine file's all-reduce was measured on {per_node} ranks of a node with {node} GPUs")
    measured = GroupPlacement(ranks, nodes, per_node, ceil(per_node / socket), 1, 1)
    training = nccl_injection(machine)
    scale = _load(machine, placement, training) / _load(machine, measured, machine.network.injection.si)
    return hops * curve.latency(nbytes) + scale * curve.transfer(nbytes)


def nccl_injection(machine: MachineFile) -> float:
    """Bytes per second that NCCL gets out of a node in a training run."""
    own = machine.network.nccl_injection
    return (machine.network.injection if own is None else own).si


def message_time(
    machine: MachineFile, nbytes: float, *, library: Library, same_node: bool, flows: int = 1
) -> MessageTime:
    """One message of `nbytes` between two devices; `flows` messages leave the node at the same time and share its
    injection bandwidth."""
    curves = machine.network.p2p[library]
    curve = curves.between(same_node=same_node)
    latency, transfer = curve.latency(nbytes), curve.transfer(nbytes)
    if not same_node:
        injection = nccl_injection(machine) if library == "nccl" else machine.network.injection.si
        transfer = max(transfer, nbytes * flows / injection)
    return MessageTime(latency, transfer)


@dataclass(frozen=True)
class StageEdge:
    """The messages between two stages: the worst pair of ranks."""

    same_node: bool
    flows: int


def edge(grid: ProcessGrid, stage: int, other: int | None = None) -> StageEdge:
    """How the ranks of `stage` reach those of `other` (default `stage + 1`), every replica sending at once."""
    other = stage + 1 if other is None else other
    leaving: dict[int, int] = {}
    for rank in grid.group(grid.rank(inter=stage), ("data", *TENSOR_AXES)):
        peer = grid.neighbour(rank, other - stage)
        assert peer is not None
        if grid.node(peer) != grid.node(rank):
            node = grid.node(rank)
            leaving[node] = leaving.get(node, 0) + 1
    return StageEdge(same_node=not leaving, flows=max(leaving.values(), default=1))
