"""What runs of DeepSpeed print is read: whole, cut anywhere, interleaved, failed; a number is never invented."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from axonn.training.framework import PrintedRun
from baselines.adapters.deepspeed.deepspeed_adapter import DeepSpeedAdapter

LOGS = Path(__file__).parents[1] / "logs"
MEGATRON = ("elapsed time per iteration (ms): {:.1f}", 1e3)
BIGSCIENCE = ("elapsed time per iteration (s): {:.2f}", 1.0)
SECONDS = [159.778, 137.501, 138.25, 138.0]
LOSSES = [12.44238, 11.9, 11.25, 10.5]


def read(lines: Iterable[str]) -> PrintedRun:
    return DeepSpeedAdapter().read(lines)


def iteration(
    number: int,
    seconds: float,
    loss: str | None,
    *,
    last: int = 4,
    skipped: int = 0,
    elapsed: tuple[str, float] = MEGATRON,
) -> str:
    """As `training_log` of Megatron-DeepSpeed writes it."""
    fields = [
        f"consumed samples: {number * 1024:12d}",
        f"consumed tokens: {number * 1024 * 512:12d}",
        elapsed[0].format(seconds * elapsed[1]),
        "learning rate: 1.000E-03",
        "global batch size:  1024",
        *([f"lm loss: {loss}"] if loss is not None else []),
        "loss scale: 2048.0",
        "grad norm: 1.250",
        "actual seqlen:   512",
        f"number of skipped iterations: {skipped:3d}",
        "number of nan iterations:   0",
        "samples per second: 7.421",
        "tokens per gpu per second (tgs): 59.366",
        "TFLOPs: 31.15",
    ]
    return f" iteration {number:8d}/{last:8d} | " + " | ".join(fields) + " |"


def memory(rank: int, peak: float) -> str:
    return (
        f"[Rank {rank}] (after 1 iterations) memory (MB) | allocated: 10837.39501953125 | max allocated: {peak} | "
        "reserved: 18640.0 | max reserved: 18640.0"
    )


START = [
    "using world size: 16, data-parallel-size: 2, sequence-parallel size: 1, tensor-model-parallel size: 4, "
    "pipeline-model-parallel size: 2 ",
    "Before Building Model",
    "[2021-05-27 21:32:10,180] [INFO] [utils.py:589:see_memory_usage] MA 0.0 GB         Max_MA 90.67 GB         "
    "CA 0.0 GB         Max_CA 0 GB ",
    " > number of parameters on (tensor, pipeline) model parallel rank (0, 0): 805560320",
    "[before the start of training step] datetime: 2026-07-10 05:46:31 ",
]
ITERATIONS = [iteration(i + 1, s, f"{loss:.6E}") for i, (s, loss) in enumerate(zip(SECONDS, LOSSES, strict=True))]
PEAKS = [16101.9453125, 15000.0, 16385.5, 9000.25]
MEMORY = [memory(rank, peak) for rank, peak in enumerate(PEAKS)]
END = ["[after training is done] datetime: 2026-07-10 06:01:00 "]
RUN = [*START, *MEMORY[:2], ITERATIONS[0], *MEMORY[2:], *ITERATIONS[1:], *END]


def test_a_complete_run() -> None:
    run = read(RUN)
    assert run.seconds == pytest.approx(SECONDS, abs=1e-4)
    assert run.losses == pytest.approx(LOSSES, rel=1e-6)
    assert run.memory_bytes == round(16385.5 * 2**20)
    # Tensor-parallel ranks hold copies, so that what is printed is no size of the model.
    assert run.parameters is None
    assert run.finished
    assert run.failure is None


def test_seconds_of_the_fork_that_gives_seconds() -> None:
    lines = [iteration(i + 1, s, "1.0E+00", elapsed=BIGSCIENCE) for i, s in enumerate(SECONDS)]
    assert read(lines).seconds == pytest.approx(SECONDS, abs=0.0051)


def test_a_run_that_is_no_longer_than_its_iterations_is_finished_and_a_cut_one_is_not() -> None:
    assert read(RUN[:-1]).finished
    cut = read(RUN[:-2])
    assert not cut.finished
    assert cut.failure is None
    assert cut.losses == pytest.approx(LOSSES[:3], rel=1e-6)


def test_a_run_cut_after_any_character_says_a_part_of_what_it_would_have_said() -> None:
    text = "\n".join(RUN) + "\n"
    whole = read(text.splitlines(keepends=True))
    sizes = {round(peak * 2**20) for peak in PEAKS} | {None}
    for end in range(len(text)):
        run = read(text[:end].splitlines(keepends=True))
        assert list(run.seconds) == list(whole.seconds)[: len(run.seconds)], text[:end][-60:]
        assert list(run.losses) == list(whole.losses)[: len(run.losses)], text[:end][-60:]
        assert run.memory_bytes in sizes, text[:end][-60:]
        assert run.parameters is None
        assert run.failure is None


@pytest.mark.parametrize("prefix", ["[default7]:", "[rank3]: ", "12: ", "node017: ", "[1,3]<stdout>:", "\x1b[32m"])
def test_prefixes_colours_and_carriage_returns_come_off(prefix: str) -> None:
    assert read([f"{prefix}{line}\r\n" for line in RUN]) == read(RUN)


def test_lines_of_other_ranks_between_them_change_nothing() -> None:
    generator = random.Random(3)
    noise = ["[rank2]: some warning", "time (ms) | forward: 0.00 | backward: 0.00", "", "steps per second: 3", "| |"]
    mixed = []
    for line in RUN:
        mixed += generator.choices(noise, k=2)
        mixed.append(f"[default{generator.randrange(8)}]:{line}")
    assert read(mixed) == read(RUN)


@pytest.mark.parametrize("at", [20, 60, 96, 100, 105, 150, 180, 250])
def test_a_line_with_another_in_its_middle_gives_nothing(at: int) -> None:
    torn = ITERATIONS[1][:at] + MEMORY[0] + ITERATIONS[1][at:]
    run = read([ITERATIONS[0], torn, ITERATIONS[2]])
    assert run.seconds == pytest.approx([SECONDS[0], SECONDS[2]], abs=1e-4)
    assert run.losses == pytest.approx([LOSSES[0], LOSSES[2]], rel=1e-6)
    # That other line is whole.
    assert run.memory_bytes == round(PEAKS[0] * 2**20)


def test_the_line_that_follows_half_a_line_without_an_end_is_read() -> None:
    run = read([ITERATIONS[0][:100] + ITERATIONS[1]])
    assert run.seconds == pytest.approx([SECONDS[1]], abs=1e-4)


def test_both_halves_of_a_broken_line_give_nothing() -> None:
    for at in range(2, len(ITERATIONS[0]) - 1):
        run = read([ITERATIONS[0][:at], ITERATIONS[0][at:]])
        # Only behind the last field that every version has may the end be missing.
        if "nan iterations:   0 |" not in ITERATIONS[0][:at]:
            assert not run.seconds
            assert not run.losses
            assert not run.finished


def test_an_iteration_that_is_said_again_counts_once() -> None:
    assert read([ITERATIONS[0], ITERATIONS[0], *ITERATIONS[1:]]) == read(ITERATIONS)


def test_out_of_memory() -> None:
    oom = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 226.00 MiB. GPU 0 has a total capacity."
    run = read(
        [
            *START,
            ITERATIONS[0],
            "[rank3]: Traceback (most recent call last):",
            f"[rank3]: {oom}",
            "[2026-01-01 00:00:00,000] [INFO] [launch.py:315:sigkill_handler] Killing subprocess 1234",
            "[2026-01-01 00:00:00,000] [ERROR] [launch.py:321:sigkill_handler] ['python', '-u', 'x.py'] exits "
            "with return code = -9",
        ]
    )
    assert run.failure is not None
    assert (run.failure.cause, run.failure.rank) == ("out-of-memory", 3)
    assert not run.finished
    assert run.seconds == pytest.approx(SECONDS[:1], abs=1e-4)


def test_time_limit() -> None:
    limit = "slurmstepd: error: *** STEP 1999618.0 ON r6i4n5 CANCELLED AT 2021-05-27T21:52:36 DUE TO TIME LIMIT ***"
    run = read([*START, *ITERATIONS[:2], limit])
    assert run.failure is not None
    assert run.failure.cause == "timeout"
    assert not run.finished
    assert len(run.losses) == 2


def test_what_is_printed_after_the_end_is_no_failure() -> None:
    run = read([*RUN, "Traceback (most recent call last):", "RuntimeError: Connection reset by peer"])
    assert run.failure is None
    assert run.finished


def test_skipped_iterations_have_a_time_and_no_loss_and_are_no_failure() -> None:
    skipped = iteration(1, 150.0, None, skipped=1)
    overflow = (
        "[2026-01-01 00:00:00,000] [INFO] [loss_scaler.py:190:update_scale] [deepspeed] OVERFLOW! Rank 0 Skipping "
        "step. Attempted loss scale: 65536, reducing to 32768"
    )
    run = read([overflow, skipped, *ITERATIONS[1:], *END])
    assert run.seconds == pytest.approx([150.0, *SECONDS[1:]], abs=1e-4)
    assert run.losses == pytest.approx(LOSSES[1:], rel=1e-6)
    assert run.failure is None
    assert run.finished


@pytest.mark.parametrize("loss", [None, "NAN", "INF"])
def test_a_step_that_is_taken_without_a_finite_loss_is_a_failure(loss: str | None) -> None:
    run = read([ITERATIONS[0], iteration(2, 138.0, loss), *ITERATIONS[2:], *END])
    assert run.failure is not None
    assert run.failure.cause == "nan"
    assert "iteration 2" in run.failure.detail
    assert run.losses == pytest.approx([LOSSES[0], *LOSSES[2:]], rel=1e-6)


def test_a_loss_scale_at_its_minimum_is_a_failure() -> None:
    fatal = "Exception: Current loss scale already at minimum - cannot decrease scale anymore. Exiting run."
    run = read([ITERATIONS[0], "Traceback (most recent call last):", fatal])
    assert run.failure is not None
    assert run.failure.cause == "nan"


PIPELINE = [
    "[2026-01-01 00:00:00,000] [INFO] [engine.py:134:__init__] RANK=0 STAGE=0 LAYERS=7 [0, 7) STAGE_PARAMS=917757952 "
    "(917.758M) TOTAL_PARAMS=52453507072 (52453.507M) UNIQUE_PARAMS=52004716544 (52004.717M)",
    "steps: 1 loss: 12.7902 iter time (s): 150.471 samples/sec: 6.805",
    "steps: 2 loss: 12.5000 moe: 0.0100 iter time (s): 140.250 samples/sec: 7.301",
]


def test_the_pipeline_engine_alone() -> None:
    run = read(PIPELINE)
    assert list(run.seconds) == [150.471, 140.25]
    assert list(run.losses) == [12.7902, 12.5]
    assert run.parameters == 52004716544
    assert not run.finished
    ended = "[2026-01-01 00:00:00,000] [INFO] [launch.py:353:main] Process 1234 exits successfully."
    assert read([*PIPELINE, ended]).finished


def test_a_process_that_ends_well_beside_one_that_does_not_is_no_end() -> None:
    run = read(
        [
            *PIPELINE,
            "[2026-01-01 00:00:00,000] [INFO] [launch.py:353:main] Process 1234 exits successfully.",
            "[2026-01-01 00:00:00,000] [ERROR] [launch.py:321:sigkill_handler] ['python', 'x.py'] exits with return "
            "code = -9",
        ]
    )
    assert not run.finished
    assert run.failure is not None
    assert run.failure.cause == "dead-rank"


def test_half_a_line_of_the_pipeline_engine_gives_nothing() -> None:
    line = PIPELINE[1]
    assert all(not read([line[:end]]).seconds for end in range(len(line)))
    assert all(not read([line[:end]]).losses for end in range(len(line)))


def test_the_lines_of_the_script_go_before_those_of_the_engine() -> None:
    assert read([*PIPELINE[1:], *RUN]) == read(RUN)


def test_a_loss_of_the_pipeline_engine_that_is_no_number() -> None:
    run = read([*PIPELINE, "steps: 3 loss: nan iter time (s): 140.250 samples/sec: 7.301"])
    assert run.failure is not None
    assert run.failure.cause == "nan"
    assert list(run.losses) == [12.7902, 12.5]


def test_a_speed_without_the_batch_that_it_is_of_gives_no_time() -> None:
    speed = (
        "epoch=0/micro_step=6/global_step=3, RunningAvgSamplesPerSec=1.5, CurrSamplesPerSec=4.0, MemAllocated=5.22GB, "
    )
    speed += "MaxMemAllocated=11.81GB"
    assert not read([speed]).seconds
    run = read(["[x] [INFO] [config.py:678:print]   train_batch_size ............. 16", speed])
    assert list(run.seconds) == [4.0]
    assert run.memory_bytes == round(11.81 * 2**30)
    assert all(read(["train_batch_size ............. 16", speed[:end]]).seconds == [] for end in range(len(speed)))


def test_peaks_between_calls_count_once_training_has_begun() -> None:
    peak = "MA 10.6 GB         Max_MA {} GB         CA 23.03 GB         Max_CA 23 GB "
    assert read([peak.format(19.67), *PIPELINE]).memory_bytes is None
    run = read([*PIPELINE, peak.format(12.5), peak.format(11), "MA 10.6 GB         Max_MA 99"])
    assert run.memory_bytes == round(12.5 * 2**30)


def test_parameters_of_a_run_without_model_parallelism() -> None:
    sizes = "using world size: 8, tensor-model-parallel size: 1, pipeline-model-parallel size: 1 "
    said = " > number of parameters on (tensor, pipeline) model parallel rank (0, 0): 805560320"
    assert read([sizes, said, "next"]).parameters == 805560320
    # It may be cut.
    assert read([sizes, said]).parameters is None


def test_a_real_run_of_the_pipeline_engine() -> None:
    run = read((LOGS / "deepspeed_pipeline.log").read_text().splitlines())
    assert list(run.losses) == [6.2216, 6.1985, 6.1360]
    assert list(run.seconds) == [0.028, 0.040, 0.021]
    assert run.parameters == 58752
    assert run.failure is None


def test_a_real_run_of_zero() -> None:
    run = read((LOGS / "deepspeed_zero.log").read_text().splitlines())
    # Of the third batch alone: it counts from there on.
    assert run.seconds == pytest.approx([8 / 253.18903170190515])
    assert not run.losses
    assert run.memory_bytes == round(0.38 * 2**30)
    assert run.failure is None


def test_nothing_and_anything_else_give_nothing() -> None:
    assert read([]) == PrintedRun(seconds=[], losses=[], starts=[])
    assert read(["iteration |", "iteration 1/ 2 |", "\x00", "lm loss: 3 |", "|" * 200]) == read([])
