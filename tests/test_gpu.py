"""On a real GPU, where there is one: the same function as on a CPU, no host synchronisation, and the memory it should
take. Several ranks share it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from axonn.config.train_config import PrecisionConfig
from axonn.engine import Engine
from axonn.grid import ProcessGrid
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.registry import make_model
from axonn.optim.algorithms.registry import ALGORITHMS
from axonn.optim.algorithms.sgd import SGDConfig
from axonn.perf.timing.memory_model import model_state_bytes
from axonn.spans import SpanKind, SpanRecorder, overlap
from tests.helpers.comparing import check_every_rank
from tests.helpers.rank_pool import RankPool
from tests.helpers.training import Case, train, train_over_mpi

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICE = torch.device("cuda", 0)
MODEL = GPTConfig(name="test", layers=4, hidden=512, heads=8, seq_len=256, vocab=4096)

ALONE = [
    Case(device="cuda", microbatches=2, dropout=0.1),
    Case(device="cuda", microbatches=2, offloaded=True, clip=0.05, recompute=1),
    Case(device="cuda", microbatches=2, offloaded=True, clip=0.05, optimizer=SGDConfig(lr=0.1, nesterov=True)),
    Case(device="cuda", microbatches=2, model_kind="unet", dropout=0.1),
    Case(device="cuda", microbatches=2, schedule="zero-bubble", tied=True),
]
TOGETHER = [
    Case(device="cuda", inter=2, microbatches=4),
    Case(device="cuda", inter=4, microbatches=4, schedule="message-driven-zero-bubble", tied=True),
    Case(device="cuda", row=2, col=2, sub_shards=2, microbatches=2, dropout=0.1),
    Case(device="cuda", data=2, offloaded=True, clip=0.05, k=1, microbatches=2),
    Case(device="cuda", inter=2, col=2, sub_shards=2, microbatches=4, recompute=1),
    Case(device="cuda", model_kind="unet", inter=2, row=2, microbatches=2),
]


@pytest.mark.parametrize("case", ALONE, ids=str)
def test_a_gpu_computes_what_a_cpu_does(case: Case) -> None:
    check_every_rank(case, [train(case, 0, None, None)])


@pytest.mark.parametrize("case", TOGETHER, ids=str)
def test_grids_whose_ranks_share_a_gpu_equal_serial_training(case: Case, pool: RankPool) -> None:
    check_every_rank(case, pool.run(train_over_mpi, case, ranks=case.grid.size))


def engine_of(
    placement: Any = "device", spans: SpanRecorder | None = None, *, name: str = "adamw", **options: Any
) -> Engine:
    config = ALGORITHMS[name].config(name=name, placement=placement, bsize=1_000_000, clip_norm=1.0, buckets_resident=2)
    return Engine(
        make_model(MODEL),
        grid=ProcessGrid(),
        batch_size=8,
        microbatch_size=4,
        optimizer=config,
        precision=PrecisionConfig(compute="bfloat16"),
        device=DEVICE,
        spans=spans,
        **options,
    )


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, MODEL.vocab, (8, MODEL.seq_len + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@pytest.mark.parametrize("placement", ["device", "offloaded"])
@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_no_operation_of_a_batch_waits_for_the_device(name: str, placement: str) -> None:
    engine = engine_of(placement, name=name)
    engine.train_batch(*batch())
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert engine.train_batch(*batch()).applied
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("placement", ["device", "offloaded"])
def test_the_whole_device_is_never_waited_for(placement: str) -> None:
    engine = engine_of(placement, spans=SpanRecorder(0))
    engine.train_batch(*batch())
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        engine.train_batch(*batch())
    names = {event.key for event in profile.key_averages()}
    assert any(name.startswith("cudaLaunchKernel") for name in names), names
    # The profiler itself waits for the device at its end.
    assert sum(e.count for e in profile.key_averages() if e.key == "cudaDeviceSynchronize") <= 1


@pytest.mark.parametrize("placement", ["device", "offloaded"])
def test_model_state_on_the_device_is_what_the_memory_model_says(placement: str) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(DEVICE)
    engine = engine_of(placement)
    parameters = sum(spec.parameter.numel() for spec in engine.specs)
    expected = model_state_bytes(parameters, optimizer=placement, bsize=1_000_000, buckets=2, compute="bfloat16")
    assert torch.cuda.memory_allocated(DEVICE) - before == pytest.approx(expected, rel=0.05)
    said = engine.memory()
    on_device = said["parameters"] + said["gradients"] + said["optimizer_state"] + said["buckets"]
    assert on_device == pytest.approx(expected, rel=0.05)
    assert (said["host"] > 0) == (placement == "offloaded")


def test_spans_lie_in_the_order_in_which_the_gpu_worked() -> None:
    spans = SpanRecorder(0)
    engine = engine_of("offloaded", spans=spans)
    for _ in range(2):
        engine.train_batch(*batch())
    assert all(span.end >= span.start for span in spans.spans)
    last = [span for span in spans.spans if span.step == 1]
    kinds = {span.kind for span in last}
    assert {SpanKind.FORWARD, SpanKind.BACKWARD, SpanKind.OPTIMIZER, SpanKind.COPY} <= kinds
    tasks = [s for s in last if s.kind in (SpanKind.FORWARD, SpanKind.BACKWARD)]
    for one, following in pairwise(tasks):
        assert one.end <= following.start + 1e-4
    assert overlap(last).collective == 0
