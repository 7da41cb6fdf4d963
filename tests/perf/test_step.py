"""What a stage does after its last task, and how much batch times spread."""

from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from axonn.errors import ConfigError
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.registry import outline_of
from axonn.perf.machine.machine_file import MachineFile, load_machine
from axonn.perf.prediction import Prediction, predict
from axonn.perf.strategy import Strategy
from axonn.perf.timing.jitter import Jitter, JitterSpread
from axonn.perf.timing.step_times import StepTime, Tie, finish, ties_of
from axonn.perf.timing.update_times import stage_steps, step_times
from axonn.spans import SpanKind, breakdown

ROOT = Path(__file__).parents[2]
MODEL = GPTConfig(name="small", layers=8, hidden=1024, heads=16, seq_len=512, vocab=51200, tied_head=True)
STEPS = [StepTime(3.0, 1.0), StepTime(2.0, 1.0), StepTime(2.0, 1.5)]
ENDS = [10.0, 8.0, 5.0]


@pytest.fixture(scope="module")
def machine() -> MachineFile:
    return load_machine(ROOT / "experiments/machines/summit.yaml")


def strategy_of(**given: Any) -> Strategy:
    grid = given.pop("grid", {"inter": 4, "data": 2})
    return Strategy.model_validate({"grid": grid, "microbatch_size": 2, "optimizer": "offloaded", **given})


# --- after the last task


def test_every_stage_begins_its_reduction_when_it_is_done() -> None:
    ends = finish(ENDS, STEPS)
    assert [end.reduction for end in ends] == [(10, 13), (8, 10), (5, 7)]
    assert [end.optimizer for end in ends] == [(13, 14), (10, 11), (7, 8.5)]


def test_an_agreement_lets_all_wait_for_the_last() -> None:
    before = finish(ENDS, STEPS, agreement="before", flag=0.5)
    assert [end.reduction for end in before] == [(10.5, 13.5), (10.5, 12.5), (10.5, 12.5)]
    after = finish(ENDS, STEPS, agreement="after", flag=0.5)
    assert [end.reduction for end in after] == [(10, 13), (8, 10), (5, 7)]
    assert [end.optimizer for end in after] == [(13.5, 14.5), (13.5, 14.5), (13.5, 15)]


def test_the_stages_of_a_tied_parameter_wait_for_each_other() -> None:
    ends = finish(ENDS, STEPS, ties=[Tie((0, 2), 0.25)])
    assert [end.tied for end in ends] == [(10, 10.25), (8, 8), (10, 10.25)]
    assert [end.reduction[0] for end in ends] == [10.25, 8, 10.25]
    assert ends[0].reducing == 3.25


def test_the_head_of_the_last_stage_is_tied_to_the_first(machine: MachineFile) -> None:
    strategy = strategy_of()
    (tie,) = ties_of(outline_of(MODEL), machine, strategy)
    assert tie.stages == (0, 3)
    assert tie.seconds > MODEL.vocab * MODEL.hidden * 2 / machine.node.nvlink.si
    assert ties_of(outline_of(MODEL.model_copy(update={"tied_head": False})), machine, strategy) == []
    assert ties_of(outline_of(MODEL), machine, strategy_of(grid={"data": 8})) == []


def test_a_batch_ends_with_the_last_update(machine: MachineFile) -> None:
    """In bfloat16 the last stages reduce while the first still run backwards, in float16 nobody does."""

    def prediction(**given: Any) -> Prediction:
        return predict(MODEL, machine, strategy_of(schedule={"name": "1f1b"}, **given), batch_size=64)

    alone, together = prediction(agree_on_overflow="never"), prediction()
    assert alone.batch_time_s <= together.batch_time_s
    first = [end.reduction[0] for end in alone.ends]
    # The first stage is the last to end, and the last has to wait for it because of the tied head.
    assert first[1] > first[2]
    assert first[2] < alone.pipeline_s
    assert all(end.reduction[0] > together.pipeline_s for end in together.ends)
    steps = stage_steps(outline_of(MODEL), machine, strategy_of())
    assert step_times(outline_of(MODEL), machine, strategy_of()) == max(steps, key=sum)
    (tie,) = ties_of(outline_of(MODEL), machine, strategy_of())
    expected = together.pipeline_s + tie.seconds + sum(max(steps, key=sum))
    assert together.batch_time_s == pytest.approx(expected, rel=0.001)


