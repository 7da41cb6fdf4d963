"""What somebody adds is one new file and one line: one of each kind, added from outside."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from pydantic import Field
from torch import nn

from axonn import schedules, tensor
from axonn.autoparallel.layer_kinds import KINDS, Place
from axonn.autoparallel.layer_kinds.linear_kind import LinearKind
from axonn.config import model_config
from axonn.config.model_config import validate_model
from axonn.config.optimizer_config import OptimizerConfig
from axonn.config.train_config import PrecisionConfig, TrainConfig, load_yaml, validate
from axonn.distributed.transport import InProcessCollectives, InProcessTransport, InProcessWorld
from axonn.engine import Engine
from axonn.errors import ConfigError, LaunchError
from axonn.grid import ProcessGrid
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.registry import make_model, outline_of
from axonn.observability.records import read_records
from axonn.optim.algorithms import registry
from axonn.optim.algorithms.base import Algorithm
from axonn.perf.pipeline.simulator import simulate
from axonn.perf.planner.closed_form import Candidate, ClosedForm, Shape
from axonn.perf.planner.engine_strategy import strategy_of_config
from axonn.perf.planner.planner import plan
from axonn.perf.planner.schedule_properties import most_held
from axonn.perf.planner.search_space import Space
from axonn.perf.prediction import predict
from axonn.perf.timing.memory_model import model_state_bytes
from axonn.schedules import ScheduleSpec, StaticOrder, Task, make_schedule
from axonn.schedules.base import Kind
from axonn.training import framework
from axonn.training.framework import Adapter, Capabilities, Framework, adapter_names, load_adapter, load_framework
from axonn.training.places import ROOT
from experiments import predictor
from experiments.cluster_work import ClusterWork
from experiments.definition import find_machine
from experiments.planning.planning import plannable
from experiments.validation import validate as validate_command
from jobscripts import launchers, schedulers
from tests.helpers import optimizer_cases
from tests.helpers.command_line import CommandLine
from tests.helpers.comparing import check_every_rank
from tests.helpers.parallelizing import check
from tests.helpers.training import Case as Training
from tests.helpers.training import train, train_in_process
from tests.outside.residual_mlp.residual_mlp_config import ResidualMLPConfig

MODEL = {"name": "small", "layers": 2, "hidden": 8, "heads": 2, "seq_len": 4, "vocab": 16}

# --- a schedule


def waves(stage: int, stages: int, microbatches: int, chunks: int) -> list[Task]:
    """GPipe with as many microbatches at a time as there are stages."""
    groups = [range(first, min(first + stages, microbatches)) for first in range(0, microbatches, stages)]
    return [Task(kind, 0, m) for group in groups for kind in (Kind.FORWARD, Kind.BACKWARD) for m in group]


@pytest.fixture
def _waves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(schedules.STATIC, "waves", StaticOrder(make=waves))


@pytest.mark.usefixtures("_waves")
def test_a_schedule() -> None:
    spec = ScheduleSpec(name="waves")
    made = [make_schedule(spec, stage=stage, stages=3, microbatches=6) for stage in range(3)]
    run = simulate(made, seconds=lambda stage, task: 1.0)
    assert run.makespan == 2 * (3 + 2) * 2
    assert run.most_held == [3, 3, 3] == most_held(ScheduleSpec(name="waves"), 3, 6)
    driven = ScheduleSpec(pick="waves")
    run = simulate(
        [make_schedule(driven, stage=s, stages=3, microbatches=6) for s in range(3)], seconds=lambda stage, task: 1.0
    )
    assert run.makespan <= 20


@pytest.mark.usefixtures("_waves")
def test_a_schedule_says_what_it_needs() -> None:
    with pytest.raises(ConfigError, match="schedule 'waves' needs one chunk per stage; remove chunks"):
        make_schedule(ScheduleSpec(name="waves", chunks=2), stage=0, stages=2, microbatches=4)
    with pytest.raises(ConfigError, match=r"unknown schedule 'wave'; known are .*zero-bubble, waves"):
        make_schedule(ScheduleSpec(name="wave"), stage=0, stages=2, microbatches=4)


@pytest.mark.usefixtures("_waves")
def test_a_schedule_is_planned() -> None:
    """The planner knows no more of it than what runs: estimates are near the simulation, and it may be pinned."""
    model = GPTConfig(name="small", layers=8, hidden=1024, heads=16, seq_len=512, vocab=51200)
    machine, spec = find_machine("summit"), ScheduleSpec(name="waves")
    space = Space(gpus=4, batch_size=64, inter=4)
    assert spec in space.schedules(4)
    assert space.limits(spec, 4) == [spec]
    closed = ClosedForm(plannable(model).outline, machine, batch_size=64)
    for size in (1, 4):
        candidate = Candidate(Shape((1, 4, 1, 1), size), spec, None, "device")
        estimate = closed.estimate(candidate)
        prediction = predict(closed.outline(1, 1), machine, closed.strategy(candidate), batch_size=64)
        assert estimate.seconds == pytest.approx(prediction.batch_time_s, rel=0.1)
        assert estimate.needs >= prediction.memory.total
    found = plan(plannable(model), machine, replace(space, schedule=spec), shown=3)
    assert {choice.strategy.schedule for choice in found.best} == {spec}


# --- an architecture

MLP_FILE = "kind: residual-mlp\nname: mlp\nblocks: 4\nhidden: 16\ninner: 32\nseq_len: 8\nvocab: 64\n"
FIGURE = """
name: mlps
title: Perceptrons
predicted:
  machine: summit
  batch_size: 64
  precision: float16
  frameworks: {AxoNN: {microbatch_size: 2}}
  points: [{framework: AxoNN, model: mlp.yaml, gpus: 4, strategy: {grid: {inter: 2, col: 2}, recompute: none}}]
