"""Every machine file of the repository: it loads and its numbers are plausible, together and by themselves."""

from itertools import pairwise

import numpy as np
import pytest

from axonn.perf.machine.kernel_times import gemm_time
from axonn.perf.machine.machine_file import Curve, MachineFile, load_machine
from axonn.perf.machine.network import GroupPlacement, all_reduce_time, message_time, ring_factor
from experiments.definition import HERE

# Not what axonn calibrate has left here.
FILES = sorted(path for path in (HERE / "machines").glob("*.yaml") if path.stem != "local")


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def machine(request: pytest.FixtureRequest) -> MachineFile:
    return load_machine(request.param)


def test_the_machines_that_are_promised_are_there() -> None:
    assert {path.stem for path in FILES} >= {"summit", "selene", "perlmutter", "frontier", "dgx-h100"}
    assert all(load_machine(path).name == path.stem for path in FILES)


def test_large_products_reach_half_of_the_peak_and_never_all_of_it(machine: MachineFile) -> None:
    gpu = machine.gpu
    rates = [2 * n**3 / gemm_time(gpu, n, n, n) for n in (1024, 4096, 16384, 32768)]
    assert all(slow < fast * 1.001 for slow, fast in pairwise(rates))
    assert 0.5 * gpu.peak.si < rates[-1] < gpu.peak.si
    assert gpu.stream_bandwidth.si < gpu.memory_bandwidth.si


def curves_of(machine: MachineFile) -> list[Curve]:
    reduce = machine.network.all_reduce
    found = [reduce.intra_node, reduce.inter_node]
    for p2p in machine.network.p2p.values():
        found += [p2p.intra_node, p2p.inter_node]
    return found


def test_larger_messages_take_longer(machine: MachineFile) -> None:
    sizes = np.geomspace(1, 1e10, 300)
    for curve in curves_of(machine):
        seconds = np.array([curve.seconds(size) for size in sizes])
        assert np.all(np.diff(seconds) > -2e-6)  # fitted pieces may meet a microsecond or two apart


def test_no_message_is_faster_than_its_links(machine: MachineFile) -> None:
    nbytes, injection = 1e9, machine.network.injection.si
    for library in machine.network.p2p:
        inside = message_time(machine, nbytes, library=library, same_node=True)
        across = message_time(machine, nbytes, library=library, same_node=False)
        assert inside.seconds <= across.seconds
        assert nbytes / across.transfer <= injection / machine.network.ports.number * 1.2
        assert nbytes / inside.transfer <= machine.node.nvlink.si


@pytest.mark.parametrize("nodes", [2, 8, 64])
def test_one_rank_per_node_reduces_at_most_at_the_speed_of_its_port(machine: MachineFile, nodes: int) -> None:
    gpus = machine.node.gpus.number
    each = GroupPlacement(nodes, nodes, 1, 1, gpus, 1)  # all devices of a node, each in a group of its own
    seconds = all_reduce_time(machine, 1e9, each)
    sent = ring_factor(nodes) * 1e9 / seconds
    assert 0.3 < sent / (machine.network.injection.si / gpus) < 1.2
    whole = GroupPlacement(gpus, 1, gpus, gpus // machine.node.gpus_per_socket.number, 1, 1)
    assert all_reduce_time(machine, 1e9, whole) < seconds


def test_a_switch_reaches_all_devices_at_the_same_speed_and_pairs_do_not() -> None:
    def bus(name: str, ranks: int) -> float:
        machine = load_machine(HERE / "machines" / f"{name}.yaml")
        return ring_factor(ranks) * 1e9 / all_reduce_time(machine, 1e9, GroupPlacement(ranks, 1, ranks, 1, 1, 1))

    assert bus("selene", 2) == pytest.approx(bus("selene", 8), rel=0.02)
    # Two of Perlmutter's four GPUs have one of three links: 76 and 225 GB/s in Megatron-AxoNN's own table.
    assert bus("perlmutter", 2) == pytest.approx(76e9, rel=0.1)
    assert bus("perlmutter", 4) == pytest.approx(225e9, rel=0.1)


def test_collectives_leave_some_multiprocessors_to_compute() -> None:
    selene = load_machine(HERE / "machines/selene.yaml")
    fields = selene.model_dump()
    fields["network"]["all_reduce"]["multiprocessors"]["value"] = 108
    with pytest.raises(ValueError, match="must be fewer than"):
        MachineFile.model_validate(fields)
