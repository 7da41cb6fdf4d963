"""What was cut, changed or lost of a folder of jobs is refused or does no harm, and no time is invented of it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from axonn.errors import RecordError
from axonn.observability.records import read_records
from jobscripts.generate import hash_of
from tests.baselines.test_deepspeed_printed import START
from tests.helpers.command_line import CommandLine, tiny
from tests.helpers.job_folders import (
    DONE,
    Small,
    attempt,
    fig6_published,
    gather,
    old,
    only,
    printed,
    small_job,
    trail,
    with_spans,
    written,
)

FEW = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


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
