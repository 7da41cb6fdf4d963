"""Supervision of a run from its start to its end: starts the ranks, watches them, reports failures on their behalf.

An interruption ends the run. With `on_stop`, which is called with the reason, the ranks first save their state after
their current batch (`axonn.training.supervision.rank_watch`). Once everything has come to its end, the interruption is
raised; but if the caller notes interruptions as `pending`, it is a failure of the outcome instead.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import IO

from axonn.checkpoint.checkpoints import Checkpoint
from axonn.config.train_config import TrainConfig
from axonn.device.devices import DeviceType
from axonn.distributed.launch import find_mpiexec, mpiexec_command, rank_environment
from axonn.observability.records import Failure
from axonn.training.framework import RankProgram, load_framework
from axonn.training.resumption import forget_batches
from axonn.training.run_folder import SPEC, STOP, SUPERVISOR
from axonn.training.run_outcome import Outcome, outcome_of, rank_state
from axonn.training.session_history import NEWEST_LOG
from axonn.training.supervision.cluster_launch import spec_of
from axonn.training.supervision.interruption import PendingSignals, noted
from axonn.training.supervision.process_group import GRACE_S, end_process_group
from axonn.training.supervision.rank_watch import Watch
from axonn.training.supervision.session_folders import session_folders


def supervise(
    framework: str,
    config: TrainConfig,
    folder: Path,
    *,
    timeout_s: float = 3600.0,
    on_batch: Callable[[int], None] = lambda done: None,
    resume: Checkpoint | None = None,
    give_up: Callable[[], Failure | None] = lambda: None,
    turns: bool = False,
    own_cores: bool = False,
    link_only: bool = False,
    device: DeviceType = "cpu",
    threads: int = 1,
    pending: PendingSignals | None = None,
    on_stop: Callable[[str], None] | None = None,
    on_warning: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Run `config` with `framework` on one process per rank of its grid; everything it writes is under `folder`.

    `on_batch` is called with the number of finished batches; as soon as `give_up` returns a failure, the run is ended
    with it. With `resume` the run goes on from that checkpoint, and metrics and spans of later batches are removed;
    without, everything of an earlier run but its checkpoints. With `turns` the ranks train a batch when the
    `TurnTaking` of the folder grants one. With `device` "cuda" they take the GPUs of this machine in turn. `own_cores`
    and `link_only`: see `mpiexec_command`; `threads`: of each rank. `pending` and `on_stop`: see the module.
    `on_warning` is called for starved ranks, and `log.txt` has its messages. The ranks never outlive this call.

    Raises `LaunchError` when there is no MPI to start several ranks with.
    """
    ranks = config.grid.size
    checkpoint = None if resume is None else str(resume.folder)
    stoppable = on_stop is not None
    spec = spec_of(framework, config, checkpoint=checkpoint, turns=turns, device=device, stoppable=stoppable)
    _prepare(folder, spec, ranks, resume)
    with noted() if pending is None else nullcontext(pending) as interruption, open(folder / NEWEST_LOG, "w") as log:
        program = load_framework(framework).program(config, folder)
        placement = {"link_only": link_only, "own_cores": own_cores}
        with _running(program, folder, ranks, log, threads=threads, **placement) as process:
            watch = Watch(
                process,
                folder,
                ranks,
                timeout_s=timeout_s,
                # A job that waits for its turn finishes nothing meanwhile.
                stall_limit_s=float("inf") if turns else config.stall_limit_s,
                on_batch=on_batch,
                give_up=give_up,
                pending=interruption,
                on_stop=on_stop,
                on_warning=partial(_warn, log, on_warning),
            )
            failure = watch.until_end()
            # Without a failure, a launcher that still runs is one that its ranks have outlived.
            stuck = process.poll() is None
        failure = failure or _failure_after_exit(0 if stuck else process.returncode, folder, ranks, interruption)
        (folder / STOP).unlink(missing_ok=True)
    # Earlier batches may have had fewer ranks.
    return outcome_of(folder, ranks, failure, first=0 if resume is None else resume.state.batches)


def _prepare(folder: Path, spec: str, ranks: int, resume: Checkpoint | None) -> None:
    """Make the run folder ready for its ranks."""
    if ranks > 1:
        # Raises before anything is written.
        find_mpiexec()
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder, resume)
    (folder / SPEC).write_text(spec)


