"""Where a command computes: said once, checked before anything is written, and kept in what the run leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from axonn.device.devices import ranks_on
from axonn.training.supervision.supervisor import supervise
from experiments import runner
from experiments.definition import ROOT, load_experiment
from experiments.runner import points_of, run_point
from jobscripts.job_plan import plan_small_jobs
from jobscripts.site import Site
from jobscripts.system import load_system
from tests.helpers.command_line import CommandLine, tiny


def test_a_gpu_that_is_not_there_is_said_before_anything_is_written(axonn: CommandLine) -> None:
    config = axonn.config()
    before = sorted(axonn.root.rglob("*"))
    for command in (["train", config], ["run", ROOT / "experiments" / "fig6.yaml", "--list"]):
        code, _, error = axonn(*command, "--device", "cuda")
        assert code == 2
        assert "needs a GPU" in error
        assert "take device 'cpu'" in error.replace("\n", " ")
    code, _, error = axonn("train", config, "--device", "gpu")
    assert code == 2
    assert "known are auto, cpu, cuda" in error.replace("\n", " ")
    assert sorted(axonn.root.rglob("*")) == before


def test_ranks_without_a_gpu_fail_with_the_reason(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    outcome = supervise("axonn", tiny(inter=1, steps=2), tmp_path, timeout_s=100, device="cuda")
    assert json.loads((tmp_path / "spec.json").read_text())["device"] == "cuda"
    assert outcome.failure is not None
    assert "needs a GPU" in outcome.failure.detail


def test_a_framework_that_has_no_code_for_gpus_is_not_run_on_them(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = load_experiment(ROOT / "experiments" / "fig6.yaml")
    (*_, point) = [p for p in points_of(experiment) if p.framework.startswith("deepspeed")]
    record = run_point(replace(point, device="cuda"), command="test")
    assert record.failure is not None
    assert record.failure.cause == "unavailable"
    assert "leave out --device cuda" in record.failure.detail


def test_points_on_a_gpu_are_other_points(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = load_experiment(ROOT / "experiments" / "fig6.yaml")
    monkeypatch.setattr(runner, "version_of", lambda framework: "1")
    here, there = points_of(experiment), points_of(experiment, "cuda")
    assert [p.name for p in here] == [p.name for p in there]
    assert all(a.fingerprint != b.fingerprint for a, b in zip(here, there, strict=True))


def test_small_jobs_take_the_gpus_of_a_machine() -> None:
    experiment = load_experiment(ROOT / "experiments" / "fig6.yaml")
    planned = plan_small_jobs(experiment, system=load_system("perlmutter"), site=Site())
    specs = {job.adapter: json.loads(job.launch.files["spec.json"]) for job in planned.jobs}
    assert {spec["device"] for spec in specs.values()} == {"cuda"}
    assert {job.adapter for job in planned.jobs if job.launch.mpi_on_device} == {"axonn"}


def test_where_ranks_compute_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "NVIDIA H100")
    assert ranks_on("cpu", 1) == "1 rank on the CPU"
    assert ranks_on("cuda", 1) == "1 rank on 1 GPU NVIDIA H100"
    assert ranks_on("cuda", 2) == "2 ranks on 2 GPUs NVIDIA H100"
    assert ranks_on("cuda", 3) == "3 ranks on 2 GPUs NVIDIA H100, which they share (2 on one)"


def test_doctor_says_what_gpus_there_are(axonn: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name = "NVIDIA H100"
        total_memory = 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: Properties())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "NVIDIA H100")
    code, out, error = axonn("doctor")
    assert code == 0, error
    assert "NVIDIA H100, 80 GiB" in out
    assert "up to 2 with a GPU each" in out
