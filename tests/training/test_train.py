"""Training as people start it: it goes on where it was, on any grid, and refuses what would not be the same run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from axonn.checkpoint.checkpoints import Checkpoint, CheckpointState, latest
from axonn.checkpoint.local_shard import LocalShard
from axonn.cli.training_progress import TrainingProgress
from axonn.config.train_config import TrainConfig, validate
from axonn.data.text import TextData
from axonn.distributed.collectives import SerialCollectives
from axonn.distributed.runtime import Runtime
from axonn.durable_files import locked_folder
from axonn.engine import BatchResult
from axonn.errors import ConfigError, LaunchError
from axonn.grid import ProcessGrid
from axonn.inter_layer.non_finite import NotFinite
from axonn.models.gpt.gpt_model import GPT
from axonn.models.registry import make_data
from axonn.models.weights_file import check_weights
from axonn.observability.records import read_records
from axonn.spans import SpanKind, SpanRecorder, read_spans
from axonn.training import trainer as training
from axonn.training.framework import ResumableTrainer
from axonn.training.loop import CHECKPOINTS, TrainingLoop
from axonn.training.metrics import BATCHES, EVALUATIONS, read_rows
from axonn.training.resumption import newest_checkpoint
from axonn.training.run_folder import STOP
from axonn.training.run_record import parts_of
from tests.helpers.command_line import TEXT, CommandLine

# --- the loop, with a trainer of one number


class OneNumber(ResumableTrainer):
    """Its state is one number, which each batch moves by the batch's own number."""

    def __init__(self) -> None:
        self.weight = torch.zeros(1, dtype=torch.float64)
        self.updates = 0
        self.evaluated: list[int] = []

    def train_batch(self, step: int) -> float:
        assert step == self.updates, "a batch was repeated or left out"
        self.weight += 1.0 / (step + 1)
        self.updates += 1
        self.result = BatchResult(
            loss=float(self.weight), applied=step != 1, learning_rate=0.1, loss_scale=2.0, gradient_norm=None
        )
        return self.result.loss

    def evaluate(self, number: int) -> float:
        self.evaluated.append(number)
        return float(number)

    def not_finite(self) -> list[NotFinite]:
        return []

    def data_digest(self) -> str:
        return "digest"

    def state_tensors(self) -> Mapping[str, LocalShard]:
        return {"master.weight": LocalShard.whole(self.weight)}

    def state_loaded(self) -> None:
        return None

    def progress(self) -> Mapping[str, Any]:
        return {"updates": self.updates}

    def load_progress(self, progress: Mapping[str, Any]) -> None:
        self.updates = progress["updates"]

    def memory(self) -> Mapping[str, int]:
        return {}


def small(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "model": {"name": "small", "layers": 2, "hidden": 16, "heads": 2, "seq_len": 16, "vocab": 256},
        "batch_size": 8,
        "microbatch_size": 2,
        "steps": 7,
    }
    return validate(values | changes, TrainConfig, where="test")


def loop_of(config: TrainConfig, trainer: Any, folder: Path, *, stoppable: bool = False) -> TrainingLoop:
    collectives = SerialCollectives(ProcessGrid(), 0)
    runtime = Runtime(rank=0, transport=None, collectives=collectives, clock_offset=0.0)
    spans = SpanRecorder(0, folder=folder / "spans-0.parquet")
    return TrainingLoop(config, trainer, runtime=runtime, spans=spans, folder=folder, stoppable=stoppable)


def test_the_loop_saves_evaluates_and_writes_every_batch(tmp_path: Path) -> None:
    config = small(checkpoints={"every": 3, "keep": 5}, evaluation={"every": 2, "batches": 3})
    trainer = OneNumber()
    loop = loop_of(config, trainer, tmp_path)
    loop.run(loop.start(None))
    rows = read_rows(tmp_path / BATCHES)
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["applied"] for row in rows] == [True, False, True, True, True, True, True]
    assert all(row["loss_scale"] == 2.0 and row["learning_rate"] == 0.1 for row in rows)
    assert trainer.evaluated == [0, 1, 2] * 3
    assert [(row["batches"], row["loss"]) for row in read_rows(tmp_path / EVALUATIONS)] == [
        (2, 1.0),
        (4, 1.0),
        (6, 1.0),
    ]
    saved = sorted(p.name for p in (tmp_path / CHECKPOINTS).iterdir())
    assert saved == ["step-00000003", "step-00000006", "step-00000007"]
    newest = latest(tmp_path / CHECKPOINTS)
    assert newest is not None
    assert (newest.state.batches, newest.state.samples, newest.state.data_digest) == (7, 56, "digest")


