"""No batch system: a script that is run where the nodes are, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from axonn.errors import LaunchError
from jobscripts.schedulers import Resources, Scheduler, Status


class Plain(Scheduler):
    name = "none"
    variables = {"id": "$$", "nodes": "hostname", "submitted_from": "$PWD"}
    runs_at_once = True

    def directives(self, resources: Resources) -> list[str]:
        return []

    def submit(self, script: str) -> list[str]:
        return ["bash", script]

    def job_id(self, printed: str) -> str:
        raise LaunchError("a job without a batch system is known by the folder of its attempt alone")

    def ask(self, ids: Sequence[str]) -> list[list[str]]:
        return []

    def states(self, printed: str) -> dict[str, Status]:
        return {}


SCHEDULER = Plain
