"""A pool of MPI ranks that lives as long as the test session: tests send it functions, every rank answers."""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from axonn.launch import mpiexec_command, rank_environment

ROOT = Path(__file__).parent.parent


def _send(link: Connection, value: Any) -> None:
    # Connection.send would hand tensors over as shared memory of a process that may be gone.
    link.send_bytes(pickle.dumps(value))


def _receive(link: Connection) -> Any:
    return pickle.loads(link.recv_bytes())


class RankPool:
    """`size` ranks started by mpiexec. `run` calls a module-level function on the first `ranks` of them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._process: subprocess.Popen[bytes] | None = None
        self._links: list[Connection] = []

    def start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="axonn-pool-")
        address = str(Path(self._folder.name) / "socket")
        key = secrets.token_bytes(16)
        listener = Listener(address, "AF_UNIX", backlog=self.size, authkey=key)
        env = rank_environment(os.environ) | {"AXONN_POOL": address, "AXONN_POOL_KEY": key.hex()}
        command = mpiexec_command(self.size, [sys.executable, "-m", "tests.rank_pool"])
        self._process = subprocess.Popen(command, env=env, cwd=ROOT)
        links = {}
        for _ in range(self.size):
            link = listener.accept()
            links[_receive(link)] = link
        listener.close()
        self._links = [links[rank] for rank in range(self.size)]

    def run(self, function: Callable[..., Any], *args: Any, ranks: int, timeout_s: float = 120.0) -> list[Any]:
        """Results of `function(comm, *args)` by rank. Raises with the tracebacks of all ranks that failed."""
        if self._process is None:
            self.start()
        for link in self._links[:ranks]:
            _send(link, (function, args, ranks))
        results, errors = [], []
        for rank, link in enumerate(self._links[:ranks]):
            if not link.poll(5.0 if errors else timeout_s):
                errors.append(f"rank {rank} gave no answer")
                continue
            ok, value = _receive(link)
            (results if ok else errors).append(value if ok else f"rank {rank}:\n{value}")
        if errors:
            self.stop()  # The ranks that did not fail may be stuck; the next call starts anew.
            raise AssertionError("\n".join(errors))
        return results

    def stop(self) -> None:
        if self._process is None:
            return
        for link in self._links:
            with contextlib.suppress(OSError):
                _send(link, None)
            link.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()
        self._process = None
        self._folder.cleanup()


def main() -> None:
    import torch
    from mpi4py import MPI

    torch.set_num_threads(1)
    world = MPI.COMM_WORLD
    link = Client(os.environ["AXONN_POOL"], "AF_UNIX", authkey=bytes.fromhex(os.environ["AXONN_POOL_KEY"]))
    _send(link, world.Get_rank())
    while (job := _receive(link)) is not None:
        function, args, ranks = job
        try:
            comm = world.Create_group(world.Get_group().Incl(range(ranks)))
            result = function(comm, *args)
            comm.Free()
            _send(link, (True, result))
        except BaseException:
            _send(link, (False, traceback.format_exc()))


if __name__ == "__main__":
    # Jobs name functions of importable modules, this one included.
    from tests.rank_pool import main as _main

    _main()