@pytest.mark.parametrize(("name", "recompute"), [(None, False), (2, True), ("auto", True)])
def test_flops_are_counted_by_the_named_formula(tmp_path: Path, name: Any, recompute: bool) -> None:
    loop = loop_of(small(steps=1, activation_checkpointing=name), OneNumber(), tmp_path)
    loop.run(0)
    (row,) = read_rows(tmp_path / BATCHES)
    layers = 8 * 16 * 2 * 16**2 * (1 + 16 / (6 * 16))
    head = 6 * 8 * 16 * 16 * 256
    assert row["recompute"] is recompute
    assert row["tflops_per_gpu_without_recompute"] * row["seconds"] * 1e12 == pytest.approx(72 * layers + head)
    assert row["tflops_per_gpu"] * row["seconds"] * 1e12 == pytest.approx((96 if recompute else 72) * layers + head)
    assert row["tokens_per_s"] * row["seconds"] == pytest.approx(8 * 16)


@given(st.integers(1, 7), st.integers(1, 7))
def test_a_loop_that_is_interrupted_goes_on(tmp_path_factory: pytest.TempPathFactory, every: int, stop: int) -> None:
    folder = tmp_path_factory.mktemp("run")
    config = small(checkpoints={"every": every})
    first = loop_of(config.model_copy(update={"steps": stop}), OneNumber(), folder)
    first.run(first.start(None))
    newest = latest(folder / CHECKPOINTS)
    assert newest is not None
    trainer = OneNumber()
    second = loop_of(config, trainer, folder)
    start = second.start(newest.folder)
    assert start == stop
    second.run(start)
    whole_run = OneNumber()
    for step in range(7):
        whole_run.train_batch(step)
    assert trainer.weight == whole_run.weight
    assert [row["step"] for row in read_rows(folder / BATCHES)] == list(range(7))


class Stops(OneNumber):
    """The file `stop` comes while it trains a batch."""

    def __init__(self, folder: Path, at: int) -> None:
        super().__init__()
        self._folder, self._at = folder, at

    def train_batch(self, step: int) -> float:
        if step == self._at:
            (self._folder / STOP).touch()
        return super().train_batch(step)


@pytest.mark.parametrize("checkpoints", [None, {"every": 2, "keep": 2}])
@pytest.mark.parametrize("at", [0, 3, 6])
def test_a_loop_is_stopped_after_the_batch_and_goes_on(
    tmp_path: Path, at: int, checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("axonn.training.loop._LOOK_BATCHES", 1)
    config = small(checkpoints=checkpoints)
    first = loop_of(config, Stops(tmp_path, at), tmp_path, stoppable=True)
    assert first.run(first.start(None)) is (at < 6), "a run that is stopped after its last batch is done"
    (tmp_path / STOP).unlink()
    trainer = OneNumber()
    second = loop_of(config, trainer, tmp_path, stoppable=True)
    newest = newest_checkpoint(tmp_path)
    if at == 6 and checkpoints is None:
        assert newest is None, "nothing was asked for"
        return
    assert newest is not None
    assert second.start(newest) == at + 1
    assert not second.run(at + 1)
    whole = OneNumber()
    for step in range(7):
        whole.train_batch(step)
    assert trainer.weight == whole.weight
    rows = read_rows(tmp_path / BATCHES)
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["step"] for row in rows if "first" in row] == sorted({0, min(at + 1, 6)} if at < 6 else {0})
    kept = sorted(int(path.name[5:]) for path in (tmp_path / CHECKPOINTS).iterdir())
    assert kept == ([at + 1] if checkpoints is None else [6, 7])


def test_only_a_stoppable_loop_looks(tmp_path: Path) -> None:
    assert not loop_of(small(), Stops(tmp_path, 2), tmp_path).run(0)
    assert len(read_rows(tmp_path / BATCHES)) == 7


