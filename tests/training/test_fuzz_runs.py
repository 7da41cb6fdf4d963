"""What runs and jobs leave, damaged: nothing of it ends in a traceback, and what is cut is never taken for whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axonn.errors import RecordError
from axonn.observability.records import read_records, write_records
from axonn.spans import Span, SpanKind, read_spans, write_spans
from axonn.training.metrics import BATCHES, Tail, read_rows
from axonn.training.run_outcome import outcome_of
from axonn.training.run_record import run_record
from experiments.compare_records import compare, load, table_of
from jobscripts.attempts import all_done, reason_of, steps_of
from jobscripts.generate import hash_of, load_manifest
from jobscripts.job_status import table
from jobscripts.submission import standings, submitted
from plots.figures import baselines, gpu
from plots.summary import mape, measured_tables, rows_of, wrong_orders
from plots.trace_command import find_run, load_steps, trace
from tests.helpers.command_line import tiny
from tests.helpers.fuzzing import altered, damaged, fuzz, read_or_refused, special_files
from tests.helpers.job_folders import Small, attempt, gather, old, trail, with_spans
from tests.observability.test_records import FAILED, record

RECORDS = [
    record(parts_s={"compute": 0.2}, phases_s={"optimizer": 0.1}, memory_bytes=7),
    record(**FAILED),
    record(kind="published", point="other", batch_times_s=[], losses=[]),
]
ROW = {"framework": "AxoNN", "kind": "measured", "model": "gpt", "gpus": 2, "batch_time_s": 1.5, "failure": None}
SUMMARY = {"rows": [ROW, ROW | {"framework": "PyTorch", "batch_time_s": 2.0}]}
STEPS, RANKS = 6, 2


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("records") / "records.json"
    write_records(path, RECORDS)
    return path.read_bytes()


def use_records(path: Path) -> bool:
    """Whether they were read; what reads records takes whatever is valid."""
    found = read_or_refused(lambda: read_records(path), names=path)
    if found is None:
        return False
    rows = rows_of([r for r in found if r.kind == "published"], [r for r in found if r.kind != "published"])
    json.dumps(rows, allow_nan=True)
    mape(rows)
    wrong_orders(rows, "measured")
    list(measured_tables(rows, [r for r in found if r.failure is not None]))
    return True


@fuzz(150)
@given(choice=st.data())
def test_damaged_records(tmp_path: Path, records: bytes, choice: st.DataObject) -> None:
    path = tmp_path / "damaged.json"
    path.write_bytes(choice.draw(damaged(records)))
    use_records(path)


@fuzz(150)
@given(choice=st.data())
def test_records_with_other_values(tmp_path: Path, records: bytes, choice: st.DataObject) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps(choice.draw(altered(json.loads(records)))), encoding="utf-8")
    use_records(path)


def test_records_that_are_cut_are_never_whole(tmp_path: Path, records: bytes) -> None:
    path = tmp_path / "cut.json"
    for length in range(len(records) - 2):
        path.write_bytes(records[:length])
        assert not use_records(path), f"{length} of {len(records)} bytes were taken for all"


def compare_or_refused(path: Path) -> None:
    found = read_or_refused(lambda: load([path]), names=path)
    if found is not None:
        read_or_refused(lambda: table_of(compare(found, "AxoNN"), "AxoNN"), names="AxoNN")


@fuzz(100)
@given(choice=st.data())
def test_summaries_with_other_values_are_compared_or_refused(tmp_path: Path, choice: st.DataObject) -> None:
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(choice.draw(altered(SUMMARY))), encoding="utf-8")
    compare_or_refused(path)


@fuzz(60)
@given(choice=st.data())
def test_damaged_summaries_are_compared_or_refused(tmp_path: Path, choice: st.DataObject) -> None:
    path = tmp_path / "summary.json"
    path.write_bytes(choice.draw(damaged(json.dumps(SUMMARY, indent=1).encode())))
    compare_or_refused(path)
    for module in (baselines, gpu):
        read_or_refused(lambda module=module: module.load(path), names=path)  # type: ignore[misc]


@pytest.mark.parametrize("module", [baselines, gpu])
def test_a_summary_that_cannot_be_drawn_is_refused(module: Any, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({"rows": [{"part": "step", "workload": "x", "tflops": "7"}]}), encoding="utf-8")
    with pytest.raises(RecordError, match=r"; run: make"):
        module.main([str(path)])


@pytest.mark.parametrize("read", [read_records, lambda path: load([path]), baselines.load, gpu.load, read_spans])
def test_what_is_no_file(read: Callable[[Path], Any], tmp_path: Path) -> None:
    for path in special_files(tmp_path, ".json"):
        if path.name == "folder.json":
            (path / "inside.json").write_text("{", encoding="utf-8")
        if path.name == "folder.json" and read is read_spans:
            continue
        with pytest.raises(RecordError) as caught:
            read(path)
        assert str(path) in str(caught.value)


# Spans

SPANS = [
    Span(rank, kind, step, 0, 0, -1, step + 0.25 * i, step + 0.25 * (i + 1))
    for rank in range(RANKS)
    for step in range(STEPS)
    for i, kind in enumerate((SpanKind.FORWARD, SpanKind.BACKWARD, SpanKind.IDLE, SpanKind.OPTIMIZER))
]


@fuzz(200)
@given(choice=st.data())
def test_spans_are_what_was_written_or_refused(tmp_path: Path, choice: st.DataObject) -> None:
    path = tmp_path / "spans.parquet"
    write_spans(path, SPANS)
    path.write_bytes(choice.draw(damaged(path.read_bytes())))
    found = read_or_refused(lambda: read_spans(path), names=path)
    # Pages have checksums: a time that was changed on the disk is no time.
    assert found is None or found == SPANS or all(span in SPANS for span in found)


def test_spans_that_are_cut_are_refused_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / "spans.parquet"
    write_spans(path, SPANS)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(RecordError, match=r"spans\.parquet"):
            read_spans(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"start": float("nan")}, "a time that is no number"), ({"end": float("inf")}, "a time that is no number")],
)
def test_spans_have_times(tmp_path: Path, changes: dict[str, float], said: str) -> None:
    write_spans(tmp_path / "spans.parquet", [SPANS[0]._replace(**changes)])  # type: ignore[arg-type]
    with pytest.raises(RecordError, match=said):
        read_spans(tmp_path / "spans.parquet")


# Run folders


@pytest.fixture
def run(small: Small) -> Path:
    """The folder of a run, as its own ranks leave it."""
    folder, job = small
    with_spans(folder, job)
    path = trail(folder, job)
    (path / "spec.json").write_text(json.dumps({"config": {"grid": {"inter": 2}}}))
    return path


def hurt(choice: st.DataObject, path: Path) -> None:
    """Damages a file, or puts a folder, nothing, or another's bytes in its place."""
    content = path.read_bytes()
    match choice.draw(st.sampled_from(["bytes", "bytes", "values", "gone", "folder", "empty"])):
        case "values" if path.suffix == ".json":
            path.write_text(json.dumps(choice.draw(altered(json.loads(content)))), encoding="utf-8")
        case "gone":
            path.unlink()
        case "folder":
            path.unlink()
            path.mkdir()
        case "empty":
            path.write_bytes(b"")
        case _:
            path.write_bytes(choice.draw(damaged(content)))


