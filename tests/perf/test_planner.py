"""The planner: its closed form beside the full prediction, what it leaves out and why, and the file it writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from axonn import schedules
from axonn.config.train_config import TrainConfig, load_yaml
from axonn.errors import ConfigError
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.perf.machine.machine_file import MachineFile
from axonn.perf.pipeline.extrapolation import pipeline_seconds
from axonn.perf.planner.closed_form import Candidate, ClosedForm, Shape
from axonn.perf.planner.engine_strategy import strategy_of_config
from axonn.perf.planner.planner import plan
from axonn.perf.planner.schedule_properties import bubble, in_flight, most_held, splits_backward
from axonn.perf.planner.search_space import Space
from axonn.perf.prediction import predict, simulate_pipeline
from axonn.perf.timing.memory_model import DoesNotFit
from axonn.perf.timing.stage_times import stage_times
from axonn.schedules import ScheduleSpec
from experiments.definition import find_machine, load_model
from experiments.planning import planning
from tests.helpers.command_line import CommandLine

SMALL = GPTConfig(name="small", layers=8, hidden=1024, heads=16, seq_len=512, vocab=51200, dropout=0.1)


@pytest.fixture(scope="module")
def machine() -> MachineFile:
    return find_machine("summit")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


def closed_form(machine: MachineFile, model: GPTConfig, batch: int) -> ClosedForm:
    return ClosedForm(planning.plannable(model).outline, machine, batch_size=batch)


CANDIDATES = [
    Candidate(Shape((6, 1, 1, 1), 2), ScheduleSpec(), None, "device"),
    Candidate(Shape((2, 3, 1, 1), 2), ScheduleSpec(), 1, "offloaded"),
    Candidate(Shape((1, 6, 1, 1), 2), ScheduleSpec(name="1f1b"), None, "device"),
    Candidate(Shape((1, 3, 1, 2), 2, 2), ScheduleSpec(), None, "offloaded"),
    Candidate(Shape((1, 3, 2, 1), 2, 1), ScheduleSpec(name="zero-bubble"), 1, "device"),
    Candidate(Shape((2, 3, 1, 1), 2, 1, 2, "loop"), ScheduleSpec(name="interleaved-1f1b", chunks=2), None, "offloaded"),
    Candidate(
        Shape((2, 3, 1, 1), 2, 1, 2, "v"), ScheduleSpec(name="zero-bubble", chunks=2, placement="v"), None, "device"
    ),
]


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda c: f"{c.shape} {c.schedule.name}")
def test_the_closed_form_is_near_the_full_prediction(machine: MachineFile, candidate: Candidate) -> None:
    closed = closed_form(machine, SMALL, 384)
    estimate = closed.estimate(candidate)
    strategy = closed.strategy(candidate)
    outline = closed.outline(1, 1)
    prediction = predict(outline, machine, strategy, batch_size=384)
    # Uneven chunks let interleaved 1F1B wait, which the closed form leaves to the simulator.
    bound = 0.2 if candidate.schedule.name == "interleaved-1f1b" else 0.05
    assert estimate.seconds == pytest.approx(prediction.batch_time_s, rel=bound)
    # Whatever the order of messages: never less than in the simulated order.
    assert prediction.memory.total <= estimate.needs <= 1.6 * prediction.memory.total


@pytest.mark.parametrize(
    "schedule",
    [
        ScheduleSpec(),
        ScheduleSpec(in_flight_limit=4),
        ScheduleSpec(name="1f1b"),
        ScheduleSpec(name="interleaved-1f1b", chunks=2),
        ScheduleSpec(name="zero-bubble"),
        ScheduleSpec(name="zero-bubble", chunks=2, placement="v"),
        ScheduleSpec(name="message-driven-zero-bubble", in_flight_limit=4),
        ScheduleSpec(name="message-driven-zero-bubble", chunks=2, placement="v", in_flight_limit=6),
    ],
    ids=lambda s: f"{s.name} x{s.chunks} {s.in_flight_limit}",
)
def test_few_microbatches_tell_how_long_many_take(machine: MachineFile, schedule: ScheduleSpec) -> None:
    closed = closed_form(machine, SMALL, 403)
    shape = Shape((1, 4, 1, 1), 1, 1, schedule.chunks, schedule.placement)
    strategy = closed.strategy(Candidate(shape, schedule, None, "device"))
    outline = closed.outline(1, 1)
    stages = stage_times(outline, machine, strategy)
    short = pipeline_seconds(outline, machine, strategy, microbatches=403, stages=stages)
    whole = simulate_pipeline(outline, machine, strategy, microbatches=403, stages=stages)
    assert short == pytest.approx(whole.makespan, rel=0.01 if schedule.chunks == 1 else 0.02)
    few = simulate_pipeline(outline, machine, strategy, microbatches=7, stages=stages)
    assert pipeline_seconds(outline, machine, strategy, microbatches=7, stages=stages) == few.makespan


@pytest.mark.parametrize(
    "schedule",
    [
        ScheduleSpec(),
        ScheduleSpec(name="gpipe"),
        ScheduleSpec(name="1f1b"),
        ScheduleSpec(name="interleaved-1f1b", chunks=2),
        ScheduleSpec(name="zero-bubble", chunks=2, placement="v"),
        ScheduleSpec(name="message-driven-zero-bubble"),
        ScheduleSpec(name="message-driven-zero-bubble", chunks=2, placement="v", in_flight_limit=4),
    ],
    ids=str,
)
def test_what_a_schedule_states_is_what_running_it_comes_to(
    schedule: ScheduleSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On even stages, a forward and each half of a backward taking as long."""
    stages, microbatches = 4, 64

    def properties() -> tuple[float, bool, list[int], float]:
        return (
            bubble(schedule, microbatches, period=3.0, whole=[3.0] * stages, weight=[1.0] * stages),
            splits_backward(schedule, stages),
            most_held(schedule, stages, microbatches),
            in_flight(schedule, stages, microbatches),
        )

    seconds, splits, held, under_way = properties()
    for registry in (schedules.DRIVEN, schedules.STATIC):
        if (definition := registry.get(schedule.name)) is not None:
            silent = replace(definition, most_held=None, in_flight=None, weights_in_bubble=None)
            monkeypatch.setitem(registry, schedule.name, silent)
    ran_seconds, ran_splits, ran_held, ran_under_way = properties()
    assert (ran_seconds, ran_splits) == (pytest.approx(seconds), splits)
    # Of the last stage of whole backwards in one chunk more is known than its limit.
    assert ran_held[:-1] == held[:-1]
    assert ran_held[-1] >= held[-1]
    # Stated is a bound of one chunk, and of several the average.
    assert under_way - 1 <= ran_under_way <= 1.5 * under_way


