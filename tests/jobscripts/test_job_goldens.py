"""Jobs are written as ever, byte by byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobscripts.generate import changed_files, load_manifest
from jobscripts.launchers import launcher_names
from jobscripts.schedulers import scheduler_names
from tests.helpers.job_goldens import ALL, GOLDENS, HOW, Golden, tree, write_golden


@pytest.mark.parametrize("golden", ALL, ids=lambda golden: golden.name)
def test_a_job_is_written_as_ever(golden: Golden, tmp_path: Path) -> None:
    write_golden(golden, tmp_path / "made")
    made, expected = tree(tmp_path / "made"), tree(GOLDENS / golden.name)
    assert sorted(made) == sorted(expected), HOW
    for name, content in made.items():
        assert content.decode() == expected[name].decode(), f"{golden.name}/{name}: {HOW}"


def test_goldens_have_every_scheduler_launcher_and_kind_of_framework() -> None:
    assert {path.name for path in GOLDENS.iterdir()} == {golden.name for golden in ALL}, HOW
    assert {golden.scheduler for golden in ALL} == set(scheduler_names())
    assert {golden.launcher for golden in ALL} == set(launcher_names())
    frameworks = {load_manifest(GOLDENS / golden.name).jobs[0].framework for golden in ALL}
    assert frameworks == {"AxoNN", "DeepSpeed", "Megatron-LM", "PyTorch 1F1B"}


def test_the_same_input_gives_the_same_bytes_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_golden(ALL[0], tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/elsewhere")
    write_golden(ALL[0], Path("two"))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@pytest.mark.parametrize("golden", ALL, ids=lambda golden: golden.name)
def test_a_manifest_has_the_hash_of_every_other_file(golden: Golden) -> None:
    folder = GOLDENS / golden.name
    manifest = load_manifest(folder)
    files = manifest.files | {name: value for job in manifest.jobs for name, value in job.files.items()}
    assert {*files, "manifest.json"} == set(tree(folder))
    assert changed_files(folder, files) == []


def test_a_file_edited_by_hand_or_gone_is_named(tmp_path: Path) -> None:
    write_golden(ALL[0], tmp_path)
    (job,) = load_manifest(tmp_path).jobs
    script, work = f"{job.name}/job.sh", f"{job.name}/work.json"
    with open(tmp_path / script, "a") as file:
        file.write("\n")
    (tmp_path / work).unlink()
    assert changed_files(tmp_path, job.files) == [script, work]
