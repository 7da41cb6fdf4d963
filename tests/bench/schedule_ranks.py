"""What runs on every rank of make bench-schedules: python -m tests.bench.schedule_ranks SPEC.json OUT.json."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from axonn.distributed.runtime import Runtime, connect
from axonn.engine import Engine
from axonn.grid import ProcessGrid
from axonn.schedules import Kind, ScheduleSpec, Task
from axonn.spans import Span, SpanKind, SpanRecorder
from tests.bench.sleeping import Compute, DelayedTransport, SleepModel

KINDS = {
    SpanKind.FORWARD: Kind.FORWARD,
    SpanKind.BACKWARD: Kind.BACKWARD,
    SpanKind.BACKWARD_INPUT: Kind.INPUT,
    SpanKind.BACKWARD_WEIGHT: Kind.WEIGHT,
}
WAITS = (SpanKind.RECEIVE_WAIT,)


class Case:
    """One schedule on one rank."""

    def __init__(
        self, settings: dict[str, Any], case: dict[str, Any], runtime: Runtime, wire: DelayedTransport
    ) -> None:
        spec = ScheduleSpec(**case)
        self._layout = spec.layout(settings["stages"])
        self._compute = Compute(settings["forward_s"], self._layout, settings["jitter"])
        self._stage = runtime.rank
        self._spans = SpanRecorder(runtime.rank)
        count = settings["microbatches"]
        self._inputs = torch.arange(count, dtype=torch.float32).view(count, 1)
        self._engine = Engine(
            SleepModel(self._layout, self._compute),
            grid=ProcessGrid(inter=settings["stages"]),
            rank=runtime.rank,
            batch_size=count,
            microbatch_size=1,
            transport=wire,
            collectives=runtime.collectives,
            schedule=spec,
            spans=self._spans,
        )

    def run(self) -> tuple[float, float, list[float]]:
        """Start of the first task and end of the last of a batch here, and what tasks took beyond their sleep."""
        self._spans.spans.clear()
        self._engine.train_batch(self._inputs, self._inputs)
        done = sorted((s for s in self._spans.spans if s.kind in WAITS or s.kind in KINDS), key=lambda s: s.start)
        tasks = [s for s in done if s.kind in KINDS]
        # From the end of the task before to the end of this one, where the rank did not wait in between.
        beyond = [b.end - a.end - self._asked(b) for a, b in pairwise(done) if a.kind in KINDS and b.kind in KINDS]
        return tasks[0].start, tasks[-1].end, beyond

    def _asked(self, span: Span) -> float:
        return self._compute(self._stage, Task(KINDS[span.kind], span.chunk, span.microbatch))


def main(spec_file: str, out_file: str) -> None:
    torch.set_num_threads(1)
    settings = json.loads(Path(spec_file).read_text())
    with connect(ProcessGrid(inter=settings["stages"])) as runtime:
        assert runtime.transport is not None
        wire = DelayedTransport(runtime.transport)
        cases = [Case(settings, case, runtime, wire) for case in settings["cases"].values()]

        def batch(case: Case, latency: float) -> tuple[float, list[float]]:
            wire.latency = latency
            runtime.barrier()
            start, end, beyond = case.run()
            ends: list[Any] = [None] * settings["stages"]
            # The clock of one machine is one.
            dist.all_gather_object(ends, (start, end))
            return max(e for _, e in ends) - min(s for s, _ in ends), beyond

        # The first round warms up, and is without latency: what is left are the constants of the machine.
        overheads = [o for case in cases for o in batch(case, 0.0)[1]]
        constants: list[Any] = [None] * settings["stages"]
        dist.all_gather_object(constants, (median(overheads), median(wire.waited_for)))
        times = [
            [[batch(case, share * settings["forward_s"])[0] for case in cases] for share in settings["shares"]]
            for _ in range(settings["rounds"])
        ]
        if runtime.rank == 0:
            result = {
                "times": times,
                "task_overhead_s": median(overhead for overhead, _ in constants),
                "message_s": median(message for _, message in constants),
            }
            Path(out_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
