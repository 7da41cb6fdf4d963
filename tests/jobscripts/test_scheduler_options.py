"""The strict reader of scheduler options reads what is right and refuses what is not."""

from __future__ import annotations

import pytest

from tests.helpers.scheduler_options import (
    BSUB,
    HYDRA,
    JSRUN,
    MPIEXEC,
    SBATCH,
    SRUN,
    OptionError,
    Table,
    read_options,
    read_script,
    requested,
    slurm_seconds,
)

SLURM = """#!/usr/bin/env bash
#SBATCH --job-name=a
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=01:30:00
#SBATCH --signal=B:USR1@300
#SBATCH --gpus-per-node=4
#SBATCH --account=abc
#SBATCH --qos=regular
# A comment.
set -u
srun --nodes=2 --ntasks=8 --ntasks-per-node=4 --cpus-per-task=8 bash rank.sh > "out" 2>&1 &
"""
LSF = """#!/usr/bin/env bash
#BSUB -J a
#BSUB -nnodes 2
#BSUB -W 1:30
#BSUB -wa USR1
#BSUB -wt 5
#BSUB -P abc
set -u
jsrun --smpiargs=-gpu -n 2 -r 1 -a 6 -g 6 -c 42 -b packed:7 -d packed bash rank.sh > "out" &
"""


def test_what_a_slurm_job_asks_for() -> None:
    found = requested(read_script(SLURM, launcher="srun"))
    assert (found.nodes, found.ranks, found.gpus, found.cores_per_rank) == (2, 8, 8, 8)
    assert (found.seconds, found.warn_seconds, found.account, found.queue) == (5400, 300, "abc", "regular")


def test_a_launcher_in_a_subshell_is_read_alike() -> None:
    whole = "srun --nodes=2 --ntasks=8 --ntasks-per-node=4 --cpus-per-task=8 bash rank.sh"
    assert whole in SLURM
    inside = read_script(SLURM.replace(whole, f"    (trap '' USR1 && exec {whole})"), launcher="srun")
    assert inside == read_script(SLURM, launcher="srun")
    assert inside.command == ["bash", "rank.sh"]


def test_what_an_lsf_job_asks_for() -> None:
    found = requested(read_script(LSF, launcher="jsrun"))
    assert (found.nodes, found.ranks, found.gpus, found.cores_per_rank) == (2, 12, 12, 7)
    assert (found.seconds, found.warn_seconds, found.account, found.queue) == (5400, 300, "abc", None)


