"""DeepSpeed's strategies train as a plain loop on one rank does, or say what they cannot do."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from axonn.config.train_config import TrainConfig, validate
from axonn.errors import LaunchError
from axonn.inter_layer.stage import virtual_spans
from axonn.models.gpt.gpt_model import GPT
from axonn.schedules import ChunkLayout
from axonn.training.framework import load_framework
from axonn.training.supervision.supervisor import supervise
from baselines import environments
from baselines.adapters.deepspeed.deepspeed_adapter import DeepSpeedAdapter
from baselines.adapters.deepspeed.deepspeed_frameworks import ENVIRONMENT, KINDS, STRATEGIES
from experiments.definition import load_model

STEPS = 6
INSTALLED = pytest.mark.skipif(ENVIRONMENT.missing is not None, reason=f"make baselines: {ENVIRONMENT.missing}")


def config_of(grid: dict[str, int] | None = None, **changes: Any) -> TrainConfig:
    """Nothing in it is a default, so an option that gets lost shows; so does the gradients' scale, at this epsilon."""
    plain = {
        "model": {"name": "test", "layers": 5, "hidden": 48, "heads": 3, "seq_len": 10, "vocab": 257},
        "grid": grid or {},
        "batch_size": 24,
        "microbatch_size": 2,
        "optimizer": {"lr": 3e-3, "betas": [0.85, 0.98], "eps": 1e-3, "weight_decay": 0.1},
        "seed": 5,
        "steps": STEPS,
    }
    return validate(plain | changes, TrainConfig, where="test")


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the plain loop on one rank."""
    outcome = supervise("pytorch/loop", config_of(), tmp_path_factory.mktemp("serial"))
    assert outcome.failure is None
    return outcome.losses


def check(strategy: str, grid: dict[str, int], folder: Path, serial: list[float]) -> None:
    """Train with it; every rank comes to its end, and the losses are those of one rank."""
    outcome = supervise(f"deepspeed/{strategy}", config_of(grid), folder, timeout_s=240)
    assert outcome.failure is None
    assert len(set(serial)) == STEPS
    assert outcome.losses == pytest.approx(serial, rel=1e-5)
    ranks = grid.get("data", 1) * grid.get("inter", 1)
    states = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    assert all(state["state"] == "done" and state["memory_bytes"] > 0 for state in states), states


@INSTALLED
@pytest.mark.parametrize(
    ("strategy", "grid"),
    [
        ("zero-1", {"data": 2}),
        pytest.param("zero-3-offload", {"data": 2}, marks=pytest.mark.full),
        pytest.param("pipeline", {"inter": 2, "data": 2}, marks=pytest.mark.full),
    ],
)
def test_losses_are_those_of_the_plain_loop(
    strategy: str, grid: dict[str, int], serial: list[float], tmp_path: Path
) -> None:
    check(strategy, grid, tmp_path, serial)


@pytest.mark.full
@INSTALLED
@pytest.mark.parametrize(
    ("strategy", "grid"),
    [(kind.strategy, {"data": 2}) for kind in KINDS if kind.strategy != "pipeline"]
    + [("pipeline", {"inter": 2}), ("pipeline", {"inter": 4}), ("zero-1", {"data": 4}), ("zero-3", {"data": 4})],
)
def test_losses_of_every_strategy_are_those_of_the_plain_loop(
    strategy: str, grid: dict[str, int], serial: list[float], tmp_path: Path
) -> None:
    check(strategy, grid, tmp_path, serial)


@INSTALLED
@pytest.mark.parametrize(
    ("strategy", "changes", "said"),
    [
        ("zero-1", {"grid": {"data": 2, "inter": 2}}, "set grid.inter to 1, or take deepspeed/pipeline"),
        ("zero-3", {"grid": {"data": 2, "col": 3}}, "set grid.row and grid.col to 1"),
        ("pipeline", {"grid": {"row": 3, "inter": 2}}, "set grid.row and grid.col to 1"),
        ("pipeline", {"grid": {"data": 2}}, "raise grid.inter"),
        ("pipeline", {"grid": {"inter": 13}}, "13 stages are more than the 12 into which this model can be cut"),
        ("pipeline", {"grid": {"inter": 2}, "model": config_of().model.model_dump() | {"tied_head": True}}, "untie"),
        ("zero-2", {"grid": {"data": 2}, "batch_size": 26}, "no multiple of G_data x microbatch_size = 2 x 2"),
        ("zero-1", {"grid": {"data": 2}, "precision": "float64"}, "set precision: float32"),
        ("zero-3", {"grid": {"data": 2}, "precision": "bfloat16"}, "bfloat16"),
        ("zero-1", {"grid": {"data": 2}, "precision": "float16"}, "float16"),
        ("zero-0", {"model": config_of().model.model_dump() | {"dropout": 0.1}}, "do without dropout"),
        ("zero-0", {"optimizer": {"clip_norm": 1.0}}, "do without optimizer.clip_norm"),
    ],
)
def test_what_it_cannot_do_is_refused_with_what_to_change(strategy: str, changes: dict[str, Any], said: str) -> None:
    reason = load_framework(f"deepspeed/{strategy}").unavailable(config_of(**changes))
    assert reason is not None
    assert said in reason


@INSTALLED
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.strategy)
def test_every_strategy_takes_what_it_can_do(kind: Any) -> None:
    grid = {"inter": 3, "data": 2} if kind.strategy == "pipeline" else {"data": 3}
    assert kind().unavailable(config_of(grid)) is None


@INSTALLED
def test_a_unet_is_refused() -> None:
    reason = load_framework("deepspeed/zero-1").unavailable(config_of(model=load_model("unet-1m").model_dump()))
    assert reason is not None
    assert "unet-1m is none" in reason


def test_the_pipeline_is_cut_where_our_engine_cuts_and_says_its_schedule() -> None:
    config = config_of({"inter": 4})
    framework = load_framework("deepspeed/pipeline")
    schedule = framework.schedule(config)
    assert schedule is not None
    assert schedule.name == "1f1b"
    spans = virtual_spans(GPT(config.model), ChunkLayout(stages=4))
    sizes = [len(span) for span in spans]
    starts = [0, *accumulate(sizes)][:-1]
    assert STRATEGIES["pipeline"]().settings(config) == {"STAGE_STARTS": ",".join(map(str, starts))}
    assert load_framework("deepspeed/zero-1").schedule(config_of({"data": 2})) is None


def test_capabilities_are_told_without_starting_or_importing_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("importing DeepSpeed takes seconds")

    monkeypatch.setattr(subprocess, "Popen", start)
    can = DeepSpeedAdapter().capabilities()
    assert "deepspeed" not in sys.modules
    assert set(can.strategies) == {kind.strategy for kind in KINDS} == set(STRATEGIES)
    assert all(0 < len(text) < 120 and "\n" not in text for text in can.strategies.values())
    assert len({kind.label for kind in KINDS}) == len(KINDS)
    assert can.precisions == ("float32", "bfloat16")
    assert can.available == (ENVIRONMENT.missing is None)
    assert (can.reason is None) == can.available


def test_an_unknown_strategy_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(LaunchError, match="no strategy 'zero-4'; known are deepspeed/zero-0, "):
        DeepSpeedAdapter().framework("zero-4")


def test_gpus_are_offered_where_there_are_some_and_its_torch_can_use_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for gpus, torch, expected in [
        (tmp_path, "2.13.0+cu126", ("cpu", "cuda")),
        (tmp_path, "2.13.0", ("cpu", "cuda")),
        (tmp_path, "2.13.0+cpu", ("cpu",)),
        (tmp_path, None, ("cpu",)),
        (tmp_path / "absent", "2.13.0+cu126", ("cpu",)),
    ]:
        monkeypatch.setattr(environments, "GPUS", gpus)
        monkeypatch.setattr(type(ENVIRONMENT), "installed", lambda self, name, version=torch: version)
        assert ENVIRONMENT.devices == expected
