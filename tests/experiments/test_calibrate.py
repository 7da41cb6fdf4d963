"""`axonn calibrate --quick`, end to end: what it writes is a machine file with which batches can be predicted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from axonn.cli.main import app
from axonn.config.loading import load_yaml
from axonn.config.train_config import TrainConfig
from axonn.errors import ConfigError
from axonn.grid import ProcessGrid
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.perf.layers.kernel_operations import MemoryBoundKernel
from axonn.perf.machine.machine_file import MachineFile, load_machine
from axonn.perf.planner.engine_strategy import strategy_of_config
from axonn.perf.prediction import predict
from experiments.calibration import measure_machine as calibration
from experiments.calibration.calibration_worker import CalibrationJob
from experiments.validation.local_validation import RUNS_FILE, LocalRuns, compare, ranks_of, summary_of, table_of
from tests.perf.test_tables import content, load

MODEL = GPTConfig(name="g", layers=4, hidden=64, heads=2, seq_len=32, vocab=256)
GRIDS = {1: [ProcessGrid()], 2: [ProcessGrid(), ProcessGrid(inter=2), ProcessGrid(data=2), ProcessGrid(col=2)]}


def seconds(machine: MachineFile, grid: ProcessGrid, hidden: int = 64) -> float:
    model = MODEL.model_copy(update={"hidden": hidden})
    config = TrainConfig(model=model, grid=grid, batch_size=8, microbatch_size=2)
    prediction = predict(model, machine, strategy_of_config(config), batch_size=8)
    assert sum(getattr(prediction.parts, name) for name in prediction.parts.__dataclass_fields__) == pytest.approx(
        prediction.batch_time_s
    )
    return prediction.batch_time_s


def check(machine: MachineFile, ranks: int) -> None:
    assert [tables.busy for tables in machine.gpu.measured] == sorted({1, ranks})
    assert machine.node.gpus.number == ranks
    assert machine.gpu.peak.source.startswith(f"axonn calibrate --ranks {ranks} --precision float32 --quick")
    assert machine.gpu.host is not None
    for grid in GRIDS[ranks]:
        assert 0 < seconds(machine, grid) < seconds(machine, grid, hidden=512)


def test_a_quick_calibration_writes_a_machine_file_that_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: dict[int, dict[str, Any]] = {}
    original = calibration._measured

    def remembered(job: CalibrationJob, ranks: int, on_part: Callable[[str], None]) -> dict[str, Any]:
        if ranks not in measured:
            measured[ranks] = original(job, ranks, on_part)
        return measured[ranks]

    monkeypatch.setattr(calibration, "_measured", remembered)
    for ranks in (2, 1):
        path = tmp_path / f"{ranks}.yaml"
        result = CliRunner().invoke(app, ["calibrate", "--quick", "--ranks", str(ranks), "--out", str(path)])
        assert result.exit_code == 0, result.output
        check(load_machine(path), ranks)


def test_no_ranks_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 ranks were asked for"):
        calibration.calibrate(ranks=0, out=tmp_path / "machine.yaml")


def test_an_unknown_precision_is_an_error() -> None:
    result = CliRunner().invoke(app, ["calibrate", "--precision", "float8"])
    assert result.exit_code == 2
    assert "compute" in result.stderr


def test_host_times_delay_operations_tasks_and_batches(tmp_path: Path) -> None:
    plain = content()
    us = {"unit": "us", "status": "measured", "source": "test"}
    slow = content()
    slow["gpu"]["host"] = {
        name: {"value": value, **us}
        for name, value in {"forward": 1e3, "backward": 2e3, "task": 1e5, "batch": 1e7}.items()
    }
    grid = ProcessGrid()
    more = seconds(load(tmp_path, slow), grid) - seconds(load(tmp_path, plain), grid)
    # 4 microbatches have a forward and a backward each; a layer has at least 10 operations.
    assert more > 10 + 4 * 2 * 0.1 + 4 * 4 * 10 * (1e-3 + 2e-3)


def test_the_optimizer_is_that_which_was_measured(tmp_path: Path) -> None:
    table = {"elements": [1000, 10_000_000], "us": [1e3, 1e7]}
    machine = load(tmp_path, content(streams={"adam": table, "adam-offloaded": {**table, "us": [2e3, 2e7]}}))
    config = TrainConfig(model=MODEL, batch_size=8, microbatch_size=2)
    found = {}
    for placement in ("device", "offloaded"):
        optimizer = {"placement": placement, "bsize": 100_000}
        strategy = strategy_of_config(TrainConfig.model_validate({**config.model_dump(), "optimizer": optimizer}))
        found[placement] = predict(MODEL, machine, strategy, batch_size=8).parts.optimizer
    assert found["device"] == pytest.approx(1e-6 * MODEL.parameters)
    assert found["offloaded"] == pytest.approx(2e-6 * MODEL.parameters)


def test_streams_that_adds_a_bias_are_part_of_a_measured_product(tmp_path: Path) -> None:
    tables = load(tmp_path, content()).gpu.measured[0]
    assert tables.seconds(MemoryBoundKernel("bias", 1000, 2000)) == 0


def test_the_local_runs_are_enough_and_are_compared(tmp_path: Path) -> None:
    configs = load_yaml(RUNS_FILE, LocalRuns).configs()
    assert len([c for c in configs.values() if ranks_of(c) <= 2]) >= 16
    machine = load(tmp_path, content())
    times = {name: [2.0, 1.0, 9.0] for name in configs}
    found = compare(configs, times, [machine, machine])
    assert all(one.measured == 2.0 and one.predicted == one.predictions[0].batch_time_s > 0 for one in found)
    summary = summary_of(found)
    assert summary["max_pct"] >= summary["mean_pct"] > 0
    assert table_of(found).row_count == len(configs)
