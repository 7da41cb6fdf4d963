"""Calibrating a GPU, as far as that can be tried without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from axonn.config.train_config import PrecisionConfig, TrainConfig
from axonn.errors import ConfigError
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.optim.model_optimizer import ModelOptimizer
from axonn.perf.machine.machine_file import load_machine
from axonn.perf.planner.engine_strategy import strategy_of_config
from axonn.perf.prediction import predict
from experiments.calibration import measure_machine as calibration
from experiments.calibration.calibration_worker import CalibrationJob
from experiments.calibration.kernel_timing import GPU, GPU_QUICK, QUICK, measure, sizes_of
from experiments.calibration.link_timing import copy_rate, empty_kernel, host_link_rate
from experiments.calibration.timing import DeviceClock, Timer
from tests.helpers.command_line import CommandLine
from tests.helpers.cuda_standin import DEVICE, standing_in


def test_every_kernel_is_measured_on_the_device_and_the_host_waits_for_readings_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = {name: values[:1] for name, values in vars(QUICK).items()}
    seen: list[str] = []
    # Making an optimizer waits for its first copy.
    monkeypatch.setattr(ModelOptimizer, "_round_masters", lambda self: None)
    with standing_in(monkeypatch) as gpu, torch.device(DEVICE):
        timer = Timer(clock=DeviceClock(), samples=2)
        found = measure(replace(QUICK, **few), torch.bfloat16, timer, seen.append)
        # An event's elapsed time is a millisecond here.
        assert found["products"]["forward"]["us"] == [1000.0]
        assert {"adam", "adam-offloaded", "layer-norm"} <= found["streams"].keys()
        assert copy_rate(timer, 4000) == host_link_rate(timer, DEVICE, 4000) == 4e6
        assert empty_kernel(timer) > 0
    assert gpu.operations > 500
    assert "attention" in seen


def test_a_gpu_has_sizes_of_its_own() -> None:
    assert sizes_of(torch.device("cuda"), quick=False) is GPU
    assert sizes_of(torch.device("cuda"), quick=True) is GPU_QUICK
    assert sizes_of(torch.device("cpu"), quick=True) is QUICK


def test_the_machine_file_of_a_gpu_predicts_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[CalibrationJob] = []
    original = calibration._measured

    def on_a_cpu(job: CalibrationJob, ranks: int, on_part: Callable[[str], None]) -> dict[str, Any]:
        jobs.append(job)
        found = original(replace(job, device="cpu"), ranks, on_part)
        gpu = {"name": "NVIDIA H100", "memory": 80 * 10**9, "multiprocessors": 132}
        return found | {"gpu": gpu, "host_link": 50e9}

    monkeypatch.setattr(calibration, "_measured", on_a_cpu)
    file = tmp_path / "local-gpu.yaml"
    calibration.calibrate(device="cuda", quick=True, out=file)
    assert jobs == [CalibrationJob(precision="bfloat16", quick=True, device="cuda")]
    machine = load_machine(file)
    assert machine.gpu.name == "NVIDIA H100"
    assert machine.gpu.memory.si == 80e9
    assert machine.gpu.multiprocessors.value == 132
    assert machine.node.host_link.si == 50e9
    assert "Links between GPUs were not measured" in machine.about
    command, *_, how = machine.gpu.peak.source.split("; ")
    assert command == "axonn calibrate --ranks 1 --precision bfloat16 --quick --device cuda"
    assert how.startswith("the fastest")
    model = GPTConfig(name="g", layers=4, hidden=64, heads=2, seq_len=32, vocab=256)
    config = TrainConfig(model=model, batch_size=8, microbatch_size=2, precision=PrecisionConfig(compute="bfloat16"))
    assert predict(model, machine, strategy_of_config(config), batch_size=8).batch_time_s > 0


def test_several_ranks_on_one_gpu_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="measured by one alone; leave out --ranks"):
        calibration.calibrate(device="cuda", ranks=2, out=tmp_path / "machine.yaml")


def test_no_gpu_is_said_at_once(axonn: CommandLine) -> None:
    code, _, error = axonn("calibrate", "--device", "cuda", "--out", axonn.root / "machine.yaml")
    assert code == 2
    assert "needs a GPU" in error
    assert not (axonn.root / "machine.yaml").exists()
