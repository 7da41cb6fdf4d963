"""A strict reader of what a job script asks for: directives of Slurm and LSF, command lines of launchers.

Options and the forms of their values: sbatch(1) and srun(1) of Slurm 22.05; IBM, LSF 10.1 command reference, bsub;
OLCF, Summit user guide, and IBM, Job Step Manager, jsrun; prterun of Open MPI 5; Hydra of MPICH 4. What a scheduler
would guess or ignore (shortened names, a directive below the first command, an option twice) is an error here.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

COUNT = r"[1-9]\d*"
ANY = r".+"
WORD = r"[^\s]+"
SIZE = r"\d+[KMGT]?"
GPUS = r"(?:[A-Za-z]\w*:)?\d+"
MINUTES = r"(?:\d+:)?\d+"
SLURM_TIME = r"\d+(?::[0-5]\d){0,2}|\d+-\d+(?::[0-5]\d){0,2}"
FLAG = ""


class OptionError(ValueError):
    """A line that its reader would refuse, ignore or misread."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Options of one command: by all names of an option, separated by spaces, the form of its value (`FLAG`: none)."""

    command: str
    options: Mapping[str, str]
    joined: bool = True
    """Whether long options take --name=value and short ones -nVALUE, as getopt has it; else the value is a word."""
    words: Mapping[str, int] = field(default_factory=dict)
    """Options that take several words, or (0) may take one with an equals sign; else one."""
    repeatable: frozenset[str] = frozenset()

    def forms(self) -> dict[str, tuple[str, str]]:
        """By each name: the first name and the form."""
        return {name: (names.split()[0], form) for names, form in self.options.items() for name in names.split()}