@fuzz(60)
@given(choice=st.data())
def test_a_run_that_lost_something_is_no_whole_run(tmp_path: Path, run: Path, choice: st.DataObject) -> None:
    config = tiny(steps=11)
    before = outcome_of(run, RANKS)
    copied = tmp_path / "copy"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(run, copied)
    hurt(choice, copied / choice.draw(st.sampled_from([BATCHES, "rank-0.json", "rank-1.json"])))
    outcome = outcome_of(copied, RANKS)
    said = {"experiment": "x", "point": "p", "source": "s", "ran": record().ran, "machine": record().machine}
    made = run_record(config, outcome, folder=copied, warmup=1, **said)
    if len(outcome.losses) < len(before.losses):
        assert made.failure is not None
        assert made.batch_time_s is None


def test_batches_that_are_cut_are_never_all(run: Path) -> None:
    path = run / BATCHES
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert len(outcome_of(run, RANKS).losses) == content[:length].count(b"\n") < 11
        assert len(read_rows(path)) == content[:length].count(b"\n")
        assert not all_done(run.parent)


@fuzz(100)
@given(choice=st.data())
def test_rows_are_rows_or_the_line_is_named(tmp_path: Path, choice: st.DataObject) -> None:
    path = tmp_path / BATCHES
    rows = [{"step": i, "loss": 4.0, "seconds": 1.0} for i in range(4)]
    path.write_bytes(choice.draw(damaged("".join(json.dumps(row) + "\n" for row in rows).encode())))
    found = read_or_refused(lambda: Tail(path).new(), names=path)
    for row in found or []:
        assert sum(row[key] for key in ("step", "loss", "seconds")) is not None


@fuzz(40)
@given(choice=st.data())
def test_axonn_trace_reads_or_says_what_is_wrong(tmp_path: Path, run: Path, choice: st.DataObject) -> None:
    copied = tmp_path / "run"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(run, copied)
    files = sorted(str(path.relative_to(copied)) for path in copied.rglob("*") if path.is_file())
    hurt(choice, copied / choice.draw(st.sampled_from(files)))
    steps = read_or_refused(lambda: load_steps(find_run(copied), None), names=copied)
    assert steps is None or (len(steps) > 0 and all(steps.values()))