"""


@pytest.fixture
def mlp(monkeypatch: pytest.MonkeyPatch) -> Iterator[ResidualMLPConfig]:
    """The configuration of an architecture that is registered for the test, by its entry point."""
    known = list(entry_points(group=model_config.ENTRY_POINTS))
    value = "tests.outside.residual_mlp:ResidualMLPArchitecture"
    added = EntryPoint(name="residual-mlp", value=value, group=model_config.ENTRY_POINTS)
    monkeypatch.setattr(model_config, "entry_points", lambda group: [*known, added])
    config = validate_model(yaml.safe_load(MLP_FILE), where="mlp.yaml")
    assert isinstance(config, ResidualMLPConfig)
    yield config
    model_config.registered.cache_clear()


def tokens_of(config: ResidualMLPConfig, step: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, config.vocab, (rows, config.seq_len + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def mlp_losses(config: ResidualMLPConfig, grid: ProcessGrid) -> list[list[float]]:
    """Losses of three steps, as each rank of the grid sees them."""
    world = InProcessWorld(grid.size)

    def losses(rank: int) -> list[float]:
        engine = Engine(
            make_model(config),
            grid=grid,
            rank=rank,
            batch_size=8,
            microbatch_size=2,
            transport=InProcessTransport(world, rank),
            collectives=InProcessCollectives(world, grid, rank),
            precision=PrecisionConfig(compute="float64"),
            activation_checkpointing=1,
        )
        return [engine.train_batch(*tokens_of(config, step, 8)).loss for step in range(3)]

    return world.run(losses)


def test_an_architecture_trains_on_a_grid_as_on_one_rank(mlp: ResidualMLPConfig) -> None:
    (serial,) = mlp_losses(mlp, ProcessGrid())
    for losses in mlp_losses(mlp, ProcessGrid(inter=2, col=2)):
        assert losses == pytest.approx(serial, rel=1e-12)
    assert len(set(serial)) == 3


def test_the_parameters_of_an_architecture_are_those_of_its_outline(mlp: ResidualMLPConfig) -> None:
    outline = outline_of(mlp)
    counted = outline.parameters([range(len(outline.links))], ProcessGrid())
    context = tensor.TensorContext.serial()
    built = {
        f"{layer.name}.{name}": parameter.numel()
        for layer in make_model(mlp).layers
        for name, parameter in layer.build(context).named_parameters()
    }
    assert sum(counted.values()) == sum(built.values()) == mlp.parameters


@pytest.mark.usefixtures("mlp")
def test_an_architecture_is_planned_and_predicted(axonn: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "PREDICTED", axonn.root / "predicted")
    (axonn.root / "mlp.yaml").write_text(MLP_FILE)
    code, _, error = axonn(
        *("plan", "--model", "mlp.yaml", "--machine", "summit", "--gpus", "4", "--batch", "64", "--out", "plan.yaml")
    )
    assert code == 0, error
    planned = load_yaml(axonn.root / "plan.yaml", TrainConfig)
    assert isinstance(planned.model, ResidualMLPConfig)
    (axonn.root / "mlps.yaml").write_text(FIGURE)
    code, output, error = axonn("predict", "mlps.yaml")
    assert code == 0, error
    assert "1 points predicted" in output
    (record,) = read_records(axonn.root / "predicted" / "mlps.json")
    assert record.settings["model.blocks"] == 4
    assert record.asked.forward_flops is not None


@pytest.mark.usefixtures("mlp")
def test_a_mistake_in_the_file_of_an_architecture_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'blocs'; did you mean 'blocks'\?"):
        validate_model(yaml.safe_load(MLP_FILE) | {"blocs": 1}, where="mlp.yaml")
    train = {"model": yaml.safe_load(MLP_FILE) | {"heads": 1}, "batch_size": 1, "microbatch_size": 1}
    with pytest.raises(ConfigError, match=r"unknown key 'model.heads'; it belongs to a model of kind 'gpt'"):
        validate(train, TrainConfig, where="mine.yaml")
    with pytest.raises(ConfigError, match=r"kind being 'gpt' \(the default\) or 'residual-mlp' or 'unet'"):
        validate_model({"kind": "mlp"}, where="mlp.yaml")


# --- an elementwise optimizer


class AdagradConfig(OptimizerConfig):
    """Adagrad without decay of the rate."""

    name: Literal["adagrad"] = "adagrad"
    eps: float = Field(default=1e-10, gt=0)


class Adagrad(Algorithm[AdagradConfig]):
    """In operations of PyTorch that know nothing of an overflow (Duchi et al., JMLR 2011)."""

    config = AdagradConfig
    states = ("sum",)
    kernel = "adagrad"
    separate_bytes = 56

    def update(
        self,
        config: AdagradConfig,
        master: torch.Tensor,
        gradient: torch.Tensor,
        states: Sequence[torch.Tensor],
        *,
        rate: float,
        number: int,
        overflow: torch.Tensor | None,
    ) -> None:
        assert overflow is None
        (total,) = states
        total.addcmul_(gradient, gradient)
        master.addcdiv_(gradient, total.sqrt().add_(config.eps), value=-rate)


@pytest.fixture
def _adagrad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.ALGORITHMS, "adagrad", Adagrad())
    # Where the tests have the reference.
    monkeypatch.setitem(optimizer_cases.TORCH, "adagrad", torch.optim.Adagrad)
    monkeypatch.setitem(optimizer_cases.OPTIONS, "adagrad", {"lr": 2e-3, "eps": 1e-7})


@pytest.mark.usefixtures("_adagrad")
@pytest.mark.parametrize("offloaded", [False, True])
def test_an_optimizer_trains_on_two_ranks_as_a_plain_loop_does(offloaded: bool) -> None:
    # A large eps: elsewhere Adagrad's first step would make rounding errors as large as gradients.
    training = Training(optimizer=AdagradConfig(lr=0.01, eps=1e-3), microbatches=2, offloaded=offloaded, clip=0.05)
    check_every_rank(training, [train(training, 0, None, None)])
    for grid in ({"data": 2}, {"inter": 2}, {"col": 2}):
        case = replace(training, **grid)  # type: ignore[arg-type]
        check_every_rank(case, train_in_process(case))


@pytest.mark.usefixtures("_adagrad")
def test_an_optimizer_is_configured_skipped_saved_and_counted_as_the_others_are() -> None:
    plain = {"grid": {}, "model": MODEL, "batch_size": 8, "microbatch_size": 2, "optimizer": {"name": "adagrad"}}
    config = validate(plain, TrainConfig, where="test")
    assert config.optimizer == AdagradConfig()
    with pytest.raises(ConfigError, match=r"unknown key 'optimizer\.epps'; did you mean 'eps'"):
        validate(plain | {"optimizer": {"name": "adagrad", "epps": 1}}, TrainConfig, where="test")
    strategy = strategy_of_config(config)
    assert strategy.algorithm == "adagrad"
    for placement in ("device", "offloaded"):
        case = optimizer_cases.Case(
            algorithm="adagrad", precision="float16", spike=(1, 0, math.inf), options={"placement": placement}
        )
        outcome = optimizer_cases.optimize(case)
        assert [result.applied for result in outcome.results] == [True, False, True, True]
        assert optimizer_cases.same_bits(outcome.states[0], outcome.states[1])
        assert {name.partition(".")[0] for name in outcome.states[0]} == {"master", "sum"}
        assert outcome.memory is not None
        elements = sum(tensor.numel() for tensor in outcome.parameters[0].values())
        sizes = {"bsize": 16, "buckets": 2, "algorithm": "adagrad"}
        assert outcome.memory.device == model_state_bytes(elements, optimizer=placement, **sizes)  # type: ignore[arg-type]
    assert {"adagrad", "adagrad-offloaded"} <= {*registry.update_streams()}


# --- a layer


class Doubled(nn.Linear):
    """Twice what a linear layer computes."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class DoubledOverRanks(tensor.Linear):
    """The same on one rank of a grid."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class DoubledKind(LinearKind):
    """How `Doubled` is cut: as what it is derived of."""

    def build(self, module: nn.Linear, place: Place, like: dict[str, Any]) -> nn.Module:
        return DoubledOverRanks(
            module.in_features,
            module.out_features,
            module.bias is not None,
            **like,
            context=place.context,
            layout=place.layout,
            in_segments=place.segments[0],
            out_segments=place.segments[1],
        )


@pytest.mark.parametrize(("row", "col"), [(1, 2), (2, 2)])
def test_a_layer(row: int, col: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(4, 12, dtype=torch.float64)]
    monkeypatch.setitem(KINDS, Doubled, DoubledKind())
    model = nn.Sequential(Doubled(12, 12), nn.GELU(), Doubled(12, 12))
    for outcome in check(model, inputs, row=row, col=col):
        cut = [module for module in outcome.parallel.modules() if isinstance(module, DoubledOverRanks)]
        assert [one.weight.numel() for one in cut] == [144 // (row * col)] * 2
        assert "Doubled" in str(outcome.report)


# --- a scheduler and a launcher of jobs

SCHEDULER = """
from jobscripts.schedulers.none import Plain

