"""Temporary folders of one run's launcher and MPI library, so that leftovers of a killed run can be removed.

Open MPI removes its session folder and its segments of shared memory when it ends by itself; a launcher that is killed
leaves them in the system's folders, under names that do not tell to which run they belonged.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from axonn.durable_files import LOCK, locked
from axonn.errors import LaunchError
from axonn.training.run_folder import SESSION, runs

_PREFIX = "axonn-run-"
SHARED_MEMORY = Path("/dev/shm")
_VARIABLES: Mapping[str, str] = {
    "PRTE_MCA_prte_tmpdir_base": "temporary",
    "OMPI_MCA_btl_sm_backing_directory": "shared",
}
"""Environment variables for the folder of Open MPI's session, and for that of messages between ranks of a node."""


@contextmanager
def session_folders() -> Iterator[dict[str, str]]:
    """Create the folders of one run and remove them at its end; yield the environment that leads its ranks there.

    A variable that the user has set stays. Folders that killed commands left are removed before. The ranks remove
    the folders themselves if the command that started them is killed (`axonn.training.run_folder`).
    """
    roots = {"temporary": Path(tempfile.gettempdir()), "shared": SHARED_MEMORY}
    wanted = {
        variable: roots[kind]
        for variable, kind in _VARIABLES.items()
        if variable not in os.environ and os.access(roots[kind], os.W_OK)
    }
    for root in set(wanted.values()):
        remove_stale(root)
    with ExitStack() as cleanup:
        made = {variable: cleanup.enter_context(_folder(root)) for variable, root in wanted.items()}
        yield {**{variable: str(folder) for variable, folder in made.items()}, SESSION: _joined(made.values())}


@contextmanager
def _folder(root: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=root))
    try:
        with locked(folder / LOCK, f"{folder} is in use"):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_stale(root: Path) -> None:
    """Remove the folders under `root` of this user's runs that have ended: the process that created them is gone, and
    with it its lock."""
    for folder in root.glob(f"{_PREFIX}*-*"):
        try:
            status = folder.lstat()
            process = int(folder.name.removeprefix(_PREFIX).partition("-")[0])
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or runs(process):
                continue
            with locked(folder / LOCK, "in use"):
                shutil.rmtree(folder, ignore_errors=True)
        except (OSError, ValueError, LaunchError):
            continue


def _joined(folders: Iterable[Path]) -> str:
    return os.pathsep.join(map(str, folders))
