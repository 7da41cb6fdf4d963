"""Runs on clusters whose ranks are this suite's own: what they are started with, and what they leave.

The folder in which such a run is started is a run folder: `spec.json` lies in it, and every rank leaves its trail there
(`axonn.training.run_folder`). What is read afterwards are those files and what the ranks printed, in any order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from axonn.config.train_config import DataConfig, TrainConfig
from axonn.device.devices import DeviceType
from axonn.errors import LaunchError
from axonn.training.framework import ClusterWork, Launch, PrintedRun
from axonn.training.metrics import BATCHES
from axonn.training.run_folder import SPEC
from axonn.training.supervision.log_failures import failure_of

LARGEST_TOKEN = 65_535
"""Of a file of uint16."""
READ_LATER = f"the ranks print no times: to read the run, {BATCHES} and rank-*.json are part of its output"


def spec_of(
    framework: str,
    config: TrainConfig,
    *,
    checkpoint: str | None = None,
    turns: bool = False,
    device: DeviceType = "cpu",
    stoppable: bool = False,
) -> str:
    """Content of the `spec.json` of a run folder.

    `checkpoint`: the one to go on from, or `NEWEST`. `stoppable`: whether the ranks look for the file `STOP` after
    every batch, and end with the status `STOPPED` when it is there.
    """
    grid = config.grid
    spec = {
        "framework": framework,
        "config": config.model_dump(mode="json"),
        "ranks": grid.size,
        "checkpoint": checkpoint,
        "turns": turns,
        "device": device,
        "stoppable": stoppable,
    }
    return json.dumps(spec, indent=1)


def launch_worker(
    framework: str,
    config: TrainConfig,
    *,
    device: DeviceType = "cpu",
    notes: Sequence[str] = (),
    checkpoint: str | None = None,
    stoppable: bool = False,
    messages_over_mpi: bool = False,
) -> Launch:
    """How every rank of `config` runs the worker of this suite on `device`; `checkpoint` and `stoppable` as of
    `spec_of`. `messages_over_mpi`: whether what stages send each other goes over MPI, from where it lies."""
    provided = [
        "python is that of this suite's environment, and the folder in which it is started is one that all ranks see"
    ]
    return Launch(
        command=["python", "-m", "axonn.training.worker", "."],
        files={SPEC: spec_of(framework, config, checkpoint=checkpoint, device=device, stoppable=stoppable)},
        mpi_on_device=messages_over_mpi and device == "cuda",
        notes=[*notes, *provided, READ_LATER],
    )


def data_of(work: ClusterWork) -> tuple[DataConfig, list[str]]:
    """Where ranks of this suite find the tokens or images of `work`, and what is to be known of that.

    Raises `LaunchError` when a file of them would not hold the vocabulary.
    """
    vocab = work.model.token_vocab
    if vocab is None:
        # What a site has as its data is text.
        return DataConfig(), [f"the {work.model.sample_unit} are {work.model.default_data}"]
    if work.data is None:
        return DataConfig(), ["the tokens are bytes of Python's own sources"]
    if vocab > LARGEST_TOKEN + 1:
        raise LaunchError(
            f"{work.model.name} has {vocab} tokens, and files of tokens hold {LARGEST_TOKEN + 1}: "
            "take a smaller vocabulary, or synthetic tokens"
        )
    # Megatron-LM writes uint16 for vocabularies below 65,500 (megatron/core/datasets/indexed_dataset.py).
    path = f"{work.data}.bin"
    return DataConfig(path=path), [f"{path} holds uint16 tokens, as Megatron-LM's tools write it"]


def read_run(lines: Iterable[str]) -> PrintedRun:
    """What a run's files and its output say, whole or cut short, the lines of all ranks perhaps mixed."""
    batches: dict[int, dict[str, Any]] = {}
    states: list[dict[str, Any]] = []
    printed: list[str] = []
    for line in lines:
        found = _object_in(line)
        if found.keys() >= {"step", "loss", "seconds"}:
            batches[found["step"]] = found
        elif found.keys() >= {"state", "time"}:
            states.append(found)
        else:
            printed.append(line)
    ordered = [batches[step] for step in sorted(batches)]
    said = {state["state"] for state in states}
    finished = said == {"done"}
    # What a launcher prints of the status with which they ended is no failure.
    stopped = "stopped" in said and said <= {"stopped", "done"}
    return PrintedRun(
        seconds=[batch["seconds"] for batch in ordered],
        starts=[place for place, batch in enumerate(ordered) if batch.get("first")],
        losses=[batch["loss"] for batch in ordered],
        memory_bytes=max((state["memory_bytes"] for state in states if "memory_bytes" in state), default=None),
        finished=finished,
        failure=None if finished or stopped else failure_of([*_raised(states), *printed]),
    )


def _raised(states: Iterable[dict[str, Any]]) -> list[str]:
    """Why ranks failed, the first one first, as Python prints it: weighed with what else was printed."""
    failed = sorted((state for state in states if state["state"] == "failed"), key=lambda state: state["time"])
    return [line for state in failed for line in ("Traceback (most recent call last):", state["detail"])]


def _object_in(line: str) -> dict[str, Any]:
    """The JSON object of a line, behind whatever a launcher puts before it; empty where there is none."""
    start = line.find("{")
    if start < 0:
        return {}
    try:
        found, _ = json.JSONDecoder().raw_decode(line, start)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
