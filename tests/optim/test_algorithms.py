"""The registered algorithms of optimizers: SGD against torch's, what all keep and cost, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from axonn.checkpoint.checkpoints import CheckpointState, load, save
from axonn.config.optimizer_config import OptimizerConfig
from axonn.config.train_config import PrecisionConfig, TrainConfig, validate
from axonn.errors import ConfigError, LaunchError
from axonn.grid import ProcessGrid
from axonn.inter_layer.stage import ParameterSpec
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.optim.algorithms.adamw import AdamWConfig
from axonn.optim.algorithms.registry import ALGORITHMS
from axonn.optim.algorithms.sgd import SGDConfig
from axonn.optim.flat_buffers import FlatParameters
from axonn.perf.planner.engine_strategy import config_of_strategy, strategy_of_config
from axonn.perf.planner.planner import plan
from axonn.perf.planner.search_space import Space
from axonn.perf.strategy import Strategy
from axonn.perf.timing.memory_model import host_bytes, model_state_bytes, state_bytes
from axonn.perf.timing.update_times import step_times
from axonn.placement import Placement
from axonn.training.capacity import need_of
from axonn.training.framework import settings_ran
from axonn.training.run_record import function_of
from baselines.adapters.adapter_common import adamw_settings
from experiments.definition import find_machine, load_experiment, load_model
from experiments.planning import planning
from tests.checkpoint.test_resumption import case_of, check_resumed, start
from tests.helpers.command_line import CommandLine
from tests.helpers.comparing import check_every_rank
from tests.helpers.optimizer_cases import (
    CPU,
    PRECISIONS,
    Case,
    give_gradients,
    make_optimizer,
    optimize,
    optimize_in_process,
    optimize_over_gloo,
    reference,
    same_bits,
    specs_of,
)
from tests.helpers.rank_pool import RankPool
from tests.helpers.shard_cases import detached
from tests.helpers.training import Case as Training
from tests.helpers.training import batch_of, make_engine, train, train_in_process
from tests.optim.test_optimizer import ELEMENTS, cuts
from tests.optim.test_optimizer_ranks import GRIDS, check_against_torch

MODEL = GPTConfig(name="g", layers=8, hidden=64, heads=4, seq_len=32, vocab=64)
names = pytest.mark.parametrize("name", list(ALGORITHMS))
placements = pytest.mark.parametrize("placement", ["device", "offloaded"])


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"model": MODEL, "batch_size": 16, "microbatch_size": 2, **changes})


# --- the registry


@names
def test_each_is_registered_under_the_name_of_its_configuration(name: str) -> None:
    algorithm = ALGORITHMS[name]
    assert algorithm.config.algorithm_name() == name
    assert issubclass(algorithm.config, OptimizerConfig)
    assert len(set(algorithm.states)) == len(algorithm.states)
    assert "master" not in algorithm.states
    assert len({one.kernel for one in ALGORITHMS.values()}) == len(ALGORITHMS)


def test_configuration_and_costs_load_no_torch() -> None:
    code = "import sys, axonn.perf.planner.planner, axonn.optim.algorithms.registry; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "False"


# --- the configuration


def test_the_default_is_dumped_as_ever_and_others_by_name() -> None:
    plain = config().model_dump(mode="json")["optimizer"]
    assert list(plain) == [
        *("lr", "betas", "eps", "weight_decay", "clip_norm", "schedule", "placement", "bsize", "k", "buckets_resident")
    ]
    assert config(optimizer={"name": "adamw"}) == config()
    other = config(optimizer=SGDConfig(momentum=0.5))
    assert list(other.model_dump(mode="json")["optimizer"])[:5] == [
        *("name", "lr", "momentum", "nesterov", "weight_decay")
    ]
    for options in ({}, {"exclude_unset": True}, {"exclude_defaults": True}):
        again = validate(other.model_dump(mode="json", **options), TrainConfig, where="test")  # type: ignore[arg-type]
        assert again == other
        assert isinstance(again.optimizer, SGDConfig)


def test_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(ConfigError, match="'optimizer': nesterov needs momentum"):
        validate(
            config().model_dump() | {"optimizer": {"name": "sgd", "momentum": 0.0, "nesterov": True}},
            TrainConfig,
            where="test",
        )


def test_records_say_which_it_was() -> None:
    from axonn.training.engine_framework import EngineFramework
    from axonn.training.framework import ran_by

    sgd = config(optimizer=SGDConfig())
    settings = settings_ran(sgd, ran_by(EngineFramework(), sgd))
    assert (settings["optimizer.name"], settings["optimizer.momentum"]) == ("sgd", 0.9)
    assert "optimizer.name" not in settings_ran(config(), ran_by(EngineFramework(), config()))
    assert function_of(sgd) != function_of(config())
    assert function_of(sgd) == function_of(config(optimizer=SGDConfig(placement="offloaded")))


# --- what SGD computes


@settings(max_examples=60)
@given(
    cut=cuts,
    placement=st.sampled_from(["device", "offloaded"]),
    momentum=st.sampled_from([(0.0, False), (0.5, False), (0.9, False), (0.9, True)]),
    weight_decay=st.sampled_from([0.0, 0.05]),
)
def test_a_step_is_that_of_torch_sgd_however_it_is_cut(
    cut: dict[str, Any], placement: str, momentum: tuple[float, bool], weight_decay: float
) -> None:
    own = {"momentum": momentum[0], "nesterov": momentum[1], "weight_decay": weight_decay}
    case = Case(algorithm="sgd", options=cut | own | {"placement": placement})
    expected = reference(case)
    outcome = optimize(case)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(outcome.parameters[-1][name], weight, rtol=0, atol=1e-12)
    for result, norm in zip(outcome.results, expected.norms, strict=True):
        assert result.applied
        assert result.gradient_norm == (None if cut["clip_norm"] is None else pytest.approx(norm, rel=1e-12))


@settings(max_examples=40)
@given(cut=cuts, precision=st.sampled_from(list(PRECISIONS)))
def test_offloaded_state_of_sgd_gives_the_same_bits(cut: dict[str, Any], precision: str) -> None:
    resident = Case(algorithm="sgd", precision=precision, options=cut)
    a, b = optimize(resident), optimize(replace(resident, options=cut | {"placement": "offloaded"}))
    assert a.results == b.results
    for step in range(resident.steps):
        assert same_bits(a.states[step], b.states[step])
        assert same_bits(a.parameters[step], b.parameters[step])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@names
def test_where_buckets_end_changes_no_bit(name: str, precision: str) -> None:
    outcomes = [
        optimize(Case(algorithm=name, precision=precision, options={"bsize": bsize})) for bsize in (1, 16, 37, 1000)
    ]
    for outcome in outcomes[1:]:
        assert same_bits(outcome.parameters[-1], outcomes[0].parameters[-1])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@placements
@pytest.mark.parametrize("clip", [None, 0.05])
def test_every_rank_does_with_sgd_what_torch_does_serially(
    grid: dict[str, Any], placement: str, clip: float | None
) -> None:
    case = Case(**grid, algorithm="sgd", options={"placement": placement, "clip_norm": clip})
    check_against_torch(case, optimize_in_process(case))


def test_sgd_over_gloo(pool: RankPool) -> None:
    options = {"clip_norm": 0.05, "placement": "offloaded"}
    case = Case(data=2, inter=2, tied=True, algorithm="sgd", options=options)
    check_against_torch(case, pool.run(optimize_over_gloo, case, ranks=4))


SGD = SGDConfig(lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.05)


@pytest.mark.parametrize(
    "case",
    [
        Training(optimizer=SGD, microbatches=2),
        Training(optimizer=SGD, data=2, microbatches=2, clip=0.05),
        Training(optimizer=SGD, inter=2, microbatches=4, tied=True, offloaded=True),
        Training(optimizer=SGD, row=2, col=2, microbatches=2, offloaded=True, clip=0.05),
        Training(optimizer=SGD, data=2, inter=2, microbatches=2, model_kind="unet"),
    ],
    ids=str,
)
def test_training_with_sgd_on_a_grid_is_that_of_a_plain_loop(case: Training) -> None:
    check_every_rank(case, [train(case, 0, None, None)] if case.grid.size == 1 else train_in_process(case))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@placements
def test_an_overflow_leaves_every_bit_of_sgd_as_it_was(value: float, placement: str) -> None:
    case = Case(algorithm="sgd", precision="float16", spike=(1, 0, value), options={"placement": placement})
    outcome = optimize(case)
    assert [result.applied for result in outcome.results] == [True, False, True, True]
    assert same_bits(outcome.states[0], outcome.states[1])
    assert same_bits(outcome.parameters[0], outcome.parameters[1])
    assert not same_bits(outcome.parameters[1], outcome.parameters[2])


# --- what is kept


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize(("bsize", "resident"), [(16, 1), (33, 3), (1000, 2)])
@names
def test_model_state_is_what_the_memory_model_says_to_the_byte(name: str, half: str, bsize: int, resident: int) -> None:
    options = {"bsize": bsize, "buckets_resident": resident}
    case = Case(algorithm=name, precision=half, steps=1, options=options)
    resident_memory = optimize(case).memory
    offloaded = optimize(replace(case, options=options | {"placement": "offloaded"})).memory
    assert resident_memory is not None
    assert offloaded is not None
    states = len(ALGORITHMS[name].states)
    assert resident_memory.device == model_state_bytes(ELEMENTS, algorithm=name) == (12 + 4 * states) * ELEMENTS
    bucket = min(bsize, ELEMENTS)
    on_device = model_state_bytes(
        ELEMENTS, optimizer="offloaded", bsize=bucket, buckets=resident, compute="float16", algorithm=name
    )
    assert offloaded.device == on_device == 4 * ELEMENTS + (8 + 4 * states) * resident * bucket
    assert offloaded.host == state_bytes("float16", name).streamed * ELEMENTS == 4 * (1 + states) * ELEMENTS


@pytest.mark.parametrize("precision", ["float32", "float64"])
@names
def test_types_without_masters_add_the_state_alone(name: str, precision: Any) -> None:
    memory = optimize(Case(algorithm=name, precision=precision, steps=1)).memory
    offloaded = optimize(Case(algorithm=name, precision=precision, steps=1, options={"placement": "offloaded"})).memory
    assert memory is not None
    assert offloaded is not None
    assert memory.device == model_state_bytes(ELEMENTS, compute=precision, algorithm=name)
    assert offloaded.host == state_bytes(precision, name).streamed * ELEMENTS


@placements
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@names
def test_whole_matrices_are_reachable_in_every_flat_buffer(name: str, precision: str, placement: str) -> None:
    """By the name of a parameter: its slice and its shape, on each grid; what an algorithm of matrices needs."""
    case = Case(row=2, col=2, algorithm=name, precision=precision, options={"placement": placement, "bsize": 7})
    specs = specs_of(case, 0)
    types = PrecisionConfig(**PRECISIONS[precision])
    flat = FlatParameters(specs, grid=case.grid, precision=types, device=CPU)
    flat.parameters.copy_(torch.arange(flat.elements))
    entries = {entry.spec.name: entry for entry in flat.entries}
    assert entries.keys() == {spec.name for spec in specs}
    for spec in specs:
        entry = entries[spec.name]
        shape = spec.placement.local_shape(case.grid)
        first = torch.arange(entry.where.start, entry.where.stop)
        assert torch.equal(entry.view(flat.parameters), first.view(shape).to(flat.parameters.dtype))
        assert torch.equal(spec.parameter.detach(), entry.view(flat.parameters))
    optimizer, _ = make_optimizer(Case(algorithm=name, precision=precision, options={"placement": placement}))
    for part in optimizer.state_tensors().values():
        assert part.tensor.is_contiguous()
        assert part.tensor.shape == part.shape


# --- checkpoints


@placements
def test_training_with_sgd_goes_on_from_a_checkpoint_to_the_bit(placement: str, tmp_path: Path) -> None:
    case = Training(optimizer=SGD, microbatches=2, steps=4, offloaded=placement == "offloaded")
    engine = make_engine(case, 0, None, None)
    for step in range(2):
        engine.train_batch(*batch_of(case, step))
    state = CheckpointState(batches=2, samples=0, seed=7, progress=dict(engine.progress()), config={}, grid={})
    saved = save(tmp_path, tensors=engine.state_tensors(), state=state)
    losses = [engine.train_batch(*batch_of(case, step)).loss for step in range(2, 4)]
    resumed = make_engine(replace(case, offloaded=not case.offloaded), 0, None, None)
    resumed.load_progress(load(saved, resumed.state_tensors()).progress)
    resumed.state_loaded()
    assert [resumed.train_batch(*batch_of(case, step)).loss for step in range(2, 4)] == losses
    tensors = {name: part.tensor for name, part in resumed.state_tensors().items()}
    assert same_bits(tensors, {name: part.tensor for name, part in engine.state_tensors().items()})
    adamw = make_engine(replace(case, optimizer=AdamWConfig()), 0, None, None)
    with pytest.raises(
        ConfigError, match=r"another optimizer: it has momentum_buffer, and exp_avg, exp_avg_sq is needed; set optimiz"
    ):
        load(saved, adamw.state_tensors())


def test_any_grid_goes_on_from_a_checkpoint_of_sgd(pool: RankPool, tmp_path: Path) -> None:
    case = case_of(inter=2, optimizer=SGD)
    expected = start(pool, tmp_path, case)
    check_resumed(pool, tmp_path, case, expected, 0)
    check_resumed(pool, tmp_path, replace(case, inter=1, row=2, col=2, offloaded=True), expected, 1e-10)


def test_a_run_of_another_optimizer_is_not_gone_on_with(axonn: CommandLine) -> None:
    path = axonn.config(checkpoints={"every": 1})
    code, _, error = axonn("train", path, "--out", axonn.root / "run")
    assert code == 0, error
    path = axonn.config(checkpoints={"every": 1}, optimizer={"name": "sgd"})
    axonn.refuses("optimizer.name was adamw, is sgd", "train", path, "--out", axonn.root / "run")


@placements
def test_the_state_of_sgd_goes_over_to_another_optimizer_bit_for_bit(placement: str) -> None:
    case = Case(algorithm="sgd", precision="bfloat16", steps=4, options={"placement": placement})
    outcome = optimize(case)
    first, specs = make_optimizer(case)
    for step in range(2):
        give_gradients(first, specs, case, 0, step)
        first.step(step)
    saved = detached(first.state_tensors())
    assert saved.keys() == {f"{kind}.{spec.name}" for kind in ("master", "momentum_buffer") for spec in specs}
    second, specs = make_optimizer(case)
    for name, part in second.state_tensors().items():
        part.tensor.copy_(saved[name].tensor)
    second.state_loaded()
    second.load_progress(first.progress())
    for step in range(2, 4):
        give_gradients(second, specs, case, 0, step)
        second.step(step)
    assert same_bits({name: part.tensor for name, part in second.state_tensors().items()}, outcome.states[-1])


# --- the performance model


def test_a_strategy_names_the_algorithm() -> None:
    strategy = strategy_of_config(config(optimizer=SGDConfig(placement="offloaded", bsize=1000)))
    assert strategy.algorithm == "sgd"
    assert strategy.model_dump()["algorithm"] == "sgd"
    assert "algorithm" not in strategy_of_config(config()).model_dump()
    back = config_of_strategy(strategy, MODEL, batch_size=16)
    assert isinstance(back.optimizer, SGDConfig)
    assert strategy_of_config(back) == strategy
    with pytest.raises(ConfigError, match="there is no optimizer 'lion'; known are adamw, sgd"):
        validate({"grid": {}, "microbatch_size": 1, "algorithm": "lion"}, Strategy, where="test")


@pytest.mark.parametrize("kernels", ["fused", "separate"])
@placements
def test_less_state_takes_less_time_and_memory(kernels: str, placement: str) -> None:
    machine, outline = find_machine("summit"), planning.plannable(load_model("gpt-12b")).outline(1, 1)
    strategies = {
        name: validate(
            {
                "grid": {"inter": 6},
                "microbatch_size": 1,
                "optimizer": placement,
                "optimizer_kernels": kernels,
                "algorithm": name,
            },
            Strategy,
            where="test",
        )
        for name in ALGORITHMS
    }
    seconds = {name: sum(step_times(outline, machine, strategy)) for name, strategy in strategies.items()}
    assert 0.3 * seconds["adamw"] < seconds["sgd"] < 0.9 * seconds["adamw"]
    assert host_bytes(1000, machine, "float16", "sgd") == 8 * 1000 * machine.node.gpus.number
    assert host_bytes(1000, machine, "float16") == 12 * 1000 * machine.node.gpus.number


def test_capacity_counts_the_state_that_there_is() -> None:
    adamw, sgd = (need_of(config(optimizer={"name": name})) for name in ("adamw", "sgd"))
    assert adamw.fullest - sgd.fullest == 4 * MODEL.parameters


def test_a_plan_with_sgd_needs_less_and_writes_its_name(tmp_path: Path) -> None:
    machine = find_machine("summit")
    plans = {}
    for name in ALGORITHMS:
        space = Space(gpus=2, batch_size=16, algorithm=name, optimizer="device", checkpointing="none", inter=2)
        plans[name] = plan(planning.plannable(MODEL), machine, space).best[0]
        written = planning.write_config(plans[name], MODEL, space, tmp_path / "plan.yaml", machine=machine)
        assert written.optimizer.name == name
        from axonn.config.train_config import load_yaml

        assert load_yaml(tmp_path / "plan.yaml", TrainConfig) == written
    assert plans["sgd"].prediction.memory.total < plans["adamw"].prediction.memory.total


# --- other frameworks


def test_no_baseline_runs_another_optimizer() -> None:
    from axonn.training.framework import adapter_names, load_framework

    sgd = config(optimizer=SGDConfig(), grid=ProcessGrid(data=2))
    assert "pytorch" in adapter_names()
    reason = load_framework("pytorch/ddp").unavailable(sgd)
    assert reason is not None
    assert "optimizer.name sgd" in reason
    with pytest.raises(LaunchError, match="the baselines train with AdamW, not sgd"):
        adamw_settings(sgd)


def test_a_measured_panel_takes_any_of_them(tmp_path: Path) -> None:
    from experiments.definition import HERE

    text = (HERE / "fig6.yaml").read_text()
    assert "measured:" in text
    path = tmp_path / "fig6.yaml"
    path.write_text(text.replace("measured:\n", "measured:\n  optimizer: {name: sgd, momentum: 0.5}\n"))
    panel = load_experiment(path).measured
    assert panel is not None
    assert panel.optimizer == SGDConfig(momentum=0.5)


def test_a_parameter_spec_is_found_by_its_name_whatever_order_they_lie_in() -> None:
    """Those that are partial along the same axes lie together."""
    shapes = {"a": (), "b": ("data",), "c": ()}
    specs = [
        ParameterSpec(
            name=name, parameter=nn.Parameter(torch.empty(3, 2)), placement=Placement(shape=(3, 2), partial=axes)
        )
        for name, axes in shapes.items()
    ]
    flat = FlatParameters(specs, grid=ProcessGrid(data=2), precision=PrecisionConfig(), device=CPU)
    assert {entry.spec.name: (entry.where.start, entry.where.stop) for entry in flat.entries} == {
        "a": (0, 6),
        "c": (6, 12),
        "b": (12, 18),
    }
