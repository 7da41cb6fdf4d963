"""What jobs left becomes records: of every framework, however it ended, and wherever it was cut or changed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from axonn.errors import RecordError
from axonn.records import Record, read_records
from experiments.run_record import configuration_of, function_of
from jobscripts import collection, endings
from jobscripts.collection import Collected, collect, in_order
from jobscripts.generate import Job, hash_of
from jobscripts.submission import attempts
from tests.command_line import CommandLine, tiny
from tests.jobs_left import attempt, fig6_published, fig6_small, old, small_job, trail, with_spans, written
from tests.test_deepspeed_printed import START, iteration

FEW = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
DONE = "[after training is done] datetime: 2026-07-10 05:47:31 "


def gather(folder: Path) -> list[Collected]:
    return collect(folder, results=folder.parent / "measured", command="axonn collect jobs")


def only(folder: Path) -> Record:
    (found,) = gather(folder)
    assert found.record is not None, found.why
    return found.record


def why(folder: Path) -> str:
    """Of a failure."""
    record = only(folder)
    assert record.failure is not None
    assert record.batch_time_s is None
    return f"{record.failure.cause}: {record.failure.detail}"


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Job]:
    """One small job of two ranks that was written, and nothing more."""
    job = small_job("tiny-2r", "axonn", tiny(inter=2, steps=11))
    return written(tmp_path / "jobs", [job]), job


Small = tuple[Path, Job]


def printed(count: int, *, first: int = 1, last: int = 11) -> list[str]:
    """As Megatron-LM and Megatron-DeepSpeed print iterations: 90 seconds, then 10 and a second more each."""
    times = [90.0, *(10.0 + i for i in range(last - 1))]
    return [iteration(i + 1, times[i], f"{9 - i / 10:.6E}", last=last) for i in range(first - 1, count)]


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
    # The engine computes on processors there, of which no peak is known.
    assert (record.machine.device, record.pct_peak) == ("cpu", None)


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
    monkeypatch.setattr(endings, "FRESH_S", 0.0)
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


# --- what is broken


def cut_file(name: str) -> Callable[[Path, Path], None]:
    return lambda folder, job: (job / name).write_bytes((job / name).read_bytes()[:-9])


def change_manifest(folder: Path, job: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"machine": "four-nodes"', '"machine": "summit"'))


def changed_with_its_sum(folder: Path, job: Path) -> None:
    """Work and manifest edited so that they agree."""
    before = hash_of(job / "work.json")
    (job / "work.json").write_text((job / "work.json").read_text().replace('"microbatch_size"', '"microbatch"'))
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace(before, hash_of(job / "work.json")))
    (job / "run" / "attempt-1" / "work.json").write_bytes((job / "work.json").read_bytes())


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut_file("work.json"), "work.json is not what axonn jobs wrote (its sha256 differs)"),
        (lambda folder, job: (job / "rank.sh").write_bytes(b"\xff\xfe"), "rank.sh is not what axonn jobs wrote"),
        (lambda folder, job: (job / "spec.json").unlink(), "spec.json is gone: what ran is not known; put it back"),
        (cut_file("run/spec.json"), "run/spec.json is not what axonn jobs wrote"),
        (cut_file("run/attempt-1/job.sh"), "attempt-1/job.sh is not what axonn jobs wrote"),
        (cut_file("run/batches.jsonl"), "batches.jsonl is not what the job left (its sha256 differs)"),
        (change_manifest, "work.json: says machine 'four-nodes', and the manifest 'summit'; write the jobs anew"),
        (changed_with_its_sum, "config: the key 'microbatch_size' is missing"),
    ],
)
def test_what_was_changed_is_refused_and_the_others_are_collected(
    tmp_path: Path, axonn: CommandLine, spoil: Callable[[Path, Path], None], said: str
) -> None:
    jobs = [small_job(f"tiny-{n}r", "axonn", tiny(inter=n, steps=11)) for n in (1, 2)]
    folder = written(tmp_path / "jobs", jobs)
    for job in jobs:
        path = attempt(folder, job)
        run = trail(folder, job)
        (path / "sha256.txt").write_text(f"{hash_of(run / 'batches.jsonl')}  batches.jsonl\n")
    spoil(folder, folder / jobs[0].name)
    code, out, _ = axonn("collect", folder)
    assert code == 1
    first, second, *_ = out.splitlines()
    assert said in first
    if spoil is not change_manifest:
        assert second == "tiny-2r-axonn: 1.000 s per batch"
        assert [path.stem[:-9] for path in (tmp_path / "measured").glob("*.json")] == ["fig6-four-nodes-tiny-2r-axonn"]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('"name": "tiny-2r-axonn"', '"name": "../tiny"', "is no name of a folder"),
        ('"name": "tiny-2r-axonn"', '"name": ".."', "is no name of a folder"),
        ('"experiment": "fig6"', '"experiment": "/fig6"', "is no name of a folder"),
        ('"machine": "four-nodes"', '"machine": "../x"', "is no name of a folder"),
        ('"tiny-2r-axonn/rank.sh"', '"tiny-2r-axonn/other.sh"', "lack rank.sh"),
        ('"tiny-2r-axonn/spec.json"', '"../spec.json"', "is no file of the job"),
        ('"tiny-2r-axonn/spec.json"', '"tiny-2r-axonn/../spec.json"', "is no file of the job"),
    ],
)
def test_a_manifest_names_nothing_elsewhere(
    small: Small, axonn: CommandLine, before: str, after: str, said: str
) -> None:
    folder, _ = small
    path = folder / "manifest.json"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    axonn.refuses(said, "collect", folder)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("manifest.json", b'{"schema": "axonn-jobs/1", "exp', "manifest.json"),
        ("manifest.json", b"\xff\xfe\x00", "manifest.json"),
        ("submitted.json", b'{"a": [', "submitted.json: is not what axonn submit wrote"),
        ("submitted.json", b"[1, 2]", "submitted.json: is not what axonn submit wrote"),
    ],
)
def test_a_folder_that_is_none_is_refused_in_one_line(
    small: Small, axonn: CommandLine, name: str, content: bytes, said: str
) -> None:
    folder, _ = small
    (folder / name).write_bytes(content)
    axonn.refuses(said, "collect", folder)


@pytest.mark.parametrize("name", ["/etc/hostname", "../work.json", "spans-0.parquet/../../work.json"])
def test_sums_name_nothing_elsewhere(small: Small, name: str) -> None:
    folder, job = small
    (attempt(folder, job) / "sha256.txt").write_text(f"{'0' * 64}  {name}\n")
    assert f"{name} is no file of the run folder" in gather(folder)[0].why


def test_two_folders_have_two_records_and_a_copy_the_same(tmp_path: Path) -> None:
    for place, steps in (("a", 11), ("b", 12)):
        job = small_job("tiny-1r", "axonn", tiny(inter=1, steps=steps))
        folder = written(tmp_path / place, [job])
        attempt(folder, job)
        trail(folder, job)
        gather(folder)
    assert len(list((tmp_path / "measured").glob("*.json"))) == 2
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    gather(tmp_path / "c")
    assert len(list((tmp_path / "measured").glob("*.json"))) == 2


def test_half_a_span_file_is_named(small: Small) -> None:
    folder, job = small
    attempt(folder, job)
    trail(folder, job)
    with_spans(folder, job)
    (path,) = (folder / job.name / "run" / "spans-1.parquet").glob("[0-9]*.parquet")
    path.write_bytes(path.read_bytes()[:100])
    (found,) = gather(folder)
    assert found.broken
    assert str(path) in found.why
    path.unlink()
    assert only(folder).parts_s == {}


GARBAGE = st.sampled_from([b"", b"\xff\x00\xfe", b"\xe2\x82", b'{"step": 3, "lo', b"\n\n{}\n[]\n"])


@pytest.mark.parametrize("which", ["axonn", "megatron", "deepspeed"])
def test_a_log_may_be_cut_anywhere(tmp_path_factory: pytest.TempPathFactory, which: str) -> None:
    """The batches before the cut are there, none is invented, and there is a time only where all are there."""
    base = tmp_path_factory.mktemp("cut")
    job = small_job("tiny-1r", "axonn", tiny(inter=1, steps=11))
    if which != "axonn":
        job = fig6_published({"megatron": "Megatron-LM", "deepspeed": "DeepSpeed"}[which], which)
    folder = written(base / "jobs", [job], machine="four-nodes" if which == "axonn" else "summit")
    start = attempt(folder, job, output="\n".join([*START, *printed(11), DONE]) + "\n")
    path = start / "output.txt"
    # The job's own sums are of what was cut.
    (start / "sha256.txt").write_text("")
    if which == "axonn":
        path = trail(folder, job) / "batches.jsonl"
    whole = only(folder)
    content = path.read_bytes()

    @FEW
    @given(at=st.integers(min_value=0, max_value=len(content)), garbage=GARBAGE)
    def check(at: int, garbage: bytes) -> None:
        path.write_bytes(content[:at] + garbage)
        old(folder)
        record = only(folder)
        count = len(record.batch_times_s)
        assert record.batch_times_s == whole.batch_times_s[:count]
        assert (record.failure is None) == (count == 11)
        if record.failure is not None:
            assert f"{count} of 11 batches are done" in record.failure.detail

    check()


@FEW
@given(names=st.sets(st.sampled_from(["sha256.txt", "started.txt", "versions.txt", "nodes.txt", "ended.json", "."])))
def test_what_is_missing_of_an_attempt_costs_no_more_than_that(names: set[str]) -> None:
    with tempfile.TemporaryDirectory() as place:
        job = small_job("tiny-1r", "axonn", tiny(inter=1, steps=11))
        folder = written(Path(place) / "jobs", [job])
        path = attempt(folder, job)
        trail(folder, job)
        for name in names - {"."}:
            (path / name).unlink()
        if "." in names:
            shutil.rmtree(path)
        old(folder)
        (found,) = gather(folder)
        if "." in names:
            assert found.record is None
            assert found.why == "was not submitted"
        elif "sha256.txt" in names and "ended.json" not in names:
            assert found.broken
            assert "sha256.txt is gone: whether what the job left was changed is not known" in found.why
        else:
            assert found.record is not None
            assert found.record.batch_time_s == 1.0
            assert (found.record.created is None) == ("started.txt" in names)


def test_a_failure_hides_no_time_of_an_earlier_run(small: Small) -> None:
    folder, job = small
    attempt(folder, job)
    trail(folder, job)
    whole = only(folder)
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / job.name / "run")
    attempt(copy, job, reason="failed", status=1)
    (failed,) = gather(copy)
    assert failed.record is not None
    assert failed.record.failure is not None
    assert failed.hidden
    (path,) = (folder.parent / "measured").glob("*.json")
    assert read_records(path) == [whole]
    # The next time is one again.
    attempt(copy, job, number=2)
    trail(copy, job)
    (later,) = gather(copy)
    assert not later.hidden
    assert read_records(path) == [later.record]


def test_starts_that_differ_are_named(small: Small) -> None:
    folder, job = small
    first = attempt(folder, job, number=1, reason="wall-limit", status=75)
    attempt(folder, job, number=2)
    trail(folder, job)
    assert only(folder).note is None
    (first / "commit.txt").write_text("ba9876543210\n")
    (first / "versions.txt").write_text("Python 3.12.1\naxonn-reproduction==0.1.0\ntorch==2.5.0\n")
    note = only(folder).note
    assert note is not None
    assert "its starts differ: commit ba9876543210, then 0123456789ab; Python 3.12.1, then 3.11.4" in note
    assert "torch 2.5.0, then" in note
    # Of a start that could not write it, nothing is known.
    (first / "commit.txt").unlink()
    (first / "versions.txt").unlink()
    assert only(folder).note is None


def test_no_jobs_at_all(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="is this the folder that axonn jobs wrote"):
        gather(tmp_path)


def test_the_records_file_is_json_that_others_read(small: Small) -> None:
    folder, job = small
    attempt(folder, job)
    trail(folder, job)
    only(folder)
    (path,) = (folder.parent / "measured").glob("*.json")
    assert json.loads(path.read_text())["schema"] == "axonn-records/1"
