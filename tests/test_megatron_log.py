"""What Megatron-LM prints is read: whole, cut, interleaved and failed, in the forms of 2020 to 2026."""

from __future__ import annotations

from pathlib import Path

import pytest

from baselines.megatron import MegatronAdapter
from experiments.framework import PrintedRun

LOGS = Path(__file__).parent / "logs"
MIB = 2**20


def lines_of(name: str) -> list[str]:
    return (LOGS / f"{name}.log").read_text().splitlines(keepends=True)


def read(lines: list[str]) -> PrintedRun:
    return MegatronAdapter().read(lines)


def test_a_whole_run_of_2021() -> None:
    run = read(lines_of("megatron_2021"))
    assert run.seconds == pytest.approx([150.8917, 137.2135, 137.0062, 137.11])
    # The first iteration was skipped.
    assert run.losses == [12.44238, 11.9812, 11.5005]
    assert run.memory_bytes == round(20010.5 * MIB)
    # The tied head is counted on the last stage again.
    assert run.parameters is None
    assert (run.finished, run.failure) == (True, None)


def test_a_whole_run_of_2026() -> None:
    run = read(lines_of("megatron_2026"))
    assert run.seconds == pytest.approx([3.744, 0.744, 0.7457])
    assert run.losses == [10.8301, 10.20935, 9.91002]
    assert run.memory_bytes == round(5130.5 * MIB)
    assert run.parameters == 204807168 + 203760640
    assert (run.finished, run.failure) == (True, None)


def test_the_form_before_version_2() -> None:
    run = read(lines_of("megatron_before_2"))
    assert run.seconds == pytest.approx([123.7424, 120.7424])
    assert run.losses == [12.52221, 11.92221]
    assert (run.finished, run.failure) == (True, None)


def test_lines_that_run_into_each_other_give_nothing_wrong() -> None:
    run = read(lines_of("megatron_interleaved"))
    assert run.seconds == pytest.approx([9.1204, 8.101])
    assert run.losses == [10.91, 10.7]
    assert run.memory_bytes is not None
    assert run.memory_bytes in {round(mib * MIB) for mib in (19976.25, 19977.5, 19970.0)}
    # Replicated parameters are counted on every tensor-parallel rank.
    assert run.parameters is None
    assert not run.finished
    assert run.failure is None


@pytest.mark.parametrize(
    ("name", "cause", "rank", "batches"),
    [
        ("megatron_out_of_memory", "out-of-memory", 5, 1),
        ("megatron_nan", "nan", 3, 1),
        ("megatron_nan_2023", "nan", None, 2),
        ("megatron_time_limit", "timeout", None, 1),
    ],
)
def test_failed_runs(name: str, cause: str, rank: int | None, batches: int) -> None:
    run = read(lines_of(name))
    assert run.failure is not None
    assert (run.failure.cause, run.failure.rank) == (cause, rank)
    assert len(run.seconds) == batches
    assert len(run.losses) == 1
    assert not run.finished


@pytest.mark.parametrize(
    "name", ["megatron_2021", "megatron_2026", "megatron_before_2", "megatron_time_limit", "megatron_nan_2023"]
)
def test_wherever_it_is_cut_it_says_nothing_that_the_whole_does_not(name: str) -> None:
    text = (LOGS / f"{name}.log").read_text()
    whole = read(text.splitlines())
    for end in range(0, len(text), 7):
        run = read(text[:end].splitlines())
        assert list(run.seconds) == list(whole.seconds[: len(run.seconds)]), end
        assert list(run.losses) == list(whole.losses[: len(run.losses)]), end
        assert (run.memory_bytes or 0) <= (whole.memory_bytes or 0)
        assert run.parameters in (None, whole.parameters)


def test_colours_and_carriage_returns_do_not_matter() -> None:
    plain = lines_of("megatron_2026")
    coloured = [f"\x1b[32m{line.rstrip()}\x1b[0m\r\n" for line in plain]
    assert read(coloured) == read(plain)


def test_a_run_whose_iterations_were_all_skipped_has_no_result() -> None:
    skipped = [line for line in lines_of("megatron_2021") if "lm loss" not in line]
    run = read(skipped)
    assert len(run.seconds) == 1
    assert run.failure is not None
    assert run.failure.cause == "nan"
