"""Seconds of messages and all-reduces, given the placement of their ranks.

A placement determines which links a message or a group crosses, and how many others share them. A measured curve
(`Curve`) gives the time in the configuration that was measured; for any other configuration the time per byte is scaled
by the load of the busiest link.
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
    """Seconds of one message: it arrives `latency + transfer` after the send; the link is busy for `transfer`."""

    latency: float
    transfer: float

    @property
    def seconds(self) -> float:
        """Seconds from the send to the arrival."""
        return self.latency + self.transfer


@dataclass(frozen=True)
class GroupPlacement:
    """Placement of a group's ranks on nodes and sockets, and the number of similar groups that share its links."""

    ranks: int
    nodes: int
    most_per_node: int
    """Ranks of the group on the node with the most of them."""
    sockets_per_node: int
    """Sockets of one node on which the group has ranks."""
    sharing_network: float
    """Groups with a rank on the same node that cross nodes, including this one; see `shared_with`."""
    sharing_bus: int
    """Groups that cross sockets within the same node, including this one."""


def place(grid: ProcessGrid, axes: Sequence[Axis], rank: int, machine: MachineFile) -> GroupPlacement:
    """Return the placement of the group of `rank` along `axes`, all groups along these axes being active at once."""
    group = grid.group(rank, axes)
    home = grid.node(rank)
    per_socket = machine.node.gpus_per_socket.number
    per_node = grid.ranks_per_node or grid.size

    def sockets(ranks: Sequence[int], node: int) -> set[int]:
        return {(r % per_node) // per_socket for r in ranks if grid.node(r) == node}

    neighbours = {grid.group(r, axes) for r in ranks_of_node(grid, rank)}
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
    """Return the ranks on the node of `rank`."""
    per_node = grid.ranks_per_node or grid.size
    first = grid.node(rank) * per_node
    return range(first, min(first + per_node, grid.size))


def shared_with(placement: GroupPlacement, size: float, sizes_on_node: Sequence[float]) -> GroupPlacement:
    """Return the placement of a group that reduces `size`, while the ranks of its node reduce `sizes_on_node`.

    A group shares the node's links only as long as the others are active, so the largest ends when all bytes are
    through.
    """
    if placement.sharing_network <= 1:
        return placement
    effective = placement.sharing_network * sum(sizes_on_node) / (len(sizes_on_node) * size)
    return replace(placement, sharing_network=min(placement.sharing_network, effective))


def ring_factor(ranks: int) -> float:
    """Return the ratio of bytes that each rank sends in a ring all-reduce to the bytes reduced: 2 (n - 1) / n.

    Thakur, Rabenseifner & Gropp, IJHPCA 2005.
    """
    return 2 * (ranks - 1) / ranks


PAYLOAD_SHARE = 370 / 450
"""Fraction of the bandwidth of a link, between devices or to the host, that is payload; the rest is protocol overhead.
NCCL's rings reach 370 of NVLink's 450 GB/s (a maintainer in github.com/NVIDIA/nccl-tests, issue 212), copies between
devices 376 to 380 (github.com/NVIDIA/nccl, issue 1264)."""


def _load(machine: MachineFile, placement: GroupPlacement, injection: float) -> float:
    """Return the seconds per byte reduced for which the group's busiest link is occupied.

    `injection`: bytes per second that a node can send.
    """
    ring = ring_factor(placement.ranks)
    loads = [0.0]
    switched = machine.node.links == "switch"
    if placement.most_per_node > 1:
        link = machine.node.nvlink.si * PAYLOAD_SHARE
        if not switched:
            # The rings of n devices of a socket use all n - 1 links of each device.
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
    """Return the bytes per second and rank of a ring over all devices of a node, from the measured all-reduce."""
    curves = machine.network.all_reduce
    return curves.intra_node.asymptotic_bandwidth * ring_factor(curves.intra_node_ranks.number)


def all_reduce_time(machine: MachineFile, nbytes: float, placement: GroupPlacement) -> float:
    """Return the seconds to all-reduce `nbytes` in a group.

    The measured curve, of one node or of several, with its time per byte scaled by the load of the group relative to
    the group that was measured; the latency grows with log2 of the number of nodes. The curve was measured in
    isolation, the group runs in training (`NetworkSpec.nccl_injection`).
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
    """Return the bytes per second that NCCL sends from a node in a training run."""
    injection = machine.network.nccl_injection or machine.network.injection
    return injection.si


def message_time(
    machine: MachineFile, nbytes: float, *, library: Library, same_node: bool, flows: int = 1
) -> MessageTime:
    """Return the time of a message of `nbytes` between two devices.

    `flows`: messages that leave the node at the same time and share its injection bandwidth.
    """
    curves = machine.network.p2p[library]
    curve = curves.between(same_node=same_node)
    latency, transfer = curve.latency(nbytes), curve.transfer(nbytes)
    if not same_node:
        injection = nccl_injection(machine) if library == "nccl" else machine.network.injection.si
        transfer = max(transfer, nbytes * flows / injection)
    return MessageTime(latency, transfer)


@dataclass(frozen=True)
class StageEdge:
    """Messages between two stages, for the worst pair of ranks. `flows`: messages that leave a node at once."""

    same_node: bool
    flows: int


def edge(grid: ProcessGrid, stage: int, target: int | None = None) -> StageEdge:
    """Return the edge from `stage` to stage `target` (default: the next one), with every replica sending at once."""
    target = stage + 1 if target is None else target
    leaving: dict[int, int] = {}
    for rank in grid.group(grid.rank(inter=stage), ("data", *TENSOR_AXES)):
        peer = grid.neighbour(rank, target - stage)
        assert peer is not None
        if grid.node(peer) != grid.node(rank):
            node = grid.node(rank)
            leaving[node] = leaving.get(node, 0) + 1
    return StageEdge(same_node=not leaving, flows=max(leaving.values(), default=1))
