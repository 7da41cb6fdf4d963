"""Folders of jobs as runs leave them, made up: attempts, logs of each framework, trails of our own ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from axonn.observability.records import Record
from axonn.spans import Span, SpanKind, SpanRecorder
from axonn.training.framework import load_adapter, load_framework
from axonn.training.supervision.cluster_launch import launch_worker
from experiments.cluster_work import SmallWork, cluster_work
from experiments.definition import ROOT, load_experiment
from experiments.runner import measured_work
from experiments.validation.published_sets import case_of
from jobscripts.collection import Collected, collect
from jobscripts.generate import ClusterJob, hash_of, write_jobs
from jobscripts.launchers import load_launcher
from jobscripts.schedulers import Resources, load_scheduler
from jobscripts.site import Site
from jobscripts.system import System
from tests.baselines.test_deepspeed_printed import iteration

DONE = "[after training is done] datetime: 2026-07-10 05:47:31 "
"""The last line of Megatron-LM and Megatron-DeepSpeed."""
Small = tuple[Path, ClusterJob]
"""Of the fixture `small`: the folder, and its one job."""
LONG_AGO = 1_700_000_000
"""No file of a job that ended is fresh."""
FIG6 = load_experiment(ROOT / "experiments" / "fig6.yaml")


def small_job(name: str, framework: str, config: Any, *, warmup: int = 1) -> ClusterJob:
    """What an experiment measures on one machine."""
    work = SmallWork(name=name, framework=framework, config=config, warmup_batches=warmup)
    job = f"{name}-{framework}".replace("/", "-")
    return ClusterJob(
        name=job,
        framework=load_framework(framework).label,
        adapter=framework,
        work=work,
        launch=launch_worker(framework, config),
        resources=resources(job, work.gpus),
    )


def fig6_small(*, most: int = 2) -> list[ClusterJob]:
    """The small points of Figure 6 with our engine and PyTorch."""
    found = measured_work(FIG6, most=most)
    return [small_job(label, name, config) for label, config, name in found if name in ("axonn", "pytorch/1f1b")]


def fig6_published(framework: str, adapter: str, model: str = "gpt-12b") -> ClusterJob:
    """A point at the published scale."""
    panel = FIG6.predicted
    assert panel is not None
    point = next(p for p in panel.points if (p.framework, p.model) == (framework, model))
    work = cluster_work(case_of(panel, point), machine="summit", name=point.name)
    name = f"{point.name}-{adapter}"
    return ClusterJob(
        name=name,
        framework=framework,
        adapter=adapter,
        work=work,
        launch=load_adapter(adapter).launch(work),
        resources=resources(name, work.gpus),
    )


def resources(name: str, ranks: int) -> Resources:
    return Resources(
        name=name, nodes=ranks, ranks_per_node=1, gpus_per_node=0, cores_per_rank=1, seconds=3600, warn_seconds=300,
        account=None, queue=None, constraint=None, options=[],
    )  # fmt: skip


def written(folder: Path, jobs: Sequence[ClusterJob], *, machine: str = "four-nodes", experiment: str = "fig6") -> Path:
    """The folder of these jobs, of a machine without a batch system, so that nobody but the files says anything."""
    system = System(machine=machine, scheduler="none", launcher="mpiexec", cores_per_rank=1, source="a test")
    write_jobs(
        jobs, folder, experiment=experiment, command="axonn jobs", system=system, site=Site(),
        scheduler=load_scheduler("none"), launcher=load_launcher("mpiexec"),
    )  # fmt: skip
    return folder


def attempt(
    folder: Path,
    job: ClusterJob,
    *,
    number: int = 1,
    output: str | bytes = "",
    reason: str | None = "finished",
    status: int = 0,
    ended: str | None = None,
) -> Path:
    """A start of a job: its copies, what it printed, and how it ended (`reason` None: it says nothing of that)."""
    own = folder / job.name
    path = own / "run" / f"attempt-{number}"
    path.mkdir(parents=True)
    for name in ("job.sh", "rank.sh", "work.json"):
        (path / name).write_bytes((own / name).read_bytes())
    for name in job.launch.files:
        (own / "run" / name).write_bytes((own / name).read_bytes())
    (path / "output.txt").write_bytes(output if isinstance(output, bytes) else output.encode())
    (path / "nodes.txt").write_text("node1\nnode2\n")
    (path / "started.txt").write_text(f"2026-03-01T{number:02d}:00:00Z\n")
    (path / "versions.txt").write_text(
        "Python 3.11.4\naxonn-reproduction==0.1.0\ntorch==2.6.0\nmegatron-core==0.4\ndeepspeed==0.5\n"
    )
    (path / "environment.txt").write_text("MASTER_ADDR=node1\nOMP_NUM_THREADS=7\n")
    (path / "clocks-node1.txt").write_text("0, Tesla V100-SXM2-16GB, 1530 MHz, 877 MHz, 60 W\n")
    (path / "commit.txt").write_text("0123456789ab\n")
    if reason is not None:
        said = json.dumps({"job": str(number), "status": status, "reason": reason}) + "\n"
        (path / "ended.json").write_text(said if ended is None else ended)
        (path / "sha256.txt").write_text(f"{hash_of(path / 'output.txt')}  {path.name}/output.txt\n")
    old(folder)
    return path


def old(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (LONG_AGO, LONG_AGO))


def trail(
    folder: Path,
    job: ClusterJob,
    *,
    batches: int | None = None,
    seconds: Sequence[float] = (),
    first: Sequence[int] = (0,),
    loss: float = 4.0,
    state: str = "done",
    **details: Any,
) -> Path:
    """What our ranks leave: a second for each batch but the first, unless told otherwise. Returns the run folder."""
    run = folder / job.name / "run"
    run.mkdir(exist_ok=True)
    steps, ranks = job.work.steps, job.work.gpus
    count = steps if batches is None else batches
    times = list(seconds) or [5.0, *[1.0] * (steps - 1)]
    rows = [
        {"step": i, "loss": loss - 0.01 * i, "seconds": times[i]} | ({"first": True} if i in first else {})
        for i in range(count)
    ]
    (run / "batches.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = {"memory_bytes": 7, "memory": {"parameters": 2, "activations": 3}, "bytes_per_batch": {"inter": 11}}
    for rank in range(min(ranks, 4)):
        own = whole if state in ("done", "stopped") else {}
        said = {"state": state, "pid": 1, "time": 9.0 + rank} | own | details
        (run / f"rank-{rank}.json").write_text(json.dumps(said))
    old(folder)
    return run


def with_spans(folder: Path, job: ClusterJob) -> None:
    """Of every rank and batch: half of it computes, a quarter waits, the rest optimises; a pause after batch 5."""
    for rank in range(job.work.gpus):
        recorder = SpanRecorder(rank, folder=folder / job.name / "run" / f"spans-{rank}.parquet")
        for step in range(job.work.steps):
            now = step + (100.0 if step > 5 else 0.0)
            for kind in (SpanKind.FORWARD, SpanKind.BACKWARD, SpanKind.IDLE, SpanKind.OPTIMIZER):
                recorder.spans.append(span(rank, kind, step, now, now + 0.25))
                now += 0.25
        recorder.flush()
    old(folder)


def span(rank: int, kind: SpanKind, step: int, start: float, end: float) -> Span:
    return Span(rank, kind, step, microbatch=0, layer=0, direction=-1, start=start, end=end)


def gather(folder: Path) -> list[Collected]:
    """Records go beside the folder."""
    return collect(folder, results=folder.parent / "measured", command="axonn collect jobs")


def only(folder: Path) -> Record:
    """Of the one job."""
    (found,) = gather(folder)
    assert found.record is not None, found.why
    return found.record


def printed(count: int, *, first: int = 1, last: int = 11) -> list[str]:
    """As Megatron-LM and Megatron-DeepSpeed print iterations: 90 seconds, then 10 and a second more each."""
    times = [90.0, *(10.0 + i for i in range(last - 1))]
    return [iteration(i + 1, times[i], f"{9 - i / 10:.6E}", last=last) for i in range(first - 1, count)]