def test_the_best_is_the_best_of_all_when_everything_is_simulated(machine: MachineFile) -> None:
    """A space small enough to predict all of it."""
    space = Space(gpus=4, batch_size=64, checkpointing="none", optimizer="device", microbatch_size=2)
    found = plan(planning.plannable(SMALL), machine, space)
    closed = closed_form(machine, SMALL, 64)
    times = []
    for grid in space.grids():
        for schedule in (s for base in space.schedules(grid[1]) for s in space.limits(base, grid[1])):
            for sub_shards in space.sub_shards(grid[2] * grid[3], 2):
                shape = Shape(grid, 2, sub_shards, schedule.chunks, schedule.placement)
                strategy = closed.strategy(Candidate(shape, schedule, None, "device"))
                times.append(predict(closed.outline(1, 1), machine, strategy, batch_size=64).batch_time_s)
    assert found.best[0].seconds == pytest.approx(min(times), rel=0.02)
    assert [c.seconds for c in found.best] == sorted(c.seconds for c in found.best)


def test_pins_are_kept(machine: MachineFile) -> None:
    space = Space(
        gpus=8,
        batch_size=64,
        inter=2,
        col=2,
        microbatch_size=4,
        schedule=ScheduleSpec(name="1f1b"),
        checkpointing=2,
        optimizer="offloaded",
    )
    found = plan(planning.plannable(SMALL), machine, space)
    assert found.best
    for choice in found.best:
        s = choice.strategy
        assert (s.grid.inter, s.grid.col, s.grid.data * s.grid.row) == (2, 2, 2)
        assert (s.microbatch_size, s.schedule.name, s.checkpoint_layers) == (4, "1f1b", 2)
        assert s.recompute == "full"
        assert s.optimizer == "offloaded"
        assert choice.prediction.fits


def test_a_unet_is_planned_too(machine: MachineFile) -> None:
    found = plan(planning.plannable(load_model("unet-30m")), machine, Space(gpus=4, batch_size=64))
    assert found.best[0].prediction.fits
    assert found.best[0].strategy.grid.data == 4


# --- bad input


