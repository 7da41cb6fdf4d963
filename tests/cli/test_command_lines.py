"""Every command line works with `python -m`, and says what an answer hangs on that nobody said."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

import pytest
import typer

from axonn.cli import main
from axonn.config.train_config import TrainConfig, load_yaml
from axonn.perf.strategy import Strategy
from axonn.training import trainer
from experiments import predictor
from experiments.definition import ROOT
from tests.helpers.command_line import TEXT, CommandLine

PACKAGES = ("axonn", "experiments", "baselines", "plots", "jobscripts", "tools")
STARTED_BY_THE_SUITE = {
    "axonn.distributed.transport.gpu_aware",
    "baselines.gpu.bench_worker",
    "baselines.comparison_session",
    "experiments.calibration.calibration_worker",
    "axonn.training.worker",
}
"""Ranks and their like, which are given a folder and asked nothing; and all of baselines.ranks."""
MINIMAL = """
model: {name: tiny, layers: 2, hidden: 16, heads: 2, seq_len: 16, vocab: 256}
batch_size: 4
microbatch_size: 2
steps: 2
precision: float64
optimizer: {lr: 0.01, schedule: {warmup: 1}}
"""
PREDICTED = """
name: mine
title: Mine
predicted:
  machine: summit
  batch_size: 8
  precision: float16
  frameworks: {AxoNN: {microbatch_size: 1}}
  points: [{framework: AxoNN, model: gpt-12b, gpus: 48, strategy: {grid: {inter: 48}, recompute: none}}]
"""
PLAN = ("plan", "--model", "gpt-12b", "--machine", "summit", "--gpus", "48", "--microbatch", "8")
PINNED = (
    "--data",
    "4",
    "--inter",
    "12",
    "--row",
    "1",
    "--col",
    "1",
    "--optimizer",
    "offloaded",
    "--checkpointing",
    "2",
)


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    return found


def runs_by_itself(path: Path) -> bool:
    """Whether a module does something as `python -m`."""
    return any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        for node in ast.parse(path.read_text(encoding="utf-8")).body
    )


def has_a_command_line(path: Path) -> bool:
    """Whether a module reads the words that were typed, in a function of its own for it."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in body)


def asked_by_people() -> list[str]:
    return sorted(
        name.removesuffix(".__main__")
        for name, path in modules().items()
        if runs_by_itself(path) and name not in STARTED_BY_THE_SUITE and not name.startswith("baselines.ranks.")
    )


def test_every_module_with_a_command_line_runs_by_itself() -> None:
    # What these two have is called by others: figures, and ranks.
    shared = {"plots.figure", "baselines.ranks.rank_common"}
    silent = {name for name, path in modules().items() if has_a_command_line(path) and not runs_by_itself(path)}
    assert silent == shared


@pytest.mark.parametrize("name", asked_by_people())
def test_a_module_says_how_it_is_used(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    assert ended.value.code in (0, None)
    assert "usage:" in capsys.readouterr().out.lower()
    assert list(tmp_path.iterdir()) == []


def test_the_command_has_its_name_and_that_of_its_package() -> None:
    assert {"axonn", "experiments", "axonn.cli.main"} <= set(asked_by_people())


def test_a_plan_says_what_it_hangs_on(axonn: CommandLine) -> None:
    command = typer.main.get_command(main.app).commands["plan"]  # type: ignore[attr-defined]
    options = {f"--{p.name.replace('_', '-')}": p.default for p in command.params}
    # A default that is none leaves something to the search, which its table shows; or it is that of another option.
    filled = {"--batch", *(name for name, default in options.items() if default not in (None, False))}
    assert {"--batch", "--precision", "--reserve", "--chunks", "--placement", "--pick"} <= filled
    schedule = ("--schedule", "message-driven")
    status, printed, error = axonn(*PLAN, *PINNED, *schedule)
    assert status == 0, error
    (line,) = (line for line in printed.splitlines() if line.startswith("by default: "))
    assert {option for option in options if f"({option})" in line} == filled | {"--order", "--in-flight"}
    assert "batch 16384" in line
    told = ("--batch", 1024, "--precision", "float16", "--reserve", 0.1, "--pick", 1, "--in-flight", 12)
    told = (*told, "--order", "data,inter,row,col", "--chunks", 1, "--placement", "loop", "--algorithm", "adamw")
    status, printed, error = axonn(*PLAN, *PINNED, *schedule, *map(str, told))
    assert status == 0, error
    assert "by default" not in printed


def test_training_says_what_it_hangs_on(axonn: CommandLine) -> None:
    path = axonn.root / "my.yaml"
    path.write_text(MINIMAL + f"data: {{path: {TEXT}}}\n", encoding="utf-8")
    config = load_yaml(path, TrainConfig)
    said = {"batch_size", "precision.compute", "optimizer.lr", "optimizer.schedule.warmup", "data.path"}
    said |= {f"model.{name}" for name in ("name", "kind", "layers", "hidden", "heads", "seq_len", "vocab")}
    said.add("microbatch_size")
    free = {key for key in trainer._flat(config) if trainer._is_free(key)}
    taken = trainer.taken_by_default(config)
    assert taken.keys() == trainer._flat(config).keys() - said - free
    assert taken["precision.master"] == "float64"
    _, printed, _ = axonn("train", "my.yaml")
    (line,) = (line for line in printed.splitlines() if line.startswith("by default: "))
    assert line == "by default: " + ", ".join(f"{key} {value}" for key, value in taken.items())
    assert "seed 0" in line
    path.write_text(MINIMAL, encoding="utf-8")
    assert "library" in trainer.taken_by_default(load_yaml(path, TrainConfig))["data.path"]


def test_a_prediction_says_what_it_hangs_on(axonn: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "PREDICTED", axonn.root / "predicted")
    (axonn.root / "mine.yaml").write_text(PREDICTED, encoding="utf-8")
    for words in ((), ("--fresh", "--jitter", "0.1")):
        status, printed, error = axonn("predict", "mine.yaml", *words)
        assert status == 0, error
        lines = [line for line in printed.splitlines() if line.startswith("by default: ")]
        named = {name for name in Strategy.model_fields if f" {name} " in lines[-1].replace(":", " ")}
        assert named == Strategy.model_fields.keys() - {"grid", "microbatch_size", "recompute"}
        assert len(lines) == 1 + bool(words)
    assert "(--seeds)" in lines[0]
