"""Predicted points leave what a run leaves: records with parts and bytes, and spans."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from axonn.models.registry import outline_of
from axonn.observability.records import Record, read_records
from axonn.perf.strategy import Strategy
from axonn.perf.timing.bytes_sent import bytes_by_axis
from axonn.perf.timing.jitter import Jitter
from axonn.spans import breakdown, overlap, read_spans, span_files
from experiments import predictor
from experiments.definition import ROOT, Experiment, load_experiment, load_model
from experiments.predictor import done_predictions, predict_experiment
from tests.helpers.command_line import CommandLine

POINTS = [
    {"framework": "AxoNN", "strategy": {"microbatch_size": 8, "grid": {"inter": 6}}},
    {"framework": "DeepSpeed", "strategy": {"microbatch_size": 8, "grid": {"col": 3, "inter": 2}}},
]  # fmt: skip


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two small points."""
    monkeypatch.setattr(predictor, "PREDICTED", tmp_path / "predicted")
    content: dict[str, Any] = yaml.safe_load((ROOT / "experiments/fig6.yaml").read_text(encoding="utf-8"))
    content["predicted"] |= {"batch_size": 64, "points": [{"model": "gpt-12b", "gpus": 6, **p} for p in POINTS]}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture
def experiment(file: Path) -> Experiment:
    return load_experiment(file)


def test_spans_of_a_predicted_run_are_those_of_its_record(experiment: Experiment, tmp_path: Path) -> None:
    records = predict_experiment(experiment, command="test", spans=tmp_path / "spans")
    for record in records:
        folder = Path(record.run_folder or "")
        stages = record.ran.grid.inter
        # As the runner reads the folder of a run.
        files = [span_files(folder / f"spans-{stage}.parquet") for stage in range(stages)]
        spans = [span for own in files for file in own for span in read_spans(file)]
        assert {span.rank for span in spans} == set(range(stages))
        found = breakdown(spans)
        parts = record.parts_s
        assert found.compute == pytest.approx(parts["compute"])
        assert found.tensor == pytest.approx(parts["tensor_all_reduce"], abs=1e-9)
        assert found.bubble == pytest.approx(parts["bubble"])
        assert found.total == pytest.approx(record.batch_time_s)
    assert breakdown(spans).tensor > 0
    # DeepSpeed's point reduces beside nothing.
    assert overlap(spans).hidden == pytest.approx(0, abs=1e-9)


def test_records_say_what_is_sent(experiment: Experiment) -> None:
    ours, theirs = predict_experiment(experiment, command="test")
    element, hidden, places = 2, 4512, 512
    activation = 8 * places * hidden * element
    # The first stage sends 8 microbatches and the gradient of the embedding, which the last one has too.
    embedding = 51200 * hidden * element
    assert ours.bytes_per_batch["inter"] == 8 * activation + embedding
    assert "col" not in ours.bytes_per_batch
    assert theirs.bytes_per_batch["inter"] == pytest.approx((8 * activation + embedding) / 3, rel=1e-3)
    # Four all-reduces of a layer and two again, of 24 layers and 8 microbatches, over three ranks.
    layers = 24 * 8 * 6 * activation * 4 / 3
    assert layers < theirs.bytes_per_batch["col"] < 1.05 * layers


def test_bytes_do_not_depend_on_the_microbatch() -> None:
    outline = outline_of(load_model("gpt-12b"))
    strategy = Strategy.model_validate({"grid": {"data": 2, "col": 2, "inter": 4}, "microbatch_size": 1})
    twice = strategy.model_copy(update={"microbatch_size": 2})
    assert bytes_by_axis(outline, strategy, batch_size=64) == bytes_by_axis(outline, twice, batch_size=64)


def test_jitter_is_part_of_what_was_predicted(experiment: Experiment) -> None:
    jitter = Jitter(relative=0.1, repeats=3)
    plain = predict_experiment(experiment, command="test")
    assert done_predictions(experiment) == plain
    assert done_predictions(experiment, jitter) is None
    records = predict_experiment(experiment, command="test", jitter=jitter)
    assert done_predictions(experiment, jitter) == records == read_records(predictor.predicted_file(experiment))
    for record in records:
        assert len(record.batch_times_s) == 3
        assert record.batch_time_s == pytest.approx(sum(record.batch_times_s) / 3)

    def times(given: list[Record]) -> list[list[float]]:
        return [record.batch_times_s for record in given]

    assert times(predict_experiment(experiment, command="test", jitter=jitter)) == times(records)


def test_the_command_prints_the_spread(axonn: CommandLine, file: Path, tmp_path: Path) -> None:
    code, output, _ = axonn("predict", file, "--jitter", "0.1", "--seeds", "2", "--spans", tmp_path / "spans")
    assert code == 0
    assert "Batch times under jitter" in output
    assert len(list((tmp_path / "spans").glob("*/spans-*.parquet/*.parquet"))) == 6 + 2
    code, output, _ = axonn("predict", file, "--jitter", "0.1", "--seeds", "2")
    assert "nothing to do" in output
    assert "Batch times under jitter" in output
    axonn.refuses("jitter -0.1 must be at least 0", "predict", file, "--jitter", "-0.1")
