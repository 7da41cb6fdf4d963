"""Files that a comparison leaves in results/: the summary, and one record for each contender, workload and
condition."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from axonn.durable_files import replace_durably
from axonn.errors import LaunchError
from axonn.observability.machine_usage import BUSY_SHARE
from axonn.observability.records import Failure, Record, Workload, write_records
from axonn.training.framework import ran_by, settings_ran
from axonn.training.provenance import this_machine
from baselines.comparison import Result, Verdict, busy_lines
from baselines.contenders import Contender, framework_of

EXPERIMENT = "baselines"
POLICY = {
    "batch_time_s": "median of the batches after one warm-up batch",
    "ratio": "median over paired rounds of the seconds over those of the fastest AxoNN of the kind",
    "spread": "95% interval of that median by order statistics; least and most where rounds are few",
    "processor_ratio": "the same of the processor seconds of all ranks for a batch",
    "rounds": "until half of every interval is within the share asked for, or the minutes are spent (stopped)",
    "busy": f"others took more than {BUSY_SHARE:.0%} of the core seconds of a batch; "
    "left out of times and ratios unless with_busy",
    "behind": "the interval of AxoNN over the fastest other framework lies above 1 + margin",
}
"""Meaning of the fields of rows and verdicts."""


def command() -> str:
    """Return the command line that started the comparison."""
    return shlex.join(["python", "-m", "baselines.compare", *sys.argv[1:]])


def about_frameworks(contenders: Sequence[Contender]) -> dict[str, dict[str, str | None]]:
    """Return version and disclosure by framework, for those that are installed."""
    about: dict[str, dict[str, str | None]] = {}
    for contender in contenders:
        framework = framework_of(contender)
        if framework is None:
            continue
        try:
            version = framework.version()
        except LaunchError:
            continue
        about[contender.framework] = {"version": version, "disclosure": framework.disclosure}
    return about


def write_summary(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    results: Sequence[Result],
    verdicts: Sequence[Verdict],
    refused: Mapping[str, Sequence[Contender]],
    *,
    remarks: Sequence[str],
    interrupted: bool,
    quick: bool,
) -> Path:
    """Write `folder`/summary.json."""
    content = {
        "figure": EXPERIMENT,
        "title": "AxoNN and other frameworks on the same work",
        "quick": quick,
        "interrupted": interrupted,
        "rows": list(rows),
        "verdicts": [verdict.model_dump() | {"behind": verdict.behind} for verdict in verdicts],
        "failures": [
            {
                **_named(r.contender),
                "workload": r.workload,
                "condition": r.condition.name,
                **r.failure.model_dump(exclude_none=True),
            }
            for r in results
            if r.failure is not None
        ],
        "not_compared": [{**_named(c), "reason": reason} for reason, some in refused.items() for c in some],
        "remarks": [*remarks, *busy_lines(results)],
        "with_busy": any(r.with_busy for r in results),
        "policy": POLICY,
        "provenance": {
            "command": command(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": this_machine().model_dump(exclude_none=True),
            "commit": this_machine().commit,
            "records": "records/*.json",
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "summary.json"
    replace_durably(path, json.dumps(content, indent=1) + "\n")
    return path


def _named(contender: Contender) -> dict[str, str]:
    return {"framework": contender.label, "strategy": contender.variant, "parallelism": contender.kind}


def record_of(result: Result) -> Record:
    """Return a contender's record, possibly a failure. Raises `LaunchError` when its framework has gone in the
    meantime."""
    contender = result.contender
    framework = framework_of(contender)
    if framework is None:
        raise LaunchError(f"{contender.framework} was measured and cannot be made any more")
    config = contender.config(result.workload, result.ranks, steps=1)
    failure = result.failure
    if failure is None and not result.turns:
        failure = Failure(cause="interrupted", detail="the comparison was interrupted before its turn came")
    turns = result.counted
    seconds = [turn.seconds for turn in turns]
    usage = [turn.usage for turn in turns if turn.usage is not None]
    return Record(
        kind="measured",
        experiment=EXPERIMENT,
        point=f"{result.workload}-{result.ranks}r, {contender.kind}, {result.condition.name}",
        asked=Workload.of(
            config.model, gpus=result.ranks, batch_size=config.batch_size, precision=config.precision.compute
        ),
        ran=(ran := ran_by(framework, config)),
        settings=settings_ran(config, ran),
        machine=this_machine(),
        source=command(),
        batch_time_s=sum(seconds) / len(seconds) if failure is None else None,
        batch_times_s=seconds,
        warmup_batches=0,
        losses=result.losses,
        usage=usage if len(usage) == len(turns) else [],
        memory_bytes=result.memory_bytes,
        bytes_per_batch={} if result.bytes_sent is None else {"all": result.bytes_sent},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        failure=failure,
        note=contender.variant + (f"; {framework.disclosure}" if framework.disclosure else ""),
    )


def write_records_of(folder: Path, results: Sequence[Result]) -> None:
    """Write one file for each contender and workload, replacing those of an earlier comparison."""
    if folder.exists():
        for stale in folder.glob("*.json"):
            stale.unlink()
    files: dict[str, list[Record]] = {}
    for result in results:
        link = "-link" if result.condition.kbit is not None else ""
        files.setdefault(f"{result.workload}{link}-{result.contender.key}", []).append(record_of(result))
    for name, records in files.items():
        write_records(folder / f"{name}.json", records)
