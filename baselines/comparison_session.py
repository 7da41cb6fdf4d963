"""One part of the comparison: a workload on the plain loopback, or over an emulated link in a namespace of its own.

Over a link this module is run as a program inside the namespace: python -m baselines.comparison_session PART.json
FOUND.json
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from axonn.config.train_config import StrictModel
from axonn.errors import LaunchError
from axonn.training.places import ROOT
from axonn.training.supervision.process_group import end_process_group
from baselines.comparison_progress import Reporter
from baselines.contenders import KINDS, Contender, Device, Kind
from baselines.coordinator import (
    ContenderResult,
    JobGroup,
    LinkCondition,
    RanksJob,
    keep_little,
    take_turns,
)
from baselines.rounds import LOOPBACK, Condition
from experiments.slow_link import kbit_per_second, message_bytes
from experiments.workloads import MICROBATCHES

SLOWNET = ROOT / "tools" / "slownet.sh"
MEMORY_SHARE = 0.85
"""Share of the free memory that the jobs of a group may take in all."""
_RANK_BYTES = 500 << 20
"""A rank's interpreter, libraries and buffers."""
_STATE_BYTES = 24
"""Bytes per parameter: float32 weights, gradients and two moments, and as much again for weights and batches in
transit."""
MESSAGE_SHARES = (0.2, 0.5)
"""Seconds of a message over those of one stage's forward."""
COLLECTIVES_SHARE = 0.5
"""Seconds of a layer's collectives over those of its compute; of the gradients' all-reduce over the batch's compute."""


class SessionPart(StrictModel):
    """Everything that is measured on one workload and one link."""

    workload: str
    ranks: int
    link: bool
    device: Device
    contenders: list[Contender]
    """Contenders that can run."""
    least_rounds: int
    most_rounds: int
    seconds: float
    conditions: dict[Kind, list[Condition]]
    half_width: float | None = None
    with_busy: bool = False
    """Option of `JobGroup`, as `half_width` is."""
    runs: Path
    """Folder that holds the ranks' run folders."""

    def folder(self, key: str) -> Path:
        """Return the run folder of a contender."""
        return self.runs / f"{self.workload}{'-link' if self.link else ''}-{key}"

    @property
    def title(self) -> str:
        return f"{self.workload}, {'emulated link' if self.link else 'loopback'}"


class PartMeasurements(StrictModel):
    """Results of a part: the measured contenders by key, one entry for each group in which a contender took part."""

    measured: dict[str, list[ContenderResult]] = {}
    interrupted: bool = False


