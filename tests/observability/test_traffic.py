"""What a run says of the bytes it sent: by axis and operation, in the run folder, the record and on the screen."""

from __future__ import annotations

import json

import pytest

from axonn.config.train_config import TrainConfig, load_yaml
from axonn.distributed.collectives import Call
from axonn.distributed.transport.base import Decisions, SentMessage
from axonn.grid import AXES, ProcessGrid
from axonn.inter_layer.stage import virtual_spans
from axonn.models.registry import make_model, outline_of
from axonn.observability.records import read_records
from axonn.observability.traffic import sent_by_axis, summary
from axonn.perf.timing.communication import Training
from axonn.schedules import ChunkLayout, Direction
from tests.helpers.command_line import CommandLine
from tests.helpers.training import Case

CALLS = {
    Call("all-reduce sum", ("data",), (0, 1, 2, 3), 100, "float32", 4): 3,
    Call("all-reduce sum", ("data",), (0, 1, 2, 3), 20, "bfloat16", 2): 1,
    Call("all-gather", ("row",), (0, 1, 2, 3), 10, "float64", 8): 2,
    Call("all-reduce max", AXES, tuple(range(16)), 1, "float32", 4): 1,
    Call("all-reduce sum", ("inter", "row"), tuple(range(8)), 1, "float64", 8): 1,
}


def test_what_was_sent_by_axis_and_operation() -> None:
    messages = {SentMessage(1, Direction.FORWARD, 50, 200): 4, SentMessage(0, Direction.BACKWARD, 50, 200): 2}
    found = summary(CALLS, messages, Decisions(5, 120))

    assert [(t.axis, t.kind, t.count, t.elements, t.bytes, t.sent_bytes) for t in found] == [
        ("all", "all-reduce max", 1, 1, 4, 2 * 15 / 16 * 4),
        ("data", "all-reduce sum", 4, 320, 1240, 1.5 * 1240),
        ("inter", "message", 6, 300, 1200, 1200),
        ("inter+row", "all-reduce sum", 1, 1, 8, 14.0),
        ("row", "all-gather", 2, 20, 160, 3 * 160),
        ("row+col", "decision", 5, 15, 120, 120),
    ]
    assert sent_by_axis(found) == {
        "all": 8,
        "data": 1860,
        "inter": 1200,
        "inter+row": 14,
        "row": 480,
        "row+col": 120,
    }


def predicted(config: TrainConfig) -> dict[str, int]:
    """The most that any rank sends along each axis, by the model."""
    grid = config.grid
    layout = ChunkLayout(stages=grid.inter)
    training = Training(
        outline=outline_of(config.model),
        grid=grid,
        batch_size=config.batch_size,
        microbatch_size=config.microbatch_size,
        sub_shards=2,
        layout=layout,
        spans=virtual_spans(make_model(config.model), layout),
        precision=config.precision,
        optimizer=config.optimizer,
    )
    most: dict[str, int] = {}
    for rank in range(grid.size):
        for axes, volume in training.volume(rank).items():
            axis = "all" if axes == "+".join(AXES) else axes
            most[axis] = max(most.get(axis, 0), round(volume.bytes))
    return most


def test_a_training_run_says_what_it_sent(axonn: CommandLine) -> None:
    changes = {"grid": {"inter": 2, "row": 2}, "optimizer": {"clip_norm": 1.0}, "schedule": {"name": "1f1b"}}
    path = axonn.config(**changes)
    folder = axonn.root / "run"
    code, out, error = axonn("train", path, "--out", folder)
    assert code == 0, error
    (record,) = read_records(folder / "record.json")
    expected = predicted(load_yaml(path, TrainConfig))
    assert expected.keys() == {"row", "inter", "inter+row", "all"}
    assert record.bytes_per_batch == expected
    line = next(line for line in out.splitlines() if line.startswith("bytes sent per batch"))
    assert f"row {expected['row']:,}" in line
    assert f"inter {expected['inter']:,}" in line
    for rank in range(4):
        state = json.loads((folder / f"rank-{rank}.json").read_text())
        kinds = {(part["axis"], part["kind"]) for part in state["traffic"]}
        assert kinds >= {("row", "all-reduce sum"), ("row", "all-gather"), ("inter", "message")}


def test_one_rank_sends_nothing_and_says_nothing(axonn: CommandLine) -> None:
    code, out, error = axonn("train", axonn.config(), "--out", axonn.root / "run")
    assert code == 0, error
    assert "bytes sent" not in out
    assert read_records(axonn.root / "run" / "record.json")[0].bytes_per_batch == {}


@pytest.mark.parametrize("kind", ["gpt", "unet"])
def test_the_outline_has_every_parameter_of_the_model(kind: str) -> None:
    """On one rank as many elements as the configuration counts."""
    model = Case(model_kind=kind).model  # type: ignore[arg-type]
    outline = outline_of(model)
    assert sum(sum(link.parameters(ProcessGrid()).values()) for link in outline.links) == model.parameters
