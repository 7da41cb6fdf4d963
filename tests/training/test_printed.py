"""What made a run on a cluster fail is read from what it printed: the cause, not what followed from it."""

from __future__ import annotations

import pytest

from axonn.training.supervision.log_failures import clean, failure_of, lines_of

TRACEBACK = "Traceback (most recent call last):"
WATCHDOG = (
    "[rank{0}]:[E1206 18:44:12.715298746 ProcessGroupNCCL.cpp:607] [Rank {0}] Watchdog caught collective operation "
    "timeout: WorkNCCL(SeqNum=7753, OpType=_REDUCE_SCATTER_BASE, NumelIn=544997376, NumelOut=68124672, "
    "Timeout(ms)=600000) ran for 600061 milliseconds before timing out."
)
OUT_OF_MEMORY = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 226.00 MiB. GPU 0 has a total capacity of 15.70 GiB "
    "of which 210.38 MiB is free."
)
CHILD_FAILED = """\
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
pretrain_gpt.py FAILED
------------------------------------------------------------
Failures:
  <NO_OTHER_FAILURES>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2025-05-21_15:43:03
  host      : node7
  rank      : 5 (local_rank: 1)
  exitcode  : {code} (pid: 14750)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============================================================"""


def test_colours_overwritten_text_and_prefixes_come_off() -> None:
    assert clean("\x1b[31m[default7]: iteration  1/ 2 |\x1b[39m\r\n") == " iteration  1/ 2 |"
    assert clean(" 50%|##   \r100%|#####") == "100%|#####"
    assert clean("12: [rank3]: ValueError: x") == "ValueError: x"
    assert clean("[1,5]<stdout>:loss") == "loss"
    assert clean("[prterun-node1-77@1,5]<stderr>: loss") == "loss"
    assert clean("worker-0: steps: 1 loss: 2.0") == "steps: 1 loss: 2.0"
    assert [line.text for line in lines_of(["first\rsecond\n", "\n", "\x1b[0m"])] == ["first", "second"]


@pytest.mark.parametrize(
    ("line", "cause", "rank"),
    [
        (
            "RuntimeError: CUDA out of memory. Tried to allocate 2.87 GiB (GPU 0; 14.76 GiB total capacity; 8.77 GiB "
            "already allocated; 19.75 MiB free; 13.71 GiB reserved in total by PyTorch)",
            "out-of-memory",
            None,
        ),
        (f"[rank3]: {OUT_OF_MEMORY}", "out-of-memory", 3),
        (
            "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=37205392.0. Some of your processes may have "
            "been killed by the cgroup out-of-memory handler.",
            "out-of-memory",
            None,
        ),
        (
            "slurmstepd: error: Detected 1 oom_kill event in StepId=11300781.0. Some of the step tasks have been OOM "
            "Killed.",
            "out-of-memory",
            None,
        ),
        ("srun: error: node107: task 4: Out Of Memory", "out-of-memory", 4),
        ("TERM_MEMLIMIT: job killed after reaching LSF memory usage limit.", "out-of-memory", None),
        (WATCHDOG.format(2), "timeout", 2),
        (
            "slurmstepd: error: *** STEP 1999618.0 ON r6i4n5 CANCELLED AT 2021-05-27T21:52:36 DUE TO TIME LIMIT ***",
            "timeout",
            None,
        ),
        ("TERM_RUNLIMIT: job killed after reaching LSF run time limit.", "timeout", None),
        (
            "Rank 6: found NaN in local forward loss calculation. Device: 2, node: node3",
            "nan",
            6,
        ),
        (
            "RuntimeError: Rank 9, node n1, device 1, iteration 4: Unexpected result nan (message='found NaN in local "
            "forward loss calculation')",
            "nan",
            9,
        ),
        (
            "Exception: Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.",
            "nan",
            None,
        ),
        ("steps: 3 loss: nan iter time (s): 150.471 samples/sec: 6.805", "nan", None),
        (
            "E0813 06:19:49.809000 161210 site-packages/torch/distributed/elastic/multiprocessing/api.py:869] failed "
            "(exitcode: -9) local_rank: 2 (pid: 161617) of binary: /usr/bin/python",
            "dead-rank",
            None,
        ),
        ("srun: error: nid01934: task 3: Killed", "dead-rank", 3),
        ("srun: error: nid01934: tasks 2,4-5: Exited with exit code 1", "error", None),
        ("ERROR:  One or more process terminated with signal 9", "dead-rank", None),
        ("ERROR:  One or more process (first noticed rank 17) terminated with signal 11", "dead-rank", 17),
        (
            "[2023-11-01 10:00:00,123] [ERROR] [launch.py:321:sigkill_handler] ['/usr/bin/python', '-u'] exits with "
            "return code = -9",
            "dead-rank",
            None,
        ),
        ("srun: error: *** STEP 9.0 ON n1 CANCELLED AT 2022-05-17T17:58:10 DUE TO NODE FAILURE ***", "dead-rank", None),
        ("slurmstepd: error: *** STEP 9411285.0 ON gpu20-15 CANCELLED AT 2022-05-17T17:58:10 ***", "interrupted", None),
        ("Exited with exit code 140.", "interrupted", None),
        ("Exited with exit code 137.", "dead-rank", None),
    ],
)
def test_one_line(line: str, cause: str, rank: int | None) -> None:
    failure = failure_of(["> setting random seeds to 1234 ...", line])
    assert failure is not None
    assert (failure.cause, failure.rank) == (cause, rank)
    assert failure.detail.startswith(clean(line)[:60])


