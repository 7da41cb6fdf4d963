"""The reference implementation on this machine: it trains what one rank of plain PyTorch trains, or says why not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from axonn.config.train_config import TrainConfig, validate
from axonn.errors import LaunchError
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.registry import outline_of
from axonn.perf.strategy import Strategy
from axonn.training.framework import ClusterWork, load_framework
from axonn.training.run_outcome import Outcome
from axonn.training.supervision.supervisor import supervise
from baselines.adapters.isolated_framework import stage_starts
from baselines.adapters.reference import ENVIRONMENT, ReferenceAdapter
from tests.helpers.launches import run_launch

BOUND = 1e-5
STEPS = 5
MODEL: dict[str, Any] = {"name": "test", "layers": 3, "hidden": 24, "heads": 3, "seq_len": 10, "vocab": 257}


@pytest.fixture(scope="module")
def installed() -> None:
    if ENVIRONMENT.missing is not None:
        pytest.skip(f"make baselines: {ENVIRONMENT.missing}")


def config_of(grid: dict[str, int], microbatches: int = 6, **changes: Any) -> TrainConfig:
    """Nothing in it is a default, so an option that gets lost shows."""
    plain = {
        "model": MODEL,
        "grid": grid,
        "batch_size": 2 * microbatches,
        "microbatch_size": 2,
        "optimizer": {"lr": 3e-3, "betas": [0.85, 0.98], "eps": 1e-6, "weight_decay": 0.1},
        "seed": 5,
        "steps": STEPS,
    }
    return validate(plain | changes, TrainConfig, where="test")


@pytest.fixture(scope="module")
def serial(installed: None, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of one rank."""
    outcome = supervise("pytorch/loop", config_of({}), tmp_path_factory.mktemp("serial"), timeout_s=120)
    assert outcome.failure is None
    assert len(set(outcome.losses)) == STEPS
    return outcome.losses


def train(strategy: str, config: TrainConfig, folder: Path) -> Outcome:
    return supervise(f"reference/{strategy}", config, folder, timeout_s=120)


@pytest.mark.parametrize(
    ("strategy", "grid"),
    [
        pytest.param("pipeline", {"inter": 2}, marks=pytest.mark.full),
        pytest.param("pipeline", {"inter": 3}, marks=pytest.mark.full),
        ("pipeline", {"inter": 2, "data": 2}),
        ("data", {"data": 2}),
        pytest.param("data", {}, marks=pytest.mark.full),
    ],
)
def test_it_trains_like_one_rank(strategy: str, grid: dict[str, int], serial: list[float], tmp_path: Path) -> None:
    config = config_of(grid)
    assert load_framework(f"reference/{strategy}").unavailable(config) is None
    outcome = train(strategy, config, tmp_path)
    assert outcome.failure is None
    assert outcome.losses == pytest.approx(serial, rel=BOUND, abs=0)
    ranks = grid.get("inter", 1) * grid.get("data", 1)
    states = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    assert all(state["state"] == "done" for state in states), states
    assert all(state["memory_bytes"] > 0 for state in states), states
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [], "what only the ranks needed is gone"


@pytest.mark.full
@pytest.mark.usefixtures("installed")
def test_fewer_microbatches_than_stages_and_recompute(tmp_path: Path) -> None:
    """Two microbatches are the fewest that its pipeline takes; what is recomputed changes nothing."""
    plain = supervise("pytorch/loop", config_of({}, 2), tmp_path / "serial", timeout_s=120)
    outcome = train("pipeline", config_of({"inter": 3}, 2, activation_checkpointing=2), tmp_path / "pipeline")
    assert outcome.failure is None
    assert outcome.losses == pytest.approx(plain.losses, rel=BOUND, abs=0)


@pytest.mark.usefixtures("installed")
def test_a_single_microbatch_is_refused_for_a_reason(tmp_path: Path) -> None:
    config = config_of({"inter": 2}, 1)
    assert "single microbatch" in (load_framework("reference/pipeline").unavailable(config) or "")
    failure = train("pipeline", config, tmp_path).failure
    assert failure is not None, "the bug is gone: offer it"
    assert "TypeError" in failure.detail


