"""Where things lie: what is named is looked for from where one stands, and what a command makes lies there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from axonn.models.gpt.gpt_config import GPTConfig
from axonn.training.places import check_owner
from experiments.definition import ROOT
from tests.helpers.clones import copy_of_the_project, files_in, newcomers_environment
from tests.helpers.command_line import TEXT, CommandLine, tiny

PACKAGES = ("axonn", "experiments", "baselines", "plots", "jobscripts")
EXPERIMENT = """
name: mine
title: Mine
about: A GPT at the published scale, and a small one here.
predicted:
  machine: own
  batch_size: 256
  precision: float16
  frameworks: {AxoNN: {microbatch_size: 1}}
  points: [{framework: AxoNN, model: own-gpt, gpus: 8, strategy: {grid: {inter: 8}}}]
runs:
  batches: 3
  warmup_batches: 1
  repeats: 1
  loss_tolerance: 1.0e-4
  defaults:
    model: {name: small, layers: 1, hidden: 16, heads: 2, seq_len: 16, vocab: 256}
    batch_size: 4
    microbatch_size: 2
  runs: {one: {}}
"""
SITE = 'account: a\nqueue: regular\nwall_time: "1:00"\nwarn: "0:10"\n'
CONFIG = tiny(inter=1, steps=2, checkpoints={"every": 2}, data={"path": str(TEXT)}).model_dump(mode="json")
UNET: dict[str, Any] = {"kind": "unet", "name": "u", "image_size": 8, "channels": 1, "width": 8, "multipliers": [1]}
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-compile"]
COMMAND = "axonn.cli.main"
Command = tuple[str, Sequence[object], int]
"""Module, arguments, and the exit status."""
SEVERAL = """
import contextlib, io, json, runpy, sys
printed = []
for module, arguments, status in json.loads(sys.argv[1]):
    sys.argv[:] = ["axonn", *arguments]
    ended, said = 0, io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            if module == "axonn.cli.main":
                from axonn.cli.main import main
                import axonn.cli.console
                axonn.cli.console.console.file = said
                main()
            else:
                runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        ended = end.code if isinstance(end.code, int) else int(end.code is not None)
    assert ended == status, f"{module} {arguments}: {ended}: {said.getvalue()}"
    printed.append(said.getvalue())
print(json.dumps(printed))
"""
PATHS = """
import importlib, json, pkgutil, sys
from pathlib import Path
found = {}
for package in json.loads(sys.argv[1]):
    for one in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        # Ranks of other frameworks need these; __main__ runs a command.
        if not one.name.startswith("baselines.ranks.") and not one.name.endswith("__main__"):
            own = vars(importlib.import_module(one.name))
            found |= {one.name + "." + name: str(value) for name, value in own.items() if isinstance(value, Path)}
