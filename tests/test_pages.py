"""Help and errors lead to a page that is there."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from axonn import errors
from axonn.cli import main
from axonn.cli.doc_links import ERRORS, documented, explained, page_of
from axonn.errors import AxonnError, CheckpointError, ConfigError, MachineError, RunFailed
from experiments.definition import ROOT


@pytest.mark.parametrize("name", sorted(main.commands()))
def test_help_of_a_command_names_its_page(name: str) -> None:
    page = page_of(main.commands()[name])
    assert (ROOT / page).is_file()
    assert f"axonn {name}" in (ROOT / page).read_text(encoding="utf-8")
    shown = CliRunner().invoke(main.app, [name, "--help"])
    assert shown.exit_code == 0
    assert f"More in {page}" in shown.output


def test_help_names_the_index() -> None:
    shown = CliRunner().invoke(main.app, ["--help"])
    (page,) = re.findall(r"docs/\S+\.md", shown.output)
    assert (ROOT / page).is_file()


def ended(failure: BaseException, page: str = "docs/plan.md") -> int:
    def fail() -> None:
        raise failure

    with pytest.raises(SystemExit) as exited, explained(page):
        fail()
    code = exited.value.code
    assert isinstance(code, int)
    return code


@pytest.mark.parametrize(
    ("failure", "page"),
    [
        (ConfigError("it is [wrong]"), "docs/plan.md"),
        (MachineError("it is [wrong]"), "docs/own-machine.md"),
        (CheckpointError("it is [wrong]"), "docs/resume.md"),
        (RunFailed("it is [wrong]"), ERRORS),
    ],
)
def test_an_error_names_the_page_of_its_kind_or_of_the_command(
    failure: AxonnError, page: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(failure) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == ["error: it is [wrong]", f"see {page}"]


def test_an_error_of_the_system_names_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(OSError(errno.ENOSPC, "No space left on device", "/some/file")) == 2
    assert capsys.readouterr().err.splitlines() == ["error: /some/file: No space left on device", f"see {ERRORS}"]


def test_an_interruption_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(KeyboardInterrupt()) == 130
    assert "run again to go on" in capsys.readouterr().err


def test_a_mistake_of_the_suite_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), explained():
        _ = 1 // 0


def test_a_command_without_a_page_has_that_of_errors() -> None:
    def command() -> None: ...

    marked: Callable[[], None] = documented("docs/jobs.md")(command)
    assert marked is command
    assert page_of(marked) == "docs/jobs.md"
    assert page_of(None) == ERRORS


def test_every_error_says_what_it_is() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AxonnError)]
    assert len(kinds) > 8
    assert all(kind.__doc__ for kind in kinds)
