"""Handing jobs in and how they stand, with programs of the test in place of Slurm's and LSF's."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from axonn.durable_files import LOCK
from axonn.errors import LaunchError, RecordError
from jobscripts.generate import MANIFEST, JobEntry, Manifest, hash_of
from jobscripts.job_status import changes
from jobscripts.schedulers import load_scheduler
from jobscripts.submission import SUBMITTED, standings, submit, submitted, to_submit
from tests.helpers.command_line import CommandLine

NAMES = ("first", "second", "third")
SBATCH = 'n=$(ls "$LOG" | wc -l); touch "$LOG/$n"; echo $((101 + n))'


class Site:
    """A folder of three jobs, and programs on the PATH that stand for a batch system's."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str) -> None:
        self.folder, self.programs = root / "jobs", root / "programs"
        (root / "log").mkdir()
        self.programs.mkdir()
        # Nothing else: a machine may have a real batch system.
        for tool in ("sh", "bash", "cat", "ls", "mkdir", "touch", "wc"):
            (self.programs / tool).symlink_to(shutil.which(tool) or f"/bin/{tool}")
        monkeypatch.setenv("PATH", str(self.programs))
        monkeypatch.setenv("LOG", str(root / "log"))
        for name in ("sbatch", "squeue", "sacct", "bsub", "bjobs", "bhist"):
            self.program(name, f"echo '{name}: not reachable' >&2; exit 1")
        entries = []
        for name in NAMES:
            (self.folder / name).mkdir(parents=True)
            script = self.folder / name / "job.sh"
            script.write_text(f"echo {name}\n")
            (script.parent / "rank.sh").write_text("")
            (script.parent / "work.json").write_text(json.dumps({"work": {"steps": 2}}))
            files = {f"{name}/{own}": hash_of(script.parent / own) for own in ("job.sh", "rank.sh", "work.json")}
            entries.append(
                JobEntry(
                    name=name,
                    point=name,
                    framework="AxoNN",
                    adapter="axonn",
                    nodes=1,
                    gpus=1,
                    node_hours=1,
                    files=files,
                )
            )
        manifest = Manifest(
            experiment="fig6", machine="m", scheduler=scheduler, launcher="srun", command="axonn jobs", jobs=entries
        )
        (self.folder / MANIFEST).write_text(json.dumps(manifest.model_dump(mode="json", by_alias=True)))

    def program(self, name: str, script: str) -> None:
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def prints(self, name: str, text: str) -> None:
        self.program(name, f"cat <<'END'\n{text}\nEND")

    def remember(self, **ids: list[str]) -> None:
        (self.folder / SUBMITTED).write_text(json.dumps(ids))

    def ended(self, name: str, job: str, reason: str | None) -> None:
        attempt = self.folder / name / "run" / f"attempt-{job}"
        attempt.mkdir(parents=True)
        if reason is not None:
            (attempt / "ended.json").write_text(json.dumps({"job": job, "status": 1, "reason": reason}))

    def did(self, name: str, losses: list[str]) -> None:
        """Batches of our own ranks, of the two that each job has."""
        rows = "".join(f'{{"step": {i}, "loss": {loss}}}\n' for i, loss in enumerate(losses))
        (self.folder / name / "run" / "batches.jsonl").write_text(rows)

    def states(self) -> list[str]:
        return [one.state for one in standings(self.folder)]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    site = Site(tmp_path, monkeypatch, "slurm")
    site.program("sbatch", SBATCH)
    return site


def test_what_was_submitted_is_remembered_at_once_though_the_next_is_refused(slurm: Site) -> None:
    slurm.program("sbatch", 'case "$PWD" in *second) echo "sbatch: error: limit" >&2; exit 1;; esac; ' + SBATCH)
    seen: list[tuple[str, str]] = []
    with pytest.raises(LaunchError, match=r"second was not taken: sbatch: error: limit; 1 submitted before it are"):
        submit(slurm.folder, on_job=lambda *job: seen.append(job))
    assert seen == [("first", "101")]
    assert submitted(slurm.folder) == {"first": ["101"]}
    slurm.program("sbatch", SBATCH)
    slurm.prints("squeue", "101|PENDING|Priority|2026-01-02T03:04:05|N/A|N/A|1:00:00")
    assert submit(slurm.folder) == [("second", "102"), ("third", "103")]


