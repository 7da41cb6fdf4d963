"""What the pages under docs/ say is what happens: every command is run as it stands there, in a fresh clone."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

from axonn.config.train_config import TrainConfig
from experiments import definition
from tests.helpers.clones import copy_of_the_project, newcomers_environment

ROOT = definition.ROOT
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.glob("*.md") if "```sh" in page.read_text(encoding="utf-8"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\S+\.(?:yaml|py|txt))\b.*")
STATUS = re.compile(r"#.*exit status (\d+)")


@dataclass
class Block:
    """Of a page: a file, whose name stands in its first line, or commands with what they print."""

    kind: str
    text: str
    printed: list[str] = field(default_factory=list)

    @property
    def name(self) -> str | None:
        found = FILE.fullmatch(self.text.partition("\n")[0])
        return found[1] if found and self.kind in ("yaml", "python") else None

    @property
    def status(self) -> int:
        found = STATUS.search(self.text)
        return int(found[1]) if found else 0


def blocks_of(page: Path) -> list[Block]:
    blocks: list[Block] = []
    for kind, text in FENCE.findall(page.read_text(encoding="utf-8")):
        if kind == "text":
            assert blocks, f"{page.name}: output of no command"
            assert blocks[-1].kind == "sh", f"{page.name}: output of no command"
            blocks[-1].printed.append(text)
        else:
            blocks.append(Block(kind, text))
    return blocks


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of the project alone, and the environment in which the tests run as its `.venv`."""
    folder = copy_of_the_project(tmp_path / "axonn-reproduction")
    (folder / ".venv").symlink_to(sys.prefix)
    newcomers_environment(monkeypatch, path=folder)
    return folder


def appears(line: str, output: str) -> bool:
    """Whether a printed line is there; `…` stands for what differs from run to run, blanks for any blanks."""
    parts = [r"\s+".join(map(re.escape, part.split())) for part in line.strip().split("…")]
    return re.search(r"\s*.*?\s*".join(parts), output) is not None


LONG = ("own-machine", "own-figure", "train-a-unet", "trace", "compare", "determinism")
"""Pages whose commands measure or train for long: tried by `make test-pages`, and so by CI."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.stem, marks=[pytest.mark.full] * (p.stem in LONG)) for p in PAGES]
)
def test_the_commands_of_a_page_do_what_it_says(page: Path, clone: Path) -> None:
    before = {path.relative_to(ROOT) for path in ROOT.glob("*")} | {
        path.relative_to(ROOT) for path in ROOT.glob("runs/*")
    }
    for block in blocks_of(page):
        if block.name is not None:
            target = clone / block.name
            assert target.resolve().is_relative_to(clone)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text, encoding="utf-8")
        if block.kind != "sh":
            continue
        ended = subprocess.run(
            ["bash", "-e", "-c", block.text], cwd=clone, capture_output=True, text=True, timeout=600, check=False
        )
        output = ended.stdout + ended.stderr
        assert ended.returncode == block.status, f"{page.name}:\n{block.text}\n{output}"
        shown = "".join(block.printed).splitlines()
        for line in shown:
            assert not line.strip() or appears(line, output), f"{page.name}: no {line!r} in\n{output}"
        # A page does not lead to what the tool itself warns of, but where it shows that; other tests keep the machine
        # busy.
        warnings = [line for line in output.splitlines() if line.startswith("warning:")]
        for warning in (line for line in warnings if "the machine was busy" not in line):
            assert any(appears(line, warning) for line in shown if line.startswith("warning:")), (
                f"{page.name}: {warning}"
            )
    after = {path.relative_to(ROOT) for path in ROOT.glob("*")} | {
        path.relative_to(ROOT) for path in ROOT.glob("runs/*")
    }
    assert after - before <= {Path(".pytest_cache"), Path(".hypothesis")}, "something was written beside the clone"


def pages() -> list[Path]:
    return [
        ROOT / "README.md",
        *(p for n in ("CONTRIBUTING", "CHANGELOG") if (p := ROOT / f"{n}.md").exists()),
        *DOCS.glob("*.md"),
    ]


def written(page: Path) -> str:
    """The words of a page, in one line, without what is run and printed."""
    return " ".join(FENCE.sub("", page.read_text(encoding="utf-8")).split())


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def headings_and_tables(page: Path) -> str:
    """The headings of a page and the first rows of its tables, in small letters."""
    lines = page.read_text(encoding="utf-8").splitlines()
    heads = [a for a, b in pairwise(lines) if a.startswith("|") and re.fullmatch(r"\|[-:| ]+\|", b)]
    return "\n".join([*(line for line in lines if line.startswith("#")), *heads]).lower()


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"(?:\]\(|src=\")([^)#\"]*)(?:#([^)]*))?[)\"]", written(page)):
        if not target.startswith(("http://", "https://")):
            there = page.parent / target if target else page
            assert there.exists(), f"{page.name}: {target} is not there"
            assert not anchor or anchor in anchors(there), f"{page.name}: {target} has no heading #{anchor}"


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_what_is_said_to_be_on_another_page_is_there(page: Path) -> None:
    text = written(page)
    # The README is long: who is sent there is told where.
    assert not re.search(r"\]\([./]*README\.md\)", text), f"{page.name}: links to the README without a section"
    assert not re.search(r"\b(?:see|in) the README\b", text), f"{page.name}: sends to the README without a link"
    link = r"\[[^\]]*\]\(([\w./-]+\.md)[^)]*\)"
    for what in ("table", "list", "section"):
        said = re.findall(rf"\b{what}s? of (\w+)[^.;]*? \(?(?:in|of|see) (?:the )?{link}", text)
        said += [(word, to) for to, word in re.findall(rf"{link} has (?:a|the) {what} of (\w+)", text)]
        for word, target in said:
            there = headings_and_tables(page.parent / target)
            assert word.lower().rstrip("s") in there, f"{page.name}: there is no {what} of {word} in {target}"


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_files_that_are_named_are_there(page: Path) -> None:
    made = {block.name for block in blocks_of(page)} | {"experiments/machines/local.yaml", "plots/out"}
    packages = "axonn|experiments|plots|baselines|jobscripts|tools|tests|docs"
    code = " ".join(re.findall(r"`([^`]+)`", written(page)))
    for name in re.findall(rf"(?<![\w./-])((?:{packages})/[\w./*-]*[\w*])", code):
        is_one = not re.search(r"NAME|_X\b", name) and not any(name.startswith(str(one)) for one in made)
        assert not is_one or any(ROOT.glob(name)), f"{page.name}: there is no {name}"


def test_the_configuration_page_names_every_key() -> None:
    page = (DOCS / "configuration.md").read_text(encoding="utf-8") + (DOCS / "train-a-gpt.md").read_text(
        encoding="utf-8"
    )
    missing = [key for key in TrainConfig.model_fields if not re.search(rf"`{key}\b|^{key}:", page, re.MULTILINE)]
    assert missing == []


def test_the_index_names_every_page() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    missing = [page.name for page in DOCS.glob("*.md") if page.name != "index.md" and f"]({page.name})" not in index]
    assert missing == []


@pytest.mark.parametrize(
    ("line", "output", "there"),
    [
        ("loss … -> … in 20 batches", "loss 5.1 -> 4.2 in 20 batches; runs/x", True),
        ("loss … in 20", "loss 5.1 -> 4.2 in 21 batches", False),
        ("a  b", "a b", True),
        ("(x)", "x", False),
    ],
)
def test_output_is_compared(line: str, output: str, there: bool) -> None:
    assert appears(line, output) is there
