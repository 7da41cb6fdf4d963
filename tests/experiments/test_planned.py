"""Points whose open settings the planner chooses: what is pinned, what is chosen, and what our engine would refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from axonn.errors import ConfigError
from axonn.grid import ProcessGrid
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.unet.unet_config import UNetConfig
from axonn.observability.records import read_records
from axonn.perf.machine.machine_file import MachineFile
from axonn.perf.prediction import predict
from axonn.perf.strategy import Strategy
from axonn.perf.timing.memory_model import DoesNotFit
from experiments import predictor
from experiments.definition import (
    Experiment,
    PredictedPanel,
    PredictedPoint,
    find_machine,
    load_experiment,
    strategy_of,
)
from experiments.planning.planned_points import planned, space_of_strategy
from experiments.predictor import done_predictions, predict_experiment

# Three heads, which no two columns can share.
SMALL = UNetConfig(
    name="small", image_size=8, width=96, multipliers=(1, 2), blocks=1, attention_levels=(0,), head_channels=32
)
SHARED: dict[str, Any] = {
    "schedule": {"name": "1f1b"},
    "message_library": "nccl",
    "optimizer": "device",
    "recompute": "none",
    "accumulate": "separate",
    "reduce_type": "float16",
}
OURS = SHARED | {"grid": {"inter": 1}}
SCHEME = SHARED | {"grid": {"inter": 1, "row": 1}, "overdecomposition": 1, "overlap_input_gradients": False}


@pytest.fixture(scope="module")
def machine() -> MachineFile:
    return find_machine("perlmutter")


def with_memory(machine: MachineFile, nbytes: float) -> MachineFile:
    memory = machine.gpu.memory.model_copy(update={"value": nbytes / 1e9, "unit": "GB"})
    return machine.model_copy(update={"gpu": machine.gpu.model_copy(update={"memory": memory})})


def test_the_choice_is_the_fastest_of_all_predictions(machine: MachineFile) -> None:
    given = OURS | {"microbatch_size": 4}
    choice = planned(SMALL, machine, given, gpus=4, batch_size=64, where="test")
    seconds = {}
    for data, row, col in [(4, 1, 1), (2, 2, 1), (1, 4, 1)]:
        for shards in (1, 2) if data < 4 else (1,):
            strategy = Strategy.model_validate(
                given | {"grid": {"data": data, "row": row, "col": col}, "overdecomposition": shards}
                | {"partition": "work", "partition_messages": False, "overlap_input_gradients": True}
            )  # fmt: skip
            seconds[data, row, col, shards] = predict(SMALL, machine, strategy, batch_size=64).batch_time_s
    g = choice.strategy.grid
    chosen = (g.data, g.row, g.col, choice.strategy.overdecomposition)
    assert min(seconds, key=lambda key: seconds[key]) == chosen
    # Both numbers of sub-shards on grids that cut layers; columns are refused.
    assert (choice.searched, choice.fitting, choice.refused) == (5, 5, "")
    assert f"row {g.row}, col {g.col}" in choice.notes[0]
    assert predict(SMALL, machine, choice.strategy, batch_size=64).batch_time_s == pytest.approx(seconds[chosen])


def test_what_is_given_is_pinned_and_what_is_never_searched_is_kept(machine: MachineFile) -> None:
    space = space_of_strategy(SCHEME, gpus=8, batch_size=64, where="test")
    assert (space.inter, space.row, space.data, space.col) == (1, 1, None, None)
    assert (space.checkpointing, space.optimizer, space.overdecomposition) == ("none", "device", 1)
    assert space.fixed == {
        "message_library": "nccl", "accumulate": "separate", "reduce_type": "float16", "overlap_input_gradients": False
    }  # fmt: skip
    heads = SMALL.model_copy(update={"head_channels": 24})
    strategy = planned(heads, machine, SCHEME, gpus=2, batch_size=8, where="test").strategy
    assert (strategy.grid.inter, strategy.grid.row, strategy.overdecomposition) == (1, 1, 1)
    assert (strategy.overlap_input_gradients, strategy.accumulate) == (False, "separate")
    assert space_of_strategy({"recompute": "full"}, gpus=8, batch_size=64, where="test").checkpointing == "auto"
    blocks = {"recompute": "full", "checkpoint_layers": 2}
    assert space_of_strategy(blocks, gpus=8, batch_size=64, where="test").checkpointing == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bsize": 1000}, "F: the planner chooses bsize; remove it"),
        ({"recompute": "selective"}, "F: the planner knows no recompute 'selective'"),
        ({"optimiser": "device"}, "F: unknown key 'optimiser'; did you mean 'optimizer'"),
        ({"grid": {"rows": 1}}, "F: unknown key 'grid.rows'"),
    ],
)
def test_what_cannot_be_pinned_is_said(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space_of_strategy(given, gpus=8, batch_size=64, where="F")


def test_a_grid_that_the_engine_refuses_is_taken_where_no_other_fits_and_said(machine: MachineFile) -> None:
    def needs(col: int) -> int:
        strategy = Strategy.model_validate(
            SCHEME | {"grid": ProcessGrid(data=4 // col, col=col), "microbatch_size": 1, "partition": "work"}
        )
        return predict(SMALL, machine, strategy, batch_size=4).memory.total

    assert planned(SMALL, machine, SCHEME, gpus=4, batch_size=4, where="test").refused == ""
    tight = with_memory(machine, (needs(4) + needs(2)) / 2 / 0.95)
    choice = planned(SMALL, tight, SCHEME, gpus=4, batch_size=4, where="test")
    assert choice.strategy.grid.col == 4
    assert choice.refused.startswith("heads (3) of")
    assert "count as if they could be cut evenly" in choice.notes[1]
    with pytest.raises(DoesNotFit):
        planned(SMALL, with_memory(machine, needs(4) / 2), SCHEME, gpus=4, batch_size=4, where="test")
    # Of a GPT, what cannot be cut is not predicted either.
    gpt = GPTConfig(name="three heads", layers=2, hidden=96, heads=3, seq_len=8, vocab=64)
    with pytest.raises(ConfigError, match="three heads on 2 GPUs"):
        planned(gpt, machine, SHARED | {"grid": {"row": 1, "col": 2, "inter": 1}}, gpus=2, batch_size=4, where="test")


def panel(given: dict[str, Any]) -> PredictedPanel:
    return PredictedPanel(
        machine="perlmutter",
        batch_size=32,
        precision="float16",
        frameworks={"AxoNN": given, "whole": SHARED | {"microbatch_size": 4, "grid": {"data": 2}}},
        planned=["AxoNN"],
        points=[PredictedPoint(framework=name, model="unet-30m", gpus=2) for name in ("AxoNN", "whole")],
    )


def test_an_experiment_says_what_the_planner_chooses(elsewhere: Path, machine: MachineFile) -> None:
    experiment = Experiment(name="planned", title="", predicted=panel(OURS))
    ours, whole = predict_experiment(experiment, command="test")
    assert ours.note is not None
    assert ours.note.startswith(f"planner: data {ours.ran.grid.data}, inter 1, row {ours.ran.grid.row}")
    assert ours.ran.overdecomposition is not None
    assert (whole.note, whole.ran.grid.data) == (None, 2)
    assert read_records(predictor.predicted_file(experiment)) == [ours, whole]
    assert done_predictions(experiment) == [ours, whole]
    # With another pin it is another plan.
    assert done_predictions(experiment.model_copy(update={"predicted": panel(OURS | {"overdecomposition": 1})})) is None


def test_a_planned_point_has_no_strategy_before_it_is_predicted() -> None:
    given = panel(OURS)
    planned_point, whole = given.points
    assert strategy_of(given, whole, where="F").grid.data == 2
    with pytest.raises(ConfigError, match="F: AxoNN unet-30m: the planner chooses it"):
        strategy_of(given, planned_point, where="F")


def test_planned_names_a_framework(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(
        "name: wrong\ntitle: wrong\npredicted:\n  machine: perlmutter\n  batch_size: 8\n  precision: float16\n"
        "  frameworks: {AxoNN: {}}\n  planned: [AxoN]\n  points: [{framework: AxoNN, model: unet-30m, gpus: 2, "
        "strategy: {microbatch_size: 1, grid: {}}}]\n"
    )
    with pytest.raises(ConfigError, match=r"without an entry in frameworks: \['AxoN'\]"):
        load_experiment(path)