@pytest.mark.parametrize(
    ("line", "state", "reason", "since", "left"),
    [
        ("7|PENDING|Resources|S|B|E|9:00", "waiting", "Resources", "S", None),
        ("7|PENDING|ReqNodeNotAvail, UnavailableNodes:n3|S|N/A|N/A|9:00", "waiting",
         "ReqNodeNotAvail, UnavailableNodes:n3", "S", None),
        ("7|RUNNING|None|S|B|E|9:00", "running", None, "B", "9:00"),
        ("7|COMPLETING|None|S|B|E|9:00", "running", None, "B", "9:00"),
        ("7|CANCELLED by 0|None|S|B|E", "cancelled", None, "E", None),
        ("7|NODE_FAIL|None|S|B|E", "node-failure", None, "E", None),
        ("7|TIMEOUT|TimeLimit|S|B|E|0:00", "timed-out", "TimeLimit", "E", None),
        ("7|OUT_OF_MEMORY|None|S|B|E", "out-of-memory", None, "E", None),
        ("7|A_NEW_STATE|None|S|B|E", "unknown", None, "E", None),
    ],
)  # fmt: skip
def test_lines_of_slurm(line: str, state: str, reason: str | None, since: str, left: str | None) -> None:
    found = load_scheduler("slurm").states(f"\nnonsense\n{line}\n")["7"]
    assert (found.state, found.reason, found.since, found.left) == (state, reason, since, left)


@pytest.mark.parametrize(
    ("line", "state", "reason", "left"),
    [
        ("7|PEND|Feb  2 00:44|-|-|-|-|New job is waiting;", "waiting", "New job is waiting;",
         None),
        ("7|RUN|Feb  2 00:44|Feb  2 00:45|Feb  2 01:45 L|0:25 L|-|-", "running", None, "0:25"),
        ("7|UNKWN|Feb  2 00:44|Feb  2 00:45|-|-|-|-", "running", None, None),
        ("7|DONE|Feb  2 00:44|Feb  2 00:45|Feb  2 00:46 L|-|-|-", "done", None, None),
        ("7|EXIT|Feb  2 00:44|Feb  2 00:45|Feb  2 00:46|-|TERM_RUNLIMIT: job killed after reaching run limit|-",
         "timed-out", "TERM_RUNLIMIT: job killed after reaching run limit", None),
        ("7|EXIT|Feb  2 00:44|-|Feb  2 00:46|-|TERM_FORCE_OWNER: x|-", "cancelled", "TERM_FORCE_OWNER: x", None),
        ("7|EXIT|Feb  2 00:44|Feb  2 00:45|Feb  2 00:46|-|-|-", "failed", None, None),
        ("Job <7>, User <me>, Project <p>\nFri Feb  2 00:44:01: Submitted from host <h>;\n"
         "Fri Feb  2 00:46:01: Exited with exit code 140;\n"
         "Fri Feb  2 00:46:01: Completed <exit>; TERM_RUNLIMIT: job killed after reaching run limit;",
         "timed-out", "TERM_RUNLIMIT: job killed after reaching run limit", None),
        ("Job <7>, User <me>\nFri Feb  2 00:46:01: Done successfully. The CPU time used is 1.0 seconds;", "done", None,
         None),
    ],
)  # fmt: skip
def test_lines_of_lsf(line: str, state: str, reason: str | None, left: str | None) -> None:
    found = load_scheduler("lsf").states(f"{line}\n")["7"]
    assert (found.state, found.reason, found.left) == (state, reason, left)


def test_sacct_knows_what_squeue_has_forgotten(slurm: Site) -> None:
    slurm.remember(first=["1"], second=["2"], third=["3"])
    slurm.prints("squeue", "1|RUNNING|None|S|B|E|9:00")
    slurm.program("sacct", 'case "$*" in *--jobs=2,3) echo "2|CANCELLED by 0|None|S|B|E";; *) exit 1;; esac')
    assert slurm.states() == ["running", "cancelled", "unknown"]
    # The queue has answered: what it does not know does not run.
    assert to_submit(slurm.folder) == ["second", "third"]


