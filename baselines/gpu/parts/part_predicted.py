"""Part predicted: the performance model's predictions of the GPTs of part gpt, from this machine's own calibration."""

from __future__ import annotations

from typing import Any

from axonn.config.train_config import TrainConfig, validate
from axonn.errors import AxonnError
from axonn.observability.records import Failure
from axonn.perf.machine.machine_file import MachineFile, load_machine
from axonn.perf.planner.engine_strategy import strategy_of_config
from axonn.perf.prediction import predict
from baselines.gpu.bench_context import Context
from baselines.gpu.bench_rows import BenchRow, failed
from experiments.calibration.measure_machine import LOCAL, LOCAL_GPU

PART = "predicted"
LABEL = "performance model"


def describes(machine: MachineFile, context: Context) -> str | None:
    """Return why a machine file does not describe the GPU that was measured; None where it does, and for a CPU."""
    if context.plan.device == "cpu" or context.peak is None:
        return None
    gpu, device = machine.gpu.name.lower(), context.peak.device.lower()
    if device in gpu or gpu in device:
        return None
    return f"its machine file describes '{machine.gpu.name}', measured was on '{device}'; {_make(context)}"


def _make(context: Context) -> str:
    return f"axonn calibrate{' --device cuda' if context.plan.device == 'cuda' else ''} makes it"


def measure(context: Context) -> tuple[list[BenchRow], dict[str, Any]]:
    """Predict each GPT that was measured."""
    measured = context.earlier.get("gpt")
    rows = [row for row in measured.rows if row.ours and row.failure is None] if measured is not None else []
    if not rows:
        return [_nothing("part 'gpt' has measured nothing on this device; run it first, or with this part")], {}
    file = LOCAL_GPU if context.plan.device == "cuda" else LOCAL
    if not file.exists():
        return [_nothing(f"experiments/machines/{file.name} is not there; {_make(context)}")], {}
    try:
        machine = load_machine(file)
        reason = describes(machine, context)
        if reason is not None:
            return [_nothing(reason)], {}
        return [_row(row, machine) for row in rows], {"machine_file": f"experiments/machines/{file.name}"}
    except AxonnError as error:
        return [_nothing(str(error))], {}


def _nothing(reason: str) -> BenchRow:
    return failed(PART, "GPTs", LABEL, Failure(cause="unavailable", detail=reason))


def _row(row: BenchRow, machine: MachineFile) -> BenchRow:
    assert row.seconds is not None
    config = validate(row.config or {}, TrainConfig, where=PART)
    try:
        prediction = predict(config.model, machine, strategy_of_config(config), batch_size=config.batch_size)
    except AxonnError as error:
        return failed(PART, row.model, LABEL, Failure(cause="unavailable", detail=str(error)))
    return BenchRow(
        part=PART,
        model=row.model,
        contender=LABEL,
        seconds=row.seconds,
        predicted_s=prediction.batch_time_s,
        error_pct=100 * (prediction.batch_time_s / row.seconds - 1),
        note="seconds are those that part gpt measured",
    )