_SLURM_BOTH = {
    "--account -A": WORD,
    "--begin -b": WORD,
    "--chdir -D": ANY,
    "--comment": ANY,
    "--constraint -C": WORD,
    "--container": ANY,
    "--contiguous": FLAG,
    "--core-spec -S": r"\d+",
    "--cores-per-socket": COUNT,
    "--cpus-per-gpu": COUNT,
    "--cpus-per-task -c": COUNT,
    "--dependency -d": WORD,
    "--distribution -m": WORD,
    "--error -e": ANY,
    "--exclude -x": WORD,
    "--exclusive": r"user|mcs",
    "--export": WORD,
    "--gpu-bind": r"(?:verbose,)?(?:closest|none|single:\d+|per_task:\d+|map_gpu:\S+|mask_gpu:\S+)",
    "--gpu-freq": WORD,
    "--gpus -G": GPUS,
    "--gpus-per-node": GPUS,
    "--gpus-per-socket": GPUS,
    "--gpus-per-task": GPUS,
    "--gres": WORD,
    "--hint": r"compute_bound|memory_bound|multithread|nomultithread",
    "--input -i": ANY,
    "--job-name -J": ANY,
    "--licenses -L": WORD,
    "--mail-type": r"[A-Z_0-9]+(?:,[A-Z_0-9]+)*",
    "--mail-user": WORD,
    "--mem": SIZE,
    "--mem-bind": WORD,
    "--mem-per-cpu": SIZE,
    "--mem-per-gpu": SIZE,
    "--mincpus": COUNT,
    "--network": WORD,
    "--nodefile -F": ANY,
    "--nodelist -w": WORD,
    "--nodes -N": r"[1-9]\d*(?:-[1-9]\d*)?",
    "--ntasks -n": COUNT,
    "--ntasks-per-core": COUNT,
    "--ntasks-per-gpu": COUNT,
    "--ntasks-per-node": COUNT,
    "--ntasks-per-socket": COUNT,
    "--open-mode": r"append|truncate",
    "--output -o": ANY,
    "--overcommit -O": FLAG,
    "--partition -p": WORD,
    "--qos -q": WORD,
    "--reservation": WORD,
    "--signal": r"(?:[RB]:)?(?:\d+|[A-Z]+\d?)(?:@\d{1,5})?",
    "--spread-job": FLAG,
    "--switches": r"\d+(?:@\S+)?",
    "--threads-per-core": COUNT,
    "--time -t": SLURM_TIME,
    "--time-min": SLURM_TIME,
    "--tmp": SIZE,
    "--use-min-nodes": FLAG,
    "--verbose -v": FLAG,
    "--wckey": WORD,
}
SBATCH = Table(
    command="sbatch",
    options={
        **_SLURM_BOTH,
        "--array -a": WORD,
        "--export-file": ANY,
        "--hold -H": FLAG,
        "--no-requeue": FLAG,
        "--requeue": FLAG,
        "--reboot": FLAG,
        "--wait-all-nodes": r"[01]",
    },
    words={"--exclusive": 0},
)
SRUN = Table(
    command="srun",
    options={
        **_SLURM_BOTH,
        "--cpu-bind": r"(?:(?:quiet|verbose),)?(?:none|rank|threads|cores|sockets|ldoms|map_cpu:\S+|mask_cpu:\S+)",
        "--exact": FLAG,
        "--kill-on-bad-exit -K": r"[01]",
        "--label -l": FLAG,
        "--mpi": WORD,
        "--overlap": FLAG,
        "--unbuffered -u": FLAG,
        "--wait -W": r"\d+",
    },
    words={"--exclusive": 0, "--kill-on-bad-exit": 0},
)
BSUB = Table(
    command="bsub",
    options={
        "-J": r"[^\s\[\]]+",
        "-P": WORD,
        "-q": WORD,
        "-W": r"\d+(?::[0-5]?\d)?",
        "-We": r"\d+(?::[0-5]?\d)?",
        "-nnodes": COUNT,
        "-n": COUNT,
        "-R": ANY,
        "-G": WORD,
        "-U": WORD,
        "-m": ANY,
        "-M": SIZE,
        "-o": ANY,
        "-oo": ANY,
        "-e": ANY,
        "-eo": ANY,
        "-cwd": ANY,
        "-env": ANY,
        "-w": ANY,
        "-wa": r"[A-Z]+\d?",
        "-wt": MINUTES,
        "-alloc_flags": ANY,
        "-core_isolation": r"[0-6]",
        "-step_cgroup": r"[yn]",
        "-B": FLAG,
        "-N": FLAG,
        "-u": WORD,
        "-r": FLAG,
        "-rn": FLAG,
        "-x": FLAG,
        "-csm": r"[yn]",
    },
    joined=False,
)
JSRUN = Table(
    command="jsrun",
    options={
        "--nrs -n": COUNT,
        "--np -p": COUNT,
        "--rs_per_host -r": COUNT,
        "--tasks_per_rs -a": COUNT,
        "--gpu_per_rs -g": r"\d+|ALL_GPUS",
        "--cpu_per_rs -c": r"[1-9]\d*|ALL_CPUS",
        "--memory_per_rs -m": r"\d+",
        "--bind -b": r"none|rs|packed:[1-9]\d*|packed:smt:[1-9]\d*",
        "--launch_distribution -d": r"packed|cyclic|plane:[1-9]\d*",
        "--latency_priority -l": r"(?:cpu|gpu|mem|CPU|GPU|MEM)(?:-(?:cpu|gpu|mem|CPU|GPU|MEM))*(?:,\S+)?",
        "--smpiargs -M": ANY,
        "--env -E": r"[A-Za-z_]\w*(?:=.*)?",
        "--env_no_propagate -F": WORD,
        "--env_eval -D": WORD,
        "--stdio_mode -e": r"individual|collected|prepended",
        "--stdio_stdout -o": ANY,
        "--stdio_stderr -k": ANY,
        "--exit_on_error -X": r"[01]",
        "--immediate -i": FLAG,
        "--chdir -h": ANY,
        "--use_reservation -J": r"\d+",
        "--use_spindle": FLAG,
    },
    repeatable=frozenset({"--env", "--env_no_propagate", "--env_eval"}),
)
MPIEXEC = Table(
    command="mpiexec",
    options={
        "--np --n -np -n -c": COUNT,
        "--map-by": r"ppr:[1-9]\d*:(?:node|package|numa|l3cache)(?::PE=\d+)?|slot\S*|node\S*|core\S*",
        "--bind-to": r"(?:none|core|package|numa|hwthread|l3cache)(?::\S+)?",
        "--rank-by": WORD,
        "-x": r"[A-Za-z_]\w*(?:=.*)?",
        "--host": WORD,
        "--hostfile": ANY,
        "--mca --prtemca --pmixmca -mca": ANY,
        "--oversubscribe": FLAG,
        "--allow-run-as-root": FLAG,
        "--tag-output": FLAG,
        "--report-bindings": FLAG,
        "--prefix": ANY,
        "--wdir": ANY,
    },
    joined=False,
    words={"--mca": 2},
    repeatable=frozenset({"-x", "--mca"}),
)
HYDRA = Table(
    command="mpiexec",
    options={
        "-n -np": COUNT,
        "-ppn": COUNT,
        "-hosts": WORD,
        "-f": ANY,
        "-genv": ANY,
        "-genvall": FLAG,
        "-genvlist": WORD,
        "-bind-to": WORD,
        "-map-by": WORD,
        "-launcher": WORD,
        "-iface": WORD,
        "-wdir": ANY,
        "-l": FLAG,
    },
    joined=False,
    words={"-genv": 2},
    repeatable=frozenset({"-genv"}),
)
DIRECTIVES = {"#SBATCH": SBATCH, "#BSUB": BSUB}
LAUNCHERS = {"srun": SRUN, "jsrun": JSRUN, "mpiexec": MPIEXEC, "hydra": HYDRA}
Options = dict[str, list[str]]


