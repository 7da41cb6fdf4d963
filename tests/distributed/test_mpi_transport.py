"""Messages over MPI: progress beside a computation, staging through host memory, and what the MPI can do."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from mpi4py import MPI
from typer.testing import CliRunner

from axonn.cli.main import app
from axonn.distributed.tensor_spec import TensorSpec
from axonn.distributed.transport import Address, Message
from axonn.distributed.transport.diagnostics import Finding, diagnose
from axonn.distributed.transport.gpu_aware import gpu_aware_mpi, judge
from axonn.distributed.transport.mpi import MPITransport
from axonn.distributed.transport.staging import DevicePath, HostPath, ReceivedTensors, StagedPath, Tensors, path_for
from axonn.schedules import Direction
from tests.helpers.rank_pool import RankPool
from tests.helpers.transports import CPU, compute_until, edge, receive

# --- progress


def computes_while_a_message_travels(comm: MPI.Intracomm, flag: str) -> int:
    """Rank 0 sends and computes, rank 1 computes; neither calls MPI again until rank 1 has the message."""
    transport = MPITransport(comm)
    if comm.Get_rank() == 1:
        transport.expect(edge(0, Direction.FORWARD, (1 << 21,)), 1)
    comm.Barrier()
    if comm.Get_rank() == 0:
        transport.send(1, Address(Direction.FORWARD, 0, 5), (torch.ones(1 << 21, dtype=torch.float64),))
        compute_until(Path(flag).exists)
        found = 0
    else:
        # A glance at the queue calls no MPI; a poll would make progress and prove nothing.
        compute_until(lambda: bool(transport._arrived))
        Path(flag).touch()
        found = len(list(transport._arrived))
        assert [m.address.microbatch for m in transport.poll()] == [5] * found
    comm.Barrier()
    transport.flush()
    transport.close()
    return found


def test_a_message_sent_before_a_long_computation_has_arrived_when_that_ends(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(computes_while_a_message_travels, str(tmp_path / "arrived"), ranks=2) == [0, 1]


class Late(MPITransport):
    """The thread takes the message in right after the first, fruitless poll."""

    polls = 0

    def poll(self) -> list[Message]:
        self.polls += 1
        if self.polls > 1:
            return super().poll()
        while not self._arrived:
            time.sleep(0.001)
        return []


def waits_unluckily(comm: MPI.Intracomm) -> int:
    transport = Late(comm)
    number = 0
    if comm.Get_rank() == 0:
        transport.send(1, Address(Direction.FORWARD, 0, 9), (torch.zeros(1, dtype=torch.float64),))
        transport.flush()
    else:
        transport.expect(edge(0, Direction.FORWARD, (1,)), 1)
        number = transport.wait()[0].address.microbatch
    comm.Barrier()
    transport.close()
    return number


def test_a_message_that_the_thread_takes_in_just_then_is_not_lost(pool: RankPool) -> None:
    assert pool.run(waits_unluckily, ranks=2) == [0, 9]


# --- ways into MPI's memory


class Slow(StagedPath):
    """Copies to host memory take time: the first messages are not ready for ever more looks than the later ones."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.asked = 0
        self.consumers: list[int] = []

    def outgoing(self, tensors: Tensors) -> tuple[Tensors, Callable[[], bool]]:
        memory, _ = super().outgoing(tensors)
        looks = iter([False] * (40 - 10 * (len(self.consumers) + self.asked)))
        self.asked += 1
        return memory, lambda: next(looks, True)

    def hand_over(self, landed: ReceivedTensors) -> Tensors:
        self.consumers.append(threading.get_ident())
        return super().hand_over(landed)


def sends_what_is_not_ready(comm: MPI.Intracomm) -> tuple[list[int], bool, bool]:
    path = Slow()
    transport = MPITransport(comm, path=path)
    peer = 1 - comm.Get_rank()
    count = 6
    transport.expect(edge(peer, Direction.FORWARD, (50,)), count)
    tensor = torch.empty(50, dtype=torch.float64)
    for i in range(count):
        transport.send(peer, Address(Direction.FORWARD, 0, i), (tensor.fill_(i),))
    messages = receive(transport, count)
    transport.flush()
    comm.Barrier()
    transport.close()
    right = all(m.tensors[0].unique().tolist() == [float(i)] for i, m in enumerate(messages))
    # The consumer's thread takes each message over, since on a GPU it is its stream that has to wait.
    handed_over = path.consumers == [threading.get_ident()] * count
    return [m.address.microbatch for m in messages], right, handed_over


def test_a_message_waits_until_its_memory_is_ready_and_is_not_overtaken(pool: RankPool) -> None:
    # The copy is made at once, so the tensor could be written again in between.
    assert pool.run(sends_what_is_not_ready, ranks=2) == [(list(range(6)), True, True)] * 2