@pytest.mark.parametrize(
    ("strategy", "grid", "changes", "said"),
    [
        ("pipeline", {}, {}, "raise grid.inter"),
        ("data", {"inter": 2}, {}, "set grid.inter to 1"),
        ("data", {"col": 2}, {}, "gather around every product"),
        ("pipeline", {"inter": 2, "row": 2}, {}, "gather around every product"),
        ("pipeline", {"inter": 2}, {"precision": "float64"}, "set precision: float32"),
        ("pipeline", {"inter": 2}, {"model": MODEL | {"tied_head": True}}, "untie the head"),
        ("data", {"data": 4}, {}, "no multiple of G_data x microbatch_size"),
        ("pipeline", {"inter": 9}, {}, "9"),
        ("data", {}, {"optimizer": {"clip_norm": 1.0}}, "optimizer.clip_norm"),
    ],
)
@pytest.mark.usefixtures("installed")
def test_what_it_does_not_do_is_said(strategy: str, grid: dict[str, int], changes: dict[str, Any], said: str) -> None:
    reason = load_framework(f"reference/{strategy}").unavailable(config_of(grid, **changes))
    assert reason is not None
    assert said in reason


def test_its_record_says_which_schedule_ran() -> None:
    ran = load_framework("reference/pipeline").schedule(config_of({"inter": 2}))
    assert ran is not None
    assert (ran.name, ran.in_flight_limit) == ("message-driven", 2), "its limit is the number of stages"
    assert load_framework("reference/data").schedule(config_of({"data": 2})) is None


@pytest.mark.usefixtures("installed")
def test_capabilities_name_version_and_what_was_changed() -> None:
    found = ReferenceAdapter().capabilities()
    assert found.available
    assert "axonn 0.2.0" in (found.version or "")
    assert set(found.strategies) == {"pipeline", "data"}
    for name in found.strategies:
        assert load_framework(f"reference/{name}").disclosure == found.disclosure
    assert "Gloo" in (found.disclosure or "")


def work(*, clipping: float | None = None, data: str | None = None, **strategy: Any) -> ClusterWork:
    fields = {"grid": {"inter": 2}, "microbatch_size": 2, "compute": "float32", "recompute": "none"} | strategy
    return ClusterWork(
        name="small-2",
        model=GPTConfig(**MODEL),
        strategy=validate(fields, Strategy, where="test"),
        batch_size=8,
        steps=3,
        gpus=2,
        gpus_per_node=2,
        gradient_clipping=clipping,
        data=data,
    )


@pytest.mark.usefixtures("installed")
def test_a_launch_runs_as_it_says(tmp_path: Path) -> None:
    """Its command with its files, where it is started; the framework's initial weights, random tokens."""
    launch = ReferenceAdapter().launch(work())
    lines = run_launch(launch, 2, tmp_path, python=str(ENVIRONMENT.python), mpiexec=ENVIRONMENT.mpiexec)
    run = ReferenceAdapter().read(lines)
    assert run.failure is None
    assert run.finished
    assert len(run.losses) == 3
    # Of nothing learned all tokens are as likely.
    assert run.losses[0] == pytest.approx(math.log(MODEL["vocab"]), rel=0.1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grid": {"col": 2}}, "set row and col to 1"),
        ({"schedule": {"name": "1f1b"}}, "a schedule '1f1b'"),
        ({"schedule": {"in_flight_limit": 4}}, "its is G_inter = 2"),
        ({"optimizer": "sharded"}, "set optimizer: device"),
        ({"recompute": "selective"}, "selective recompute"),
        ({"clipping": 1.0}, "gradient clipping"),
        ({"data": "corpus"}, "leave data out"),
        ({"microbatch_size": 8}, "single microbatch"),
    ],
)
def test_what_it_does_not_do_on_a_cluster_is_said(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(LaunchError, match=r"small-2 cannot be launched with the reference") as error:
        ReferenceAdapter().launch(work(**changes))
    assert said in str(error.value)


def test_a_launch_cuts_as_the_strategy_says() -> None:
    by_layers = ReferenceAdapter().launch(work(grid={"inter": 3}, partition="layers"))
    by_work = ReferenceAdapter().launch(work(grid={"inter": 3}, partition="work"))
    assert by_layers.environment == {"STAGE_STARTS": "0,3,5"}
    assert by_work.environment["STAGE_STARTS"] == ",".join(map(str, stage_starts(config_of({"inter": 3}))))
    assert len(outline_of(GPTConfig(**MODEL)).links) == 8
    assert ReferenceAdapter().launch(work(grid={"data": 2})).command[-1] == "data"
