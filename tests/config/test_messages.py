"""No message of a wrong file or argument speaks of Python: its classes, numbers of errors, words of its libraries."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from axonn.cli import main
from axonn.errors import AxonnError, RecordError
from axonn.observability.records import read_records
from experiments.definition import HERE
from tests.config.test_fuzz_files import READERS, kinds
from tests.helpers.command_line import CommandLine
from tests.helpers.fuzzing import _places, special_files

OF_PYTHON = re.compile(
    r"NoneType|Traceback|Value error|\[Errno|<class|object at 0x|instance of [A-Z]|\b(Key|Type|Attribute|Index)Error"
    r"|\b(GPT|UNet|Grid|Train|Optimizer|Schedule|Precision|Data)Config\b|found None|found (True|False)"
)
WRONG: list[Any] = [None, "a text", -1, True, [None], {"a": 1}]
"""Of each type, one of which is the right one at most."""
LONG = "AXONN_FUZZ_EXAMPLES" in os.environ


def places_of(data: Any) -> Iterator[tuple[Any, ...]]:
    """A place in a file for each name of a key, and the file itself."""
    names = set()
    for place in _places(data):
        name = place[-1] if place else ""
        if name not in names and all(part == 0 for part in place if isinstance(part, int)):
            names.add(name)
            yield place


def spoken(message: str) -> None:
    assert (found := OF_PYTHON.search(message)) is None, f"{found and found[0]!r} in: {message}"


@kinds
def test_a_value_of_a_wrong_type_is_refused_in_the_words_of_the_file(kind: str, tmp_path: Path) -> None:
    content, read = READERS[kind]
    good = yaml.safe_load(content)
    path = tmp_path / "wrong.yaml"
    refused = 0
    places = list(places_of(good))
    # All at each place in `make faults` and in a file of few keys; otherwise two, in turn.
    every = LONG or len(places) < 10
    for number, place in enumerate(places):
        for value in WRONG if every else (WRONG[number % len(WRONG)], WRONG[(number + 2) % len(WRONG)]):
            data = copy.deepcopy(good)
            if place:
                holder = data
                for key in place[:-1]:
                    holder = holder[key]
                holder[place[-1]] = value
            else:
                data = value
            path.write_text(yaml.safe_dump(data), encoding="utf-8")
            try:
                read(path)
            except AxonnError as error:
                refused += 1
                said = str(error)
            else:
                continue
            spoken(said)
            # One file is named once, and once is said what is wrong with it.
            assert all(line.count(str(path)) <= 1 for line in said.splitlines()), said
    assert refused > 10


@kinds
def test_a_file_that_is_none_is_refused_so(kind: str, tmp_path: Path) -> None:
    for path in special_files(tmp_path, ".yaml"):
        with pytest.raises(AxonnError) as refused:
            READERS[kind][1](path)
        spoken(str(refused.value))
        assert str(refused.value).count(path.name) == 1


def test_a_record_file_that_is_none_is_refused_so(tmp_path: Path) -> None:
    for path in special_files(tmp_path, ".json"):
        with pytest.raises(RecordError) as refused:
            read_records(path)
        spoken(str(refused.value))
        assert str(refused.value).count(path.name) == 1


FIG6 = str(HERE / "fig6.yaml")
ARGUMENTS: dict[str, list[list[str]]] = {
    "calibrate": [["--precision", "float7"]],
    "collect": [["{path}"]],
    "compare": [["{path}"]],
    "doctor": [],
    "export": [["{path}", "--out", "weights.safetensors"]],
    "jobs": [["{path}", "--machine", "summit"], [FIG6, "--machine", "{path}"],
             [FIG6, "--machine", "summit", "--site", "{path}"]],
    "plan": [["--model", "{path}", "--machine", "summit", "--gpus", "6", "--batch", "6"],
             ["--model", "gpt-12b", "--machine", "{path}", "--gpus", "6", "--batch", "6"],
             ["--module", "{path}", "--machine", "summit", "--gpus", "6", "--batch", "6"]],
    "predict": [["{path}"], ["--validate", "{path}"]],
    "run": [["{path}"]],
    "schematics": [["{path}"]],
    "status": [["{path}"]],
    "submit": [["{path}"]],
    "trace": [["{path}"]],
    "train": [["{path}"]],
}  # fmt: skip
"""What each command is given, where a file that is none stands for `{path}`."""


def test_every_command_is_tried() -> None:
    assert set(ARGUMENTS) >= set(main.commands())


@pytest.mark.parametrize("name", sorted(main.commands()))
def test_a_command_refuses_files_that_are_none_in_plain_words(axonn: CommandLine, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "special"
    folder.mkdir()
    null, number = folder / "null.yaml", folder / "number.json"
    null.write_text("null\n")
    number.write_text("7")
    paths = [path for path in [*special_files(folder, ".yaml"), null, number] if "\0" not in str(path)]
    for given in ARGUMENTS[name]:
        for path in paths:
            words = [word.replace("{path}", str(path)) for word in given]
            code, _, error = axonn(name, *words)
            assert code == 2, f"{words}: {code} {error}"
            spoken(error)
