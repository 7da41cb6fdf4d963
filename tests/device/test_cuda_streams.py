"""The work that the engine gives a GPU, tried without one (`tests.helpers.cuda_standin`): in order, on one device, and
the host waits only for the numbers of the batch."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from axonn import engine as engine_module
from axonn.config.train_config import PrecisionConfig
from axonn.device.pinned_memory import pinned_zeros
from axonn.device.streams import DeviceEvent, DeviceToHostCopy, Timeline
from axonn.distributed.transport import Address, Decision, Message, MessageEdge, Transport
from axonn.distributed.transport.staging import StagedPath
from axonn.engine import Engine
from axonn.grid import ProcessGrid
from axonn.models.registry import make_model
from axonn.optim.algorithms.adamw import AdamWConfig
from axonn.optim.algorithms.sgd import SGDConfig
from axonn.schedules import Direction, ScheduleSpec
from axonn.spans import SpanRecorder
from tests.helpers.cuda_standin import DEVICE, Gpu, HostWaits, Race, StandInCollectives, Stream, standing_in
from tests.helpers.training import Case

SINGLE = ProcessGrid()


@pytest.fixture(autouse=True)
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "usable", lambda device: device)


def engine_of(
    gpu: Gpu, grid: ProcessGrid, *, rank: int = 0, model: str = "gpt", spans: bool = False, **options: Any
) -> Engine:
    recorder = SpanRecorder(0) if spans else None
    options = {
        "optimizer": AdamWConfig(bsize=1500, clip_norm=1.0),
        "precision": PrecisionConfig(compute="bfloat16"),
        **options,
    }
    case = Case(model_kind=model, dropout=options.pop("dropout", 0.0), tied=options.pop("tied", False))  # type: ignore[arg-type]
    return Engine(
        make_model(case.model),
        grid=grid,
        rank=rank,
        batch_size=8 * grid.data,
        microbatch_size=4,
        collectives=StandInCollectives(grid, rank, gpu),
        device=DEVICE,
        spans=recorder,
        **options,
    )


def batch_of(model: str) -> tuple[Any, torch.Tensor]:
    if model == "gpt":
        return torch.ones(8, 10, dtype=torch.int64), torch.ones(8, 10, dtype=torch.int64)
    return (torch.ones(8, 3, 8, 8), torch.ones(8, dtype=torch.int64)), torch.ones(8, 3, 8, 8)


class Neighbour(Transport):
    """The other one of two stages, which answers at once, through host memory as without GPU-aware MPI."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__(0, device=DEVICE)
        self._path = StagedPath(DEVICE)
        self._gpu = gpu
        self._edges: dict[MessageEdge, int] = {}
        self._came: list[Address] = []

    def expect(self, edge: MessageEdge, count: int) -> None:
        self._edges[edge] = 0
        self._count = count
        if edge.direction == Direction.FORWARD:
            self._came = [Address(Direction.FORWARD, 0, m) for m in range(count)]

    def _send(self, peer: int, address: Address, tensors: tuple[torch.Tensor, ...]) -> None:
        memory, ready = self._path.outgoing(tensors)
        assert ready()
        for tensor in memory:
            tensor.add(1)  # Read by the host.
        if address.direction == Direction.FORWARD:
            self._came.append(address._replace(direction=Direction.BACKWARD))

    def poll(self) -> list[Message]:
        messages = []
        for edge in self._edges:
            for address in [a for a in self._came if a.direction == edge.direction]:
                self._came.remove(address)
                memory = self._path.buffers(edge.tensors)
                for tensor in memory:
                    tensor.zero_()  # Written by the host.
                messages.append(Message(address, self._path.hand_over(self._path.incoming(memory))))
        return messages

    def wait(self) -> list[Message]:
        return self.poll()

    def flush(self) -> None: ...

    def expect_decisions(self, peer: int, count: int) -> None: ...

    def _send_decision(self, peer: int, decision: Decision) -> None: ...

    def poll_decisions(self) -> list[Decision]:
        return []


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("schedule", ["message-driven", "1f1b", "message-driven-zero-bubble"])
def test_messages_through_host_memory_are_in_order(monkeypatch: pytest.MonkeyPatch, stage: int, schedule: str) -> None:
    grid = ProcessGrid(inter=2)
    inputs, targets = batch_of("gpt")
    with standing_in(monkeypatch) as gpu:
        with gpu.unchecked():
            engine = engine_of(
                gpu, grid, rank=stage, transport=Neighbour(gpu), schedule=ScheduleSpec(name=schedule), spans=True
            )
        engine.train_batch(inputs, targets)
        engine.train_batch(inputs, targets)
        assert engine.held_microbatches == 0


