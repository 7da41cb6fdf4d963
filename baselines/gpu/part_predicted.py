"""Part predicted: what the performance model says of the GPTs of part gpt, from this machine's own calibration."""

from __future__ import annotations

from typing import Any

from axonn.config import TrainConfig, validate
from axonn.errors import AxonnError
from axonn.perf.engine_strategy import strategy_of_config
from axonn.perf.machine import MachineFile, load_machine
from axonn.perf.predict import predict
from axonn.records import Failure
from baselines.gpu.context import Context
from baselines.gpu.rows import Row, failed
from experiments.definition import HERE

PART = "predicted"
LOCAL = HERE / "machines" / "local.yaml"
LABEL = "performance model"
CALIBRATE = "axonn calibrate makes it"


def describes(machine: MachineFile, context: Context) -> str | None:
    """Why a machine file is not that of the device that was measured; None where it is."""
    gpu = machine.gpu.name.lower()
    device = "cpu" if context.peak is None else context.peak.device.lower()
    on_gpu = context.plan.device == "cuda"
    if on_gpu and device not in gpu and gpu not in device:
        return f"{LOCAL.name} describes '{machine.gpu.name}', measured was on '{device}'; {CALIBRATE}"
    if not on_gpu and any(word in gpu for word in ("nvidia", "tesla")):
        return f"{LOCAL.name} describes '{machine.gpu.name}', measured was on a CPU; {CALIBRATE}"
    return None


def measure(context: Context) -> tuple[list[Row], dict[str, Any]]:
    """A row for each GPT that was measured."""
    measured = context.earlier.get("gpt")
    rows = [row for row in measured.rows if row.ours and row.failure is None] if measured is not None else []
    if not rows:
        return [_nothing("part 'gpt' has measured nothing on this device; run it first, or with this part")], {}
    if not LOCAL.exists():
        return [_nothing(f"experiments/machines/{LOCAL.name} is not there; {CALIBRATE}")], {}
    try:
        machine = load_machine(LOCAL)
        reason = describes(machine, context)
        if reason is not None:
            return [_nothing(reason)], {}
        return [_row(row, machine) for row in rows], {"machine_file": f"experiments/machines/{LOCAL.name}"}
    except AxonnError as error:
        return [_nothing(str(error))], {}


def _nothing(reason: str) -> Row:
    return failed(PART, "GPTs", LABEL, Failure(cause="unavailable", detail=reason))


def _row(row: Row, machine: MachineFile) -> Row:
    assert row.seconds is not None
    config = validate(row.config or {}, TrainConfig, where=PART)
    try:
        found = predict(config.model, machine, strategy_of_config(config), batch_size=config.batch_size)
    except AxonnError as error:
        return failed(PART, row.model, LABEL, Failure(cause="unavailable", detail=str(error)))
    return Row(
        part=PART,
        model=row.model,
        contender=LABEL,
        seconds=row.seconds,
        predicted_s=found.batch_time_s,
        error_pct=100 * (found.batch_time_s / row.seconds - 1),
        note="seconds are those that part gpt measured",
    )
