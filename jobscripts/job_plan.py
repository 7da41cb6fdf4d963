"""The jobs of an experiment on a machine, their geometry checked before anything is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from axonn.errors import AxonnError, ConfigError, LaunchError
from axonn.grid import Axis
from axonn.perf.machine.machine_file import MachineFile
from axonn.perf.prediction import Prediction
from axonn.perf.timing.task_times import TaskTime
from axonn.training.engine_framework import EngineFramework
from axonn.training.framework import Adapter, InProcessFramework, adapter_names, load_adapter, load_framework
from axonn.training.run_folder import NEWEST
from axonn.training.supervision.cluster_launch import launch_worker
from experiments.cluster_work import PUBLISHED_STEPS, SmallWork, cluster_work
from experiments.definition import Experiment, find_machine, slug
from experiments.predicted_case import PredictedCase, predict_case
from experiments.predictor import PointToPredict, decided, points_to_predict
from experiments.runner import measured_work
from jobscripts.generate import ClusterJob, is_script
from jobscripts.schedulers import Resources
from jobscripts.site import Site, as_time
from jobscripts.system import System

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """All jobs of an experiment. `warnings`: what costs time; `left_out`: why no job was made, of which points."""

    jobs: list[ClusterJob] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, name: str, reason: str) -> None:
        """Make no job for a point."""
        self.left_out.setdefault(reason, []).append(name)

    def require(self, site: Site, *, where: str) -> None:
        """Raise `ConfigError` naming what these jobs need and the site file lacks: the folders of other frameworks'
        scripts, and tokens where a framework has no synthetic ones."""
        wants = sorted({job.framework for job in self.jobs if job.launch.needs_data})
        if site.data is None and wants:
            raise ConfigError(
                f"{where}: add data: /PATH/PREFIX, where PREFIX.bin and PREFIX.idx have the tokens: "
                f"{' and '.join(wants)} cannot make any up; or write jobs of other frameworks alone with --framework"
            )
        scripts = {
            job.adapter: word
            for job in self.jobs
            if job.adapter not in site.programs
            for word in job.launch.command
            if is_script(word)
        }
        if scripts:
            keys = ", ".join(f"{adapter}: FOLDER" for adapter in scripts)
            names = " and ".join(sorted(set(scripts.values())))
            raise ConfigError(
                f"{where}: add programs: {{{keys}}}, the folder of each one's {names}; "
                "or write jobs of other frameworks alone with --framework"
            )

    def notes(self) -> dict[str, list[str]]:
        """Return, by framework, what differs from the requested work, or must be provided."""
        notes: dict[str, list[str]] = {}
        for job in self.jobs:
            listed = notes.setdefault(job.framework, [])
            listed.extend(note for note in job.launch.notes if note not in listed)
        return notes

    def left_out_lines(self) -> list[str]:
        """Return one line for each reason."""
        return [f"{', '.join(names)}: {reason}" for reason, names in self.left_out.items()]


def plan_jobs(
    experiment: Experiment,
    *,
    system: System,
    site: Site,
    steps: int = PUBLISHED_STEPS,
    repeats: int = 1,
    only: Sequence[str] = (),
    on_point: Callable[[str], None] = lambda name: None,
) -> JobPlan:
    """Return jobs for each point at the published scale whose framework has an adapter, `repeats` of each.

    `only`: labels of frameworks. `on_point` is called with each job's name before its geometry is checked. Raises
    `ConfigError` with every point that cannot run on the machine: too few nodes, a grid that leaves GPUs of a node
    without a rank, more memory than a device has.
    """
    machine = find_machine(system.machine)
    adapters = {adapter.label: adapter.name for adapter in map(load_adapter, adapter_names())}
    if experiment.predicted is not None:
        adapters |= experiment.predicted.adapters
    _, points = points_to_predict(experiment)
    planned = JobPlan()
    errors: dict[str, list[str]] = {}
    times: dict[str, float] = {}
    for point in _wanted(points, [p.framework for p in points], only, experiment):
        name = slug(f"{point.name}-{point.framework}").lower()
        on_point(name)
        try:
            case, _ = decided(point, machine)
            predicted = predict_case(case, machine, where=point.where, rules=point.rules)
        except AxonnError as error:
            errors[name] = [str(error)]
            continue
        if wrong := impossible(predicted, machine, system):
            errors[name] = wrong
            continue
        try:
            job = _published_job(name, point, predicted, adapters, system=system, site=site, steps=steps)
        except LaunchError as error:
            planned.leave_out(name, str(error))
            continue
        planned.warnings.extend(f"{name}: {text}" for text in straddling(predicted, machine))
        times[name] = predicted.prediction.batch_time_s
        planned.jobs.extend(_repeated(job, repeats))
    planned.warnings.extend(_too_short(times, steps, site))
    return _checked(planned, errors, system)


def _too_short(times: Mapping[str, float], steps: int, site: Site) -> list[str]:
    """Return a warning if predicted batches do not fit into the wall time, or one batch not into the time left when a
    job is warned."""
    warnings = []
    late = [name for name, time in times.items() if steps * time > site.seconds - site.warn_seconds]
    if late:
        needs = max(steps * times[name] for name in late) + site.warn_seconds
        warnings.append(
            f"{steps} batches are predicted not to fit into wall_time '{site.wall_time}' of {', '.join(late)}; the "
            f"longest needs '{as_time(needs)}', and the start of the ranks comes on top"
        )
    lost = [name for name, time in times.items() if 2 * time > site.warn_seconds]
    if lost:
        needs = 2 * max(times[name] for name in lost)
        warnings.append(
            f"warn '{site.warn}' is too late to end a batch and save, should the wall limit come: {', '.join(lost)} "
            f"would begin anew when submitted again; the longest batch needs warn '{as_time(needs)}'"
        )
    return warnings


def plan_small_jobs(
    experiment: Experiment, *, system: System, site: Site, repeats: int = 1, only: Sequence[str] = ()
) -> JobPlan:
    """Return jobs for what the experiment measures on one machine; a weak scaling goes up to all ranks of the system.

    Only frameworks whose ranks are this suite's own are run so. Raises `ConfigError` as `plan_jobs` does, and where the
    experiment measures nothing.
    """
    policy = experiment.policy
    if policy is None:
        raise ConfigError(f"experiments/{experiment.name}.yaml has nothing small to measure; leave out --small")
    per_node = _ranks_per_node(system)
    work = measured_work(experiment, most=None if system.nodes is None else system.nodes * per_node)
    labels = [load_framework(name).label for _, _, name in work]
    planned = JobPlan()
    errors: dict[str, list[str]] = {}
    for (label, config, framework), framework_label in _wanted(
        list(zip(work, labels, strict=True)), labels, only, experiment
    ):
        small = SmallWork(name=label, framework=framework, config=config, warmup_batches=policy.warmup_batches)
        name = slug(f"{label}-{framework}").lower()
        if wrong := _too_many(small.gpus, per_node, system.nodes, system.machine):
            errors[name] = wrong
            continue
        runner = load_framework(framework)
        reason = runner.unavailable(config)
        if not isinstance(runner, InProcessFramework):
            reason = "its ranks run in an environment of their own, which no job has; axonn run measures it"
        if reason is not None:
            planned.leave_out(name, reason)
            continue
        job = ClusterJob(
            name=name,
            framework=framework_label,
            adapter=framework,
            work=small,
            launch=launch_worker(
                framework,
                config,
                device=system.device,
                checkpoint=NEWEST,
                stoppable=True,
                messages_over_mpi=isinstance(runner, EngineFramework),
            ),
            resources=_resources(name, small.gpus, system=system, site=site),
        )
        planned.jobs.extend(_repeated(job, repeats))
    return _checked(planned, errors, system)


def _wanted(points: Sequence[_T], labels: Sequence[str], only: Sequence[str], experiment: Experiment) -> list[_T]:
    if unknown := sorted(set(only) - set(labels)):
        known = ", ".join(dict.fromkeys(labels))
        raise ConfigError(f"no point is of {', '.join(unknown)}; the frameworks of {experiment.name} are {known}")
    return [point for point, label in zip(points, labels, strict=True) if not only or label in only]


def _repeated(job: ClusterJob, repeats: int) -> list[ClusterJob]:
    """Return the job `repeats` times; the first has the plain name."""
    names = [job.name, *(f"{job.name}-{number}" for number in range(2, repeats + 1))]
    return [replace(job, name=name, resources=replace(job.resources, name=name)) for name in names]


def _checked(planned: JobPlan, errors: Mapping[str, Sequence[str]], system: System) -> JobPlan:
    if errors:
        lines = [f"\n  {name}: {text}" for name, texts in errors.items() for text in texts]
        raise ConfigError(f"{len(errors)} job(s) cannot run on {system.machine}:{''.join(lines)}")
    if not planned.jobs:
        raise ConfigError("there is no job to write:\n  " + "\n  ".join(planned.left_out_lines()))
    counts = Counter(job.name for job in planned.jobs)
    if same := [name for name, count in counts.items() if count > 1]:
        raise ConfigError(f"several points would have jobs called {', '.join(same)}; give them other labels")
    return planned


def _published_job(
    name: str,
    point: PointToPredict,
    predicted: PredictedCase,
    adapters: dict[str, str],
    *,
    system: System,
    site: Site,
    steps: int,
) -> ClusterJob:
    if point.framework not in adapters:
        raise LaunchError(f"no adapter is called '{point.framework}'; there are {', '.join(sorted(adapters))}")
    adapter: Adapter = load_adapter(adapters[point.framework])
    work = cluster_work(
        predicted.case, machine=system.machine, name=point.name, steps=steps, data=site.data, device=system.device
    )
    return ClusterJob(
        name=name,
        framework=point.framework,
        adapter=adapter.name,
        work=work,
        launch=adapter.launch(work),
        resources=_resources(name, work.gpus, system=system, site=site),
    )


def _ranks_per_node(system: System) -> int:
    return system.ranks_per_node or find_machine(system.machine).node.gpus.number


def _resources(name: str, ranks: int, *, system: System, site: Site) -> Resources:
    """Return resources with one rank per GPU, and as many ranks as a node can have."""
    per_node = min(ranks, _ranks_per_node(system))
    return Resources(
        name=name,
        nodes=-(-ranks // per_node),
        ranks_per_node=per_node,
        gpus_per_node=per_node if system.device == "cuda" else 0,
        cores_per_rank=site.cores_per_rank or system.cores_per_rank,
        seconds=site.seconds,
        warn_seconds=site.warn_seconds,
        account=site.account,
        queue=site.queue if system.queue_is == "partition" else None,
        qos=site.queue if system.queue_is == "qos" else None,
        constraint=site.constraint or system.constraint,
        options=[*(system.options if site.scheduler in (None, system.scheduler) else []), *site.options],
    )


def impossible(predicted: PredictedCase, machine: MachineFile, system: System) -> list[str]:
    """Return why a point cannot run on the machine."""
    per_node = system.ranks_per_node or machine.node.gpus.number
    nodes = system.nodes or (None if machine.nodes is None else machine.nodes.number)
    reasons = _too_many(predicted.case.gpus, per_node, nodes, machine.name)
    if not predicted.prediction.fits:
        needs, has = predicted.prediction.memory.total / 1e9, machine.gpu.memory.si / 1e9
        reasons.append(
            f"needs {needs:.1f} GB on the fullest GPU, which has {has:.1f} GB (predicted); lower microbatch_size, or "
            "cut the model over more ranks"
        )
    return reasons


def _too_many(ranks: int, per_node: int, nodes: int | None, machine: str) -> list[str]:
    reasons = []
    if ranks > per_node and ranks % per_node:
        reasons.append(
            f"{ranks} ranks do not fill nodes of {per_node}: the last would have {per_node - ranks % per_node} without "
            f"work; choose a grid of {ranks - ranks % per_node} or {ranks + per_node - ranks % per_node} ranks"
        )
    if nodes is not None and (needs := -(-ranks // per_node)) > nodes:
        reasons.append(f"{needs} nodes are more than the {nodes} of {machine}")
    return reasons


def straddling(predicted: PredictedCase, machine: MachineFile) -> list[str]:
    """Return a warning about groups of tensor parallelism that span several nodes, with the predicted cost of their
    collectives."""
    grid = predicted.strategy.process_grid(machine)
    axes: tuple[Axis, ...] = ("row", "col")
    across = []
    for axis in axes:
        groups = grid.groups([axis]) if grid.extent(axis) > 1 else []
        if spanning := [group for group in groups if len(grid.nodes_of(group)) > 1]:
            across.append(f"{len(spanning)} of {len(groups)} groups along {axis}")
    if not across:
        return []
    taken, waited = collective_times(predicted.prediction)
    batch = predicted.prediction.batch_time_s
    return [
        f"{' and '.join(across)} lie on several nodes; of a batch of {batch:.2f} s the collectives of row and col are "
        f"predicted to take {taken:.2f} s, of which {waited:.2f} s ({waited / batch:.0%} of the batch) are not hidden "
        "under compute"
    ]


def collective_times(prediction: Prediction) -> tuple[float, float]:
    """Return the seconds of a batch during which collectives of the tensor axes are under way, and the part of them in
    which nothing is computed; means over the stages."""
    count = Counter((stage, task.chunk, task.kind) for stage, task, _, _ in prediction.simulation.tasks)
    under_way = sum(
        number * sum(end - start for start, end in joined_intervals(prediction.stages[s].chunks[chunk].tasks[kind]))
        for (s, chunk, kind), number in count.items()
    )
    return under_way / len(prediction.stages), prediction.parts.tensor_all_reduce


def joined_intervals(task: TaskTime) -> list[tuple[float, float]]:
    """Return the intervals of its collectives, overlapping ones joined: sub-shards have theirs side by side."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted((start, end) for start, end in task.collectives):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def node_hours(jobs: Sequence[ClusterJob]) -> float:
    """Return the most node-hours that all jobs may take."""
    return sum(job.resources.node_hours for job in jobs)
