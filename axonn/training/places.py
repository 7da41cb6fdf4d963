"""Places of files: the suite's own, the user's project, run folders. The page on them is docs/configuration.md.

The rule: a path that the user names is relative to the working directory, and output goes there too. Inside of a clone
of the suite, results, figures and run folders of experiments are those of the clone, from each of its folders. From
anywhere else, the suite's own folder, `ROOT`, is only read.
"""

from __future__ import annotations

import os
from pathlib import Path

from axonn.durable_files import read_json
from axonn.errors import ConfigError, RecordError
from axonn.training.session_history import RUN_FILE

ROOT = Path(__file__).resolve().parents[2]
"""The folder of the suite's own files: a clone, or the site-packages that it is installed in."""
RUNS = Path("runs")
"""Folder of the runs of `axonn train`, relative to the working directory."""
_CONFIGURATIONS = (".yaml", ".yml")


def project_of(place: Path) -> Path:
    """Return the clone of the suite that `place` lies in, otherwise `place` itself. Under it are results/, plots/out/,
    runs/ of experiments, and experiments/machines/local.yaml."""
    in_clone = (ROOT / "pyproject.toml").is_file() and place.resolve().is_relative_to(ROOT)
    return ROOT if in_clone else place


PROJECT = project_of(Path.cwd())


def from_here(path: Path) -> str:
    """Return a path for messages: relative to the working directory if it lies below, else as it is."""
    working, absolute = Path.cwd(), _absolute(path)
    return str(absolute.relative_to(working)) if absolute.is_relative_to(working) else str(path)


def in_project(path: Path) -> str:
    """Return a path for records: relative to the project, and so independent of the working directory inside of it."""
    return str(path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path)


def described_file(folder: str, name: str) -> Path | None:
    """Return `experiments/FOLDER/NAME.yaml` of the user's project, otherwise the suite's own; None where neither has
    it."""
    candidates = (place / "experiments" / folder / f"{name}.yaml" for place in (PROJECT, ROOT))
    return next((path for path in candidates if path.exists()), None)


def described_names(folder: str) -> list[str]:
    """Return the names that `described_file` finds, sorted."""
    return sorted({p.stem for place in (PROJECT, ROOT) for p in (place / "experiments" / folder).glob("*.yaml")})


def run_folder(config_file: Path) -> Path:
    """Return the default run folder of a configuration file: runs/NAME, where NAME is its path without suffix relative
    to the working directory, or its file name alone if it does not lie below."""
    working, absolute = Path.cwd(), _absolute(config_file)
    name = absolute.relative_to(working) if absolute.is_relative_to(working) else Path(absolute.name)
    return RUNS / name.with_suffix("")


def recorded(config_file: Path, folder: Path) -> str:
    """Return the path by which `run.json` in `folder` names a configuration file: relative to `folder` if both lie
    below the working directory, so that they may be moved together; otherwise absolute."""
    working, absolute = Path.cwd(), _absolute(config_file)
    below = absolute.is_relative_to(working) and _absolute(folder).is_relative_to(working)
    return os.path.relpath(absolute, _absolute(folder)) if below else str(absolute)


def check_owner(folder: Path, config_file: Path) -> None:
    """Raise `ConfigError` if a run folder holds the run of another configuration file."""
    try:
        named = read_json(folder / RUN_FILE)["sessions"][-1]["config_file"]
    except (OSError, ValueError, LookupError, TypeError):
        named = None  # No run yet, or one that does not name its configuration.
    owner = _absolute(folder / named) if isinstance(named, str) else None
    if owner is not None and owner != _absolute(config_file):
        raise ConfigError(
            f"{folder} holds the run of {from_here(owner)}, and not of {from_here(_absolute(config_file))}; choose "
            f"another folder with --out, or give --out {folder} to use it all the same"
        )


def find_run(named: Path | None) -> Path:
    """Return the run folder that is named, directly or by its configuration file; by default the run below `RUNS` that
    was started last. Raises `RecordError` where there is none."""
    if named is not None:
        return run_folder(named) if named.suffix in _CONFIGURATIONS and named.is_file() else named
    runs = sorted(RUNS.rglob(RUN_FILE), key=lambda path: path.stat().st_mtime_ns)
    if not runs:
        raise RecordError(f"there is no run of axonn train below {_absolute(RUNS)}; name its folder")
    return runs[-1].parent


def _absolute(path: Path) -> Path:
    # Links are not followed: the name that the user gave decides.
    return Path(os.path.abspath(path))
