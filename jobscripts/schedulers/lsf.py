"""LSF: bsub and bjobs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from axonn.errors import LaunchError
from jobscripts.schedulers import Resources, Scheduler, State, Status

_STATES: dict[str, State] = {
    "PEND": "waiting",
    "PSUSP": "waiting",
    "WAIT": "waiting",
    "RUN": "running",
    "SSUSP": "running",
    "USUSP": "running",
    # The node does not answer.
    "UNKWN": "running",
    "DONE": "done",
    "EXIT": "failed",
    "ZOMBI": "failed",
}
# IBM Spectrum LSF, "Termination reasons displayed by bacct, bhist, and bjobs".
_REASONS: dict[str, State] = {
    "TERM_RUNLIMIT": "timed-out",
    "TERM_DEADLINE": "timed-out",
    "TERM_MEMLIMIT": "out-of-memory",
    "TERM_SWAP": "out-of-memory",
    "TERM_OWNER": "cancelled",
    "TERM_FORCE_OWNER": "cancelled",
    "TERM_ADMIN": "cancelled",
    "TERM_FORCE_ADMIN": "cancelled",
    "TERM_BUCKET_KILL": "cancelled",
    "TERM_PREEMPT": "cancelled",
    "TERM_LOAD": "cancelled",
    "TERM_WINDOW": "cancelled",
    "TERM_EXTERNAL_SIGNAL": "cancelled",
    "TERM_CSM_ALLOC": "node-failure",
    "TERM_ZOMBI": "node-failure",
}
_NOTHING = ("", "-")


class Lsf(Scheduler):
    name = "lsf"
    variables = {
        "id": "$LSB_JOBID",
        "nodes": "awk '!seen[$0]++' \"$LSB_DJOB_HOSTFILE\"",
        "submitted_from": "$LS_SUBCWD",
    }

    unknown_job = "is not found"
    # bsub ignores the #BSUB lines of a script given by name, except where a site sets LSB_BSUB_PARSE_SCRIPT.
    reads_script = True

    def directives(self, resources: Resources) -> list[str]:
        r = resources
        minutes = -(-r.seconds // 60)
        lines = [
            f"-J {r.name}",
            f"-nnodes {r.nodes}",
            f"-W {minutes // 60}:{minutes % 60:02d}",
            "-o lsf-%J.out",
            "-wa USR1",
            f"-wt {-(-r.warn_seconds // 60)}",
            "-rn",
        ]
        for option, value in (("-P", r.account), ("-q", r.queue)):
            if value is not None:
                lines.append(f"{option} {value}")
        return [f"#BSUB {line}" for line in [*lines, *r.options]]

    def submit(self, script: str) -> list[str]:
        return ["bsub"]

    def job_id(self, printed: str) -> str:
        match = re.search(r"Job <(\d+)> is submitted", printed)
        if match is None:
            raise LaunchError(f"bsub gave no job: {printed.strip() or 'it printed nothing'}")
        return match[1]

    def ask(self, ids: Sequence[str]) -> list[list[str]]:
        # Free text comes last. bjobs forgets jobs an hour after their end; bhist has logs.
        fields = "jobid stat submit_time start_time finish_time time_left exit_reason pend_reason"
        return [
            ["bjobs", "-a", "-noheader", "-o", f"{fields} delimiter='|'", *ids],
            ["bhist", "-n", "0", "-UF", *ids],
        ]

    def states(self, printed: str) -> dict[str, Status]:
        states: dict[str, Status] = {}
        for line in printed.splitlines():
            columns = [*map(str.strip, line.split("|", 7))]
            if len(columns) < 8 or columns[0] in _NOTHING or columns[1] in _NOTHING:
                continue
            job, word = columns[:2]
            submitted, started, ended, left, exited, pends = [
                None if text in _NOTHING else text for text in columns[2:]
            ]
            state = _STATES.get(word, "unknown")
            if state == "failed":
                state = _ended_as(exited or "")
            since = submitted if state == "waiting" else started if state == "running" else ended
            states[job] = Status(
                state=state,
                reason=pends if state == "waiting" else exited,
                # "0:25 L": L, E or X says which limit is meant.
                since=since and re.sub(r" [LEX]$", "", since),
                left=left and re.sub(r" [LEX]$", "", left) if state == "running" else None,
            )
        return states or _histories(printed)


def _histories(printed: str) -> dict[str, Status]:
    """Parse the output of bhist: a paragraph for each job, its last event last."""
    states: dict[str, Status] = {}
    for text in re.split(r"^(?=Job <)", printed, flags=re.MULTILINE):
        match = re.match(r"Job <(\d+)>", text)
        end = re.search(r"^(.*?\d:\d\d:\d\d[^:]*): (Done successfully|Exited|Completed <exit>)", text, re.MULTILINE)
        if match and end:
            reason = re.search(r"TERM_\w+[^;\n]*", text)
            state: State = "done" if end[2].startswith("Done") else _ended_as(reason[0] if reason else "")
            states[match[1]] = Status(state=state, reason=reason[0].rstrip(".") if reason else None, since=end[1])
    return states


def _ended_as(reason: str) -> State:
    return next((state for word, state in _REASONS.items() if word in reason), "failed")


SCHEDULER = Lsf