@pytest.mark.parametrize("agreement", ["before", "after", "never"])
@pytest.mark.parametrize(
    "grid", [{"inter": 4, "data": 2}, {"inter": 2, "data": 2, "col": 2}, {"data": 2, "row": 2}], ids=str
)
@pytest.mark.parametrize("blocking", [False, True])
def test_spans_break_down_to_the_parts(
    machine: MachineFile, grid: dict[str, int], agreement: str, blocking: bool
) -> None:
    strategy = strategy_of(
        grid=grid, agree_on_overflow=agreement, blocking_messages=blocking, overdecomposition=2, microbatch_size=4
    )
    prediction = predict(MODEL, machine, strategy, batch_size=64, record=True)
    found, parts = breakdown(prediction.spans()), prediction.parts
    assert found.compute == pytest.approx(parts.compute)
    assert found.tensor == pytest.approx(parts.tensor_all_reduce, abs=1e-9)
    assert found.point_to_point == pytest.approx(parts.point_to_point, rel=1e-6, abs=1e-9)
    assert found.bubble == pytest.approx(parts.bubble)
    assert found.all_reduce == pytest.approx(parts.all_reduce)
    assert found.optimizer == pytest.approx(parts.optimizer)
    assert found.unexplained == pytest.approx(0, abs=1e-9)
    assert sum(astuple(parts)) == pytest.approx(prediction.batch_time_s)


def test_spans_name_layers_and_tensor_collectives(machine: MachineFile) -> None:
    strategy = strategy_of(grid={"inter": 2, "col": 2})
    spans = predict(MODEL, machine, strategy, batch_size=8, record=True).spans()
    stages = (predict(MODEL, machine, strategy, batch_size=8, record=True).spans(only=stage) for stage in range(2))
    assert sorted(span for own in stages for span in own) == sorted(spans)
    collectives = [s for s in spans if s.kind == SpanKind.TENSOR]
    # Per microbatch and half of the layers: two forward, two again, two backward, and the ends' own.
    assert len(collectives) >= 2 * 4 * 4 * 6
    # What computes up to a collective, and the collective, have the layer that issues it: links 0 to 8, and the rest.
    layers = [{s.layer for s in spans if s.kind == SpanKind.FORWARD and s.rank == stage} for stage in range(2)]
    assert min(layers[0]) == 0
    assert max(layers[0]) < 9 == min(layers[1])
    assert all(s.layer in layers[s.rank] for s in collectives)
    assert all(s.microbatch >= 0 and s.chunk == 0 for s in collectives)


# --- jitter


def test_factors_have_the_asked_mean_and_deviation() -> None:
    noise = Jitter(relative=0.2, seed=3).noise(1)
    factors = [noise() for _ in range(20_000)]
    mean = sum(factors) / len(factors)
    assert mean == pytest.approx(1, abs=0.01)
    assert (sum((f - mean) ** 2 for f in factors) / len(factors)) ** 0.5 == pytest.approx(0.2, rel=0.05)
    assert min(factors) > 0


def test_equal_seeds_give_equal_times(machine: MachineFile) -> None:
    def times(**given: Any) -> tuple[float, ...]:
        spread = predict(MODEL, machine, strategy_of(), batch_size=256, jitter=Jitter(**given)).spread
        assert spread is not None
        return spread.batch_times_s

    assert times(relative=0.1, repeats=3) == times(relative=0.1, repeats=3)
    assert times(relative=0.1, repeats=3, seed=1) != times(relative=0.1, repeats=3)
    assert len(set(times(relative=0.1, repeats=3))) == 3
    # Without noise all batches are the predicted one; with it they take longer in the mean: all wait for the slowest.
    still = predict(MODEL, machine, strategy_of(), batch_size=256)
    assert still.spread is None
    assert times(relative=0.0, repeats=2) == pytest.approx((still.batch_time_s,) * 2)
    noisy = times(relative=0.3, repeats=20)
    assert sum(noisy) / 20 > still.batch_time_s


def test_percentiles_are_interpolated() -> None:
    spread = JitterSpread((3.0, 1.0, 2.0))
    assert [spread.percentile(p) for p in (0, 25, 50, 100)] == [1.0, 1.5, 2.0, 3.0]
    assert spread.mean == 2.0


@pytest.mark.parametrize("given", [{"relative": -0.1}, {"relative": 0.1, "repeats": 0}])
def test_senseless_jitter_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="jitter"):
        Jitter(**given)
