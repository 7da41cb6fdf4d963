"""Causes of failure in the output of a run on a cluster, whatever framework printed it.

The patterns are those of PyTorch 1.4 to 2.6, its launchers, Slurm, LSF with jsrun, and Open MPI 4 and 5, as found in
public logs and in the programs' sources.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from axonn.observability.records import Failure

Cause = Literal["out-of-memory", "timeout", "nan", "dead-rank", "error", "interrupted"]

_ESCAPE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\^_])")
_PREFIX = re.compile(
    r"""\s*(?:
      \[rank(?P<torch>\d+)\]:[ ]?                    # PyTorch from 2.2, when a rank raises
    | \[[a-z]+\d+\]:                                 # torchrun --tee: [default7]: is local rank 7
    | \[(?:[\w.@-]+@)?\d+,(?P<mpi>\d+)\]<\w+>:?[ ]?  # Open MPI: --tag-output
    | (?P<task>\d+):[ ]                              # srun --label, where every rank is a task
    | (?!slurm)[a-z][a-z.-]*\d[\w.-]*:[ ]            # pdsh: host names that have a number
    )""",
    re.VERBOSE,
)
_DETAIL = 400
"""Characters of a line that a failure keeps."""


@dataclass(frozen=True)
class LogLine:
    """One printed line: its text and the information in its prefixes."""

    text: str
    rank: int | None = None
    """Rank in the whole job, where a prefix names it."""
    prefix: str = ""
    """All prefixes, which distinguish the lines of several ranks."""


def split(line: str) -> LogLine:
    """Strip colours, carriage returns and the prefixes of launchers from a line."""
    text = _ESCAPE.sub("", line).rstrip("\r\n")
    text = text.rpartition("\r")[2]
    rank, prefix = None, ""
    while (match := _PREFIX.match(text)) is not None:
        named = next((value for value in match.groupdict().values() if value is not None), None)
        rank = int(named) if named is not None else rank
        prefix += match[0]
        text = text[match.end() :]
    return LogLine(text.rstrip(), rank, prefix.strip())


def clean(line: str) -> str:
    """Return the text of a line alone; of texts that a carriage return overwrote only the last."""
    return split(line).text


def lines_of(lines: Iterable[str]) -> Iterator[LogLine]:
    """Yield every line that is not empty; text that a carriage return ended counts as a line."""
    for printed in lines:
        for part in printed.splitlines():
            if (line := split(part)).text:
                yield line


class _Weight(IntEnum):
    """Distance of a notice from the cause of failure; the first notice of the lowest weight is taken for the cause."""

    CAUSE = 0
    """A cause that follows from nothing else."""
    EVENT = 1
    """An exception, or a limit of the scheduler: the first of several counts."""
    KILLED = 2
    """A process that ended without saying why."""
    WAITED = 3
    """A rank that waited in vain for another."""
    CONSEQUENCE = 4
    """A broken connection, or an exit code that says only that something went wrong."""
    TOLD = 5
    """A request to end, as all ranks get once one has failed."""
    SUMMARY = 6
    """A statement that some rank failed."""


@dataclass(frozen=True)
class _Notice:
    weight: _Weight
    cause: Cause
    detail: str
    rank: int | None


_TEXTS: list[tuple[str, _Weight, Cause]] = [
    (r"CUDA out of memory|HIP out of memory", _Weight.CAUSE, "out-of-memory"),
    (r"CUDA error: out of memory|cudaErrorMemoryAllocation", _Weight.CAUSE, "out-of-memory"),
    (r"CUBLAS_STATUS_ALLOC_FAILED", _Weight.CAUSE, "out-of-memory"),
    (r"DefaultCPUAllocator: (can't|not enough)|Cannot allocate memory", _Weight.CAUSE, "out-of-memory"),
    # Slurm.
    (r"[Dd]etected \d+ oom[-_ ]kill event", _Weight.CAUSE, "out-of-memory"),
    (r"^srun: error: .*: tasks? .*: Out Of Memory", _Weight.CAUSE, "out-of-memory"),
    # LSF.
    (r"^TERM_MEMLIMIT", _Weight.CAUSE, "out-of-memory"),
    # Megatron-LM from core 0.4 on, and DeepSpeed when halving the loss scale did not help.
    (r"found (NaN|Inf) in local (forward loss|grad)", _Weight.CAUSE, "nan"),
    (r"Unexpected result (nan|-?inf)\b", _Weight.CAUSE, "nan"),
    (r"loss scale already at minimum", _Weight.CAUSE, "nan"),
    (r"\b[Ll]oss( of batch \d+)? ?(is|became|=|==|:) ?\(?(nan|NaN|NAN|-?inf)\b", _Weight.CAUSE, "nan"),
    (r"^(slurmstepd|srun|slurmd).*DUE TO TIME LIMIT", _Weight.EVENT, "timeout"),
    (r"^TERM_RUNLIMIT", _Weight.EVENT, "timeout"),
    (r"^(slurmstepd|srun|slurmd).*DUE TO NODE FAILURE|^srun: error: Node failure on", _Weight.EVENT, "dead-rank"),
    (r"^(slurmstepd|srun|slurmd).*DUE TO (PREEMPTION|JOB REQUEUE)", _Weight.EVENT, "interrupted"),
    (r"^TERM_(OWNER|ADMIN|PREEMPT)", _Weight.EVENT, "interrupted"),
    (r"^srun: error: .*: tasks? .*: (Killed|Segmentation fault|Bus error)", _Weight.KILLED, "dead-rank"),
    (r"\bline \d+:\s+\d+ (Killed|Segmentation fault|Bus error)", _Weight.KILLED, "dead-rank"),
    (r"^[Kk]illed$|^Segmentation fault( \(core dumped\))?$", _Weight.KILLED, "dead-rank"),
    (r"Watchdog caught collective operation timeout", _Weight.WAITED, "timeout"),
    (r"NCCL (communicator was aborted|watchdog thread terminated)", _Weight.CONSEQUENCE, "error"),
    (r"^srun: error: .*: tasks? .*: Exited with exit code \d+", _Weight.CONSEQUENCE, "error"),
    (r"^srun: error: .*: tasks? .*: Aborted", _Weight.CONSEQUENCE, "dead-rank"),
    (r"^MPI_ABORT was invoked on rank \d+", _Weight.CONSEQUENCE, "error"),
    (r"^(slurmstepd|srun).*\*\*\* (STEP|JOB) .*CANCELLED AT (?!.*DUE TO)", _Weight.TOLD, "interrupted"),
    (r"^srun: error: .*: tasks? .*: (Terminated|Interrupt)", _Weight.TOLD, "interrupted"),
    (r"Main process received SIG(TERM|INT)", _Weight.TOLD, "interrupted"),
    (r"^ *\[exiting program after receiving SIGTERM", _Weight.TOLD, "interrupted"),
    # Megatron-DeepSpeed with --kill-switch-file.
    (r"^ *\[Detected kill switch at ", _Weight.TOLD, "interrupted"),
]
_NOTICES = [(re.compile(pattern), weight, cause) for pattern, weight, cause in _TEXTS]

_NAMED_RANK = re.compile(
    r"^srun: error: .*: task (?P<task>\d+): "
    r"|^MPI_ABORT was invoked on rank (?P<abort>\d+)"
    r"|\b[Rr]ank (?P<megatron>\d+)(?:: found|, node .*: Unexpected)"
    r"|Unexpected result \S+ on rank (?P<rerun>\d+)"
)

_EXITS: list[re.Pattern[str]] = [
    re.compile(pattern)
    for pattern in [
        # torchrun, then DeepSpeed's launcher, jsrun, LSF, and Python of a process that it started.
        r"failed \(exitcode: (?P<code>-?\d+)\) local_rank: \d+",
        r"exits with return code = (?P<code>-?\d+)",
        r"^ERROR:\s+One or more process( \(first noticed rank (?P<rank>\d+)\))? terminated with signal (?P<signal>\d+)",
        r"^Exited by signal (?P<signal>\d+)",
        r"^Exited with exit code (?P<code>\d+)",
        r"CalledProcessError: .*died with <Signals\.\w+: (?P<signal>\d+)>",
        r"CalledProcessError: .*returned non-zero exit status (?P<code>\d+)",
        # Open MPI: the notice is folded, and `_folded` unfolds it.
        r"noticed that process rank (?P<rank>\d+) with PID \d+.* exited on signal (?P<signal>\d+)",
        r"noticed that process rank (?P<rank>\d+) with PID \d+.* exited with (?:exit )?code (?P<code>\d+)",
    ]
]

_EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*(?P<name>[A-Z_]\w*)(?:: (?P<text>.*)|:?$)")
_BROKEN = re.compile(
    r"DistBackendError|CalledProcessError|DistNetworkError|NCCL error|ncclRemoteError|Broken pipe"
    r"|Connection (closed by peer|reset by peer|refused)|[Ss]ocket (closed|timeout)|remote process exited"
)
_TOLD = re.compile(r"^(?:[\w.]*\.)?(SignalException|KeyboardInterrupt)\b")


def failure_of(lines: Iterable[str]) -> Failure | None:
    """Return the first cause of failure that the lines name; None where they name none.

    A cause is preferred to its consequences, wherever they stand: a rank out of memory to the others' timeouts, an
    exception to the exit codes that it leads to. `rank` is that of the line that names the cause.
    """
    notices = list(_notices(list(lines_of(lines))))
    if not notices:
        return None
    first = min(notices, key=lambda notice: notice.weight)
    return Failure(cause=first.cause, detail=first.detail[:_DETAIL], rank=first.rank)


def _notices(lines: list[LogLine]) -> Iterator[_Notice]:
    raising: set[str] = set()
    """Prefixes of the lines that are within a traceback."""
    summary = _Summary()
    for number, line in enumerate(lines):
        text = line.text
        if text.startswith("Traceback (most recent call last)"):
            raising.add(line.prefix)
            continue
        if (root := summary.feed(text)) is not None:
            yield root
            continue
        if (known := _known(line)) is not None:
            raising.discard(line.prefix)
            yield known
            continue
        if (ended := _exit(_folded(lines, number), line.rank)) is not None:
            raising.discard(line.prefix)
            yield ended
        elif line.prefix in raising and _EXCEPTION.match(text):
            raising.discard(line.prefix)
            yield _exception(line)


def _known(line: LogLine) -> _Notice | None:
    for pattern, weight, cause in _NOTICES:
        if pattern.search(line.text):
            match = _NAMED_RANK.search(line.text)
            named = next((v for v in match.groupdict().values() if v is not None), None) if match else None
            return _Notice(weight, cause, line.text, int(named) if named is not None else line.rank)
    return None


def _exception(line: LogLine) -> _Notice:
    """Return the notice in the last line of a traceback."""
    if line.text.startswith(("MemoryError", "numpy.core._exceptions._ArrayMemoryError")):
        return _Notice(_Weight.CAUSE, "out-of-memory", line.text, line.rank)
    if line.text.startswith(("FloatingPointError", "NotFiniteError")):
        return _Notice(_Weight.CAUSE, "nan", line.text, line.rank)
    if _TOLD.match(line.text):
        return _Notice(_Weight.TOLD, "interrupted", line.text, line.rank)
    if "ChildFailedError" in line.text:
        return _Notice(_Weight.SUMMARY, "error", line.text, line.rank)
    weight = _Weight.CONSEQUENCE if _BROKEN.search(line.text) else _Weight.EVENT
    return _Notice(weight, "error", line.text, line.rank)


def _folded(lines: list[LogLine], number: int) -> str:
    """Return a line, joined with the next one where Open MPI has folded its notice."""
    text = lines[number].text
    if " noticed that process rank " in text and number + 1 < len(lines):
        return f"{text} {lines[number + 1].text}"
    return text


def _exit(text: str, rank: int | None) -> _Notice | None:
    for pattern in _EXITS:
        if (match := pattern.search(text)) is not None:
            named = match.groupdict()
            if named.get("rank") is not None:
                rank = int(named["rank"])
            code = -int(named["signal"]) if named.get("signal") is not None else int(named["code"])
            return _ended(code, text, rank)
    return None


def _ended(code: int, text: str, rank: int | None) -> _Notice | None:
    """Return the notice of a process that ended with `code`, negative for a signal; None where that is no failure."""
    if code == 0:
        return None
    # A shell reports a signal as 128 and its number.
    number = -code if code < 0 else code - 128
    if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        # Schedulers warn of a limit with the last two.
        return _Notice(_Weight.TOLD, "interrupted", text, rank)
    if number == signal.SIGABRT:
        # Also how the NCCL watchdog ends its process.
        return _Notice(_Weight.CONSEQUENCE, "dead-rank", text, rank)
    if number == signal.SIGKILL:
        hint = "; the system kills a process like this when memory runs out"
        return _Notice(_Weight.KILLED, "dead-rank", text[: _DETAIL - len(hint)] + hint, rank)
    if number in signal.valid_signals():
        return _Notice(_Weight.KILLED, "dead-rank", text, rank)
    return _Notice(_Weight.CONSEQUENCE, "error", text, rank)


class _Summary:
    """Parser of the block that torchrun prints at the end, from its line "Root Cause" on."""

    def __init__(self) -> None:
        self._open = False
        self._rank: int | None = None

    def feed(self, text: str) -> _Notice | None:
        """Take the next line; return the notice once the block has named rank and exit code of the first failure."""
        if text.startswith("Root Cause (first observed failure):"):
            self._open, self._rank = True, None
        elif self._open and (match := re.match(r"\s*rank\s+: (\d+)", text)) is not None:
            self._rank = int(match[1])
        elif self._open and (match := re.match(r"\s*exitcode\s+: (-?\d+)", text)) is not None:
            self._open = False
            return _ended(int(match[1]), f"torchrun: rank {self._rank} failed first ({text.strip()})", self._rank)
        return None
