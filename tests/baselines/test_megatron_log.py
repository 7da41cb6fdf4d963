"""What Megatron-LM prints is read: whole, cut, interleaved and failed, in the forms of 2020 to 2026."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from axonn.training.framework import PrintedRun
from baselines.adapters.deepspeed.deepspeed_adapter import DeepSpeedAdapter
from baselines.adapters.megatron.megatron_adapter import MegatronAdapter

LOGS = Path(__file__).parents[1] / "logs"
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


@pytest.mark.parametrize("reader", [MegatronAdapter().read, DeepSpeedAdapter().read])
def test_several_starts_are_one_run_of_what_was_said_last(reader: Callable[[list[str]], PrintedRun]) -> None:
    def line(number: int, milliseconds: float) -> str:
        return (
            f" iteration {number:8d}/       4 | elapsed time per iteration (ms): {milliseconds} | "
            "lm loss: 2.0E+00 | number of skipped iterations: 0 | number of nan iterations: 0 |"
        )

    # Told to stop after 3 iterations, of which the checkpoint has 2.
    told = "[exiting program after receiving SIGTERM.] datetime: 2026-01-01 00:00:00 "
    first = ["training ...", line(1, 9000.0), line(2, 2000.0), line(3, 2500.0), told]
    cut = reader(first)
    assert (list(cut.starts), cut.finished) == ([0], False)
    assert cut.failure is not None
    assert cut.failure.cause == "interrupted"
    run = reader([*first, "training ...", line(3, 8000.0), line(4, 2100.0), "[after training is done] datetime: x"])
    assert list(run.seconds) == pytest.approx([9.0, 2.0, 8.0, 2.1])
    assert list(run.starts) == [0, 2]
    assert (run.finished, run.failure) == (True, None)
    # Begun anew from the first: nothing of the first start is left.
    run = reader([*first, "training ...", line(1, 7000.0), line(2, 2200.0), line(3, 2300.0), line(4, 2400.0)])
    assert list(run.seconds) == pytest.approx([7.0, 2.2, 2.3, 2.4])
    assert list(run.starts) == [0]