def test_accounting_that_is_disabled_and_a_job_that_is_long_gone_are_answers(slurm: Site) -> None:
    slurm.remember(first=["1"])
    slurm.program("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    slurm.program("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert to_submit(slurm.folder) == list(NAMES)


def test_nothing_is_submitted_twice_because_the_scheduler_is_silent(slurm: Site) -> None:
    slurm.remember(first=["1"], second=["2"])
    slurm.ended("second", "2", "failed")
    with pytest.raises(LaunchError, match=r"first may still wait or run as job 1.*squeue: not reachable"):
        submit(slurm.folder)
    assert submit(slurm.folder, only=["second", "third"]) == [("second", "101"), ("third", "102")]


def test_copied_results_stand_as_their_jobs_left_them(slurm: Site) -> None:
    slurm.remember(first=["1"], second=["2"], third=["3"])
    slurm.ended("first", "1", "finished")
    slurm.ended("second", "2", "wall-limit")
    for name in ("squeue", "sacct"):
        (slurm.programs / name).unlink()
    found = standings(slurm.folder)
    assert [one.state for one in found][:2] == ["done", "timed-out"]
    assert [one.failed for one in found] == [False, True, False]


def test_an_earlier_jobs_reason_is_not_that_of_the_newest(slurm: Site) -> None:
    slurm.remember(first=["1", "2"], second=["3", "4"])
    slurm.ended("first", "1", "wall-limit")
    slurm.ended("second", "3", "finished")
    slurm.ended("third", "5", "failed")
    slurm.prints("squeue", "\n".join(f"{job}|CANCELLED|None|S|B|E|9:00" for job in (2, 4)))
    found = standings(slurm.folder)
    assert [(one.id, one.state, one.reason) for one in found] == [
        ("2", "cancelled", None),
        ("4", "cancelled", None),
        ("5", "failed", "failed"),
    ]


def test_a_job_with_all_its_batches_is_finished_however_it_ended(slurm: Site, axonn: CommandLine) -> None:
    slurm.remember(first=["1"], second=["2"], third=["3"])
    for name, job, losses in (
        ("first", "1", ["2.0", "1.0"]),
        ("second", "2", ["2.0"]),
        ("third", "3", ["2.0", "NaN"]),
    ):
        slurm.ended(name, job, "failed")
        slurm.did(name, losses)
    slurm.prints("squeue", "\n".join(f"{job}|FAILED|None|S|B|E|9:00" for job in (1, 2, 3)))
    assert to_submit(slurm.folder) == ["second", "third"]
    assert [one.failed for one in standings(slurm.folder)] == [False, True, True]
    _, said, _ = axonn("status", slurm.folder)
    assert said.count("finished") == 1


@pytest.mark.parametrize("line", ["7", "7;cluster", "Submitted batch job 7"])
def test_the_id_is_found_among_other_lines(line: str) -> None:
    assert load_scheduler("slurm").job_id(f"Quota: 5 of 9\n{line}\nHave a good day\n") == "7"


def test_a_finished_job_that_is_submitted_again_begins_anew(slurm: Site) -> None:
    slurm.prints("squeue", "")
    job = slurm.folder / "first"
    for number in ("1", "2"):
        slurm.ended("first", number, "finished")
        slurm.remember(first=[number])
        slurm.program("sbatch", "exit 1")
        with pytest.raises(LaunchError):
            submit(slurm.folder, only=["first"], again=True)
        assert (job / "run").exists()
        slurm.program("sbatch", SBATCH)
        submit(slurm.folder, only=["first"], again=True)
        assert not (job / "run").exists()
        assert (job / f"run-{number}" / f"attempt-{number}" / "ended.json").exists()


def test_a_job_does_not_begin_anew_while_a_start_of_it_is_at_work(slurm: Site) -> None:
    slurm.prints("squeue", "")
    slurm.ended("first", "1", "finished")
    slurm.remember(first=["1"])
    run = slurm.folder / "first" / "run"
    with open(run / LOCK, "w") as script:
        fcntl.flock(script, fcntl.LOCK_EX)
        with pytest.raises(LaunchError, match=r"a start of this job still runs in .*/first/run; wait for its end"):
            submit(slurm.folder, only=["first"], again=True)
    assert run.exists()
    assert len(submit(slurm.folder, only=["first"], again=True)) == 1


def test_two_submit_at_once_hand_in_nothing_twice(slurm: Site) -> None:
    def second(name: str, job: str) -> None:
        with pytest.raises(LaunchError, match="another axonn submit is at work"):
            submit(slurm.folder)

    assert len(submit(slurm.folder, on_job=second)) == len(NAMES)
    assert {name: len(ids) for name, ids in submitted(slurm.folder).items()} == dict.fromkeys(NAMES, 1)


def test_what_was_started_by_hand_is_not_submitted_again(slurm: Site) -> None:
    slurm.remember(first=["1"])
    slurm.ended("first", "1", "failed")
    slurm.ended("first", "9", None)
    slurm.prints("squeue", "9|RUNNING|None|S|B|E|9:00")
    assert to_submit(slurm.folder) == ["second", "third"]


@pytest.mark.parametrize(
    ("said", "reason", "state"),
    [
        ("RUNNING", "failed", "running"),
        ("RUNNING", "finished", "done"),
        ("FAILED", "wall-limit", "timed-out"),
        ("NODE_FAIL", "cancelled", "node-failure"),
        ("CANCELLED", "cancelled", "cancelled"),
        ("COMPLETED", "failed", "failed"),
        ("COMPLETED", None, "done"),
    ],
)
def test_the_scheduler_and_the_job_agree(slurm: Site, said: str, reason: str | None, state: str) -> None:
    slurm.remember(first=["1"])
    slurm.ended("first", "1", reason)
    slurm.prints("squeue", f"1|{said}|None|S|B|E|9:00")
    assert slurm.states()[0] == state


@pytest.mark.parametrize("text", ["{", "[]", '{"first": "1"}', '{"first": [1]}', ""])
def test_a_broken_memory_is_named(slurm: Site, text: str) -> None:
    (slurm.folder / SUBMITTED).write_text(text)
    with pytest.raises(RecordError, match="is not what axonn submit wrote"):
        submit(slurm.folder)


def test_refusals(slurm: Site) -> None:
    with pytest.raises(LaunchError, match="there is no job fourth; there are first, second, third"):
        submit(slurm.folder, only=["fourth"])
    slurm.program("sbatch", "echo Submitted")
    with pytest.raises(
        LaunchError, match=r"sbatch gave no job: Submitted; .*first may have been taken: look for it with squeue"
    ):
        submit(slurm.folder, only=["first"])
    (slurm.programs / "sbatch").unlink()
    with pytest.raises(LaunchError, match=r"sbatch cannot be started: .* is this a node where jobs are submitted"):
        submit(slurm.folder, only=["first"])
    (slurm.folder / "first" / "job.sh").write_text("rm -rf\n")
    with pytest.raises(LaunchError, match="was changed since axonn jobs wrote it"):
        submit(slurm.folder)
    assert submitted(slurm.folder) == {}


def test_lsf_takes_jobs_and_forgets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path, monkeypatch, "lsf")
    # Whatever a site set, it reads the lines of a script that comes in.
    read = 'read -r word name; [ "$word" = echo ] || exit 1; '
    site.program(
        "bsub", read + 'n=$(ls "$LOG" | wc -l); touch "$LOG/$n"; echo "Job <$n> is submitted to queue <batch>."'
    )
    assert submit(site.folder, only=["first", "second"]) == [("first", "0"), ("second", "1")]
    site.program("bjobs", "echo '1|RUN|a|b|c|0:25 L|-|-'; echo 'Job <0> is not found' >&2; exit 255")
    site.program("bhist", "echo 'No matching job found' >&2; exit 255")
    assert to_submit(site.folder) == ["first", "third"]


