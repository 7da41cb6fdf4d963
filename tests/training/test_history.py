"""Of every file of a run folder it can be told under which configuration it came to be, also after other grids."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from axonn.config.train_config import TrainConfig
from axonn.errors import RecordError
from axonn.grid import ProcessGrid
from axonn.observability.records import read_records
from axonn.spans import Span, SpanKind, read_spans
from axonn.training.metrics import read_rows
from axonn.training.session_history import PastSession, session_of, sessions_of
from plots.trace_command import find_run, load_steps, trace
from tests.helpers.command_line import CommandLine

GRIDS: list[tuple[int, dict[str, int]]] = [(0, {"inter": 2}), (4, {"col": 2}), (8, {})]
"""First batch and grid of each session; each trains four batches, with a checkpoint after every two."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that went on twice, each time on another grid."""
    root = tmp_path_factory.mktemp("history")
    with pytest.MonkeyPatch.context() as patch:
        line = CommandLine(root, patch, _Nothing())  # type: ignore[arg-type]
        for first, grid in GRIDS:
            config = line.config(
                grid=grid,
                steps=first + 4,
                checkpoints={"every": 2, "keep": 9},
                evaluation={"every": 2},
                data={"path": str(Path(__file__)), "held_out": 0.1},
            )
            code, _, _ = line("train", config, "--out", root / "run")
            assert code == 0
    return root / "run"


class _Nothing:
    """In place of the capture of a test's output, which a fixture of a module has not."""

    def readouterr(self) -> tuple[str, str]:
        return "", ""


def session(folder: Path, batch: int) -> PastSession:
    found = session_of(sessions_of(folder), batch)
    assert found is not None
    return found


def of_batch(folder: Path, batch: int) -> TrainConfig:
    config = session(folder, batch).config
    assert config is not None
    return config


def of_log(folder: Path, name: str) -> TrainConfig:
    (found,) = [one for one in sessions_of(folder) if one.log == name]
    assert found.config is not None
    return found.config


def of_spans(folder: Path, path: Path) -> list[TrainConfig]:
    """By the file's name alone; what is in it agrees."""
    rank, first = int(path.parent.stem.removeprefix("spans-")), int(path.stem)
    own = session(folder, first)
    assert rank < own.grid.size
    spans = read_spans(path)
    assert {span.rank for span in spans} == {rank}
    assert all(own.has(span.step) for span in spans)
    assert_kinds(spans, own.grid)
    return [of_batch(folder, first)]


def assert_kinds(spans: list[Span], grid: ProcessGrid) -> None:
    """A pipeline has messages between its stages, columns have collectives."""
    kinds = {span.kind for span in spans}
    assert (SpanKind.SEND in kinds) == (grid.inter > 1)
    assert (SpanKind.TENSOR in kinds) == (grid.col > 1)


def newest(folder: Path) -> TrainConfig:
    config = sessions_of(folder)[-1].config
    assert config is not None
    return config


FILES: dict[str, Callable[[Path, Path], list[TrainConfig]]] = {
    r"batches\.jsonl": lambda folder, path: [of_batch(folder, row["step"]) for row in read_rows(path)],
    # An evaluation comes after the batch before.
    r"evaluations\.jsonl": lambda folder, path: [of_batch(folder, row["batches"] - 1) for row in read_rows(path)],
    r"usage-\d+\.jsonl": lambda folder, path: [of_batch(folder, row["step"]) for row in read_rows(path)],
    r"spans-\d+\.parquet/\d+\.parquet": of_spans,
    r"checkpoints/step-\d+/.*": lambda folder, path: [
        TrainConfig.model_validate(json.loads((path.parent / "state.json").read_text())["config"])
    ],
    r"log(-\d+)?\.txt": lambda folder, path: [of_log(folder, path.name)],
    r"config\.yaml": lambda folder, path: [TrainConfig.model_validate(yaml.safe_load(path.read_text()))],
    r"spec\.json": lambda folder, path: [TrainConfig.model_validate(json.loads(path.read_text())["config"])],
    # Of the newest session alone: each start removes those of the one before.
    r"rank-\d+\.(json|alive|stack)": lambda folder, path: [newest(folder)],
    r"record\.json": lambda folder, path: [newest(folder)],
    r"run\.json": lambda folder, path: [config for one in sessions_of(folder) if (config := one.config)],
    r"\..*lock.*|lock": lambda folder, path: [],
}
"""By name: how the configuration of each part of a file is found."""


def expected(first: int) -> dict[str, int]:
    return {"data": 1, "inter": 1, "row": 1, "col": 1} | dict(GRIDS)[first]


def test_each_session_has_its_batches_and_its_configuration(folder: Path) -> None:
    found = sessions_of(folder)
    assert [(one.first_batch, one.end) for one in found] == [(0, 4), (4, 8), (8, None)]
    for (first, grid), one in zip(GRIDS, found, strict=True):
        assert one.grid == ProcessGrid(**grid)
        assert one.config is not None
        assert (one.config.grid, one.config.steps) == (one.grid, first + 4)
    assert [one.log for one in found] == ["log-1.txt", "log-2.txt", "log.txt"]