def test_what_fits_nowhere_is_an_error_that_says_how_much_is_needed(command: CommandLine) -> None:
    arguments = ("plan", "--model", "gpt-100b", "--machine", "summit", "--gpus", "6", "--batch", "64")
    command.refuses("fits nowhere", *arguments)
    code, _, error = command(*arguments)
    assert code == 2
    assert "more memory than the 16.3 GB that a GPU has for it; the smallest needs" in error
    assert "Take more GPUs" in error


def test_the_nearest_miss_is_the_least_that_lacks(machine: MachineFile) -> None:
    model = planning.plannable(load_model("gpt-12b"))
    space = Space(gpus=6, batch_size=12, optimizer="device", checkpointing="auto")
    with pytest.raises(DoesNotFit, match="the smallest needs") as error:
        plan(model, machine, space)
    needed = float(str(error.value).split("the smallest needs ")[1].split(" GB")[0])
    assert needed > 20 * 12e9 / 6 / 1e9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--gpus": "40000"}, "summit has 27648 GPUs (4608 nodes with 6), not 40000"),
        ({"--model": "gpt-13b"}, "there is no model 'gpt-13b'; did you mean gpt-12b"),
        ({"--machine": "sumit"}, "there is no machine 'sumit'; did you mean summit"),
        ({"--batch": "7"}, "the batch does not divide (data 48"),
        ({"--inter": "7"}, "no grid of 48 ranks has inter = 7; the pinned extents must divide 48"),
        ({"--microbatch": "5"}, "no configuration of gpt-12b on 48 GPUs of summit is possible"),
        ({"--schedule": "1f2b"}, "unknown schedule '1f2b'"),
        ({"--checkpointing": "some"}, "say none, auto, or a number of blocks"),
        ({"--order": "data,row"}, "name each of data, inter, row, col once"),
        ({"--in-flight": "3"}, "give --schedule"),
        ({"--col": "16", "--inter": "3"}, "the tensor axes do not divide the model's layers"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_change(
    command: CommandLine, changes: dict[str, str], message: str
) -> None:
    given = {"--model": "gpt-12b", "--machine": "summit", "--gpus": "48", "--data": "48"} | changes
    if not {"--batch"} & set(changes):
        del given["--data"]
    command.refuses(message, "plan", *(word for pair in given.items() for word in pair))


def test_a_batch_is_asked_for_where_the_model_has_none(command: CommandLine) -> None:
    command.refuses("give --batch", "plan", "--model", "unet-1m", "--machine", "summit", "--gpus", "2")


# --- the file


def test_the_written_configuration_is_the_choice_and_trains(command: CommandLine) -> None:
    content = {"name": "tiny", "layers": 2, "hidden": 16, "heads": 2, "seq_len": 16, "vocab": 256}
    model, out = command.root / "tiny.yaml", command.root / "plan.yaml"
    model.write_text(yaml.safe_dump(content), encoding="utf-8")
    common = ("--machine", "summit", "--batch", "8", "--precision", "float32", "--out", out)
    code, text, _ = command("plan", "--model", model, "--gpus", "2", *common, "--pick", "2")
    assert code == 0
    assert "run it with: axonn train" in text
    assert "axonn train" in text
    config = load_yaml(out, TrainConfig)
    assert (config.batch_size, config.precision.compute) == (8, "float32")
    assert strategy_of_config(config).grid == config.grid
    assert command("plan", "--model", model, "--gpus", "1", *common)[0] == 0
    code, text, error = command("train", out)
    assert code == 0, error
    assert "loss" in text


def test_a_row_that_does_not_exist_cannot_be_picked(command: CommandLine) -> None:
    arguments = ("--model", "gpt-12b", "--machine", "summit", "--gpus", "48", "--data", "8", "--inter", "6")
    command.refuses("--pick 99", "plan", *arguments, "--microbatch", "1", "--pick", "99")


def test_a_configuration_is_made_of_every_row(machine: MachineFile) -> None:
    found = plan(planning.plannable(SMALL), machine, Space(gpus=4, batch_size=64))
    for choice in found.best:
        config = planning.config_of_strategy(choice.strategy, SMALL, batch_size=64)
        assert strategy_of_config(config) == choice.strategy


def test_unknown_pins_raise_before_any_search(machine: MachineFile) -> None:
    with pytest.raises(ConfigError, match="has 27648 GPUs"):
        plan(planning.plannable(SMALL), machine, Space(gpus=10**6, batch_size=10**6))
