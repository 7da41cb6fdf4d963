"""megatron-core trains what a plain loop trains, under each strategy; what it cannot run is refused with a way out."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from axonn.config.train_config import TrainConfig, validate
from axonn.errors import LaunchError
from axonn.training.run_outcome import Outcome
from axonn.training.supervision.supervisor import supervise
from baselines.adapters.megatron.megatron_adapter import MegatronAdapter
from baselines.adapters.megatron.megatron_local import ENVIRONMENT

STEPS = 6
BOUND = 1e-5


def config_of(grid: dict[str, int], **changes: Any) -> TrainConfig:
    """Nothing in it is a default, so an option that gets lost shows."""
    base = {
        "model": {"name": "test", "layers": 8, "hidden": 48, "heads": 4, "seq_len": 12, "vocab": 260},
        "grid": grid,
        "batch_size": 16,
        "microbatch_size": 2,
        "optimizer": {"lr": 3e-3, "betas": [0.85, 0.98], "eps": 1e-6, "weight_decay": 0.1},
        "steps": STEPS,
        "seed": 5,
    }
    return validate(base | changes, TrainConfig, where="test")


def trained(framework: str, config: TrainConfig, folder: Path) -> Outcome:
    outcome = supervise(framework, config, folder, timeout_s=280)
    assert outcome.failure is None, outcome.failure.detail
    assert len(outcome.losses) == STEPS
    return outcome


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of PyTorch on one rank."""
    return trained("pytorch/loop", config_of({}), tmp_path_factory.mktemp("serial")).losses


@cache
def installed() -> bool:
    return ENVIRONMENT.missing is None


@pytest.mark.parametrize(
    ("strategy", "grid"),
    [
        ("combined", {"inter": 2, "col": 2}),
        *(
            pytest.param(strategy, grid, marks=pytest.mark.full)
            for strategy, grid in [
                ("tensor", {"col": 2}),
                ("pipeline", {"inter": 2}),
                ("interleaved", {"inter": 2}),
                ("interleaved", {"inter": 4}),
                ("data", {"data": 2}),
                ("data-distributed-optimizer", {"data": 2}),
                ("combined", {"data": 2, "col": 2}),
                ("combined", {"data": 2, "inter": 2}),
            ]
        ),
    ],
)
def test_losses_are_those_of_one_rank(strategy: str, grid: dict[str, int], serial: list[float], tmp_path: Path) -> None:
    if not installed():
        pytest.skip(f"{ENVIRONMENT.missing}; run make baselines")
    config = config_of(grid)
    assert MegatronAdapter().framework(strategy).unavailable(config) is None
    outcome = trained(f"megatron/{strategy}", config, tmp_path)
    assert len(set(serial)) == STEPS
    assert outcome.losses == pytest.approx(serial, rel=BOUND, abs=0)
    assert outcome.memory_bytes is not None


SMALL = {"name": "test", "layers": 6, "hidden": 48, "heads": 4, "seq_len": 12, "vocab": 261}


@pytest.mark.parametrize(
    ("strategy", "grid", "changes", "why"),
    [
        ("tensor", {"row": 2}, {}, "set row to 1"),
        ("tensor", {"inter": 2}, {}, "set inter to 1"),
        ("pipeline", {"data": 2, "inter": 2}, {}, "set data to 1"),
        ("data", {"col": 2}, {}, "set col to 1"),
        ("interleaved", {}, {}, "raise inter"),
        ("data-distributed-optimizer", {}, {}, "raise data"),
        ("tensor", {"col": 2}, {"model": SMALL}, "vocab"),
        ("tensor", {"col": 3}, {"model": SMALL}, "heads"),
        ("pipeline", {"inter": 4}, {"model": SMALL}, "layers"),
        ("interleaved", {"inter": 2}, {"model": SMALL}, "layers"),
        ("interleaved", {"inter": 4}, {"batch_size": 12}, "microbatches"),
        ("data", {"data": 3}, {}, "batch_size"),
        ("data", {"data": 2}, {"precision": "float64"}, "float32"),
        ("data", {"data": 2}, {"model": SMALL | {"tied_head": True}}, "tied_head"),
        ("data", {"data": 2}, {"model": SMALL | {"dropout": 0.1}}, "dropout"),
    ],
)
def test_what_it_cannot_run_is_refused(strategy: str, grid: dict[str, int], changes: dict[str, Any], why: str) -> None:
    framework = MegatronAdapter().strategies[strategy]()
    refused = framework.refuses(config_of(grid, **changes)) if why != "dropout" else None
    if why == "dropout" and installed():
        refused = framework.unavailable(config_of(grid, **changes))
    elif why == "dropout":
        pytest.skip(f"{ENVIRONMENT.missing}; run make baselines")
    assert refused is not None
    assert why in refused


def test_records_name_the_schedule_that_ran() -> None:
    adapter = MegatronAdapter()
    pipelined = config_of({"inter": 2})
    plain, interleaved = (adapter.framework(name).schedule(pipelined) for name in ("pipeline", "interleaved"))
    assert (plain and plain.name, interleaved and (interleaved.name, interleaved.chunks)) == (
        "1f1b",
        ("interleaved-1f1b", 2),
    )
    asked = config_of({"inter": 2}, schedule={"name": "interleaved-1f1b", "chunks": 4})
    chosen = adapter.framework("interleaved").schedule(asked)
    assert chosen is not None
    assert chosen.chunks == 4
    assert adapter.framework("tensor").schedule(config_of({"col": 2})) is None


def test_capabilities_are_said_at_once() -> None:
    started = time.process_time()
    found = MegatronAdapter().capabilities()
    assert time.process_time() - started < 0.5
    assert {"tensor", "pipeline", "interleaved", "data", "data-distributed-optimizer", "combined"} == set(
        found.strategies
    )
    assert all(found.strategies.values())
    if installed():
        assert found.version is not None
        assert found.version.startswith("megatron-core 0.16.1, torch ")
        assert found.disclosure is not None
        assert "shim" in found.disclosure
    else:
        assert found.reason is not None
        assert "make baselines" in found.reason


def test_an_unknown_strategy_names_the_known_ones() -> None:
    with pytest.raises(LaunchError, match="megatron/pipeline"):
        MegatronAdapter().framework("zero")
