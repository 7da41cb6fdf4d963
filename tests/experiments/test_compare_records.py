"""axonn compare: what it reads, what it compares, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from axonn.cli.main import app, main
from axonn.errors import RecordError
from axonn.observability.records import Execution, Failure, Machine, Record, Workload, write_records
from experiments.compare_records import behind, compare, load
from tests.helpers.busy import BUSY, QUIET
from tests.helpers.rank_pool import ROOT


def record(framework: str, seconds: float | None, **changes: Any) -> Record:
    asked = {"model": "m", "parameters": 10, "gpus": 2, "batch_size": 4, "precision": "float32"}
    ran = {"framework": framework, "version": "1", "grid": {"inter": 2}, "microbatch_size": 1}
    asked |= {"seq_len": 8, "layers": 1, "hidden": 8, "vocab": 16} | changes.pop("asked", {})
    plain: dict[str, Any] = {
        "kind": "measured",
        "experiment": "test",
        "point": "m-2r",
        "asked": Workload(**asked),
        "ran": Execution.model_validate(ran),
        "machine": Machine(name="here"),
        "source": "test",
        "batch_time_s": seconds,
        "failure": Failure(cause="timeout", detail="too slow") if seconds is None else None,
    }
    return Record(**plain | changes)


def entries_of(tmp_path: Path, *records: Record) -> list[Any]:
    write_records(tmp_path / "some.json", records)
    return load([tmp_path / "some.json"])


def test_frameworks_of_the_same_work_stand_side_by_side(tmp_path: Path) -> None:
    lines = compare(
        entries_of(
            tmp_path,
            record("PyTorch", 3.0),
            record("AxoNN", 2.0),
            # Repeated: the median counts. The warm-up batch does not.
            record("PyTorch", 9.0, batch_times_s=[50.0, 5.0, 7.0, 9.0], warmup_batches=1),
            record("DeepSpeed", None),
            # Another way of ours is slower: ratios are to the fastest.
            record(
                "AxoNN", 4.0, ran=Execution.model_validate(record("AxoNN", 1.0).ran.model_dump() | {"grid": {"col": 2}})
            ),
        ),
        "AxoNN",
    )
    assert [(line.framework, line.seconds, line.ratio, line.runs) for line in lines] == [
        ("AxoNN", 2.0, 1.0, 1),
        ("AxoNN", 4.0, 2.0, 1),
        ("PyTorch", 5.0, 2.5, 2),
        ("DeepSpeed", None, None, 0),
    ]
    assert lines[3].failure == "timeout: too slow"
    assert behind(lines, 0.41) == []
    (said,) = behind(lines, 0.39)
    assert "0.400 of the time of PyTorch" in said


def test_kinds_and_works_are_never_mixed(tmp_path: Path) -> None:
    entries = entries_of(
        tmp_path,
        record("AxoNN", 1.0),
        record("PyTorch", 2.0),
        record("AxoNN", 10.0, kind="predicted"),
        record("PyTorch", 5.0, kind="predicted"),
        record("PyTorch", 1.0, kind="published"),
        record("PyTorch", 0.1, asked={"batch_size": 8}),
    )
    ratios = {(line.kind, line.work, line.framework): line.ratio for line in compare(entries, "AxoNN")}
    assert sorted(ratio for ratio in ratios.values() if ratio is not None) == [0.5, 1.0, 1.0, 2.0]
    # What AxoNN did not do is shown, without a ratio.
    assert [key[0] for key, ratio in ratios.items() if ratio is None] == ["published", "measured"]
    assert len(behind(compare(entries, "AxoNN"), 1.05)) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "cannot be read"),
        ('{"a": 1}', "neither a record file nor a summary"),
        ('{"schema": "axonn-records/99", "records": []}', "expected 'axonn-records/1'"),
        ('{"rows": [{"framework": "AxoNN", "kind": "measured"}]}', "row 1: is no row"),
        ('{"rows": [{"framework": "AxoNN", "kind": "guessed", "batch_time_s": 1.0}]}', "kind 'guessed'"),
        ('{"rows": [5]}', "row 1"),
    ],
)
def test_what_cannot_be_read_is_said(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(RecordError, match=message) as raised:
        load([path])
    assert str(path) in str(raised.value)


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no record of 'AxoNN'; frameworks in these records: PyTorch"):
        compare(entries_of(tmp_path, record("PyTorch", 1.0)), "AxoNN")
    with pytest.raises(RecordError, match="nothing to compare"):
        compare(entries_of(tmp_path, record("PyTorch", 1.0), record("AxoNN", 1.0, kind="predicted")), "AxoNN")
    with pytest.raises(RecordError, match="nothing to compare"):
        compare(entries_of(tmp_path, record("PyTorch", 1.0), record("AxoNN", None)), "AxoNN")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match="holds no records"):
        load([tmp_path / "empty"])
    with pytest.raises(RecordError, match="cannot be read"):
        load([tmp_path / "missing.json"])


def test_folders_and_summaries_are_read(tmp_path: Path) -> None:
    write_records(tmp_path / "records" / "one.json", [record("AxoNN", 1.0)])
    write_records(tmp_path / "records" / "deep" / "two.json", [record("PyTorch", 2.0)])
    (tmp_path / "records" / "spec.json").write_text('{"something": "else"}')
    assert [line.ratio for line in compare(load([tmp_path / "records"]), "AxoNN")] == [1.0, 2.0]
    row = {"workload": "small", "ranks": 2, "kind": "measured", "parallelism": "data", "condition": "loopback"}
    rows = [
        row | {"framework": "AxoNN", "strategy": "data", "batch_time_s": 1.0},
        row | {"framework": "PyTorch", "strategy": "DDP", "batch_time_s": 1.5, "failure": None},
        row
        | {
            "framework": "PyTorch",
            "strategy": "fully_shard",
            "batch_time_s": 1.0,
            "failure": {"cause": "not-comparable", "detail": "losses differ"},
        },
    ]
    (tmp_path / "summary.json").write_text(json.dumps({"rows": rows}))
    lines = compare(load([tmp_path / "summary.json"]), "AxoNN")
    assert [(line.variant, line.ratio) for line in lines] == [("data", 1.0), ("DDP", 1.5), ("fully_shard", None)]
    assert lines[2].failure == "not-comparable: losses differ"


PUBLISHED = str(ROOT / "results" / "published" / "fig6.json")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ([], 0, "published"),
        (["--fail-above", "1.05"], 0, "at most 1.05 times"),
        (["--fail-above", "0.5"], 1, "AxoNN falls behind: published, gpt-12b-48"),
        (["--to", "DeepSpeed", "--fail-above", "1.05"], 1, "DeepSpeed falls behind"),
    ],
)
def test_the_exit_code_says_whether_ours_is_behind(options: list[str], code: int, said: str) -> None:
    outcome = CliRunner().invoke(app, ["compare", PUBLISHED, *options])
    assert outcome.exit_code == code
    assert said in outcome.output


def test_an_error_has_an_exit_code_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["axonn", "compare", str(tmp_path / "missing.json")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "missing.json" in capsys.readouterr().err


def test_runs_of_a_busy_machine_are_marked_and_in_no_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loud, calm = {"usage": [BUSY] * 3}, {"usage": [QUIET] * 3}
    # A repeat of a busy machine does not count beside another.
    mixed = [record("AxoNN", 2.0, **calm), record("AxoNN", 9.0, **loud), record("PyTorch", 3.0, **calm)]
    lines = compare(entries_of(tmp_path, *mixed, record("DeepSpeed", 1.0, **loud)), "AxoNN")
    found = {line.framework: (line.seconds, line.ratio, line.busy) for line in lines}
    assert found == {"AxoNN": (2.0, 1.0, False), "PyTorch": (3.0, 1.5, False), "DeepSpeed": (1.0, None, True)}
    assert behind(lines, 1.05) == []
    taken_in = compare(entries_of(tmp_path, *mixed, record("DeepSpeed", 1.0, **loud)), "AxoNN", with_busy=True)
    assert {line.framework: line.ratio for line in taken_in}["DeepSpeed"] == pytest.approx(1.0 / 5.5)
    file = tmp_path / "some.json"
    monkeypatch.setattr("sys.argv", ["axonn", "compare", str(file), "--fail-above", "1.05"])
    main_status = 0
    try:
        main()
    except SystemExit as end:
        main_status = int(end.code or 0)
    out = " ".join(capsys.readouterr().out.split())
    assert main_status == 0
    assert "1 measured while the machine was busy with other work, marked (busy): left out of ratios" in out
    assert "DeepSpeed (inter 2) (busy)" in out
    # Nothing else is nothing to compare.
    with pytest.raises(RecordError, match="measured while the machine was busy"):
        compare(entries_of(tmp_path, record("AxoNN", 2.0, **loud), record("PyTorch", 3.0, **loud)), "AxoNN")
