"""Where things lie. One rule: what one names is relative to where one stands, and what a command makes lies there.

Where one stands below a clone of the suite, results, figures and run folders of experiments are those of the clone,
as a repository is the same from each of its folders. The folder of the suite itself, `ROOT`, is only read from anywhere
else. The page is docs/configuration.md.
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
"""Where runs of `axonn train` lie, from where one stands."""
_CONFIGURATIONS = (".yaml", ".yml")


def project_of(place: Path) -> Path:
    """The clone of the suite that `place` lies in, otherwise `place` itself: under it are results/, plots/out/, runs/
    of experiments, and experiments/machines/local.yaml."""
    in_clone = (ROOT / "pyproject.toml").is_file() and place.resolve().is_relative_to(ROOT)
    return ROOT if in_clone else place


PROJECT = project_of(Path.cwd())


def from_here(path: Path) -> str:
    """A path for people: from where they stand, where it lies below."""
    here, absolute = Path.cwd(), _absolute(path)
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(path)


def in_project(path: Path) -> str:
    """A path for what is kept, which does not depend on where in the project one stands."""
    return str(path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path)


def described_file(folder: str, name: str) -> Path | None:
    """`experiments/FOLDER/NAME.yaml` of the project in which one stands, otherwise the suite's own; None where neither
    has it."""
    found = (place / "experiments" / folder / f"{name}.yaml" for place in (PROJECT, ROOT))
    return next((path for path in found if path.exists()), None)


def described_names(folder: str) -> list[str]:
    """What `described_file` finds, by name."""
    return sorted({p.stem for place in (PROJECT, ROOT) for p in (place / "experiments" / folder).glob("*.yaml")})


def run_folder(config_file: Path) -> Path:
    """Where the run of a configuration lies if nothing else is said: runs/NAME, NAME being its path from where one
    stands, without ending; of a file that does not lie below, its name alone."""
    here, absolute = Path.cwd(), _absolute(config_file)
    name = absolute.relative_to(here) if absolute.is_relative_to(here) else Path(absolute.name)
    return RUNS / name.with_suffix("")


def recorded(config_file: Path, folder: Path) -> str:
    """A configuration as `run.json` in `folder` names it: from there where both lie below where one stands, so that
    they may be moved together; otherwise by its whole path."""
    here, absolute = Path.cwd(), _absolute(config_file)
    below = absolute.is_relative_to(here) and _absolute(folder).is_relative_to(here)
    return os.path.relpath(absolute, _absolute(folder)) if below else str(absolute)


def check_owner(folder: Path, config_file: Path) -> None:
    """Raise `ConfigError` where a run folder holds the run of another configuration file."""
    try:
        named = read_json(folder / RUN_FILE)["sessions"][-1]["config_file"]
    except (OSError, ValueError, LookupError, TypeError):
        named = None  # No run yet, or one that does not say whose it is.
    owner = _absolute(folder / named) if isinstance(named, str) else None
    if owner is not None and owner != _absolute(config_file):
        raise ConfigError(
            f"{folder} holds the run of {from_here(owner)}, and not of {from_here(_absolute(config_file))}; choose "
            f"another folder with --out, or give --out {folder} to use it all the same"
        )


def find_run(named: Path | None) -> Path:
    """The folder of a run that is named, be it by its configuration file; by default the one below `RUNS` that was
    started last. Raises `RecordError` where there is none."""
    if named is not None:
        return run_folder(named) if named.suffix in _CONFIGURATIONS and named.is_file() else named
    runs = sorted(RUNS.rglob(RUN_FILE), key=lambda path: path.stat().st_mtime_ns)
    if not runs:
        raise RecordError(f"there is no run of axonn train below {_absolute(RUNS)}; name its folder")
    return runs[-1].parent


def _absolute(path: Path) -> Path:
    # As it was named: a link is not followed, since what it is called decides.
    return Path(os.path.abspath(path))