class EmulatedLink:
    """The loopback of a network namespace that belongs to this process."""

    def apply(self, condition: Condition) -> None:
        if condition.kbit is None:
            # It fails where there is no limit yet.
            subprocess.run(["tc", "qdisc", "del", "dev", "lo", "root"], check=False, capture_output=True)
            return
        rate = ["rate", f"{condition.kbit}kbit", "burst", "32kb", "latency", "400ms"]
        try:
            command = ["tc", "qdisc", "replace", "dev", "lo", "root", "tbf", *rate]
            subprocess.run(command, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            raise LaunchError(f"the rate of the link cannot be set: {error.stderr.strip()}") from error

    def sent(self) -> int:
        for line in Path("/proc/net/dev").read_text().splitlines():
            name, _, numbers = line.partition(":")
            if name.strip() == "lo":
                # Received bytes and 7 other columns come first.
                return int(numbers.split()[8])
        raise LaunchError("there is no loopback interface in /proc/net/dev")


def conditions_over_link(
    workload: str, ranks: int, *, forward: float, backward: float, parameters: int, layer_share: float
) -> dict[Kind, list[Condition]]:
    """Return rates by kind, from seconds of a microbatch on one of 2 stages.

    `layer_share`: the share of the model's compute that is one transformer layer.
    """
    compute = 2 * MICROBATCHES * (forward + backward) / ranks
    message = message_bytes(workload)
    layer_bytes = MICROBATCHES * 4 * message * 2 * (ranks - 1)
    messages = [
        Condition(
            name=f"link: a message takes {share:g} of a forward",
            kbit=kbit_per_second(message, share * forward * 2 / ranks),
        )
        for share in MESSAGE_SHARES
    ]
    collectives = Condition(
        name=f"link: collectives take {COLLECTIVES_SHARE:g} of a layer's compute",
        kbit=kbit_per_second(layer_bytes, COLLECTIVES_SHARE * layer_share * compute),
    )
    gradients = Condition(
        name=f"link: the gradients' all-reduce takes {COLLECTIVES_SHARE:g} of the compute",
        kbit=kbit_per_second(2 * (ranks - 1) * 4 * parameters, COLLECTIVES_SHARE * compute),
    )
    return {"inter-layer": messages, "tensor": [collectives], "data": [gradients], "combined": [collectives]}


def job_bytes(contender: Contender, workload: str, ranks: int) -> int:
    """Estimate the bytes that all ranks of a contender take in all; data parallelism is assumed to replicate all
    state."""
    parameters = contender.config(workload, ranks, 1).model.parameters
    copies = contender.grid_of(ranks).get("data", 1)
    return ranks * _RANK_BYTES + copies * _STATE_BYTES * parameters


def free_bytes() -> int:
    """Return the bytes of memory that new processes may take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def groups_of(part: SessionPart, available: int) -> Iterator[tuple[Kind, list[Contender]]]:
    """Yield the contenders that run at the same time: those of a kind, split into several groups with all of ours in
    each where they would take more than `MEMORY_SHARE` of the `available` bytes."""
    for kind in KINDS:
        ours = [c for c in part.contenders if c.kind == kind and c.ours]
        others = [c for c in part.contenders if c.kind == kind and not c.ours]
        if not ours and not others:
            continue

        def need(some: Sequence[Contender]) -> int:
            return sum(job_bytes(c, part.workload, part.ranks) for c in some)

        left = MEMORY_SHARE * available - need(ours)
        group: list[Contender] = []
        for contender in others:
            if group and need([*group, contender]) > left:
                yield kind, ours + group
                group = []
            group.append(contender)
        yield kind, ours + group


def run_part(part: SessionPart, *, link: LinkCondition, say: Reporter) -> PartMeasurements:
    """Measure all groups of a part. Results from before an interruption are kept."""
    measurements = PartMeasurements()
    groups = list(groups_of(part, free_bytes()))
    deadline = time.monotonic() + part.seconds
    waiting = sum(len(members) for _, members in groups)
    for number, (kind, members) in enumerate(groups):
        conditions = part.conditions.get(kind, [LOOPBACK])
        group = JobGroup(
            number=number,
            conditions=conditions,
            least_rounds=part.least_rounds,
            most_rounds=part.most_rounds,
            seconds=max(0.0, deadline - time.monotonic()) * len(members) / waiting,
            ours=[c.key for c in members if c.ours],
            half_width=part.half_width,
            with_busy=part.with_busy,
        )
        waiting -= len(members)
        jobs = [
            RanksJob(
                c.key,
                c.framework,
                c.config(part.workload, part.ranks, steps=part.most_rounds * len(conditions) + 1),
                part.folder(c.key),
                link_only=part.link,
                device=part.device,
            )
            for c in members
        ]
        names = {c.key: c.name for c in members}
        with say.group(f"{part.title}: {kind}", names, seconds=group.seconds) as report:
            try:
                measured, interrupted = take_turns(group, jobs, link=link, say=report)
            except KeyboardInterrupt:
                # While its jobs ended: measurements of earlier groups count.
                return measurements.model_copy(update={"interrupted": True})
        for key, result in measured.items():
            measurements.measured.setdefault(key, []).append(result)
            if result.failure is None:
                keep_little(part.folder(key))
        if interrupted:
            return measurements.model_copy(update={"interrupted": True})
    return measurements


def run_over_link(part: SessionPart, folder: Path) -> PartMeasurements:
    """Run `run_part` in a network namespace of its own. Raises `LaunchError` when that cannot be made or fails."""
    folder.mkdir(parents=True, exist_ok=True)
    asked, answer = folder / "link-part.json", folder / "link-found.json"
    asked.write_text(part.model_dump_json())
    answer.unlink(missing_ok=True)
    # The limit that the script sets is removed at once: ranks start without one.
    command = [
        "unshare",
        "-n",
        "bash",
        str(SLOWNET),
        sys.executable,
        "-m",
        "baselines.comparison_session",
        str(asked),
        str(answer),
    ]
    # A session of its own, so that an interruption reaches it once, from here.
    process = subprocess.Popen(command, env={**os.environ, "RATE": "10gbit"}, start_new_session=True)
    interrupted = False
    try:
        try:
            process.wait()
        except KeyboardInterrupt:
            interrupted = True
            process.send_signal(signal.SIGINT)
            process.wait()
        if not answer.exists():
            if interrupted:
                return PartMeasurements(interrupted=True)
            raise LaunchError(f"the part over the emulated link ended with code {process.returncode} and no result")
        measurements = PartMeasurements.model_validate_json(answer.read_text())
        return measurements.model_copy(update={"interrupted": measurements.interrupted or interrupted})
    finally:
        if process.poll() is None:
            end_process_group(process)
        asked.unlink(missing_ok=True)
        answer.unlink(missing_ok=True)


def _end_with(parent: int) -> None:
    """End this process when the one that waits for the answer is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: Sequence[str]) -> None:
    # Even where an outer shell makes its background jobs ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _end_with(os.getppid())
    asked, answer = map(Path, arguments)
    part = SessionPart.model_validate_json(asked.read_text())
    measurements = run_part(part, link=EmulatedLink(), say=Reporter())
    answer.write_text(measurements.model_dump_json())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (LaunchError, KeyboardInterrupt) as error:
        sys.exit(f"error: {error}")
