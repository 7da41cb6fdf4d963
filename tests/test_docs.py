"""What the pages under docs/ say is what happens: every command is run as it stands there, in a fresh clone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from axonn.config import TrainConfig
from experiments import definition

ROOT = definition.ROOT
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.glob("*.md") if "```sh" in page.read_text(encoding="utf-8"))
NOT_OF_A_CLONE = {".venv", ".baselines", ".git", "runs", "build", "jobs"}
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
    folder = tmp_path / "axonn-reproduction"

    def ignored(parent: str, names: list[str]) -> set[str]:
        top = Path(parent) == ROOT
        drop = {n for n in names if n.endswith((".egg-info", "_cache")) or n == "__pycache__"}
        drop |= NOT_OF_A_CLONE & set(names) if top else set()
        if Path(parent) == ROOT / "results":
            drop |= set(names) - {"published"}
        if Path(parent) == ROOT / "plots":
            drop |= {"out"} & set(names)
        return drop | ({"local.yaml", "local-gpu.yaml"} & set(names) if Path(parent).name == "machines" else set())

    shutil.copytree(ROOT, folder, ignore=ignored)
    (folder / ".venv").symlink_to(sys.prefix)
    for name in list(os.environ):
        if name.startswith(("AXONN", "PYTEST")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    # As a newcomer's terminal, who may be root, and not this process's.
    for name in list(os.environ):
        if name.startswith(("OMPI_", "PRTE_", "PMIX_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


def appears(line: str, output: str) -> bool:
    """Whether a printed line is there; `…` stands for what differs from run to run, blanks for any blanks."""
    parts = [r"\s+".join(map(re.escape, part.split())) for part in line.strip().split("…")]
    return re.search(r"\s*.*?\s*".join(parts), output) is not None


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
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
        for line in "".join(block.printed).splitlines():
            assert not line.strip() or appears(line, output), f"{page.name}: no {line!r} in\n{output}"
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


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"(?:\]\(|src=\")([^)#\"]+)(?:#[^)]*)?[)\"]", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name}: {target} is not there"


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
