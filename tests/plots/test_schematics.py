"""Schematics are drawn from the objects that run, for any configuration, with the same bytes each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from axonn.config.train_config import TrainConfig, validate
from axonn.errors import GridError
from axonn.grid import ProcessGrid
from axonn.schedules import Kind
from plots.figures import schematics

SPLIT = {"name": "message-driven-zero-bubble", "chunks": 2, "placement": "v"}


def config_of(**changes: Any) -> TrainConfig:
    return validate(schematics.EXAMPLE | changes, TrainConfig, where="test")


def test_long_axes_keep_their_ends() -> None:
    assert schematics.shown(6) == [0, 1, 2, 3, 4, 5]
    assert schematics.shown(24) == [0, 1, 2, 3, None, 23]
    assert schematics.shown(5, 4) == [0, 1, None, 4]


def test_the_timeline_is_the_schedule() -> None:
    simulation = schematics.scheduled(config_of())
    assert [len(order) for order in simulation.orders()] == [16] * 3
    # The published limit: stage 0 starts three forwards and waits.
    assert [str(task) for task in simulation.orders()[0][:4]] == ["0F0", "0F1", "0F2", "0B0"]
    # Two stages down, a backward of twice a forward, and back, with four messages on the way.
    first = next(start for stage, task, start, _ in simulation.tasks if stage == 0 and task.kind == Kind.BACKWARD)
    assert first == pytest.approx(3 + 2 + 2 + 4 * schematics.MESSAGE)
    split = schematics.scheduled(config_of(schedule=SPLIT))
    assert {task.kind for _, task, _, _ in split.tasks} == {Kind.FORWARD, Kind.INPUT, Kind.WEIGHT}
    assert sum(split.busy) == pytest.approx(sum(simulation.busy))


def test_layers_alternate() -> None:
    (normal, first), (transposed, second) = schematics.weights_of(ProcessGrid(row=2, col=3), 12)
    assert (normal, transposed) == ("normal", "transposed")
    assert [{cut.dim: cut.axis for cut in placement.cuts} for placement in (first, second)] == [
        {0: "col", 1: "row"},
        {0: "row", 1: "col"},
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"grid": {"inter": 9, "data": 8, "col": 4}, "batch_size": 64, "schedule": SPLIT},
        {"grid": {}, "schedule": {"name": "gpipe"}},
    ],
)
def test_the_same_picture_has_the_same_bytes(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = config_of(**changes)
    drawn = [schematics.draw_all(config, tmp_path / name) for name in ("one", "two")]
    assert [path.name for path in drawn[0]] == [
        f"schematic-{name}.{kind}" for name in ("grid", "schedule", "layer") for kind in ("png", "svg")
    ]
    for one, two in zip(*drawn, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name
        assert one.stat().st_size > 5000, one.name


def test_a_grid_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(schematics.EXAMPLE | {"grid": {"col": 3}}))
    with pytest.raises(GridError, match="heads"):
        schematics.main([str(path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
