"""Checkpoints: folders `step-00000120` that a run on any grid can resume from, whichever grid wrote them.

Tensors are stored in safetensors files (`axonn.checkpoint.sharded_files`) under names that are global over the job,
independent of how they were sharded: data that replicas share is written once, and each rank reads only what it needs.
`state.json` beside them holds everything else, and the checksums. None of it is executable, so loading an untrusted
checkpoint runs no code of its author.

A checkpoint is written under a hidden name and renamed once all of it is on disk, so a crash at any moment leaves the
previous one intact.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field, ValidationError

from axonn.checkpoint.local_shard import LocalShard, compare_shapes
from axonn.checkpoint.rank_group import RankGroup
from axonn.checkpoint.sharded_files import INDEX, FileName, read_shards, stored_tensors, write_shards
from axonn.config.train_config import StrictModel
from axonn.durable_files import reason_of, regular_file, sync, write_durably
from axonn.errors import CheckpointError, ConfigError

SCHEMA = "axonn-checkpoint/2"
_STATE = "state.json"
_READERS = 8


class StoredFile(StrictModel):
    """Expected size and checksum of one file of a checkpoint."""

    bytes: int
    crc32: int


class CheckpointState(StrictModel):
    """State of a training run, except its tensors.

    All randomness is counter-based, so `seed` and `batches` are the state of every random generator, and `batches` the
    position in the data.
    """

    schema_: Literal["axonn-checkpoint/2"] = Field(default="axonn-checkpoint/2", alias="schema")
    batches: int = Field(ge=0)
    """Batches trained on so far."""
    samples: int = Field(ge=0)
    """Samples trained on so far."""
    seed: int
    progress: dict[str, Any]
    """State of the engine: optimizer updates, loss scale and the like."""
    config: dict[str, Any]
    grid: dict[str, int]
    """Extents of the grid that wrote the checkpoint."""
    data_digest: str | None = None
    versions: dict[str, str] = {}
    created: str | None = None
    files: dict[FileName, StoredFile] = {}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    state: CheckpointState


def checkpoint_name(batches: int) -> str:
    """Return the name of the folder of the checkpoint taken after `batches` batches."""
    return f"step-{batches:08d}"


def save(
    folder: Path | str,
    *,
    tensors: Mapping[str, LocalShard],
    state: CheckpointState,
    keep: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint of all ranks of `group` into `folder`, remove all but the `keep` newest, return its folder.

    `tensors`: this rank's shards by global name; where shards of several ranks overlap, they hold equal values.
    Collective. Raises `CheckpointError` when it cannot be written, naming the tensors of which the ranks together hold
    only a part.
    """
    folder = Path(folder)
    ranks = RankGroup(group)
    final = folder / checkpoint_name(state.batches)
    temporary = folder / f".{final.name}.writing"
    ranks.agree(lambda: _make_empty(temporary), f"{folder}: cannot be written")
    try:
        written = write_shards(temporary, tensors, ranks)
    except CheckpointError:
        _discard(temporary, ranks)
        raise
    described = ranks.gather(_describe_all(temporary, written))
    files = {name: file for of_rank in described for name, file in of_rank.items()}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    complete = state.model_copy(update={"files": files, "created": created, "versions": _versions() | state.versions})

    def finish() -> None:
        write_durably(temporary / _STATE, complete.model_dump_json(by_alias=True, indent=1) + "\n")
        sync(temporary)
        if final.exists():
            _remove(final)  # It is damaged: nothing could be loaded from it.
        temporary.rename(final)
        sync(folder)
        if keep is not None:
            _prune(folder, state.batches, keep)

    try:
        ranks.agree(finish, f"{folder}: the checkpoint cannot be written")
    except CheckpointError:
        _discard(temporary, ranks)
        raise
    return final


def load(
    checkpoint: Path | str, tensors: Mapping[str, LocalShard], *, group: dist.ProcessGroup | None = None
) -> CheckpointState:
    """Fill this rank's shards from a checkpoint, converting to their types. Collective over `group`.

    Raises `ConfigError` naming the tensors when the ranks' names or global shapes differ from those of the checkpoint,
    and `CheckpointError` when it cannot be read. Call `verify` first: otherwise damage may show only after some tensors
    have been overwritten.
    """
    checkpoint = Path(checkpoint)
    ranks = RankGroup(group)
    state = read_state(checkpoint)
    stored = {name: tuple(tensor.shape) for name, tensor in stored_tensors(checkpoint).items()}
    differences = compare_shapes(stored, ranks.shapes(tensors), have="the checkpoint", want="the model")
    if differences:
        raise ConfigError(f"{checkpoint}: is of another model: {differences}")
    read_shards(checkpoint, tensors, ranks)
    return state