class Toy(Plain):
    name = "toy"

    def directives(self, resources):
        return [f"#TOY {resources.nodes}"]

SCHEDULER = Toy
"""
LAUNCHER = """
from jobscripts.launchers.srun import Srun

class Toy(Srun):
    name = "toyrun"

LAUNCHER = Toy
"""


@pytest.mark.parametrize(("package", "name", "text"), [(schedulers, "toy", SCHEDULER), (launchers, "toyrun", LAUNCHER)])
def test_what_jobs_are_run_with(
    package: Any, name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    load, names = (
        (schedulers.load_scheduler, schedulers.scheduler_names)
        if package is schedulers
        else (launchers.load_launcher, launchers.launcher_names)
    )
    assert name in names()
    assert load(name).name == name  # type: ignore[operator]


# --- another framework


class ToyAdapter(Adapter):
    """A framework that is nowhere installed."""

    name = "toy"
    label = "Toy"

    def capabilities(self) -> Capabilities:
        return Capabilities(version=None, reason="it is nowhere installed", strategies=())

    def framework(self, strategy: str | None) -> Framework:
        raise LaunchError("Toy is nowhere installed")

    def launch(self, work: ClusterWork) -> Any:
        raise LaunchError("Toy is nowhere installed")

    def read(self, lines: Iterable[str]) -> Any:
        raise AssertionError


class Entry:
    """As an installed package registers it."""

    name = "toy"

    def load(self) -> type[Adapter]:
        return ToyAdapter


def test_a_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framework, "entry_points", lambda group: [Entry()] if group == "axonn.frameworks" else [])
    assert list(adapter_names()) == ["toy"]
    assert load_adapter("toy").capabilities().reason == "it is nowhere installed"
    with pytest.raises(LaunchError, match="nowhere installed"):
        load_framework("toy")
    with pytest.raises(LaunchError, match="unknown framework 'tuy'; did you mean 'toy'"):
        load_framework("tuy")


# --- a machine, and a published set


def test_a_machine_and_a_published_set(axonn: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate_command, "RESULT", axonn.root / "validation.json")
    machine = yaml.safe_load((ROOT / "experiments" / "machines" / "summit.yaml").read_text(encoding="utf-8"))
    (axonn.root / "mine.yaml").write_text(yaml.safe_dump(machine | {"name": "mine"}), encoding="utf-8")
    model = {"name": "small", "layers": 4, "hidden": 512, "heads": 8, "seq_len": 512, "vocab": 51200}
    point = {"label": "small", "gpus": 2, "published": 0.3, "model": model}
    data_set = {
        "name": "set",
        "title": "One model",
        "source": "a test",
        "status": "text",
        "machine": "mine.yaml",
        "defaults": {"batch_size": 64, "strategy": {"microbatch_size": 2, "grid": {"inter": 2}}},
        "points": [point],
    }
    (axonn.root / "set.yaml").write_text(yaml.safe_dump(data_set), encoding="utf-8")
    code, output, error = axonn("predict", "--validate", "set.yaml")
    assert code == 0, error
    assert "small" in output
    (axonn.root / "model.yaml").write_text(yaml.safe_dump(model), encoding="utf-8")
    plan_command = ("plan", "--model", "model.yaml", "--machine", "mine.yaml", "--gpus", "2", "--batch", "64")
    code, output, error = axonn(*plan_command, "--out", "plan.yaml")
    assert code == 0, error
    assert "GPUs of mine" in (axonn.root / "plan.yaml").read_text(encoding="utf-8")