@pytest.mark.parametrize("spans", [False, True], ids=["untraced", "traced"])
@pytest.mark.parametrize(
    ("grid", "options"),
    [
        (SINGLE, {}),
        (SINGLE, {"optimizer": AdamWConfig(placement="offloaded", bsize=1500)}),
        (SINGLE, {"optimizer": AdamWConfig(placement="offloaded", bsize=1500, buckets_resident=1, clip_norm=0.1)}),
        (SINGLE, {"precision": PrecisionConfig(compute="float16"), "tied": True}),
        (SINGLE, {"precision": PrecisionConfig(compute="float32"), "dropout": 0.1}),
        (SINGLE, {"activation_checkpointing": "auto", "dropout": 0.1}),
        (SINGLE, {"model": "unet", "dropout": 0.1}),
        (SINGLE, {"optimizer": SGDConfig(placement="offloaded", bsize=1500)}),
        (SINGLE, {"optimizer": SGDConfig(), "precision": PrecisionConfig(compute="float16")}),
        (ProcessGrid(data=2), {"optimizer": AdamWConfig(bsize=700, k=2)}),
        (ProcessGrid(data=2), {"optimizer": AdamWConfig(placement="offloaded", bsize=700, k=2)}),
        (ProcessGrid(col=2), {"overdecomposition": 1}),
        (ProcessGrid(row=2, col=2), {"overdecomposition": 2, "dropout": 0.1}),
        (ProcessGrid(data=2, row=2), {"overdecomposition": 2, "activation_checkpointing": 1}),
        (ProcessGrid(row=2), {"overdecomposition": 2, "model": "unet"}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_batch_is_in_order_and_the_host_waits_once(
    monkeypatch: pytest.MonkeyPatch, grid: ProcessGrid, options: dict[str, Any], spans: bool
) -> None:
    model = options.get("model", "gpt")
    with standing_in(monkeypatch) as gpu:
        with gpu.unchecked():
            engine = engine_of(gpu, grid, spans=spans, **options)
            inputs, targets = batch_of(model)
            # The first batch may bring to the device what stays there.
            engine.train_batch(inputs, targets)
        for _ in range(3):
            before = gpu.waits
            assert engine.train_batch(inputs, targets).applied
            # The loss; whether gradients overflowed; their norm; and the two tasks that are done before the next are
            # given. A trace waits for its end.
            assert gpu.waits - before <= 3 + 2 + (1000 if spans else 0)
        engine.evaluate_batch(inputs, targets)
        assert gpu.operations > 500
        engine.state_tensors()


def test_the_stand_in_sees_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with standing_in(monkeypatch) as gpu:
        side = Stream(gpu)
        x = torch.ones(4, device=DEVICE)
        with gpu.stream(side), pytest.raises(Race, match=r"what aten\.ones"):
            x.mul_(2)
        side.wait_stream(gpu.current)
        with gpu.stream(side):
            x[:2].mul_(2)
        x[2:].mul_(2)
        with pytest.raises(Race):
            x.sum()
        gpu.current.wait_event(side.record_event())
        x.sum()
        with pytest.raises(HostWaits):
            x.to("cpu")
        with pytest.raises(HostWaits):
            torch.cuda.synchronize()
        host = torch.empty(4, pin_memory=True)
        host.copy_(x, non_blocking=True)
        with pytest.raises(Race):
            host.add_(1)
        gpu.current.record_event().synchronize()
        host.add_(1)
        with pytest.raises(Exception, match="cannot be called on meta"):
            x.sum().item()
        with pytest.raises(RuntimeError, match="two different devices"):
            x + torch.ones(4)


def test_a_reading_is_there_when_its_copy_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert DeviceToHostCopy(torch.tensor([1.5, 2.0])).wait() == [1.5, 2.0]
    with standing_in(monkeypatch) as gpu:
        reading = DeviceToHostCopy(torch.ones(2, device=DEVICE, dtype=torch.float64))
        assert gpu.waits == 0
        assert len(reading.wait()) == 2
        assert gpu.waits == 1


class Cudart:
    """`torch.cuda.cudart()`, with room to lock `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if sum(self.locked.values()) + size > self.limit:
            return 2
        self.locked[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


def test_host_state_is_locked_where_it_lies_until_nothing_refers_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cudart(limit=1000)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    zeros = pinned_zeros(200, torch.float32)
    assert cuda.locked == {zeros.data_ptr(): 800}
    view = zeros[100:]
    del zeros
    gc.collect()
    assert len(cuda.locked) == 1
    made = torch.zeros
    asked: list[bool] = []

    def zeros_of(*sizes: int, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        asked.append(pin_memory)
        return made(*sizes, **options)

    monkeypatch.setattr(torch, "zeros", zeros_of)
    assert pinned_zeros(200, torch.float32).tolist() == [0.0] * 200
    assert asked == [False, True]
    del view
    gc.collect()
    assert cuda.locked == {}


def test_spans_of_a_gpu_are_recorded_when_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    from axonn.spans import SpanKind

    with standing_in(monkeypatch):
        spans = SpanRecorder(0)
        timeline = Timeline(DEVICE, spans)
        start = timeline.now()
        timeline.span(SpanKind.COPY, start, timeline.now(), microbatch=3)
        with spans.paused():
            timeline.span(SpanKind.COPY, start, timeline.now())
        assert spans.spans == []
        timeline.flush()
    (span,) = spans.spans
    assert (span.kind, span.microbatch) == (SpanKind.COPY, 3)
    assert DeviceEvent(torch.device("cpu"), timed=True).passed