@contextmanager
def _running(
    started: AbstractContextManager[RankProgram],
    folder: Path,
    ranks: int,
    log: IO[str],
    *,
    link_only: bool,
    own_cores: bool,
    threads: int,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run the program on all ranks during the block, and end them, and the launcher, with it."""
    with started as program, session_folders() if ranks > 1 else nullcontext[dict[str, str]]({}) as session:
        command = list(program.command)
        if ranks > 1:
            command = mpiexec_command(ranks, command, link_only=link_only, own_cores=own_cores, mpiexec=program.mpiexec)
        process = subprocess.Popen(
            command,
            env=rank_environment(os.environ, threads=threads)
            | {SUPERVISOR: str(os.getpid())}
            | session
            | dict(program.environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            end_process_group(process)
            _end_ranks(folder, ranks, session_id=process.pid)


def _warn(log: IO[str], on_warning: Callable[[str], None], text: str) -> None:
    print(f"warning: {text}", file=log, flush=True)
    on_warning(text)


def kept_log(folder: Path) -> str | None:
    """Return the name under which the newest log is kept once another start writes its own; None without a log."""
    return f"log-{len(list(folder.glob('log-*.txt'))) + 1}.txt" if (folder / NEWEST_LOG).exists() else None


def _clear(folder: Path, resume: Checkpoint | None) -> None:
    """Remove the files of an earlier run that this one does not go on with."""
    for stale in [*folder.glob("rank-*"), *folder.glob(STOP)]:
        stale.unlink()
    forget_batches(folder, after=0 if resume is None else resume.state.batches)
    if resume is None:
        for stale in folder.glob("log-*.txt"):
            stale.unlink()
        return
    log = folder / NEWEST_LOG
    if (kept := kept_log(folder)) is not None:
        log.rename(folder / kept)


def _failure_after_exit(code: int, folder: Path, ranks: int, interruption: PendingSignals) -> Failure | None:
    states = {rank: rank_state(folder, rank) for rank in range(ranks)}
    if {s.get("state") for s in states.values()} == {"stopped"}:
        reason = interruption.message or f"told to end by the file '{STOP}' of the run folder"
        return Failure(cause="interrupted", detail=reason)
    failed = sorted((s["time"], rank) for rank, s in states.items() if s.get("state") == "failed")
    killed = _killed_rank(folder, code, ranks)
    if killed is not None:
        rank, number = killed
        name = signal.Signals(number).name
        hint = "; the system kills a process like this when memory runs out" if number == signal.SIGKILL else ""
        return Failure(cause="dead-rank", rank=rank, detail=f"rank {rank} was killed by {name}{hint}")
    if failed:
        state = states[failed[0][1]]
        # The rank where it began, if the one that failed first knows that.
        rank = min(state.get("ranks") or [failed[0][1]])
        return Failure(cause=state["cause"], rank=rank, detail=f"rank {rank}: {state['detail']}")
    unfinished = [rank for rank, s in states.items() if s.get("state") != "done"]
    if code == 0 and not unfinished:
        return None
    tail = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-5:]
    return Failure(
        cause="error",
        rank=unfinished[0] if unfinished else None,
        detail=f"the launcher ended with code {code}; ranks not finished: {unfinished}; " + " | ".join(tail),
    )


def _killed_rank(folder: Path, code: int, ranks: int) -> tuple[int, int] | None:
    """Return (rank, signal) of the rank that a signal ended first, from the exit code or Open MPI's notice."""
    if ranks == 1:
        return (0, -code) if code < 0 else None
    text = (folder / "log.txt").read_text(errors="replace")
    notice = re.search(r"rank\s+(\d+)\s+with\s+PID\s+\d+.*?exited\s+on\s+signal\s+(\d+)", text, re.DOTALL)
    return (int(notice[1]), int(notice[2])) if notice else None


def _end_ranks(folder: Path, ranks: int, *, session_id: int) -> None:
    """End ranks that have outlived their launcher: each has its own process group, in the launcher's session."""
    pids = {pid for rank in range(ranks) if isinstance(pid := rank_state(folder, rank).get("pid"), int)}
    end = time.monotonic() + GRACE_S
    while time.monotonic() < end and (left := {pid for pid in pids if _is_of(pid, session_id)}):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _is_of(pid: int, session_id: int) -> bool:
    try:
        return os.getsid(pid) == session_id
    except OSError:
        return False
