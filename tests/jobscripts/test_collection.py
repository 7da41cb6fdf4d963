"""What jobs left becomes records: of every framework, however it ended."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from axonn.observability.records import read_records
from axonn.training.run_record import configuration_of, function_of
from jobscripts import collection, job_failure
from jobscripts.collection import in_order
from jobscripts.submission import attempts
from tests.baselines.test_deepspeed_printed import START
from tests.helpers.job_folders import (
    DONE,
    Small,
    attempt,
    fig6_published,
    fig6_small,
    gather,
    only,
    printed,
    trail,
    with_spans,
    written,
)


def why(folder: Path) -> str:
    """Of a failure."""
    record = only(folder)
    assert record.failure is not None
    assert record.batch_time_s is None
    return f"{record.failure.cause}: {record.failure.detail}"


# --- what is whole


def test_small_points_are_recorded_as_axonn_run_does(tmp_path: Path) -> None:
    jobs = fig6_small()
    folder = written(tmp_path / "jobs", jobs)
    for job in jobs:
        attempt(folder, job)
        trail(folder, job)
    with_spans(folder, jobs[2])
    found = gather(folder)
    assert [one.record is not None and one.record.failure for one in found] == [None] * 4
    record = found[2].record
    assert record is not None
    config: Any = jobs[2].work.config  # type: ignore[union-attr]
    assert (record.experiment, record.point, record.ran.framework) == ("fig6", "gpt-8x256-2r", "AxoNN")
    assert (record.batch_time_s, record.warmup_batches, record.batch_times_s[0]) == (1.0, 1, 5.0)
    assert len(record.losses) == config.steps
    assert record.configuration == configuration_of(config)
    assert (record.memory_bytes, record.memory_parts["activations"], record.memory_of_all["activations"]) == (7, 3, 6)
    assert record.bytes_per_batch == {"inter": 11}
    assert record.phases_s["inter_layer"] == pytest.approx(0.5)
    assert record.asked.gpus == 2
    assert record.asked.precision == "float32"
    assert record.tflops_per_gpu_without_recompute == pytest.approx(record.asked.flops(recompute=False) / 2e12)
    assert record.pct_peak is None
    # And says where it ran.
    m = record.machine
    assert (m.name, m.host, m.device, m.python) == ("four-nodes", "node1 and 1 more", "cpu", "3.11.4")
    assert (m.torch, m.commit, m.threads_per_rank) == ("2.6.0", "0123456789ab", 7)
    assert record.ran.version == "axonn-reproduction 0.1.0, torch 2.6.0"
    assert (record.created, record.source) == ("2026-03-01T01:00:00+00:00", "axonn collect jobs")
    run = folder / jobs[2].name / "run"
    assert record.run_folder == str(run)
    files = sorted((tmp_path / "measured").glob("*.json"))
    assert [path.stem[:-9] for path in files] == sorted(f"fig6-four-nodes-{job.name}" for job in jobs)
    assert read_records(run / "record.json") == [record]
    # Again it is the same to the byte.
    before = [path.read_bytes() for path in files]
    gather(folder)
    assert [path.read_bytes() for path in files] == before


def test_batches_after_a_new_start_are_left_out(small: Small) -> None:
    folder, job = small
    attempt(folder, job, reason="wall-limit", status=75)
    attempt(folder, job, number=2)
    trail(folder, job, seconds=[9.0, *[1.0] * 5, 7.0, *[1.0] * 4], first=[0, 6])
    with_spans(folder, job)
    record = only(folder)
    assert record.batch_time_s == 1.0
    assert record.batch_times_s[6] == 7.0
    assert record.note is not None
    assert "new starts with batch 6" in record.note
    assert record.created == "2026-03-01T02:00:00+00:00"
    # The time between the starts is nobody's.
    assert sum(record.parts_s.values()) == pytest.approx(1.0)
    # Where nothing else is there, there is no time.
    trail(folder, job, seconds=[9.0, *[2.0] * 10], first=range(11))
    assert why(folder) == "error: no batch but those that warm up: the first 1 and the first of each new start"
    assert "leaves out" not in str(only(folder).note)


@pytest.mark.parametrize(("framework", "adapter"), [("Megatron-LM", "megatron"), ("DeepSpeed", "deepspeed")])
def test_printed_logs_of_all_attempts_are_one_run(tmp_path: Path, framework: str, adapter: str) -> None:
    job = fig6_published(framework, adapter)
    folder = written(tmp_path / "jobs", [job], machine="summit")
    # The first attempt was cut in the middle of a line and of a character.
    cut = "\n".join([*START, *printed(6)]).encode()[:-40] + b"\xe2\x82"
    attempt(folder, job, number=1, output=cut, reason=None)
    # Started by hand, with a number that is not in order.
    attempt(folder, job, number=3, output="\n".join([*START, *printed(11, first=6), DONE]))
    record = only(folder)
    assert record.failure is None
    assert record.batch_times_s == pytest.approx([90.0, *(10.0 + i for i in range(10))])
    # Without the iteration that the second attempt began with.
    rest = [10.0 + i for i in range(10) if i != 4]
    assert record.batch_time_s == pytest.approx(sum(rest) / len(rest))
    assert record.note is not None
    assert record.machine.device == "Tesla V100-SXM2-16GB"
    assert adapter in record.ran.version
    rate = record.asked.flops(recompute=True) / (record.batch_time_s or 0) / 48 / 1e12
    assert record.tflops_per_gpu == pytest.approx(rate)
    assert record.pct_peak == pytest.approx(100 * rate / 125)
    assert (record.asked.precision, record.ran.grid.col) == ("float16", 3)


def test_published_points_of_our_ranks_have_what_they_left(tmp_path: Path) -> None:
    job = fig6_published("AxoNN", "axonn")
    folder = written(tmp_path / "jobs", [job], machine="summit")
    attempt(folder, job)
    trail(folder, job)
    record = only(folder)
    assert record.failure is None
    assert (record.point, record.asked.gpus, record.asked.precision) == ("gpt-12b-48", 48, "float16")
    assert (record.batch_time_s, record.memory_parts) == (1.0, {"parameters": 2, "activations": 3})
    assert record.configuration is not None
    assert record.tflops_per_gpu is not None
    assert record.machine.device == "Tesla V100-SXM2-16GB"
    assert record.pct_peak == pytest.approx(100 * record.tflops_per_gpu / 125)


def test_attempts_are_in_the_order_in_which_they_started(small: Small) -> None:
    folder, job = small
    for number in (3, 10, 2):
        attempt(folder, job, number=number)
    names = [path.name for path in in_order(attempts(folder / job.name))]
    assert names == ["attempt-2", "attempt-3", "attempt-10"]


def test_an_attempt_that_does_not_say_when_it_started_stands_by_the_time_of_its_folder(small: Small) -> None:
    folder, job = small
    for number in (1, 2):
        attempt(folder, job, number=number)
    # Copied, the second one first.
    os.utime(folder / job.name / "run" / "attempt-1")
    newest = attempt(folder, job, number=3)
    (newest / "started.txt").unlink()
    os.utime(newest)
    assert [path.name for path in attempts(folder / job.name)] == ["attempt-1", "attempt-2", "attempt-3"]


# --- what failed


def slurm_says(monkeypatch: pytest.MonkeyPatch, state: str, reason: str | None = None) -> None:
    """Of the job, in place of the scheduler."""
    asked = collection.standings

    def standings(folder: Path) -> list[Any]:
        return [replace(one, id="1", state=state) for one in asked(folder)]

    monkeypatch.setattr(collection, "standings", standings)


OOM = "RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB"


@pytest.mark.parametrize(
    ("state", "ending", "output", "said"),
    [
        (None, {"reason": "wall-limit", "status": 75}, "", "timeout: the job reached its wall limit; 5 of 11 batches"),
        (
            "timed-out",
            {"reason": None},
            "",
            "timeout: the job reached its wall limit; 5 of 11 batches are",
        ),
        ("node-failure", {"reason": None}, "", "dead-rank: a node of the job failed; 5 of 11"),
        ("cancelled", {"reason": None}, "", "interrupted: the job was cancelled; 5 of 11"),
        ("out-of-memory", {"reason": "failed", "status": 1}, "", "out-of-memory: the scheduler ended the job for its"),
        ("failed", {"reason": "failed", "status": 1}, OOM, "out-of-memory: RuntimeError: CUDA out of memory"),
        # What they ran out of was the cause, whatever ended them.
        ("cancelled", {"reason": "wall-limit", "status": 1}, OOM, "out-of-memory: RuntimeError: CUDA out of memory"),
        # A script that is being ended only knows that it was.
        ("node-failure", {"reason": "cancelled", "status": 143}, "", "dead-rank: a node of the job failed; 5 of 11"),
        ("out-of-memory", {"reason": "cancelled", "status": 143}, "", "out-of-memory: the scheduler ended the job"),
        ("timed-out", {"reason": "cancelled", "status": 143}, "", "timeout: the job reached its wall limit; 5 of 11"),
        ("out-of-memory", {"reason": "wall-limit", "status": 143}, "", "timeout: the job reached its wall limit"),
        (None, {"reason": "cancelled", "status": 143}, "", "interrupted: the job was cancelled; 5 of 11"),
        (None, {"reason": "failed", "status": 3}, "", "error: the job ended with exit status 3; 5 of 11 batches"),
        (None, {"reason": "failed", "status": 3}, "", "/run/attempt-1/output.txt"),
        (None, {"reason": "failed", "ended": '{"job": "1", "st'}, "", "ended.json is cut short; 5 of 11"),
        (None, {"reason": "failed", "ended": "\xff{["}, "", "ended.json is cut short; 5 of 11"),
        (None, {"reason": None}, "", "error: the job ended without a word"),
    ],
)
def test_a_failure_says_its_cause_and_what_to_do(
    small: Small, *, monkeypatch: pytest.MonkeyPatch, state: str | None, ending: Any, output: str, said: str
) -> None:
    folder, job = small
    attempt(folder, job, output=f"Traceback (most recent call last):\n{output}\n" if output else "", **ending)
    trail(folder, job, batches=5, state="started")
    if state is not None:
        slurm_says(monkeypatch, state)
    detail = why(folder)
    assert said in detail
    assert len(only(folder).losses) == 5
    hints = ("axonn submit", "microbatch_size", "output.txt")
    assert any(hint in detail for hint in hints)


def test_a_loss_that_is_no_number_is_one_also_in_the_last_batch(small: Small) -> None:
    folder, job = small
    attempt(folder, job, reason="failed", status=1)
    said = "FloatingPointError: the loss of batch 10 is nan; lower optimizer.lr"
    run = trail(folder, job, state="failed", cause="nan", detail=said)
    rows = (run / "batches.jsonl").read_text().splitlines()
    rows[-1] = '{"step": 10, "loss": NaN, "seconds": 1.0}'
    (run / "batches.jsonl").write_text("\n".join(rows) + "\n")
    assert why(folder).startswith(f"nan: {said}; 11 of 11 batches")


def test_what_happened_after_the_last_batch_is_no_failure(small: Small) -> None:
    folder, job = small
    attempt(folder, job, reason="failed", status=1, output="srun: error: node2: task 1: Killed\n")
    trail(folder, job)
    assert only(folder).batch_time_s == 1.0


def test_a_job_that_never_started_says_so(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = small
    (found,) = gather(folder)
    assert (found.record, found.why, found.broken) == (None, "was not submitted", False)
    slurm_says(monkeypatch, "cancelled")
    assert why(folder).startswith("interrupted: the job was cancelled; 0 of 11")
    slurm_says(monkeypatch, "failed")
    assert why(folder).startswith("error: the job ended before it started anything; 0 of 11")


def test_what_an_earlier_job_said_is_no_cause_of_a_later_ones_end(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, job = small
    attempt(folder, job, number=7, reason="failed", status=3, output=OOM)
    trail(folder, job, batches=5, state="started")
    slurm_says(monkeypatch, "cancelled")
    assert why(folder).startswith("interrupted: the job was cancelled; 5 of 11")
    slurm_says(monkeypatch, "failed")
    assert why(folder).startswith("error: the job ended before it started anything; 5 of 11")


@pytest.mark.parametrize(("state", "said"), [("running", "runs"), ("waiting", "waits")])
def test_what_runs_or_waits_has_no_record_yet(
    small: Small, monkeypatch: pytest.MonkeyPatch, state: str, said: str
) -> None:
    folder, job = small
    attempt(folder, job, reason="wall-limit", status=75)
    trail(folder, job, batches=5)
    slurm_says(monkeypatch, state)
    (found,) = gather(folder)
    assert (found.record, found.why, found.broken) == (None, said, False)
    assert not (folder.parent / "measured").exists()


def test_where_nobody_knows_fresh_files_are_those_of_a_run(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, job = small
    attempt(folder, job, reason=None)
    run = trail(folder, job, batches=5, state="started")
    (run / "rank-0.alive").touch()
    assert gather(folder)[0].why == "runs, as its files say"
    monkeypatch.setattr(job_failure, "FRESH_S", 0.0)
    assert "without a word" in why(folder)


def test_other_losses_make_a_failure_not_a_time(tmp_path: Path) -> None:
    jobs = fig6_small(most=1)
    folder = written(tmp_path / "jobs", jobs)
    assert len({function_of(job.work.config) for job in jobs}) == 1  # type: ignore[union-attr]
    for job, loss in zip(jobs, (4.0, 4.001), strict=True):
        attempt(folder, job)
        trail(folder, job, loss=loss)
    first, second = (one.record for one in gather(folder))
    assert first is not None
    assert second is not None
    assert first.failure is None
    assert second.failure is not None
    assert second.failure.cause == "not-comparable"
    assert "losses differ from those of AxoNN (gpt-4x256-1r) by 2.6e-04" in second.failure.detail
    assert read_records(folder / jobs[1].name / "run" / "record.json") == [second]
