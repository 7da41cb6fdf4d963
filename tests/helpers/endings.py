"""A real `axonn train` to be ended in every way, and what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from axonn.checkpoint.checkpoints import latest
from axonn.config.train_config import TrainConfig
from axonn.observability.records import Failure, read_records
from axonn.training.loop import CHECKPOINTS
from axonn.training.metrics import BATCHES, read_rows
from axonn.training.supervision.session_folders import SHARED_MEMORY
from experiments import definition
from tests.helpers.command_line import ENDLESS, TEXT, tiny

AXONN = Path(sys.executable).parent / "axonn"
PATIENCE_S = 200.0
SAVES_IF_TOLD = {"every": ENDLESS}
"""As `checkpoints`: one is there only where the run was told to save."""


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """What the condition returns, once that is true."""
    end = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)
    return found


def processes_of(folder: Path) -> list[int]:
    """Live processes (launcher and ranks) whose command line names the run folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue  # ended meanwhile
        if str(folder).encode() in command and state not in "ZX":
            found.append(int(process.name))
    return found


def end_what_is_left(folder: Path) -> None:
    """Kill whatever a test that failed has left running in a folder."""
    for pid in processes_of(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _as_in_the_foreground() -> None:
    # A shell has its background jobs ignore what a terminal's keys send.
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


class Training:
    """One `axonn train` of a tiny model on two ranks, whose temporary files go to a folder of its own."""

    def __init__(
        self,
        root: Path,
        *,
        checkpoints: dict[str, int] | None = SAVES_IF_TOLD,
        config: TrainConfig | None = None,
        before: Sequence[str] = (),
        name: str = "run",
        **popen: Any,
    ) -> None:
        self.root, self.folder, self.temporary = root, root / name, root / "tmp"
        self.temporary.mkdir(exist_ok=True)
        content = (config or tiny(data={"path": str(TEXT)}, checkpoints=checkpoints)).model_dump(mode="json")
        (root / f"{name}.yaml").write_text(yaml.safe_dump(content))
        self.printed = root / f"{name}.txt"
        # Rows of an earlier start are not those of this one.
        self.earlier = len(self.rows)
        with open(self.printed, "w") as out:
            self.process = subprocess.Popen(
                [*before, AXONN, "train", root / f"{name}.yaml", "--out", self.folder, "--device", "cpu"],
                cwd=root,
                env={**os.environ, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"},
                **{
                    "stdin": subprocess.DEVNULL,
                    "stdout": out,
                    "stderr": subprocess.STDOUT,
                    "preexec_fn": _as_in_the_foreground,
                    **popen,
                },
            )

    @property
    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.folder / BATCHES)

    def has_trained(self, batches: int = 3) -> Training:
        """Wait until so many batches are done."""

        def trained() -> bool:
            assert self.process.poll() is None, self.text
            return len(self.rows) >= self.earlier + batches

        wait_for(trained, "batches")
        return self

    def rank(self, rank: int) -> int:
        """Process id of a rank."""
        return int(json.loads((self.folder / f"rank-{rank}.json").read_text())["pid"])

    def launcher(self) -> int:
        """Process id of mpiexec."""
        return int(Path(f"/proc/{self.rank(0)}/stat").read_text().rpartition(")")[2].split()[1])

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ended(self) -> int:
        """Exit status as a shell tells it."""
        code = self.process.wait(PATIENCE_S)
        return 128 - code if code < 0 else code

    @property
    def text(self) -> str:
        return " ".join(self.printed.read_text().split())

    @property
    def failure(self) -> Failure | None:
        """That of the record."""
        (record,) = read_records(self.folder / "record.json")
        assert len(record.losses) == len(self.rows)
        return record.failure

    @property
    def saved(self) -> int | None:
        """Batches of the newest checkpoint."""
        newest = latest(self.folder / CHECKPOINTS)
        return None if newest is None else newest.state.batches

    def leftovers(self) -> list[str]:
        """What there is of the run outside of its folder, and what is half-finished inside of it."""
        mine = f"axonn-run-{self.process.pid}-"
        found = [*self.temporary.iterdir(), *SHARED_MEMORY.glob(f"{mine}*")]
        found += [path for path in self.folder.rglob("*") if path.name.startswith(".") and path.name != ".lock"]
        found += [path for path in self.folder.glob("*") if path.name in ("stop", "store", "finished")]
        return [str(path) for path in found] + [f"process {process}" for process in self.processes()]

    def processes(self) -> list[int]:
        """Live processes that name the run folder, the command left out."""
        return [process for process in processes_of(self.folder) if process != self.process.pid]

    def leaves_nothing(self) -> None:
        wait_for(lambda: not self.leftovers() or None, f"the end of {self.leftovers()}")


def root_of_docs(page: str) -> Path:
    return definition.ROOT / "docs" / page
