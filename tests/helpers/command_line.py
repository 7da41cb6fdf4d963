"""The `axonn` command inside of the tests' process, and a configuration that it trains in no time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from axonn.cli import main
from axonn.config.train_config import TrainConfig
from axonn.grid import ProcessGrid
from axonn.models.gpt.gpt_config import GPTConfig
from experiments import definition, runner

ENDLESS = 1_000_000
TEXT = definition.ROOT / "LICENSE"
"""A short text to train on, where it does not matter which."""


def tiny(*, inter: int = 2, steps: int = ENDLESS, **changes: Any) -> TrainConfig:
    return TrainConfig(
        model=GPTConfig(name="tiny", layers=2, hidden=16, heads=2, seq_len=16, vocab=256),
        grid=ProcessGrid(inter=inter),
        batch_size=8,
        microbatch_size=2,
        steps=steps,
        **changes,
    )


class CommandLine:
    """The `axonn` command inside of this process, its results and run folders in a folder of their own."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self._monkeypatch, self._capsys = root, monkeypatch, capsys
        monkeypatch.setattr(runner, "PROJECT", root)
        monkeypatch.setattr(runner, "RUNS", root / "runs")
        monkeypatch.chdir(root)
        monkeypatch.setattr(runner, "MEASURED", root / "measured")
        # What it trains is compared to the bit.
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        """(exit code, standard output, standard error)"""
        self._monkeypatch.setattr(sys, "argv", ["axonn", *map(str, arguments)])
        code = 0
        try:
            main.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        return code, *self._capsys.readouterr()

    def config(self, **changes: Any) -> Path:
        """A configuration file for `axonn train`."""
        content = tiny(inter=1, steps=2).model_dump(mode="json") | changes
        path = self.root / "config.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    def experiment(self, **measured: Any) -> Path:
        """A small experiment file for `axonn run`."""
        content = yaml.safe_load((definition.HERE / "fig6.yaml").read_text(encoding="utf-8"))
        content["measured"] |= {
            "frameworks": ["axonn"],
            "layers_per_rank": 1,
            "hidden": 16,
            "heads": 2,
            "seq_len": 16,
            "vocab": 256,
            "microbatch_size": 2,
            "min_microbatches": 2,
            "microbatches_per_rank": 1,
            "batches": 3,
            "repeats": 1,
            "max_ranks": 1,
        } | measured
        path = self.root / "experiment.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    def refuses(self, message: str, *arguments: str | Path) -> None:
        """The command fails with a one-line error that contains `message`, names a page, and leaves the folder as it
        was."""
        before = {p: p.read_bytes() if p.is_file() else None for p in self.root.rglob("*")}
        code, _, error = self(*arguments)
        assert code == 2
        assert message in error
        assert error.startswith("error: ")
        _, page = error.splitlines()
        assert (definition.ROOT / page.removeprefix("see ")).is_file()
        assert {p: p.read_bytes() if p.is_file() else None for p in self.root.rglob("*")} == before
