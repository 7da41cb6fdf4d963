"""A pool of MPI ranks that lives as long as the test session: tests send it functions, every rank answers."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, wait
from pathlib import Path
from typing import Any

from axonn.distributed.launch import mpiexec_command, rank_environment
from axonn.training.supervision.session_folders import session_folders

ROOT = Path(__file__).parents[2]
_AFTER_ERROR_S = 3.0
"""How long the other ranks are waited for once one has failed: they may be stuck waiting for it."""


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
        """Start the ranks and wait until each has reported. Raises `AssertionError` when the launcher gives up."""
        self._folder = tempfile.TemporaryDirectory(prefix="axonn-pool-")
        address = str(Path(self._folder.name) / "socket")
        self._session = contextlib.ExitStack()
        session = self._session.enter_context(session_folders())
        env = rank_environment(os.environ) | session | {"AXONN_POOL": address}
        command = mpiexec_command(self.size, [sys.executable, "-m", "tests.helpers.rank_pool"])
        links = {}
        with socket.socket(socket.AF_UNIX) as server:
            # The folder is private to this user, so the socket needs no key.
            server.bind(address)
            server.listen(self.size)
            server.settimeout(1.0)
            self._process = subprocess.Popen(command, env=env, cwd=ROOT)
            while len(links) < self.size:
                try:
                    client, _ = server.accept()
                except TimeoutError:
                    if self._process.poll() is not None:
                        raise AssertionError(f"mpiexec ended with code {self._process.returncode}") from None
                    continue
                client.setblocking(True)
                link = Connection(client.detach())
                links[_receive(link)] = link
        self._links = [links[rank] for rank in range(self.size)]

    def run(self, function: Callable[..., Any], *args: Any, ranks: int, timeout_s: float = 120.0) -> list[Any]:
        """Results of `function(comm, *args)` by rank. Raises with the tracebacks of all ranks that failed."""
        if self._process is None:
            self.start()
        for link in self._links[:ranks]:
            _send(link, (function, args, ranks))
        rank_of = {link: rank for rank, link in enumerate(self._links[:ranks])}
        results: dict[int, Any] = {}
        errors: list[str] = []
        deadline = time.monotonic() + timeout_s
        while rank_of and (ready := wait(list(rank_of), max(0.0, deadline - time.monotonic()))):
            for link in ready:
                assert isinstance(link, Connection)
                rank = rank_of.pop(link)
                try:
                    ok, value = _receive(link)
                except (EOFError, OSError):
                    ok, value = False, "died"
                if ok:
                    results[rank] = value
                else:
                    errors.append(f"rank {rank}:\n{value}")
                    deadline = min(deadline, time.monotonic() + _AFTER_ERROR_S)
        errors += [f"rank {rank} gave no answer" for rank in rank_of.values()]
        if errors:
            self.stop(patience_s=0)  # The ranks that did not fail may be stuck; the next call starts anew.
            raise AssertionError("\n".join(errors))
        return [results[rank] for rank in range(ranks)]

    def stop(self, *, patience_s: float = 10.0) -> None:
        """End the ranks, after `patience_s` by force."""
        if self._process is None:
            return
        for link in self._links:
            with contextlib.suppress(OSError):
                _send(link, None)
            link.close()
        for end, seconds in ((lambda: None, patience_s), (self._process.terminate, 10.0), (self._process.kill, None)):
            end()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
                break
        self._process = None
        self._session.close()
        self._links = []
        self._folder.cleanup()


def main() -> None:
    import torch
    from mpi4py import MPI

    torch.set_num_threads(1)
    world = MPI.COMM_WORLD
    link = Client(os.environ["AXONN_POOL"], "AF_UNIX")
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
    from tests.helpers.rank_pool import main as _main

    _main()