@pytest.mark.parametrize("path", [HostPath(), StagedPath(CPU)], ids=["direct", "staged"])
def test_a_way_keeps_shapes_and_types(path: HostPath | StagedPath) -> None:
    specs = [TensorSpec((2, 3), torch.bfloat16), TensorSpec((), torch.int64), TensorSpec((0, 4), torch.float32)]
    tensors = tuple(torch.ones(spec.shape, dtype=spec.dtype) for spec in specs)
    memory, ready = path.outgoing(tensors)
    assert ready()
    arrived = path.hand_over(path.incoming(memory))
    for found in (memory, path.buffers(specs), arrived):
        assert [(tuple(t.shape), t.dtype) for t in found] == specs
    assert all(torch.equal(a, b) for a, b in zip(arrived, tensors, strict=True))
    staged = isinstance(path, StagedPath)
    assert (memory[0].data_ptr() != tensors[0].data_ptr()) == staged
    assert (arrived[0].data_ptr() != memory[0].data_ptr()) == staged


class _Chosen(Exception):
    pass


@pytest.mark.parametrize(("aware", "chosen"), [(True, DevicePath), ("not built so", StagedPath)])
def test_staging_is_for_an_mpi_that_cannot_do_without(
    aware: bool | str, chosen: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(self: object, device: torch.device) -> None:
        raise _Chosen(type(self))

    monkeypatch.setattr("axonn.distributed.transport.gpu_aware.gpu_aware_mpi", lambda: aware)
    for kind in (DevicePath, StagedPath):
        monkeypatch.setattr(kind, "__init__", made)
    with pytest.raises(_Chosen) as error:
        path_for(torch.device("cuda"))
    assert error.value.args == (chosen,)
    assert isinstance(path_for(CPU), HostPath)


OPEN_MPI = "Open MPI v5.0.11"
CRAY = "MPI VERSION    : CRAY MPICH version 8.1.28"
MPICH = "MPICH Version: 4.2.0"


@pytest.mark.parametrize(
    ("version", "environment", "answer", "found"),
    [
        (OPEN_MPI, {}, 1, True),
        (OPEN_MPI, {}, 0, "built without GPU support"),
        (OPEN_MPI, {}, None, "has no MPIX_Query_cuda_support"),
        (CRAY, {"MPICH_GPU_SUPPORT_ENABLED": "1"}, None, True),
        (CRAY, {"MPICH_GPU_SUPPORT_ENABLED": "0"}, 1, "MPICH_GPU_SUPPORT_ENABLED=1"),
        (CRAY, {}, 1, "MPICH_GPU_SUPPORT_ENABLED=1"),
        (MPICH, {}, 1, True),
        (MPICH, {"MPIR_CVAR_ENABLE_GPU": "0"}, 1, "MPIR_CVAR_ENABLE_GPU=0"),
    ],
)
def test_the_mpi_and_the_environment_say_whether_gpu_memory_can_be_sent(
    version: str, environment: dict[str, str], answer: int | None, found: bool | str
) -> None:
    query = None if answer is None else lambda: answer
    told = judge(version, environment, "MPIX_Query_cuda_support", query)
    assert told is True if found is True else isinstance(told, str) and str(found) in told


def test_this_mpi_is_asked(pool: RankPool) -> None:
    told = pool.run(asks, ranks=1)[0]
    assert told is True or (isinstance(told, str) and "no MPIX_Query" not in told)


def asks(comm: MPI.Intracomm) -> bool | str:
    return gpu_aware_mpi()


# --- what works here


def test_both_transports_work_where_these_tests_run() -> None:
    assert [(finding.transport, finding.works) for finding in diagnose()] == [("mpi", True), ("torch", True)]


def test_doctor_says_which_transports_work(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [Finding("smoke", True, "from hill to hill"), Finding("pigeons", False, "they are [all] on strike")]
    monkeypatch.setattr("axonn.distributed.transport.diagnostics.diagnose", lambda: findings)
    outcome = CliRunner().invoke(app, ["doctor"])
    assert outcome.exit_code == 0, outcome.output
    assert re.search("transport smoke +from hill to hill", outcome.output)
    assert "will not work: transport pigeons: they are [all] on strike" in outcome.output


@pytest.mark.parametrize(
    ("stdout", "stderr", "told"),
    [
        ("", "Traceback\nModuleNotFoundError: No module named 'mpi4py'\n", "No module named 'mpi4py'; install it"),
        ("", "", "MPI ended the process with code 7; install it"),
        ("warning: no such fabric\n", "it is broken\n", "it is broken; install it"),
    ],
)
def test_an_mpi_that_does_not_start_is_found_out(
    stdout: str, stderr: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(command: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[0] == sys.executable
        return subprocess.CompletedProcess(list(command), 7, stdout, stderr)

    monkeypatch.setattr(subprocess, "run", ends)
    mpi, torch_distributed = diagnose()
    assert not mpi.works
    assert told in mpi.text
    assert torch_distributed.works
