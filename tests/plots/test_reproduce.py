"""`make reproduce`: every part is made, failures are named, and an interrupt stops all of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from experiments.definition import ROOT
from plots import reproduce


def test_all_parts_are_made_and_the_failed_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    made: list[str] = []

    def run(target: str) -> int:
        made.append(target)
        return 2 if target == "reproduce-fig5" else 0

    console = Console(width=200)
    assert reproduce.reproduce(["reproduce-fig3", "reproduce-fig5", "schematics"], run=run, console=console) == 1
    assert made == ["reproduce-fig3", "reproduce-fig5", "schematics", "report"]
    out = capsys.readouterr().out
    assert "2 of 4: make reproduce-fig5" in out
    assert "not complete: make reproduce-fig5; make reproduce repeats these alone" in out
    assert reproduce.reproduce(["schematics"], run=lambda target: 0, console=console) == 0


def test_an_interrupt_stops_all_of_it(tmp_path: Path) -> None:
    """Ctrl-C reaches the whole group of processes."""
    fake = tmp_path / "make"
    fake.write_text(f"#!/bin/sh\necho $3 >> {tmp_path}/made\n[ $3 = slow ] && exec sleep 60\nexit 0\n")
    fake.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-m", "plots.reproduce", "quick", "slow", "never"],
        cwd=ROOT,
        env={**os.environ, "MAKE": str(fake), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    made = tmp_path / "made"
    while process.poll() is None and (not made.exists() or "slow" not in made.read_text()):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted in make slow; 1 of 4 parts are done" in " ".join(out.split())
    assert "make reproduce goes on where it was" in " ".join(out.split())
    assert made.read_text().split() == ["quick", "slow"]


def test_the_makefile_makes_every_figure() -> None:
    out = subprocess.run(
        ["make", "--dry-run", "--old-file=.venv/.ready", "reproduce"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    experiments = [path.stem for path in (ROOT / "experiments").glob("*.yaml")]
    assert len(experiments) >= 9
    assert [name for name in experiments if f"reproduce-{name}" not in out.split()] == []
