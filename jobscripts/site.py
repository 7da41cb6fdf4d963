"""A user's settings for a cluster, in one short file: account, queue, modules, paths.

Everything has a default but what the machine needs (`jobscripts.system.System.needs`): that is requested by name.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator

from axonn.config.train_config import StrictModel, load_yaml
from axonn.errors import ConfigError

_NAMED = r"\$[A-Za-z_][A-Za-z0-9_]*"
_DOLLAR = re.compile(rf"({_NAMED}|\$\{{[A-Za-z_][A-Za-z0-9_]*(?::?[-+](?:[^{{}}$`]|{_NAMED})*)?\}})|\$")
"""A variable of the shell ($NAME, ${NAME}, ${NAME:-else}), or a $ that begins anything else."""
_TIME = re.compile(r"(\d+):([0-5]\d)(?::([0-5]\d))?")


def _checked_option(text: str) -> str:
    if not (text.startswith("-") and text.isprintable()):
        raise ValueError(f"{text!r} is no option; write one a line, as '--exclusive' or '-R rusage[mem=1]'")
    return text


Option = Annotated[str, AfterValidator(_checked_option)]
"""Option of a scheduler or a launcher, as on its command line: it cannot bring a second line into a script."""


class Site(StrictModel):
    """A site file. Paths and commands may use variables of the shell, which the job expands."""

    account: str | None = None
    """Project that the node-hours are charged to."""
    queue: str | None = None
    """Queue of LSF; of Slurm the partition, or the quality of service where that is what a machine's users choose."""
    constraint: str | None = None
    """Features that nodes must have (Slurm)."""
    wall_time: str = "1:00"
    """Wall time of one job, hours:minutes or hours:minutes:seconds."""
    warn: str = "0:05"
    """Time before the wall limit at which a job is told to save its state; a batch and a checkpoint have half of it."""
    options: list[Option] = []
    """Further options for the scheduler, one each, as on its command line."""
    launcher_options: list[Option] = []
    """Further options for what starts the ranks, as on its command line."""
    modules: list[str] = []
    """Modules loaded in this order, after those that were loaded before are removed."""
    setup: list[str] = []
    """Lines of shell after the modules, for instance the activation of an environment."""
    environment: dict[str, str] = {}
    """Variables set in this order, after the machine's own; a value may use the ones before it."""
    container: list[str] = []
    """Words before the command of each rank, for instance [apptainer, exec, --nv, image.sif]."""
    scheduler: str | None = None
    """Name of a scheduler in place of the machine's."""
    launcher: str | None = None
    cores_per_rank: int | None = Field(default=None, ge=1)
    programs: dict[str, str] = {}
    """Folder of each other framework's script, by the framework's name: {megatron: /home/me/Megatron-LM}."""
    data: str | None = None
    """Prefix of the tokenised text (PREFIX.bin and PREFIX.idx); without it synthetic tokens, where the framework has
    them. It has no variables, since no shell reads it."""

    @field_validator("account", "queue", "constraint")
    @classmethod
    def _is_word(cls, value: str | None) -> str | None:
        if value is not None and not (re.fullmatch(r"\S+", value) and value.isprintable()):
            raise ValueError(f"{value!r} is not one word, which is all that a scheduler takes here")
        return value

    @field_validator("data")
    @classmethod
    def _is_plain(cls, value: str | None) -> str | None:
        if value is not None and "$" in value:
            raise ValueError(f"'{value}' has a variable, and no shell reads it; write the path itself")
        if value is not None and not value.startswith("/"):
            raise ValueError(f"'{value}' is no whole path, and jobs start in folders of their own; write it from / on")
        return value

    @field_validator("wall_time", "warn")
    @classmethod
    def _is_time(cls, value: str) -> str:
        if not _TIME.fullmatch(value):
            raise ValueError("write it as hours:minutes, in quotes: '2:00'")
        return value

    def model_post_init(self, context: Any) -> None:
        if self.warn_seconds >= self.seconds:
            raise ValueError(f"warn ({self.warn}) has to be less than wall_time ({self.wall_time})")

    @field_validator("environment")
    @classmethod
    def _are_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_]\w*", name, flags=re.ASCII):
                raise ValueError(f"'{name}' is no name of a variable")
        return value

    @property
    def seconds(self) -> int:
        """The wall time in seconds."""
        return _seconds(self.wall_time)

    @property
    def warn_seconds(self) -> int:
        """Seconds of `warn`."""
        return _seconds(self.warn)

    def missing(self, provide: Mapping[str, str]) -> list[str]:
        """Return what of `provide` (`System.provide`) no module, line of setup or variable of this site brings."""
        text = " ".join([*self.modules, *self.setup, *self.environment, *self.environment.values(), *self.container])
        return [need for word, need in provide.items() if word.lower() not in text.lower()]

    def require(self, needs: list[str], *, where: str, machine: str) -> None:
        """Raise `ConfigError` naming every key of `needs` that the file does not have."""
        missing = [name for name in needs if not getattr(self, name)]
        if missing:
            keys = ", ".join(f"{name}: ..." for name in missing)
            raise ConfigError(f"{where}: a job on {machine} needs {' and '.join(missing)}; add {keys}")


def _seconds(text: str) -> int:
    match = _TIME.fullmatch(text)
    assert match is not None
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 3600 * hours + 60 * minutes + seconds


def as_time(seconds: float) -> str:
    """Return the time as hours:minutes, rounded up."""
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d}"


def load_site(path: Path | None) -> Site:
    """Load the user's file, or the defaults where there is none. Raises `ConfigError` naming key and nearest valid
    key."""
    return Site() if path is None else load_yaml(path, Site)


def as_shell(values: dict[str, Any]) -> list[str]:
    """Return lines that export variables; the shell expands `$` in their values."""
    return [f'export {name}="{in_quotes(str(value))}"' for name, value in values.items()]


def as_words(words: Iterable[str]) -> str:
    """Return the words as shell, each one word; the shell expands their `$`."""
    return " ".join(f'"{in_quotes(word)}"' if "$" in word else shlex.quote(word) for word in words)


def in_quotes(text: str) -> str:
    """Return the text as it stands between double quotes; the shell expands its variables, and runs nothing of it."""
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("`", "\\`")
    return _DOLLAR.sub(lambda match: match[0] if match[1] else "\\$", text)