def load_whole(checkpoint: Path | str, prefix: str) -> dict[str, torch.Tensor]:
    """Return the full tensors whose names begin with `prefix`, in host memory. Not collective.

    Raises `CheckpointError` when the checkpoint cannot be read.
    """
    targets = {
        n: torch.empty_like(t, device="cpu") for n, t in stored_tensors(checkpoint).items() if n.startswith(prefix)
    }
    read_shards(checkpoint, {name: LocalShard.whole(tensor) for name, tensor in targets.items()}, None)
    return targets


def latest(
    folder: Path | str, *, warn: Callable[[str], None] = lambda message: None, read_all: bool = True
) -> Checkpoint | None:
    """Return the newest intact checkpoint in `folder`, or None. Calls `warn` for each damaged one that it skips.

    Without `read_all` only `state.json` is read, and damage elsewhere goes unnoticed. Raises `ConfigError` for a
    checkpoint that another version of the suite wrote.
    """
    for path in sorted(_checkpoints(folder), reverse=True):
        try:
            return Checkpoint(folder=path, state=verify(path) if read_all else read_state(path))
        except CheckpointError as error:
            warn(f"{error}; it is skipped")
    return None


def verify(checkpoint: Path | str) -> CheckpointState:
    """Compare every file with its checksum and return the state. Raises `CheckpointError` naming the damaged files."""
    checkpoint = Path(checkpoint)
    state = read_state(checkpoint)

    def problem(name: str) -> str | None:
        try:
            actual = _describe(checkpoint / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        wanted = state.files[name]
        if actual.bytes != wanted.bytes:
            return f"{name} has {actual.bytes} bytes instead of {wanted.bytes}"
        return None if actual == wanted else f"{name} has another checksum than when it was written"

    with ThreadPoolExecutor(_READERS) as readers:
        problems = [p for p in readers.map(problem, state.files) if p is not None]
    if INDEX not in state.files:
        problems.append(f"{INDEX} has no checksum")
    if problems:
        raise CheckpointError(f"{checkpoint}: is damaged: {'; '.join(problems)}")
    return state


def read_state(checkpoint: Path | str) -> CheckpointState:
    """Read `state.json` of a checkpoint. Raises `CheckpointError`, or `ConfigError` when another version wrote it."""
    path = Path(checkpoint) / _STATE
    try:
        text = regular_file(path).read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint}: is not a complete checkpoint: {reason_of(error)}") from error
    schema = str(content.get("schema") if isinstance(content, dict) else None)
    family, _, version = schema.partition("/")
    if f"{family}/" == SCHEMA[:-1] and version.isdecimal() and schema != SCHEMA:
        older = int(version) < int(SCHEMA.partition("/")[2])
        do = "go on with the version that wrote it, or start anew with --fresh" if older else "use a newer version"
        raise ConfigError(f"{checkpoint}: has schema '{schema}', but this version reads '{SCHEMA}'; {do}")
    try:
        return CheckpointState.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        raise CheckpointError(f"{checkpoint}: is damaged: {_STATE}: '{place}': {first['msg']}") from error


def clean(folder: Path | str) -> None:
    """Remove the remains of checkpoints whose writing or removal a crash cut short. No process may be writing now."""
    for path in Path(folder).glob(".step-*"):
        shutil.rmtree(path)


def remove_all(folder: Path | str) -> None:
    """Remove every checkpoint in `folder`, and nothing else."""
    clean(folder)
    for path in _checkpoints(folder):
        _remove(path)


def _checkpoints(folder: Path | str) -> list[Path]:
    return [p for p in Path(folder).glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdecimal()]


def _prune(folder: Path, newest: int, keep: int) -> None:
    # Checkpoints after `newest` were skipped as damaged and do not count.
    intact = sorted(p for p in _checkpoints(folder) if p.name <= checkpoint_name(newest))
    for path in intact[:-keep]:
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a crash leaves either all of it or nothing that looks like one."""
    hidden = path.with_name(f".{path.name}.removed")
    if hidden.exists():
        shutil.rmtree(hidden)
    path.rename(hidden)
    shutil.rmtree(hidden)


def _discard(temporary: Path, ranks: RankGroup) -> None:
    """Free the space of a checkpoint that could not be finished; any remains are removed at the next start."""
    if ranks.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _describe_all(folder: Path, names: Iterable[str]) -> dict[str, StoredFile]:
    return {name: _describe(folder / name) for name in names}


def _describe(path: Path) -> StoredFile:
    size = checksum = 0
    with open(regular_file(path), "rb") as file:
        while block := file.read(1 << 22):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return StoredFile(bytes=size, crc32=checksum)


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__}
