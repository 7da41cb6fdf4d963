"""What ranks note of processors and machines, and when a machine is busy: made up, and for real beside other work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from axonn.observability import procfs
from axonn.observability import rank_usage as noted
from axonn.observability.batch_usage import batch_usage
from axonn.observability.busy_watch import BusyWatch
from axonn.observability.machine_usage import BUSY_SHARE, TICK_S, BatchUsage, busy_share, is_busy
from axonn.observability.records import read_all
from axonn.training.resumption import forget_batches
from axonn.training.run_outcome import outcome_of
from axonn.training.supervision.cluster_launch import spec_of
from experiments.definition import ROOT
from tests.helpers.busy import QUIET, busy_machine, usage
from tests.helpers.command_line import CommandLine, tiny

needs_proc = pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's /proc/*/schedstat")


def write(folder: Path, rank: int, *rows: dict[str, Any]) -> None:
    plain = {"host": "a", "seconds": 1.0, "processor_s": 0.9, "delay_s": 0.1, "load": 2.0, "cores": {0: [1.0, 0.0]}}
    text = "".join(json.dumps({"step": step} | plain | row) + "\n" for step, row in enumerate(rows))
    noted.usage_file(folder, rank).write_text(text)


# --- when a machine is busy


def test_an_idle_machine_is_not_busy_and_one_with_other_work_is() -> None:
    assert is_busy([QUIET] * 10) is False
    assert is_busy([usage(others=0.04)] * 10) is False
    assert is_busy([usage(others=0.06)] * 10) is True
    assert busy_share([usage(others=0.02), usage(others=0.06)]) == pytest.approx(0.04)
    assert is_busy([usage(others=0.0, stolen_s=0.3)] * 10) is True
    assert is_busy([]) is None
    assert busy_share([]) is None


def test_ranks_that_outnumber_the_cores_are_not_others() -> None:
    """Eight ranks on two cores wait for each other, and the load is eight."""
    crowded = usage(others=0.0, delay_s=7.0, load=8.0, processor_s=2.0)
    assert is_busy([crowded] * 10) is False


@pytest.mark.parametrize("batches", [1, 4, 100])
def test_what_the_counters_do_not_resolve_is_nobodys_work(batches: int) -> None:
    """A batch of 5 ms on cores whose counters step by 10 ms; a core that is taken away shows in enough of them."""
    assert is_busy([usage(0.005, others_s=0.01)] + [usage(0.005, others_s=-0.01)] * (batches - 1)) is False
    assert is_busy([usage(0.005, others=1.0)] * batches) is (batches > 4)


def test_a_negative_rest_of_counters_is_no_share() -> None:
    assert busy_share([usage(others_s=-0.01)]) == 0.0


# --- rows of ranks


def test_cores_that_ranks_share_count_once_and_their_own_each(tmp_path: Path) -> None:
    shared = {0: [1.0, 0.1], 1: [1.0, 0.0]}
    write(tmp_path, 0, {"cores": shared, "processor_s": 0.5}, {"cores": {0: [1.0, 0.0]}})
    write(tmp_path, 1, {"cores": shared, "processor_s": 0.25, "delay_s": 0.4}, {"cores": {1: [0.9, 0.2]}})
    together, apart = batch_usage(tmp_path, 2, 2)
    assert together == BatchUsage(
        seconds=1.0, processor_s=0.75, delay_s=0.4, load=2.0, cores=2, others_s=1.25, stolen_s=0.1
    )
    assert (apart.cores, apart.others_s, apart.stolen_s) == (2, pytest.approx(0.1), 0.2)


def test_of_several_hosts_the_busiest_counts(tmp_path: Path) -> None:
    write(tmp_path, 0, {"host": "a", "cores": {0: [0.9, 0.0], 1: [0.0, 0.0]}})
    write(tmp_path, 1, {"host": "b", "cores": {0: [1.0, 0.0], 1: [0.9, 0.0]}, "delay_s": None})
    (found,) = batch_usage(tmp_path, 2, 1)
    assert (found.cores, found.others_s, found.processor_s) == (2, pytest.approx(1.0), pytest.approx(1.8))
    assert found.delay_s is None


def test_batches_that_a_rank_says_nothing_of_end_it(tmp_path: Path) -> None:
    write(tmp_path, 0, {}, {}, {})
    write(tmp_path, 1, {}, {})
    assert len(batch_usage(tmp_path, 2, 3)) == 2
    with open(noted.usage_file(tmp_path, 1), "a") as file:
        file.write('{"step": 2, "seconds": -1}\nnonsense\n{"step": 2')
    assert len(batch_usage(tmp_path, 2, 3)) == 2
    noted.usage_file(tmp_path, 0).unlink()
    assert batch_usage(tmp_path, 2, 3) == []


def test_ranks_that_an_earlier_start_did_not_have_leave_no_gap(tmp_path: Path) -> None:
    write(tmp_path, 0, {}, {}, {})
    write(tmp_path, 1, {"step": 2, "processor_s": 0.25})
    assert batch_usage(tmp_path, 2, 3) == []
    (found,) = batch_usage(tmp_path, 2, 3, first=2)
    assert (found.load, found.processor_s) == (2.0, 0.25 + batch_usage(tmp_path, 1, 3, first=2)[0].processor_s)


def test_a_resumed_run_forgets_what_it_trains_again(tmp_path: Path) -> None:
    for rank in (0, 1):
        write(tmp_path, rank, {}, {}, {})
    forget_batches(tmp_path, after=2)
    assert len(batch_usage(tmp_path, 2, 9)) == 2
    forget_batches(tmp_path, after=0)
    assert list(tmp_path.iterdir()) == []


@needs_proc
def test_a_rank_notes_what_it_computed_and_the_machine_did(tmp_path: Path) -> None:
    log = noted.UsageLog(tmp_path, 0)
    log.begin()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    log.note(0)
    log.close()
    (found,) = batch_usage(tmp_path, 1, 1)
    assert found.processor_s == pytest.approx(0.3, abs=0.05)
    assert found.seconds >= found.processor_s - 0.01
    assert found.cores == len(os.sched_getaffinity(0))
    # This process's time is part of what the cores did.
    assert found.others_s >= -2 * found.cores * TICK_S


# --- for real


@needs_proc
def test_points_measured_beside_busy_processes_are_marked_and_none_is_ended(axonn: CommandLine) -> None:
    """Twice as many processes as cores at the same priority, beside one rank and beside two."""
    experiment = axonn.experiment(layers_per_rank=2, hidden=64, max_ranks=2, batches=24)
    with busy_machine():
        code, _, error = axonn("run", experiment)
    assert code == 0, error
    records = read_all(axonn.root / "measured")
    assert len(records) == 2
    for record in records:
        assert record.failure is None
        assert len(record.usage) == len(record.batch_times_s)
        assert record.busy is True, record.point
        assert record.busy_share is not None
        assert record.busy_share > BUSY_SHARE
        assert all(batch.delay_s is not None and batch.processor_s > 0 for batch in record.usage)


@needs_proc
def test_whoever_measures_without_records_is_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrations and benchmarks: what they and their children computed is their own, what others did is not."""
    watch = BusyWatch()
    with busy_machine():
        time.sleep(1.5)
        warning = watch.warning()
        usage = watch.usage()
    assert warning is not None
    assert "busy with other work" in warning
    assert usage is not None
    # The children are ours only when they have ended and were waited for.
    assert usage.others_s > usage.processor_s
    monkeypatch.setattr(procfs, "PROC", Path("/no-proc"))
    assert watch.warning() is None


SCRIPT = """
import importlib.util, sys

# Whatever has the suite importable in this environment.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
assert importlib.util.find_spec("axonn") is None
sys.path.insert(0, {ranks!r})
import rank_common

def set_up(work):
    def train(step):
        return sum(1.0 for _ in range(3_000_000)) / 3e6
    return train

rank_common.main(set_up)
"""


@needs_proc
def test_ranks_of_other_frameworks_note_the_same_where_the_suite_is_not_installed(tmp_path: Path) -> None:
    """As scripts of baselines/ranks run."""
    (tmp_path / "spec.json").write_text(spec_of("other", tiny(inter=1, steps=4)))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(ranks=str(ROOT / "baselines" / "ranks")))
    subprocess.run(
        [sys.executable, str(script), str(tmp_path), "any"], cwd=tmp_path, check=True, timeout=120,
        env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    outcome = outcome_of(tmp_path, 1)
    assert len(outcome.batch_times_s) == len(outcome.usage) == 4
    for seconds, batch in zip(outcome.batch_times_s, outcome.usage, strict=True):
        assert batch.processor_s <= 1.05 * seconds + 0.01
        assert batch.processor_s > 0
