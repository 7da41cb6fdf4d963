"""Training runs killed and stopped at random moments, then resumed: python -m tests.helpers.soak --times 50 [--seed N].

Ranks are killed or stopped, or the command itself is told to end, by SIGTERM or SIGHUP: then it saves what it has
(`--signals TERM`: by that one every time). Whatever happened, and whenever, every resumed run goes on from a good
checkpoint, and in the end all its losses and weights are those of a run that nothing happened to, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from axonn.checkpoint.checkpoints import Checkpoint, clean, latest
from axonn.config.train_config import CheckpointConfig, DataConfig, EvaluationConfig, TrainConfig
from axonn.grid import ProcessGrid
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.weights_file import read_weights
from axonn.optim.algorithms.adamw import AdamWConfig
from axonn.training.loop import CHECKPOINTS
from axonn.training.metrics import BATCHES, EVALUATIONS, read_rows
from axonn.training.run_outcome import Outcome
from axonn.training.supervision.interruption import Interrupted, noted, raised
from axonn.training.supervision.supervisor import supervise
from tests.helpers.command_line import TEXT

GRIDS = [ProcessGrid(inter=2), ProcessGrid(data=2), ProcessGrid(col=2)]
RANKS = 2
MOMENTS = ("after some batches", "during a save", "at any time")
_POLL_S = 0.001


def config_of(grid: ProcessGrid) -> TrainConfig:
    """A model so small that much of the time goes into checkpoints."""
    return TrainConfig(
        model=GPTConfig(name="tiny", layers=2, hidden=16, heads=2, seq_len=16, vocab=256, tied_head=True),
        grid=grid,
        batch_size=8,
        microbatch_size=2,
        optimizer=AdamWConfig(clip_norm=1.0),
        data=DataConfig(path=str(TEXT)),
        checkpoints=CheckpointConfig(every=3),
        evaluation=EvaluationConfig(every=10),
        steps=50,
    )


TO_COMMAND = (signal.SIGTERM, signal.SIGHUP)
"""What this process is told to end with, as a command is: it is handled as there."""


class Killer(threading.Thread):
    """Sends a signal at a moment drawn from `draw`: to one rank or to all of a run one that kills, or with `stops` now
    and then one that stops; or to this process one of `TO_COMMAND`, with `only` that one every time."""

    def __init__(self, folder: Path, draw: random.Random, *, stops: bool, only: signal.Signals | None = None) -> None:
        super().__init__(daemon=True)
        self._folder = folder
        self._over = threading.Event()
        self._moment = draw.choice(MOMENTS)
        self._victims = draw.choice([[0], [1], [0, 1]])
        kills = [signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM]
        self._signal = draw.choice([*kills, signal.SIGSTOP] if stops else kills)
        self.to_command = only is not None or draw.random() < 0.5
        if self.to_command:
            self._signal = only or draw.choice(TO_COMMAND)
        self._seconds = draw.uniform(0.0, {"during a save": 0.05, "at any time": 5.0}.get(self._moment, 0.0))
        self._batches = draw.randint(1, 25)
        self.killed = False

    def __str__(self) -> str:
        when = f"{self._moment} (+{self._seconds:.3f} s, {self._batches} batches)"
        who = "the command" if self.to_command else f"ranks {self._victims}"
        return f"{who} got {self._signal.name} {when}"

    def run(self) -> None:
        if self._wait_for(self._all_started) and self._wait_for(self._moment_has_come):
            if self._over.wait(self._seconds):
                return
            if self.to_command:
                self.killed = True
                os.kill(os.getpid(), self._signal)
                return
            for rank in self._victims:
                state = self._state(rank)
                if state.get("state") == "started":
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(str(state["pid"])), self._signal)
                        self.killed = True

    def sent(self, number: int) -> bool:
        """Whether it has sent this signal to this process."""
        return self.to_command and self.killed and number == self._signal

    def stop(self) -> None:
        self._over.set()
        self.join()

    def _wait_for(self, condition: object) -> bool:
        assert callable(condition)
        while not self._over.is_set():
            if condition():
                return True
            time.sleep(_POLL_S)
        return False

    def _all_started(self) -> bool:
        self._at_start = len(read_rows(self._folder / BATCHES))
        return all(self._state(rank).get("state") == "started" for rank in range(RANKS))

    def _moment_has_come(self) -> bool:
        if self._moment == "at any time":
            return True
        if len(read_rows(self._folder / BATCHES)) < self._at_start + self._batches:
            return False
        return self._moment != "during a save" or any((self._folder / CHECKPOINTS).glob(".step-*.writing"))

    def _state(self, rank: int) -> dict[str, object]:
        try:
            return dict(json.loads((self._folder / f"rank-{rank}.json").read_text()))
        except (FileNotFoundError, ValueError):
            return {}


@dataclass(frozen=True)
class Result:
    """What a finished run leaves."""

    batches: list[tuple[int, float, float, float | None]]
    evaluations: list[tuple[int, float]]
    weights: dict[str, torch.Tensor]

    @classmethod
    def of(cls, folder: Path, steps: int) -> Result:
        batches = read_rows(folder / BATCHES)
        return cls(
            [(row["step"], row["loss"], row["learning_rate"], row["gradient_norm"]) for row in batches],
            [(row["batches"], row["loss"]) for row in read_rows(folder / EVALUATIONS)],
            read_weights(folder / CHECKPOINTS / f"step-{steps:08d}"),
        )

    def check(self, other: Result) -> None:
        assert self.batches == other.batches, "the losses differ"
        assert self.evaluations == other.evaluations, "the evaluations differ"
        assert self.weights.keys() == other.weights.keys()
        for name, weight in self.weights.items():
            assert torch.equal(weight, other.weights[name]), f"{name} differs"


def go_on(folder: Path, config: TrainConfig, killer: Killer | None) -> Checkpoint | None:
    """Start or resume a run, perhaps to be killed; the newest checkpoint afterwards, None if the run is finished."""
    damaged: list[str] = []
    checkpoint = latest(folder / CHECKPOINTS, warn=damaged.append)
    clean(folder / CHECKPOINTS)
    if killer is not None:
        killer.start()
    saves = killer is not None and killer.to_command
    outcome = _supervised(config, folder, checkpoint, killer)
    if killer is None or not killer.killed:
        assert outcome.failure is None, outcome.failure
    if outcome.failure is None:
        return None
    newest = latest(folder / CHECKPOINTS, warn=damaged.append)
    assert not damaged, damaged
    if checkpoint is not None:
        assert newest is not None
        assert newest.state.batches >= checkpoint.state.batches, "a good checkpoint was lost"
    if saves and outcome.failure.cause == "interrupted" and "had not saved" not in outcome.failure.detail:
        assert newest is not None
        assert newest.state.batches == len(outcome.losses), "it was not saved"
    return newest


def _supervised(config: TrainConfig, folder: Path, checkpoint: Checkpoint | None, killer: Killer | None) -> Outcome:
    """As `axonn train` does it."""
    try:
        with raised(), noted() as pending:
            outcome = supervise(
                "axonn",
                config,
                folder,
                resume=checkpoint,
                timeout_s=300,
                pending=pending,
                on_stop=lambda why: None,
            )
            if killer is not None:
                killer.stop()
    except Interrupted as interruption:
        if killer is None or not killer.sent(interruption.number):
            raise  # Somebody else's.
    return outcome


def soak(
    folder: Path,
    *,
    times: int,
    seed: int,
    stops: bool = False,
    say: bool = False,
    only: signal.Signals | None = None,
) -> int:
    """Harm runs `times` times; returns how many runs were finished on the way. Raises `AssertionError`."""
    draw = random.Random(seed)
    references: dict[int, Result] = {}
    killed = finished = 0
    while killed < times:
        which = draw.randrange(len(GRIDS))
        config = config_of(GRIDS[which])
        if which not in references:
            go_on(folder / f"reference-{which}", config, None)
            references[which] = Result.of(folder / f"reference-{which}", config.steps)
        run = folder / f"run-{finished}"
        over = False
        while not over:
            killer = Killer(run, draw, stops=stops, only=only) if killed < times else None
            newest = go_on(run, config, killer)
            over = newest is None and (killer is None or not killer.killed or _is_finished(run, config))
            killed += killer is not None and killer.killed
            if say:
                where = "finished" if over else f"at {0 if newest is None else newest.state.batches}"
                print(
                    f"{killed:4d} {killer if killer is not None and killer.killed else 'left alone'}: {where}",
                    flush=True,
                )
        Result.of(run, config.steps).check(references[which])
        finished += 1
        shutil.rmtree(run)
    return finished


def _is_finished(run: Path, config: TrainConfig) -> bool:
    return (run / CHECKPOINTS / f"step-{config.steps:08d}").exists()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--signals", choices=[number.name.removeprefix("SIG") for number in TO_COMMAND])
    arguments = parser.parse_args()
    only = None if arguments.signals is None else signal.Signals[f"SIG{arguments.signals}"]
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        finished = soak(Path(folder), times=arguments.times, seed=arguments.seed, stops=True, say=True, only=only)
    print(f"{arguments.times} kills, {finished} runs finished, each as if nothing had happened")


if __name__ == "__main__":
    main()
