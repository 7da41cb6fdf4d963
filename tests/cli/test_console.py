"""What is printed: escape codes and lines that move on a real terminal alone, whatever the environment asks for."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from axonn.distributed.launch import rank_environment
from experiments.definition import ROOT

ESCAPE = b"\x1b"
FORCED = {"FORCE_COLOR": "1", "CLICOLOR_FORCE": "1", "PY_COLORS": "1", "TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1"}
ENVIRONMENTS = {
    "forced": FORCED,
    "no colour": {"NO_COLOR": "1"},
    "forced and dumb": {**FORCED, "TERM": "dumb"},
}
DISPLAYS = """
import json, sys, time
from pathlib import Path
from axonn.cli.console import console, make_console, progress_bar, warn
from axonn.cli.training_progress import TrainingProgress
from baselines.rounds import Widest
from baselines.comparison_progress import Reporter

folder = Path(sys.argv[1])
with progress_bar() as bar:
    task = bar.add_task("measuring", total=40)
    for _ in range(40):
        time.sleep(0.02)
        bar.advance(task)
with open(folder / "batches.jsonl", "w", buffering=1) as rows:
    with TrainingProgress(console, folder, first=0, steps=40) as progress:
        for step in range(40):
            row = {"step": step, "loss": 1.0, "seconds": 0.1, "tokens_per_s": 1.0, "tflops_per_gpu": 1.0}
            rows.write(json.dumps(row) + "\\n")
            time.sleep(0.02)
            progress(step + 1)
with Reporter().group("tiny", {"a": "one"}, seconds=1.0) as say:
    for _ in range(10):
        time.sleep(0.05)
        say("a", 0, 40, Widest(0.1, "a"))
with make_console(width=100).status("working") as status:
    for number in range(10):
        time.sleep(0.05)
        status.update(f"part {number}")
console.print("[red]red[/red] and [bold]bold[/bold]")
warn("a warning")
"""


def environment(**changes: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name not in {*FORCED, "NO_COLOR"}}
    return plain | {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)} | changes


@pytest.mark.parametrize(("name", "to"), [("forced", "file"), *((name, "pipe") for name in ENVIRONMENTS)])
def test_every_display_prints_plain_lines_where_there_is_no_terminal(name: str, to: str, tmp_path: Path) -> None:
    out, command = tmp_path / "out.txt", [sys.executable, "-c", DISPLAYS, str(tmp_path)]
    with open(out, "wb") as file:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment(**ENVIRONMENTS[name]),
            check=True,
            stdout=file if to == "file" else subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    text = out.read_bytes() if to == "file" else done.stdout
    assert ESCAPE not in text
    assert b"\r" not in text
    lines = [line for line in text.decode().splitlines() if line.strip()]
    assert 5 <= len(lines) <= 10, lines
    assert "red and bold" in lines
    assert sum("40/40" in line for line in lines) == 2
    assert any("intervals within 10.0% (widest: one)" in line for line in lines)


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "axonn.cli.main", "--help"],
        ["-m", "axonn.cli.main", "no-such-command"],
        ["-m", "axonn.cli.main", "predict", "no-such-file.yaml"],
        ["-m", "axonn.cli.main", "run", "experiments/fig6.yaml", "--list"],
        ["-m", "baselines.compare", "--ranks", "1"],
    ],
    ids=lambda command: " ".join(command[1:3]),
)
def test_commands_print_no_escape_codes_into_a_file(command: list[str], tmp_path: Path) -> None:
    run = (
        "import sys; sys.argv = sys.argv[1:]; import axonn.cli.main; axonn.cli.main.main()"
        if command[1] == "axonn.cli.main"
        else "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_module('baselines.compare', run_name='__main__')"
    )
    with open(tmp_path / "out", "wb") as file:
        subprocess.run(
            [sys.executable, "-c", run, *command[1:]],
            cwd=ROOT,
            env=environment(**FORCED),
            check=False,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    text = (tmp_path / "out").read_bytes()
    assert len(text) > 40
    assert ESCAPE not in text


def on_a_terminal(tmp_path: Path, **changes: str) -> bytes:
    """What the displays print on a terminal."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", DISPLAYS, str(tmp_path)],
        cwd=ROOT,
        env=environment(**changes),
        stdout=child,
        stderr=child,
    )
    os.close(child)
    text = b""
    while True:
        try:
            piece = os.read(parent, 1 << 16)
        except OSError:  # Nobody writes any more.
            break
        if not piece:
            break
        text += piece
    os.close(parent)
    assert process.wait() == 0
    return text


def test_on_a_terminal_bars_move_and_words_are_red(tmp_path: Path) -> None:
    text = on_a_terminal(tmp_path)
    assert b"\x1b[31mred" in text
    assert text.count(ESCAPE) > 50


def test_on_a_terminal_without_escape_codes_there_are_lines(tmp_path: Path) -> None:
    text = on_a_terminal(tmp_path, TERM="dumb")
    assert ESCAPE not in text
    assert b"batch 40/40" in text


def test_without_colour_bars_move_in_plain(tmp_path: Path) -> None:
    text = on_a_terminal(tmp_path, NO_COLOR="1")
    assert b"\x1b[31m" not in text
    assert b"red and " in text


def test_ranks_write_their_logs_without_colours() -> None:
    env = rank_environment({**FORCED, "PATH": "/bin"})
    assert env["NO_COLOR"] == "1"
    assert not set(env) & {"FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS", "PYTHON_COLORS", "TTY_COMPATIBLE"}


def test_there_is_one_way_to_make_a_console() -> None:
    """Whoever makes one by himself has what `FORCE_COLOR` says."""
    folders = ("axonn", "experiments", "baselines", "plots", "jobscripts", "tools", "tests/bench")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = [str(path.relative_to(ROOT)) for path in files if re.search(r"\b(Command)?Console\(", path.read_text())]
    assert found == ["axonn/cli/console.py"]