def read_options(words: Sequence[str], table: Table) -> tuple[Options, list[str]]:
    """The values of each option by its first name, and what follows the options. Raises `OptionError`."""
    forms, found, rest = table.forms(), dict[str, list[str]](), list(words)
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        name, equals, value = word, "", ""
        if table.joined and word.startswith("--"):
            name, equals, value = word.partition("=")
        elif table.joined and len(word) > 2:
            name, equals, value = word[:2], "=", word[2:]
        if name not in forms:
            raise OptionError(f"{table.command} has no option {name}")
        first, form = forms[name]
        many = table.words.get(first, 1)
        if form == FLAG:
            if equals:
                raise OptionError(f"{name} takes no value, and has '{value}'")
        elif not equals and many:
            if len(rest) < many:
                raise OptionError(f"{name} needs a value")
            value = " ".join(rest.pop(0) for _ in range(many))
        if (equals or many) and form != FLAG and not re.fullmatch(form, value):
            raise OptionError(f"{name} does not take '{value}'")
        if first in found and first not in table.repeatable:
            raise OptionError(f"{name} ({first}) is said twice")
        found.setdefault(first, []).append(value)
    return found, rest


@dataclass(frozen=True, kw_only=True)
class Script:
    """What a script says to the scheduler and the launcher. `marker`: of its directives; None where it has none."""

    marker: str | None
    job: Options
    launcher: str
    step: Options
    command: list[str]


def read_script(text: str, *, launcher: str) -> Script:
    """Raises `OptionError` naming what is wrong. The launcher is started by exactly one line, its output redirected."""
    marker, words = _directives(text)
    job: Options = {}
    if marker is not None:
        job, rest = read_options(words, DIRECTIVES[marker])
        if rest:
            raise OptionError(f"{marker} has words that are no option: {' '.join(rest)}")
    table = LAUNCHERS[launcher]
    # Perhaps in a subshell that becomes the launcher.
    started = rf"^\s*(?:\(.*\bexec )?{table.command}(?= )(.*?)\)? [<>&|;].*$"
    lines = re.findall(started, text, re.MULTILINE)
    if len(lines) != 1:
        raise OptionError(f"{len(lines)} lines start {table.command}")
    step, command = read_options(shlex.split(lines[0]), table)
    if not command:
        raise OptionError(f"{table.command} is told nothing to run")
    return Script(marker=marker, job=job, launcher=launcher, step=step, command=command)