@pytest.mark.parametrize(
    "name", ["spans-².parquet", "spans-99999999999999999999.parquet", "spans-x.parquet", "spans-1"]
)
def test_strange_names_of_spans_are_no_ranks(run: Path, name: str) -> None:
    (run / name).mkdir(exist_ok=True)
    (run / "spans-0.parquet" / "²1.parquet").write_bytes(b"")
    (run / "spans-0.parquet" / "1a.parquet").write_bytes(b"")
    assert sorted(find_run(run).files) == [0, 1]


def test_a_grid_of_more_ranks_than_there_can_be(run: Path) -> None:
    (run / "spec.json").write_text(json.dumps({"config": {"grid": {"inter": 10**12}}}))
    with pytest.raises(RecordError, match="have no spans yet or lost them"):
        load_steps(find_run(run), None)


def test_a_record_leads_to_no_folder_elsewhere(run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "results" / "record.json"
    write_records(outside, [record(run_folder=str(run))])
    before = sorted(run.rglob("*"))
    with pytest.raises(RecordError, match="a folder outside of the project"):
        trace(outside)
    assert sorted(run.rglob("*")) == before
    write_records(outside, [record(run_folder="../../x")])
    with pytest.raises(RecordError, match="there is no such run"):
        trace(outside)
    with pytest.raises(ValueError, match="more than one line"):
        record(run_folder="a\nb")


# Folders of jobs


@fuzz(60)
@given(choice=st.data())
def test_a_folder_of_jobs_is_collected_or_refused(tmp_path: Path, small: Small, choice: st.DataObject) -> None:
    origin, job = small
    if not (origin / job.name / "run").exists():
        with_spans_and_attempt(small)
    folder = tmp_path / "copy" / "jobs"
    shutil.rmtree(folder.parent, ignore_errors=True)
    shutil.copytree(origin, folder)
    (folder / "submitted.json").write_text(json.dumps({job.name: ["1"]}), encoding="utf-8")
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    hurt(choice, folder / choice.draw(st.sampled_from(files)))
    old(folder)
    read_or_refused(lambda: table(folder, standings(folder)), names=folder)
    found = read_or_refused(lambda: gather(folder), names=folder)
    for one in found or []:
        if one.record is not None and one.record.failure is None:
            assert len(one.record.batch_times_s) == 11
            assert one.record.batch_time_s == pytest.approx(1.0)
        elif one.record is None:
            assert one.why


def with_spans_and_attempt(small: Small) -> None:
    folder, job = small
    path = attempt(folder, job)
    run = trail(folder, job)
    with_spans(folder, job)
    kept = [run / BATCHES, *sorted(run.glob("rank-*.json")), *sorted(run.glob("spans-*.parquet/*"))]
    lines = [f"{hash_of(one)}  {one.relative_to(run)}" for one in [*kept, path / "output.txt"]]
    (path / "sha256.txt").write_text("".join(line + "\n" for line in lines))
    old(folder)


@fuzz(100)
@given(choice=st.data())
def test_a_manifest_is_whole_or_refused(tmp_path: Path, small: Small, choice: st.DataObject) -> None:
    folder, _ = small
    path = tmp_path / "m" / "manifest.json"
    path.parent.mkdir(exist_ok=True)
    data = json.loads((folder / "manifest.json").read_text())
    path.write_text(json.dumps(choice.draw(altered(data))), encoding="utf-8")
    found = read_or_refused(lambda: load_manifest(path.parent), names=path)
    for entry in found.jobs if found is not None else []:
        inside = path.parent.resolve()
        assert all((path.parent / name).resolve().is_relative_to(inside) for name in entry.files)


@pytest.mark.parametrize("ids", [{"a": ["--help"]}, {"a": [" "]}, {"a": ["1\n2"]}, {"a": "1"}, [], {"a": [1]}])
def test_ids_are_no_options(tmp_path: Path, ids: Any) -> None:
    (tmp_path / "submitted.json").write_text(json.dumps(ids), encoding="utf-8")
    with pytest.raises(RecordError, match=r"submitted.json: is not what axonn submit wrote"):
        submitted(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"work": {"steps": Infinity}}', '{"small": 1}', "[" * 9000, '{"work": 1}'])
def test_work_that_cannot_be_read_has_no_steps(tmp_path: Path, text: str) -> None:
    (tmp_path / "work.json").write_text(text)
    assert steps_of(tmp_path) is None
    (tmp_path / "ended.json").write_text(text)
    assert reason_of(tmp_path) is None