@pytest.mark.parametrize(
    ("table", "line", "said"),
    [
        (SBATCH, "--node=2", "no option --node"),
        (SBATCH, "--nodes=two", "does not take 'two'"),
        (SBATCH, "--nodes=0", "does not take '0'"),
        (SBATCH, "--nodes", "needs a value"),
        (SBATCH, "--nodes=", "does not take ''"),
        (SBATCH, "--nodes=2 -N 3", "said twice"),
        (SBATCH, "--time=1:75:00", "does not take"),
        (SBATCH, "--no-requeue=yes", "takes no value"),
        (SBATCH, "--gpus-per-node=-1", "does not take"),
        (SBATCH, "--cpu-bind=cores", "no option --cpu-bind"),
        (SBATCH, "--account=", "does not take"),
        (SRUN, "--cpu-bind=core bash", "does not take 'core'"),
        (SRUN, "--gpu-bind=close bash", "does not take 'close'"),
        (SRUN, "--no-requeue bash", "no option --no-requeue"),
        (SRUN, "--kill-on-bad-exit=2 bash", "does not take '2'"),
        (BSUB, "-W=2:00", "no option -W=2:00"),
        (BSUB, "-W 2:00:00", "does not take"),
        (BSUB, "-nnodes", "needs a value"),
        (BSUB, "--nnodes 2", "no option --nnodes"),
        (BSUB, "-P a -P b", "said twice"),
        (BSUB, "-J a[1]", "does not take"),
        (JSRUN, "-n 2 --nrs=2 bash", "said twice"),
        (JSRUN, "-b packed bash", "does not take 'packed'"),
        (JSRUN, "-d block bash", "does not take 'block'"),
        (JSRUN, "-t 3 bash", "no option -t"),
        (MPIEXEC, "-ppn 4 bash", "no option -ppn"),
        (MPIEXEC, "-n 2 -np 2 bash", "said twice"),
        (MPIEXEC, "--map-by ppr:node bash", "does not take"),
        (MPIEXEC, "--cpu-bind=cores bash", "no option"),
        (MPIEXEC, "-x 9LIVES bash", "does not take"),
        (MPIEXEC, "--mca btl", "needs a value"),
        (HYDRA, "--map-by ppr:4:node bash", "no option"),
        (HYDRA, "-ppn many bash", "does not take"),
    ],
)
def test_a_bad_line_is_refused(table: Table, line: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        read_options(line.split(), table)


def test_options_are_read_in_all_their_forms() -> None:
    assert read_options(["-N2", "-n", "8", "--exclusive", "-c", "4", "a", "-b"], SRUN) == (
        {"--nodes": ["2"], "--ntasks": ["8"], "--exclusive": [""], "--cpus-per-task": ["4"]},
        ["a", "-b"],
    )
    assert read_options(["-x", "A", "-x", "B=1", "--mca", "btl", "tcp", "a"], MPIEXEC)[0] == {
        "-x": ["A", "B=1"],
        "--mca": ["btl tcp"],
    }
    assert read_options(["-genv", "A", "1", "-genv", "B", "2", "a"], HYDRA)[0] == {"-genv": ["A 1", "B 2"]}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("#SBATCH --nodes=2", "# SBATCH --nodes=2", "looks like a directive"),
        ("#SBATCH --nodes=2", "#sbatch --nodes=2", "looks like a directive"),
        ("#SBATCH --nodes=2", " #SBATCH --nodes=2", "looks like a directive"),
        ("#SBATCH --nodes=2", "#SBATCH", "has no option"),
        ("#SBATCH --nodes=2", "#SBATCH nodes=2", "has no option"),
        ("#SBATCH --nodes=2", "#BSUB -nnodes 2", "two schedulers"),
        ("# A comment.", "export A=1\n#SBATCH --mem=0", "after the first command"),
        ("# A comment.", "#SBATCH --nodes=4", "said twice"),
        ("#SBATCH --nodes=2", "#SBATCH --nodes=1", "ranks are more than the job has"),
        ("--gpus-per-node=4", "--gpus-per-node=4 extra", "words that are no option"),
        ("srun --nodes=2", "srun --gpus-per-task=2 --nodes=2", "the ranks take 16 GPUs, and the job has 8"),
        ("--cpus-per-task=8 bash", "--cpus-per-task=16 bash", "a rank takes 16 cores, and the job has 8"),
        ("@300", "@99999", "at most 65535"),
        (" bash rank.sh", "", "told nothing to run"),
        ("srun --nodes=2", "srun a > b\nsrun --nodes=2", "2 lines start srun"),
    ],
)
def test_a_bad_script_is_refused(old: str, new: str, said: str) -> None:
    assert old in SLURM
    with pytest.raises(OptionError, match=said):
        requested(read_script(SLURM.replace(old, new), launcher="srun"))


def test_resource_sets_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(OptionError, match="other cores"):
        requested(read_script(LSF.replace("-c 42", "-c 21"), launcher="jsrun"))
    with pytest.raises(OptionError, match="take 4 nodes, and the job has 2"):
        requested(read_script(LSF.replace("-n 2", "-n 4"), launcher="jsrun"))


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 5400), ("90:30", 5430), ("1:30:00", 5400), ("1-2", 93600), ("1-2:30:10", 95410)]
)
def test_times_of_slurm(text: str, seconds: int) -> None:
    assert slurm_seconds(text) == seconds