def _directives(text: str) -> tuple[str | None, list[str]]:
    """The marker and the words of all directives, in order."""
    marker: str | None = None
    words: list[str] = []
    commands = False
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"\s*#\s*(SBATCH|BSUB)\b", line, re.IGNORECASE):
            mine = line.split(maxsplit=1)[0]
            if mine not in DIRECTIVES or not line.startswith("#"):
                raise OptionError(f"line {number}: '{line}' looks like a directive and is none")
            if commands:
                raise OptionError(f"line {number}: a directive after the first command is not read")
            if marker not in (None, mine):
                raise OptionError(f"line {number}: directives of two schedulers")
            marker = mine
            own = shlex.split(line.removeprefix(mine))
            if not own or not own[0].startswith("-"):
                raise OptionError(f"line {number}: '{line}' has no option")
            words += own
        elif line.strip() and not line.lstrip().startswith("#"):
            commands = True
    return marker, words


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a script really asks for. `gpus`: of all nodes."""

    name: str | None
    nodes: int
    ranks: int
    gpus: int
    cores_per_rank: int | None
    seconds: int | None
    warn_seconds: int | None
    account: str | None
    queue: str | None
    """Partition, queue or quality of service."""


def requested(script: Script) -> Request:
    """Raises `OptionError` where the ranks need more than the job has."""
    job = {name: values[0] for name, values in script.job.items()}
    step = {name: values[0] for name, values in script.step.items()}
    nodes, ranks, gpus, cores = _of_launcher(script.launcher, step)
    if script.marker == "#SBATCH":
        signal = job.get("--signal", "")
        held = int(job["--nodes"])
        per_node = int(job.get("--gpus-per-node", "0").split(":")[-1])
        if ranks > held * int(job["--ntasks-per-node"]):
            raise OptionError(f"{ranks} ranks are more than the job has")
        if gpus > held * per_node:
            raise OptionError(f"the ranks take {gpus} GPUs, and the job has {held * per_node}")
        if "@" in signal and int(signal.split("@")[1]) > 65535:
            raise OptionError("--signal: at most 65535 seconds")
        request = Request(
            name=job["--job-name"],
            nodes=held,
            ranks=ranks,
            gpus=held * per_node,
            cores_per_rank=int(job["--cpus-per-task"]),
            seconds=slurm_seconds(job["--time"]),
            warn_seconds=int(signal.split("@")[1]) if "@" in signal else None,
            account=job.get("--account"),
            queue=job.get("--qos", job.get("--partition")),
        )
    elif script.marker == "#BSUB":
        hours, minutes = job["-W"].split(":")
        request = Request(
            name=job["-J"],
            nodes=int(job["-nnodes"]),
            ranks=ranks,
            gpus=gpus,
            cores_per_rank=cores,
            seconds=3600 * int(hours) + 60 * int(minutes),
            warn_seconds=60 * int(job["-wt"]),
            account=job.get("-P"),
            queue=job.get("-q"),
        )
    else:
        return Request(
            name=None,
            nodes=nodes,
            ranks=ranks,
            gpus=gpus,
            cores_per_rank=cores,
            seconds=None,
            warn_seconds=None,
            account=None,
            queue=None,
        )
    if nodes > request.nodes:
        raise OptionError(f"the ranks take {nodes} nodes, and the job has {request.nodes}")
    if cores is not None and cores != request.cores_per_rank:
        raise OptionError(f"a rank takes {cores} cores, and the job has {request.cores_per_rank} for it")
    return request


def _of_launcher(launcher: str, step: Mapping[str, str]) -> tuple[int, int, int, int | None]:
    """Nodes, ranks, GPUs (0 where it does not say) and cores of a rank."""
    if launcher == "srun":
        ranks = int(step["--ntasks"])
        if ranks > int(step["--nodes"]) * int(step["--ntasks-per-node"]):
            raise OptionError("--ntasks is more than the nodes hold")
        gpus = ranks * int(step.get("--gpus-per-task", "0"))
        return int(step["--nodes"]), ranks, gpus, int(step["--cpus-per-task"])
    if launcher == "jsrun":
        sets, ranks = int(step["--nrs"]), int(step["--nrs"]) * int(step["--tasks_per_rs"])
        cores = int(step["--cpu_per_rs"]) // int(step["--tasks_per_rs"])
        if step["--bind"] != f"packed:{cores}":
            raise OptionError("--bind gives a rank other cores than its resource set has for it")
        return -(-sets // int(step["--rs_per_host"])), ranks, sets * int(step["--gpu_per_rs"]), cores
    ranks = int(step["-n" if launcher == "hydra" else "--np"])
    per_node = int(step["-ppn"] if launcher == "hydra" else step["--map-by"].split(":")[1])
    return -(-ranks // per_node), ranks, 0, None


def slurm_seconds(text: str) -> int:
    """Of days-hours:minutes:seconds, hours:minutes:seconds, minutes:seconds or minutes."""
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return 86400 * int(days) + 3600 * hours + 60 * minutes + seconds
    if len(parts) == 1:
        return 60 * parts[0]
    hours, minutes, seconds = parts if len(parts) == 3 else [0, *parts]
    return 3600 * hours + 60 * minutes + seconds