def test_a_framework_without_a_state_just_ends(tmp_path: Path) -> None:
    class Plain:
        def train_batch(self, step: int) -> float:
            (tmp_path / STOP).touch()
            return 1.0

    assert loop_of(small(), Plain(), tmp_path, stoppable=True).run(0)
    assert len(read_rows(tmp_path / BATCHES)) == 1
    assert not (tmp_path / CHECKPOINTS).exists()
    assert newest_checkpoint(tmp_path) is None
    assert read_rows(tmp_path / BATCHES) == []


def test_looking_costs_no_batch_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only looking moves."""
    now = 0.0

    def look(self: TrainingLoop, batch_s: float) -> tuple[bool, int]:
        nonlocal now
        assert batch_s == pytest.approx(1.0)
        now += 100.0
        return False, 1

    monkeypatch.setattr(TrainingLoop, "_stop_requested", look)
    monkeypatch.setattr("axonn.training.loop.time.perf_counter", lambda: now + 1e-3)
    trainer = OneNumber()
    trained = trainer.train_batch

    def train_batch(step: int) -> float:
        nonlocal now
        now += 1.0
        return trained(step)

    monkeypatch.setattr(trainer, "train_batch", train_batch)
    loop_of(small(), trainer, tmp_path, stoppable=True).run(0)
    assert now == 707.0
    assert [row["seconds"] for row in read_rows(tmp_path / BATCHES)] == pytest.approx([1.0] * 7)


def test_a_loss_that_is_not_a_number_is_not_saved(tmp_path: Path) -> None:
    class Diverges(OneNumber):
        def train_batch(self, step: int) -> float:
            super().train_batch(step)
            return float("nan") if step == 3 else 1.0

    with pytest.raises(FloatingPointError, match="batch 3"):
        loop_of(small(checkpoints={"every": 1}), Diverges(), tmp_path).run(0)
    newest = latest(tmp_path / CHECKPOINTS)
    assert newest is not None
    assert newest.state.batches == 3


@pytest.mark.parametrize(
    "asks", [{"checkpoints": {"every": 1}}, {"evaluation": {"every": 1}}, {"initial_weights": "model.safetensors"}]
)
def test_what_a_framework_cannot_do_is_refused(tmp_path: Path, asks: dict[str, Any]) -> None:
    class Plain:
        def train_batch(self, step: int) -> float:
            return 1.0

    with pytest.raises(ConfigError, match=f"does not support {next(iter(asks))}"):
        loop_of(small(**asks), Plain(), tmp_path)
    loop_of(small(), Plain(), tmp_path).run(0)
    assert [row["loss"] for row in read_rows(tmp_path / BATCHES)] == [1.0] * 7


def test_a_long_run_keeps_no_spans_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("axonn.training.loop._SPANS_IN_MEMORY", 10)
    most = 0
    trainer = OneNumber()
    loop = loop_of(small(steps=50), trainer, tmp_path)
    spans = loop._spans

    def train_batch(step: int) -> float:
        nonlocal most
        for _ in range(3):
            spans.add(SpanKind.FORWARD, float(step), step + 0.5)
        spans.step += 1
        most = max(most, len(spans.spans))
        return OneNumber.train_batch(trainer, step)

    monkeypatch.setattr(trainer, "train_batch", train_batch)
    loop.run(0)
    assert most == 12
    assert [s.step for s in read_spans(tmp_path / "spans-0.parquet")] == [step for step in range(50) for _ in range(3)]
    assert parts_of(tmp_path, small(), first=10, last=50)["compute"] == pytest.approx(0.5)


# --- what may change


@cache
def text_data() -> TextData:
    return make_data(small())


def saved(config: TrainConfig) -> Checkpoint:
    state = CheckpointState(
        batches=3,
        samples=24,
        seed=0,
        progress={},
        config=json.loads(json.dumps(config.model_dump(mode="json"))),
        grid={},
        data_digest=text_data().digest,
    )
    return Checkpoint(folder=Path("step-00000003"), state=state)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({}, None),
        ({"grid": {"data": 2, "inter": 2}}, None),
        ({"schedule": {"name": "1f1b"}}, None),
        ({"steps": 70}, None),
        ({"microbatch_size": 1}, None),
        ({"transport": "torch"}, None),
        ({"activation_checkpointing": 1}, None),
        ({"checkpoints": {"every": 5}}, None),
        ({"optimizer": {"placement": "offloaded", "bsize": 100, "k": None, "buckets_resident": 1}}, None),
        ({"precision": {"compute": "float32", "master": "float32", "loss_scale": 1.0}}, None),
        ({"data": {"path": "the/same/elsewhere.txt"}}, None),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"batch_size": 16}, "batch_size was 8, is 16"),
        ({"precision": "bfloat16"}, "precision.compute was float32, is bfloat16"),
        ({"precision": {"compute": "float32", "gradients": "float64"}}, "precision.gradients was float32, is float64"),
        ({"optimizer": {"lr": 0.5}}, "optimizer.lr was 0.001, is 0.5"),
        ({"optimizer": {"clip_norm": 1.0}}, "optimizer.clip_norm was not set, is 1.0"),
        ({"optimizer": {"schedule": {"name": "linear"}}}, "optimizer.schedule.name was constant, is linear"),
        ({"data": {"held_out": 0.1}}, "data.held_out was 0.0, is 0.1"),
        ({"evaluation": {"every": 5}}, "data.held_out was 0.0, is 0.05"),
        ({"initial_weights": "w.safetensors"}, "initial_weights was not set, is w.safetensors"),
    ],
    ids=str,
)
def test_what_may_change_between_sessions(changes: dict[str, Any], difference: str | None) -> None:
    differences = training.config_differences(saved(small()), small(**changes), text_data())
    assert any(difference in found for found in differences) if difference else differences == []


def test_a_longer_run_must_not_change_the_learning_rate_of_the_shorter() -> None:
    decays = {"optimizer": {"schedule": {"name": "cosine"}}}
    fixed = {"optimizer": {"schedule": {"name": "cosine", "decay_until": 7}}}
    (difference,) = training.config_differences(saved(small(**decays)), small(steps=70, **decays), text_data())
    assert difference == "optimizer.schedule.decay_until was 7, is 70"
    assert training.config_differences(saved(small(**decays)), small(steps=70, **fixed), text_data()) == []


def test_other_text_under_the_same_name_is_another_run(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"something else" * 99)
    config = small(data={"path": str(tmp_path / "text")})
    (difference,) = training.config_differences(saved(small()), config, make_data(config))
    assert difference == f"the content of data.path differs (was not set, is {tmp_path}/text)"


def test_two_trainings_do_not_share_a_folder(tmp_path: Path) -> None:
    session = training.Session(config=small(), folder=tmp_path, command="", resume=None)
    with locked_folder(tmp_path), pytest.raises(LaunchError, match=r"another run uses .*choose another --out"):
        training.train(session, fresh=False)


# --- the command


class Training:
    """`axonn train` on one rank, in a folder of its own."""

    def __init__(self, command: CommandLine) -> None:
        self.command = command
        self.folder = command.root / "runs" / "config"

    def __call__(self, *options: str, **changes: Any) -> tuple[int, str, str]:
        code, output, error = self.command("train", self.config(**changes), *options)
        return code, output.replace("\n", " "), error.replace("\n", " ")

    def config(self, **changes: Any) -> Path:
        return self.command.config(**({"data": {"path": str(TEXT)}} | changes))

    @property
    def losses(self) -> list[float]:
        rows = read_rows(self.folder / BATCHES)
        assert [row["step"] for row in rows] == list(range(len(rows)))
        return [row["loss"] for row in rows]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / CHECKPOINTS).iterdir())


@pytest.fixture
def trains(axonn: CommandLine) -> Training:
    return Training(axonn)


SAVES = {"checkpoints": {"every": 2, "keep": 3}, "evaluation": {"every": 2}}


def test_train_goes_on_exports_and_starts_anew(trains: Training) -> None:
    """One story, since every start takes seconds."""
    code, output, error = trains(**SAVES, steps=3)
    assert code == 0, output + error
    assert trains.checkpoints == ["step-00000002", "step-00000003"]
    assert "in 3 batches" in output
    assert "s per batch: compute" in output
    before = trains.losses
    # It goes on, after a crash that damaged a checkpoint and left metrics of a batch that no checkpoint has.
    (data,) = (trains.folder / CHECKPOINTS / "step-00000003").glob("*.safetensors")
    data.write_bytes(data.read_bytes()[:100])
    with open(trains.folder / BATCHES, "a") as file:
        file.write('{"step": 3, "loss": 77.0, "seconds": 1.0}\n{"step": 4, "lo')
    code, output, error = trains(**SAVES, steps=4)
    assert code == 0, output + error
    assert "step-00000003: is damaged" in output
    assert "going on after batch 2 from" in output
    assert trains.losses[:3] == before, "the batch that was computed again came out differently"
    assert len(trains.losses) == 4
    assert 77.0 not in trains.losses
    assert [row["batches"] for row in read_rows(trains.folder / EVALUATIONS)] == [2, 4]
    first, second = json.loads((trains.folder / "run.json").read_text())["sessions"]
    assert (first["first_batch"], second["first_batch"]) == (0, 2)
    assert second["command"].startswith("axonn train")
    assert second["machine"]["torch"] in torch.__version__
    assert (trains.folder / "log-1.txt").exists()
    described = yaml.safe_load((trains.folder / "config.yaml").read_text())
    assert validate(described, TrainConfig, where="").data.held_out == 0.05
    (record,) = read_records(trains.folder / "record.json")
    assert len(record.losses) == len(record.batch_times_s) == 2
    assert record.note == "batches 2 to 3"
    assert record.parts_s["compute"] > 0
    # Nothing is left to do.
    code, output, _ = trains(**SAVES, steps=4)
    assert (code, "nothing to do: 4 batches are done" in output) == (0, True)
    # Another configuration is refused, and changes nothing.
    trains.command.refuses("seed was 0, is 5", "train", trains.config(**SAVES, steps=9, seed=5))
    # The weights go out, and another run starts from them.
    out = trains.command.root / "model.safetensors"
    code, output, error = trains.command("export", trains.folder, "--out", out)
    assert code == 0, error
    code, output, error = trains("--fresh", steps=1, initial_weights=str(out))
    assert code == 0, output + error
    assert trains.checkpoints == []
    assert trains.losses[0] < before[-1]
    assert not (trains.folder / EVALUATIONS).exists()


@pytest.mark.full
def test_a_run_on_tensor_axes_goes_on_along_the_others(trains: Training) -> None:
    """As one that was never interrupted, on one rank."""
    double = {"precision": {"compute": "float64"}, "checkpoints": {"every": 2, "keep": 9}}
    tensor, other = {"grid": {"row": 2, "col": 2}}, {"grid": {"data": 2, "inter": 2}}
    code, output, error = trains(**double, steps=4)
    assert code == 0, output + error
    expected = trains.losses
    code, output, error = trains("--fresh", **double, **tensor, steps=2)
    assert code == 0, output + error
    assert trains.checkpoints == ["step-00000002"]
    code, output, error = trains(**double, **other, steps=4)
    assert code == 0, output + error
    assert "going on after batch 2 from" in output
    newest = latest(trains.folder / CHECKPOINTS)
    assert newest is not None
    assert (newest.state.batches, newest.state.grid) == (4, {"data": 2, "inter": 2, "row": 1, "col": 1})
    assert trains.losses == pytest.approx(expected, rel=1e-10)
    code, output, error = trains.command("export", trains.folder, "--out", trains.command.root / "w.safetensors")
    assert code == 0, error
    check_weights(trains.command.root / "w.safetensors", GPT(small().model))


def test_an_interruption_keeps_what_is_there_and_says_how_to_go_on(
    trains: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: TrainingProgress, done: int) -> None:
        if any((trains.folder / CHECKPOINTS).glob("step-*")):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "__call__", interrupt)
        code, output, _ = trains(**SAVES, steps=100_000)
    assert code == 130
    assert "the same command goes on from there" in output
    (record,) = read_records(trains.folder / "record.json")
    assert record.failure is not None
    assert record.failure.cause == "interrupted"
    newest = latest(trains.folder / CHECKPOINTS)
    assert newest is not None
    assert f"of batch {newest.state.batches};" in output


def test_weights_of_another_model_are_refused_before_anything_starts(trains: Training) -> None:
    path = trains.command.root / "none.safetensors"
    config = trains.config(initial_weights=str(path))
    trains.command.refuses("none.safetensors: cannot be read as safetensors", "train", config)
    trains.command.refuses("is neither a checkpoint nor a run folder", "export", trains.command.root, "--out", path)