def test_every_file_says_under_which_configuration_it_came_to_be(folder: Path) -> None:
    seen: dict[str, list[TrainConfig]] = {}
    for path in (p for p in sorted(folder.rglob("*")) if p.is_file()):
        name = str(path.relative_to(folder))
        how = [find for pattern, find in FILES.items() if re.fullmatch(pattern, name)]
        assert len(how) == 1, f"{name}: nobody says what this is"
        seen[name] = how[0](folder, path)
    grids = {name: [config.grid for config in configs] for name, configs in seen.items()}
    each = [ProcessGrid(**grid) for _, grid in GRIDS]
    assert grids["batches.jsonl"] == [grid for grid in each for _ in range(4)]
    assert grids["evaluations.jsonl"] == [grid for grid in each for _ in range(2)]
    assert grids["run.json"] == each
    (record,) = read_records(folder / "record.json")
    assert len(record.usage) == len(record.batch_times_s) == 4
    assert [grids[name] for name in ("log-1.txt", "log-2.txt", "log.txt")] == [[grid] for grid in each]
    assert {grids[name][0] == each[-1] for name in ("config.yaml", "spec.json", "record.json")} == {True}
    for done in (2, 4, 6, 8, 10, 12):
        assert grids[f"checkpoints/step-{done:08d}/state.json"] == [each[(done - 1) // 4]]
    # What a rank keeps of itself is the newest session's, whose grid has one rank.
    assert [name for name in seen if name.startswith("rank-") and not name.startswith("rank-0.")] == []
    assert len([name for name in seen if name.startswith("spans-1.parquet/")]) == 4
    assert len([name for name in seen if name.startswith("spans-0.parquet/")]) == 6


def test_the_record_is_of_the_newest_session(folder: Path) -> None:
    (record,) = json.loads((folder / "record.json").read_text())["records"]
    assert record["note"] == "batches 8 to 11"
    assert record["ran"]["grid"] == expected(8)
    assert {f"grid.{axis}": extent for axis, extent in expected(8).items()}.items() <= record["settings"].items()
    assert set(record["bytes_per_batch"]) <= {"data"}


@pytest.mark.parametrize(
    ("chosen", "batches", "names"),
    [
        ({}, range(8, 12), ["rank 0"]),
        ({"last": True}, range(8, 12), ["rank 0"]),
        ({"step": 9}, range(8, 12), ["rank 0"]),
        ({"step": 5}, range(4, 8), ["rank 0 (col 0)", "rank 1 (col 1)"]),
        ({"step": 2}, range(4), ["rank 0 (inter 0)", "rank 1 (inter 1)"]),
        ({"first": True}, range(4), ["rank 0 (inter 0)", "rank 1 (inter 1)"]),
    ],
)
def test_a_trace_is_of_one_session_and_has_its_names(
    folder: Path,
    chosen: dict[str, Any],
    batches: range,
    names: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out_folder = folder.parent / "trace"
    trace(folder, out=out_folder, **chosen)
    out = capsys.readouterr().out
    said = re.search(r"^batch (\d+), (\d+) rank", out, re.MULTILINE)
    assert said is not None
    assert int(said[1]) in batches
    assert int(said[2]) == len(names)
    events = json.loads((out_folder / "trace.json").read_text())["traceEvents"]
    named = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert named == [f"{name}, measured" for name in names]
    # The other sessions are named, and how to see them.
    assert len(re.findall("not shown: batches .* choose one with --step", out)) == 2


def test_all_batches_of_a_trace_are_of_one_grid(folder: Path) -> None:
    found = find_run(folder)
    for one in found.sessions:
        steps = load_steps(found.during(one), None)
        assert sorted(steps) == [batch for batch in range(12) if one.has(batch)]
        size = one.grid.size
        assert {span.rank for spans in steps.values() for span in spans} == set(range(size))


def test_a_session_that_went_back_takes_the_place_of_those_after(tmp_path: Path) -> None:
    """Where the newest checkpoints were damaged, a session begins before batches that others had trained."""
    grids = [{"inter": 2}, {"col": 2}, {"row": 2}, {"data": 2}]
    entries = [{"first_batch": first, "grid": grid} for first, grid in zip((0, 10, 4, 6), grids, strict=True)]
    (tmp_path / "run.json").write_text(json.dumps({"schema": "axonn-run/1", "sessions": entries}))
    found = sessions_of(tmp_path)
    assert [(one.first_batch, one.end) for one in found] == [(0, 4), (4, 6), (6, None)]
    assert [one.grid for one in found] == [ProcessGrid(**grids[i]) for i in (0, 2, 3)]
    assert session_of(found, 11) == found[-1]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"sessions": [{}]}', '{"sessions": [{"first_batch": 0, "grid": 1}]}']
)
def test_a_file_of_sessions_that_says_nothing_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RecordError, match=r"run\.json: does not say what the folder holds"):
        sessions_of(tmp_path)