print(json.dumps(found))
"""


def run_here(here: Path, program: str, given: object) -> Any:
    """What a program prints last, as JSON; it starts in the folder `here`."""
    ended = subprocess.run(
        [sys.executable, "-c", program, json.dumps(given)],
        cwd=here,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def commands(here: Path, *asked: Command) -> list[str]:
    """What commands print, one after the other."""
    plain = [(module, [str(word) for word in words], status) for module, words, status in asked]
    return [str(said) for said in run_here(here, SEVERAL, plain)]


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def outputs_of_the_clone() -> dict[str, tuple[int, int]]:
    """What commands may have made in the clone that the tests are run from."""
    places = ("runs", "results", "plots/out", "jobs", "experiments/machines", "experiments/models")
    return {f"{place}/{name}": seen for place in places for name, seen in files_in(ROOT / place).items()}


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project as a clone that is elsewhere, whose modules the commands are."""
    folder = copy_of_the_project(tmp_path / "clone")
    newcomers_environment(monkeypatch, path=folder)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    return folder


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An empty folder."""
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def test_training_lies_where_one_stands(axonn: CommandLine) -> None:
    before = outputs_of_the_clone()
    write(axonn.root / "my.yaml", CONFIG)
    write(axonn.root / "a/my.yaml", CONFIG | {"seed": 1})
    assert "in 2 batches; runs/my\n" in axonn("train", "my.yaml")[1]
    # Another run, though its file has the same name: it does not go on with the first one.
    assert "in 2 batches; runs/a/my\n" in axonn("train", "a/my.yaml")[1]
    for run, seed in (("my", 0), ("a/my", 1)):
        assert yaml.safe_load((axonn.root / f"runs/{run}/config.yaml").read_text())["seed"] == seed
    assert "nothing to do" in axonn("train", "my.yaml")[1]
    for named in ("runs/my", "runs/my/record.json", "my.yaml"):
        assert "picture: runs/my/timeline.png" in axonn("trace", named)[1]
    # By default, what was trained last.
    assert "picture: runs/a/my/timeline.png" in axonn("trace")[1]
    assert "parameters of runs/a/my/checkpoints/" in axonn("export", "--out", "weights.safetensors")[1]
    assert "parameters of runs/my/checkpoints/" in axonn("export", "my.yaml", "--out", "weights.safetensors")[1]
    assert {name.split("/")[0] for name in files_in(axonn.root)} == {"my.yaml", "a", "runs", "weights.safetensors"}
    assert outputs_of_the_clone() == before


@pytest.mark.full
def test_two_files_of_one_name_never_share_a_run(axonn: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = write(axonn.root / "here/my.yaml", CONFIG)
    other = write(axonn.root / "other/my.yaml", CONFIG | {"steps": 3})
    monkeypatch.chdir(axonn.root / "here")
    axonn("train", "my.yaml")
    whose = f"runs/my holds the run of my.yaml, and not of {other}; choose another folder with --out"
    axonn.refuses(whose, "train", "../other/my.yaml")
    axonn.refuses(whose, "train", "../other/my.yaml", "--fresh")
    # Where no run has its name it takes it, and keeps it.
    (axonn.root / "third").mkdir()
    monkeypatch.chdir(axonn.root / "third")
    assert "in 3 batches; runs/my\n" in axonn("train", "../other/my.yaml")[1]
    assert "nothing to do" in axonn("train", other)[1]
    mine.rename("my.yaml")
    axonn.refuses(f"holds the run of {other}, and not of my.yaml", "train", "my.yaml")
    # Who names the folder knows what he does.
    assert "nothing to do" in axonn("train", "my.yaml", "--out", "runs/my")[1]


def test_a_moved_project_goes_on(axonn: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    write(axonn.root / "old/my.yaml", CONFIG)
    monkeypatch.chdir(axonn.root / "old")
    axonn("train", "my.yaml")
    (axonn.root / "old").rename(axonn.root / "new")
    monkeypatch.chdir(axonn.root / "new")
    assert "nothing to do" in axonn("train", "my.yaml")[1]


@pytest.mark.parametrize(
    "said",
    [
        "",
        "[]",
        "{}",
        '{"sessions": []}',
        '{"sessions": [{}]}',
        '{"sessions": [{"config_file": null}]}',
        "[" * 100_000,
    ],
)
def test_a_folder_that_does_not_say_whose_it_is_is_taken(said: str, tmp_path: Path) -> None:
    write(tmp_path / "run.json", said)
    check_owner(tmp_path, tmp_path / "my.yaml")


def test_without_a_run_there_is_none_to_take(axonn: CommandLine) -> None:
    for words in (("trace",), ("export", "--out", "w.safetensors")):
        axonn.refuses(f"there is no run of axonn train below {axonn.root / 'runs'}", *words)


def test_a_missing_file_is_named_with_its_place(axonn: CommandLine) -> None:
    def refused(name: str, *words: str) -> None:
        said = "No such file or directory" if name != "w.safetensors" else "cannot be read as safetensors"
        axonn.refuses(said, *words)
        axonn.refuses(f"(looked for {axonn.root / name})", *words)

    for command in ("train", "predict", "run"):
        refused("none.yaml", command, "none.yaml")
    write(axonn.root / "my.yaml", CONFIG | {"data": {"path": "texts/my.txt"}})
    refused("texts/my.txt", "train", "my.yaml")
    write(axonn.root / "my.yaml", CONFIG | {"initial_weights": "w.safetensors"})
    refused("w.safetensors", "train", "my.yaml")
    more = {"blocks": 1, "attention_levels": [], "head_channels": 4, "groups": 2}
    write(axonn.root / "my.yaml", CONFIG | {"model": UNET | more, "data": {"path": "pictures.npy"}})
    refused("pictures.npy", "train", "my.yaml")


@pytest.mark.timeout(900)
def test_experiments_and_figures_lie_where_one_stands(clone: Path, here: Path) -> None:
    before = files_in(clone)
    write(here / "mine.yaml", EXPERIMENT)
    write(here / "my.yaml", CONFIG)
    write(here / "site.yaml", SITE)
    # Machines and models by their names, as in a clone.
    summit = (clone / "experiments/machines/summit.yaml").read_text(encoding="utf-8")
    write(here / "experiments/machines/own.yaml", summit.replace("name: summit", "name: own", 1))
    model = GPTConfig(name="own-gpt", layers=8, hidden=512, heads=8, seq_len=512, vocab=1000)
    write(here / "experiments/models/own-gpt.yaml", model.model_dump(mode="json"))
    plan = ("plan", "--model", "own-gpt", "--gpus", 1, "--batch", 8, "--machine")
    jobs = ("jobs", "mine.yaml", "--machine", "perlmutter", "--site", "site.yaml", "--small")
    printed = commands(
        here,
        (COMMAND, ("predict", "mine.yaml"), 0),
        (COMMAND, ("predict", "mine.yaml", "--spans", "spans"), 0),
        (COMMAND, ("run", "mine.yaml"), 0),
        (COMMAND, ("run", "mine.yaml"), 0),
        (COMMAND, ("trace", "results/measured/mine-one-axonn-0.json"), 0),
        (COMMAND, ("predict", "--validate", "ipdps22-fig11"), 0),
        (COMMAND, (*plan, "own", "--out", "plans/plan.yaml"), 0),
        (COMMAND, jobs, 0),
        (COMMAND, ("collect", "jobs/mine-perlmutter"), 0),
        ("plots.figures.schematics", ("my.yaml",), 0),
        ("plots.figures.ginter", ("--fresh",), 1),
        ("plots.report", (), 0),
        ("plots.reproduce", ("reproduce-fig6",), 2),
    )
    assert files_in(clone) == before
    assert "nothing to do" in printed[3]
    assert "picture: runs/mine-one-axonn-0/timeline.png" in printed[4]
    assert "written to jobs/mine-perlmutter" in printed[7]
    assert "in results/measured" in printed[8]
    assert "no Makefile" in printed[-1]
    assert set(files_in(here)) >= {
        "results/predicted/mine.json",
        "results/predicted/validation-ipdps22-fig11.json",
        "results/measured/mine-one-axonn-0.json",
        "runs/mine-one-axonn-0/spec.json",
        "jobs/mine-perlmutter/manifest.json",
        "plans/plan.yaml",
        "plots/out/schematic-grid.svg",
        "plots/out/ginter.svg",
        "results/ginter/summary.json",
        "results/report.html",
    }


@pytest.mark.timeout(900)
def test_a_machine_that_is_measured_is_found_where_one_stands(clone: Path, here: Path) -> None:
    before = files_in(clone)
    model = GPTConfig(name="own-gpt", layers=2, hidden=64, heads=2, seq_len=64, vocab=256)
    write(here / "experiments/models/own-gpt.yaml", model.model_dump(mode="json"))
    plan = ("plan", "--model", "own-gpt", "--gpus", 1, "--batch", 8, "--precision", "float32", "--machine", "local")
    printed = commands(here, (COMMAND, ("calibrate", "--quick", "--ranks", 1), 0), (COMMAND, plan, 0))
    assert "written to experiments/machines/local.yaml" in printed[0]
    assert "own-gpt on 1 GPUs of local" in printed[1]
    assert set(files_in(here)) == {"experiments/machines/local.yaml", "experiments/models/own-gpt.yaml"}
    assert files_in(clone) == before


def test_every_place_to_write_to_is_where_one_stands(clone: Path, here: Path) -> None:
    """Of all paths that modules of the suite have for themselves, those inside of its own folder are there in a fresh
    clone: they are read."""
    found: dict[str, str] = run_here(here, PATHS, PACKAGES)
    assert len(found) > 20
    absent = {name for name, path in found.items() if Path(path).is_relative_to(clone) and not Path(path).exists()}
    # `make baselines` installs them, in the clone.
    assert absent == {"baselines.environments.FOLDER"}
    # Below a clone, results are those of the clone, wherever one stands in it.
    inside: dict[str, str] = run_here(clone / "docs", PATHS, ["axonn", "experiments"])
    assert inside["axonn.training.places.PROJECT"] == str(clone)
    assert inside["experiments.runner.MEASURED"] == str(clone / "results" / "measured")


@pytest.mark.timeout(900)
def test_nothing_is_written_into_an_installed_package(
    clone: Path, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site-packages"
    subprocess.run([*PIP, "--target", site, clone], check=True, capture_output=True, timeout=400)
    newcomers_environment(monkeypatch, path=site)
    before = files_in(site)
    write(here / "my.yaml", CONFIG)
    doctor, *_ = commands(
        here,
        (COMMAND, ("doctor",), 0),
        (COMMAND, ("train", "my.yaml"), 0),
        (COMMAND, ("predict", "--validate", "ipdps22-fig11"), 0),
        ("plots.figures.ginter", ("--fresh",), 1),
    )
    assert str(here / "results") in doctor
    assert files_in(site) == before
    assert (here / "runs/my/record.json").exists()
    assert (here / "results/ginter/summary.json").exists()