def test_without_a_batch_system_a_job_is_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path, monkeypatch, "none")
    script = 'mkdir -p run/attempt-5 && echo \'{"reason": "failed"}\' > run/attempt-5/ended.json; exit 3\n'
    manifest = json.loads((site.folder / MANIFEST).read_text())
    (path := site.folder / "first" / "job.sh").write_text(script)
    manifest["jobs"][0]["files"]["first/job.sh"] = hash_of(path)
    (site.folder / MANIFEST).write_text(json.dumps(manifest))
    assert submit(site.folder, only=["first"]) == [("first", "5")]
    assert standings(site.folder)[0].failed


def test_status_waits_tells_and_fails(slurm: Site, axonn: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.remember(first=["1"], second=["2"])
    lines = ["1|PENDING|Resources|S|B|E|9:00", "1|RUNNING|None|S|B|E|9:00", "1|NODE_FAIL|None|S|B|E|0:00"]
    asked: list[Any] = []

    def sleep(_: float) -> None:
        asked.append(0)
        slurm.prints("squeue", lines[min(len(asked), 2)])

    slurm.prints("squeue", lines[0])
    monkeypatch.setattr("jobscripts.job_status.time.sleep", sleep)
    seen = [line.partition(" ")[2] for _, new in changes(slurm.folder, every=30) for line in new]
    assert [line for line in seen if line.startswith("first")] == [
        "first: waiting (Resources), 0 batches done",
        "first: running, 0 batches done",
        "first: node-failure, 0 batches done",
    ]
    code, said, _ = axonn("status", slurm.folder)
    assert code == 1
    assert "node-failure" in said
    assert "not submitted" in said
    code, said, _ = axonn("submit", slurm.folder, "--dry-run")
    assert (code, said.split()[:3]) == (0, ["first", "second", "third"])
    assert submitted(slurm.folder) == {"first": ["1"], "second": ["2"]}
