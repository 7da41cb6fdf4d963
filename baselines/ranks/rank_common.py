"""Training loop and work of the scripts on the ranks of other frameworks: torch and safetensors alone, nothing of the
suite.

A script sets up its framework and calls `main`. The run folder holds `spec.json` and the work; the ranks leave in it
what every run leaves (`axonn.training.run_folder` and `axonn.observability.rank_usage`, loaded by their paths).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch._C._distributed_c10d import FileStore

Train = Callable[[int], float]
"""Function that trains batch number `step` and returns the mean loss of the whole batch, on every rank."""


def _suite_module(package: str, name: str) -> ModuleType:
    """Return a module of the suite that needs the standard library alone, found by its path: a framework must not see
    anything else of the suite, since one of them has the import name of the suite's own engine."""
    alias = f"suite_{package}"
    if alias not in sys.modules:
        folder = Path(__file__).parents[2] / "axonn" / package
        spec = importlib.util.spec_from_file_location(
            alias, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules[alias] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[alias])
    return importlib.import_module(f"{alias}.{name}")


def _first_number(*names: str, otherwise: int) -> int:
    """Return the number in the first of these variables that is set: mpiexec sets the first, job scripts the others."""
    return next((int(os.environ[name]) for name in names if name in os.environ), otherwise)


class RankWork:
    """The work of this rank.

    `model` and `optimizer` have the keys of the configuration as attributes; `grid` is a mapping of extents.
    """

    def __init__(self, folder: Path, strategy: str) -> None:
        spec = json.loads((folder / "spec.json").read_text())
        config = spec["config"]
        self.folder = folder
        self.strategy = strategy
        self.rank = _first_number("OMPI_COMM_WORLD_RANK", "RANK", otherwise=0)
        self.local_rank = _first_number("OMPI_COMM_WORLD_LOCAL_RANK", "LOCAL_RANK", otherwise=0)
        self.ranks: int = spec["ranks"]
        self.turns: bool = spec["turns"]
        self.model = SimpleNamespace(**config["model"])
        self.optimizer = SimpleNamespace(**config["optimizer"])
        self.grid: dict[str, int] = config["grid"]
        self.batch_size: int = config["batch_size"]
        self.microbatch_size: int = config["microbatch_size"]
        self.steps: int = config["steps"]
        self.seed: int = config["seed"]
        self.config: dict[str, Any] = config
        self.dtype: torch.dtype = getattr(torch, config["precision"]["compute"])
        self.device = torch.device("cuda", self.local_rank) if spec["device"] == "cuda" else torch.device("cpu")

    @property
    def adamw(self) -> dict[str, Any]:
        """The configured AdamW as arguments of `torch.optim.AdamW`."""
        o = self.optimizer
        return {"lr": o.lr, "betas": tuple(o.betas), "eps": o.eps, "weight_decay": o.weight_decay}

    @cached_property
    def written(self) -> bool:
        """True if weights and batches are given; otherwise, as on a cluster, weights are the framework's, tokens
        random."""
        return self._path.exists()

    @property
    def _path(self) -> Path:
        return self.folder / "work.safetensors"

    @cached_property
    def _batches(self) -> Any:
        return safe_open(self._path, framework="pt")

    def weights(self, *layers: str) -> dict[str, torch.Tensor]:
        """Return unsharded initial weights by "<layer>.<parameter>": those of these layers, or all of them."""
        # Reopened, and copied: while the file is mapped, the parts that were read count as this rank's memory.
        with safe_open(self._path, framework="pt") as file:
            names = [name for name in file.keys() if "." in name]  # noqa: SIM118
            wanted = [name for name in names if not layers or name.partition(".")[0] in layers]
            return {name: file.get_tensor(name).clone() for name in wanted}

    def batch(self, step: int, replica: int = 0, replicas: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets [batch_size / replicas, seq_len] of one data-parallel replica."""
        rows = self.batch_size // replicas
        shard = slice(replica * rows, (replica + 1) * rows)
        if self.written:
            inputs, targets = (self._batches.get_slice(name)[step, shard] for name in ("inputs", "targets"))
        else:
            generator = torch.Generator().manual_seed(self.seed + step)
            shape = (self.batch_size, self.model.seq_len + 1)
            tokens = torch.randint(self.model.vocab, shape, generator=generator)[shard]
            inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        return inputs.to(self.device), targets.to(self.device)


def connect(work: RankWork) -> None:
    """Make the default process group, and set the variables in which frameworks look for it."""
    os.environ.update(RANK=str(work.rank), WORLD_SIZE=str(work.ranks), LOCAL_RANK=str(work.local_rank))
    if _first_number("OMPI_COMM_WORLD_LOCAL_SIZE", "LOCAL_WORLD_SIZE", otherwise=1) == work.ranks:
        # On one node, also where the host's own name does not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = FileStore(str(work.folder / "store"), work.ranks)
    backend = "gloo"
    if work.device.type == "cuda":
        torch.cuda.set_device(work.device)
        # Gloo for what stays on the host.
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=work.rank, world_size=work.ranks)


def barrier(work: RankWork) -> None:
    """Wait for every rank, and for what this one's device still does."""
    if work.device.type == "cuda":
        torch.cuda.synchronize(work.device)
    dist.all_reduce(torch.zeros(1))


def mean_over_ranks(loss: float) -> float:
    """Return the mean of all ranks' losses, on every rank."""
    value = torch.tensor([loss], dtype=torch.float64)
    dist.all_reduce(value)
    return float(value) / dist.get_world_size()


def _loop(work: RankWork, train: Train, run_folder: ModuleType) -> None:
    turns = run_folder.Turns(work.folder, work.rank) if work.turns else None
    batches = open(work.folder / "batches.jsonl", "a", buffering=1) if work.rank == 0 else None  # noqa: SIM115
    usage = _suite_module("observability", "rank_usage").UsageLog(work.folder, work.rank)
    barrier(work)
    usage.begin()
    before = time.perf_counter()
    for step in range(work.steps):
        if turns is not None:
            if not turns.wait():
                break
            barrier(work)
            usage.begin()
            before = time.perf_counter()
        loss = train(step)
        if turns is not None:
            barrier(work)
        now = time.perf_counter()
        if batches is not None:
            batches.write(json.dumps({"step": step, "loss": loss, "seconds": now - before}) + "\n")
        usage.note(step)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of batch {step} is {loss}; lower optimizer.lr")
        before = now
        if turns is not None:
            turns.finish()


def main(set_up: Callable[[RankWork], Train], leave: Callable[[], None] = lambda: None) -> None:
    """Run on this rank what `set_up` returns, batch after batch: python SCRIPT RUN_FOLDER STRATEGY.

    `leave` is called at the end of a run that has not failed.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    run_folder = _suite_module("training", "run_folder")
    work = RankWork(Path(sys.argv[1]), sys.argv[2])

    def train() -> None:
        connect(work)
        try:
            _loop(work, set_up(work), run_folder)
            barrier(work)
        finally:
            dist.destroy_process_group()
        leave()
        # Linux counts resident memory in KiB.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if work.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(work.device)
        run_folder.set_state(work.folder, work.rank, "done", memory_bytes=peak)

    run_folder.run_with_heartbeat(work.folder, work.rank, train)
    sys.stdout.flush()
    # Libraries with threads of their own have been seen to abort at exit, after all work was done.
    os._exit(0)