def test_a_run_without_failure_has_none() -> None:
    assert (
        failure_of(
            [
                "  check_for_nan_in_loss_and_grad .................. True",
                "  rerun_mode ...................................... validate_results",
                "W0 torch/distributed/run.py:793] Setting OMP_NUM_THREADS environment variable for each process",
                " iteration 2/ 2 | loss: 1.0E+00 | number of skipped iterations:   0 | number of nan iterations:   0 |",
                "Process 1234 exits successfully.",
                "[after training is done] datetime: 2021-05-27 21:42:46 ",
            ]
        )
        is None
    )


def test_a_timeout_of_others_follows_from_a_rank_out_of_memory() -> None:
    failure = failure_of([WATCHDOG.format(0), f"[rank3]: {TRACEBACK}", f"[rank3]: {OUT_OF_MEMORY}", WATCHDOG.format(1)])
    assert failure is not None
    assert (failure.cause, failure.rank) == ("out-of-memory", 3)


def test_an_exception_comes_before_what_torchrun_makes_of_it() -> None:
    lines = [
        f"[rank1]: {TRACEBACK}",
        '[rank1]:   File "pretrain_gpt.py", line 3, in <module>',
        f"[rank0]: {TRACEBACK}",
        "[rank0]: torch.distributed.DistBackendError: NCCL error in: ../NCCLUtils.hpp:219, remote process exited",
        "[rank1]:     raise ValueError(text)",
        "[rank1]: ValueError: no such data",
        TRACEBACK,
        *CHILD_FAILED.format(code=1).splitlines(),
    ]
    failure = failure_of(lines)
    assert failure is not None
    assert (failure.cause, failure.rank, failure.detail) == ("error", 1, "ValueError: no such data")


@pytest.mark.parametrize(("code", "cause"), [(-9, "dead-rank"), (-6, "dead-rank"), (1, "error"), (-15, "interrupted")])
def test_torchrun_says_which_rank_failed_first(code: int, cause: str) -> None:
    failure = failure_of([TRACEBACK, *CHILD_FAILED.format(code=code).splitlines()])
    assert failure is not None
    assert failure.cause == cause
    if code == -9:
        assert (failure.rank, "memory" in failure.detail) == (5, True)


def test_what_a_time_limit_interrupts_is_not_the_cause() -> None:
    failure = failure_of(
        [
            "slurmstepd: error: *** JOB 1999618 ON r6i4n5 CANCELLED AT 2021-05-27T21:52:36 DUE TO TIME LIMIT ***",
            TRACEBACK,
            "KeyboardInterrupt",
            TRACEBACK,
            "torch.distributed.elastic.multiprocessing.api.SignalException: Process 99 got signal: 15",
            "Killing subprocess 4946",
            "Main process received SIGTERM, exiting",
            "srun: error: r6i4n5: task 0: Terminated",
        ]
    )
    assert failure is not None
    assert (failure.cause, "TIME LIMIT" in failure.detail) == ("timeout", True)


def test_a_run_that_hangs_after_an_exception_failed_by_the_exception() -> None:
    failure = failure_of([TRACEBACK, "IndexError: 3", "TERM_RUNLIMIT: job killed after reaching LSF run time limit."])
    assert failure is not None
    assert (failure.cause, failure.detail) == ("error", "IndexError: 3")


def test_open_mpi_folds_its_notice() -> None:
    failure = failure_of(
        [
            "prterun noticed that process rank 1 with PID 4711 on node host exited on",
            "signal 9 (Killed).",
        ]
    )
    assert failure is not None
    assert (failure.cause, failure.rank) == ("dead-rank", 1)


def test_srun_kills_the_others_once_a_rank_is_killed_for_its_memory() -> None:
    failure = failure_of(
        [
            "srun: error: n1: task 2: Killed",
            "srun: launch/slurm: _step_signal: Terminating StepId=9411285.0",
            "slurmstepd: error: *** STEP 9411285.0 ON n1 CANCELLED AT 2022-05-17T17:58:10 ***",
            "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=9411285.0 cgroup.",
            "srun: error: n1: tasks 0-1,3: Terminated",
        ]
    )
    assert failure is not None
    assert failure.cause == "out-of-memory"
