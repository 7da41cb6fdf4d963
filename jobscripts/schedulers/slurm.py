"""Slurm: sbatch, squeue and sacct."""

from __future__ import annotations

import re
from collections.abc import Sequence

from axonn.errors import LaunchError
from jobscripts.schedulers import Resources, Scheduler, State, Status

_STATES: dict[str, State] = {
    "PENDING": "waiting",
    "CONFIGURING": "waiting",
    "REQUEUED": "waiting",
    "REQUEUE_HOLD": "waiting",
    "REQUEUE_FED": "waiting",
    "SPECIAL_EXIT": "waiting",
    "SUSPENDED": "waiting",
    "RUNNING": "running",
    "COMPLETING": "running",
    "SIGNALING": "running",
    "STAGE_OUT": "running",
    "STOPPED": "running",
    "RESIZING": "running",
    "COMPLETED": "done",
    "FAILED": "failed",
    "CANCELLED": "cancelled",
    "PREEMPTED": "cancelled",
    "REVOKED": "cancelled",
    "TIMEOUT": "timed-out",
    "DEADLINE": "timed-out",
    "OUT_OF_MEMORY": "out-of-memory",
    "NODE_FAIL": "node-failure",
    "BOOT_FAIL": "node-failure",
}
_NOTHING = ("", "None", "N/A", "Unknown", "INVALID", "NOT_SET")


class Slurm(Scheduler):
    name = "slurm"
    variables = {
        "id": "$SLURM_JOB_ID",
        "nodes": 'scontrol show hostnames "$SLURM_JOB_NODELIST"',
        "submitted_from": "$SLURM_SUBMIT_DIR",
    }

    unknown_job = "Invalid job id specified"

    def directives(self, resources: Resources) -> list[str]:
        r = resources
        hours, rest = divmod(r.seconds, 3600)
        lines = [
            f"--job-name={r.name}",
            f"--nodes={r.nodes}",
            f"--ntasks-per-node={r.ranks_per_node}",
            f"--cpus-per-task={r.cores_per_rank}",
            f"--time={hours:02d}:{rest // 60:02d}:{rest % 60:02d}",
            "--output=slurm-%j.out",
            # The maximum of sbatch(1).
            f"--signal=B:USR1@{min(r.warn_seconds, 65535)}",
            "--no-requeue",
        ]
        if r.gpus_per_node:
            lines.append(f"--gpus-per-node={r.gpus_per_node}")
        asked = {"account": r.account, "partition": r.queue, "qos": r.qos, "constraint": r.constraint}
        for option, value in asked.items():
            if value is not None:
                lines.append(f"--{option}={value}")
        return [f"#SBATCH {line}" for line in [*lines, *r.options]]

    def submit(self, script: str) -> list[str]:
        return ["sbatch", "--parsable", script]

    def job_id(self, printed: str) -> str:
        # Some sites' sbatch prints more, and "Submitted ..." where a wrapper drops --parsable.
        lines = [line.strip() for line in printed.splitlines()]
        ids = [m[1] for line in lines if (m := re.fullmatch(r"(?:Submitted batch job )?(\d+)(?:;\S+)?", line))]
        if not ids:
            raise LaunchError(f"sbatch gave no job: {printed.strip() or 'it printed nothing'}")
        return ids[-1]

    def ask(self, ids: Sequence[str]) -> list[list[str]]:
        # squeue first: it knows every live job, and why one waits. sacct knows those that ended long ago, where a site
        # has a database.
        jobs = f"--jobs={','.join(ids)}"
        fields = "JobID,State,Reason,Submit,Start,End"
        return [
            ["squeue", "--states=all", "--noheader", "--format=%i|%T|%r|%V|%S|%e|%L", jobs],
            ["sacct", "--allocations", "--noheader", "--parsable2", f"--format={fields}", jobs],
        ]

    def states(self, printed: str) -> dict[str, Status]:
        states: dict[str, Status] = {}
        for line in printed.splitlines():
            columns = [*map(str.strip, line.split("|"))]
            if len(columns) < 6 or columns[0] in _NOTHING or columns[1] in _NOTHING:
                continue
            job, word = columns[:2]
            reason, submitted, started, ended, *left = [None if text in _NOTHING else text for text in columns[2:]]
            # "CANCELLED by 0".
            state = _STATES.get(word.split()[0], "unknown")
            states[job] = Status(
                state=state,
                reason=reason,
                since=submitted if state == "waiting" else started if state == "running" else ended,
                left=left[0] if left and state == "running" else None,
            )
        return states


SCHEDULER = Slurm
