"""What cannot fit on a machine is refused before anything starts, with the numbers; what fits is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from axonn.config.train_config import TrainConfig
from axonn.perf.prediction import predict
from axonn.training import capacity
from axonn.training.capacity import Host, free_memory, need_of, shortage
from baselines.contenders import load_contenders, refusal
from experiments import definition
from experiments.definition import find_machine, load_model
from experiments.planning import planning
from experiments.runner import points_of, run_point
from tests.helpers.command_line import CommandLine, tiny

GB = 10**9


def here(monkeypatch: pytest.MonkeyPatch, *, cores: int = 2, memory: int | None = 24 * GB) -> None:
    """The machine that looks at itself has so much."""
    monkeypatch.setattr(capacity, "available_cores", lambda: cores)
    monkeypatch.setattr(capacity, "free_memory", lambda: memory)


def of_64(**changes: Any) -> TrainConfig:
    content: dict[str, Any] = {
        "model": load_model("gpt-12b").model_dump(),
        "grid": {"data": 2, "inter": 8, "col": 4},
        "batch_size": 256,
        "microbatch_size": 4,
        "precision": "bfloat16",
    }
    return TrainConfig.model_validate(content | changes)


def test_a_plan_for_64_gpus_is_refused_and_nothing_is_started(
    axonn: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(monkeypatch)
    monkeypatch.setattr("axonn.training.trainer.supervise", lambda *given, **options: pytest.fail("it was started"))
    path = axonn.root / "plan.yaml"
    path.write_text(yaml.safe_dump(of_64().model_dump(mode="json")))
    axonn.refuses("64 ranks are more than 4 on each of 2 cores; the ranks need", "train", path)
    axonn.refuses("of host memory together, and 24.0 GB are free", "train", path)
    axonn.refuses("axonn plan --gpus 8 or fewer for this machine", "train", path)
    axonn.refuses("--force starts it all the same", "train", path)


def test_it_is_refused_without_loading_pytorch(tmp_path: Path) -> None:
    """Which takes longer than everything else together."""
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(of_64(grid={"data": 64, "inter": 32, "col": 4}).model_dump(mode="json")))
    code = (
        "import sys\nfrom axonn.cli import main as cli\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, "train", path, "--device", "cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert ended.stdout.split() == ["2", "False"], ended.stderr
    assert "8192 ranks are more than 4 on each of" in ended.stderr
    assert [found.name for found in tmp_path.iterdir()] == ["plan.yaml"]


def test_force_starts_it(axonn: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, cores=0)
    config = axonn.config()
    axonn.refuses("1 ranks are more than 4 on each of 0 core", "train", config, "--out", axonn.root / "run")
    code, output, error = axonn("train", config, "--out", axonn.root / "run", "--force")
    assert code == 0, error
    assert "in 2 batches" in output


@pytest.mark.parametrize(("inter", "fits"), [(1, True), (8, True), (9, False)])
def test_ranks_are_counted_by_core(inter: int, fits: bool) -> None:
    config = tiny(inter=inter).model_copy(update={"model": tiny().model.model_copy(update={"layers": 9})})
    found = shortage(need_of(config), Host(cores=2, memory=24 * GB), device="cpu")
    assert found == ([] if fits else ["9 ranks are more than 4 on each of 2 cores"])


def test_memory_of_all_ranks_together_counts_on_a_cpu() -> None:
    """State alone of AdamW in float32 has 16 bytes per parameter, on each replica."""
    config = of_64(grid={"data": 2, "inter": 4}, precision="float32")
    need = need_of(config)
    parameters = sum(load_model("gpt-12b").parameters for _ in range(2))
    assert need.device > 16 * parameters
    (said,) = shortage(need, Host(cores=2, memory=24 * GB), device="cpu")
    assert said.endswith("of host memory together, and 24.0 GB are free")
    assert not shortage(need, Host(cores=2, memory=2 * need.device), device="cpu")
    assert not shortage(need, Host(cores=2, memory=None), device="cpu"), "nobody says how much there is"


def test_the_need_is_that_of_the_planner() -> None:
    """Of the fullest GPU, where the planner's simulation holds as many microbatches as any order of messages may."""
    config = of_64(schedule={"name": "1f1b"})
    from axonn.perf.planner.engine_strategy import strategy_of_config

    machine = find_machine("perlmutter")
    predicted = predict(config.model, machine, strategy_of_config(config), batch_size=config.batch_size)
    assert need_of(config).fullest == predicted.memory.total


def test_ranks_that_share_a_gpu_share_its_memory() -> None:
    need = need_of(of_64(grid={"inter": 8}))
    fits = Host(cores=8, memory=1000 * GB, gpus=[2 * need.fullest] * 4)
    assert not shortage(need, fits, device="cuda")
    (said,) = shortage(need, Host(cores=8, memory=1000 * GB, gpus=[2 * need.fullest - 1] * 4), device="cuda")
    assert said.startswith("2 ranks that share a GPU need")
    (said,) = shortage(need, Host(cores=8, memory=1000 * GB, gpus=[need.fullest - 1] * 8), device="cuda")
    assert said.startswith("a rank needs")


def test_the_offloaded_optimizer_is_host_memory() -> None:
    optimizer = {"placement": "offloaded", "bsize": 4_000_000}
    kept, streamed = need_of(of_64()), need_of(of_64(optimizer=optimizer))
    assert streamed.fullest < kept.fullest
    # Float32 weights and two moments of every replica.
    assert streamed.host - kept.host >= 2 * 12 * load_model("gpt-12b").parameters


def test_a_mistake_of_the_configuration_is_said_by_who_finds_it(axonn: CommandLine) -> None:
    axonn.refuses("batch_size 9 is not a multiple of G_data x microbatch_size", "train", axonn.config(batch_size=9))


def test_a_point_that_does_not_fit_is_a_record_of_that(axonn: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, memory=1000)
    experiment = axonn.experiment()
    code, output, error = axonn("run", experiment)
    assert code == 2
    assert "none of the points can run here" in error
    assert "of host memory together, and 0 MB are free" in " ".join(output.split())
    (point,) = points_of(definition.load_experiment(experiment))
    failure = run_point(point, command="test").failure
    assert failure is not None
    assert failure.cause == "unavailable"


def test_a_contender_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    contender = next(c for c in load_contenders() if c.framework == "axonn")
    assert refusal(contender, "tiny", 2, "cpu") is None
    here(monkeypatch, cores=0)
    assert "ranks are more than 4" in (refusal(contender, "tiny", 2, "cpu") or "")


@pytest.mark.parametrize(
    ("cores", "gpus", "said"),
    [
        (64, 8, "run it with: axonn train p.yaml"),
        (1, 4, "On a node of perlmutter: axonn train p.yaml"),
        (1, 16, "It takes 4 nodes of perlmutter, and axonn train starts ranks on one machine alone"),
    ],
)
def test_a_plan_says_where_it_runs(monkeypatch: pytest.MonkeyPatch, cores: int, gpus: int, said: str) -> None:
    here(monkeypatch, cores=cores, memory=24 * GB if cores > 1 else 1000)
    model = tiny().model.model_copy(update={"layers": 16})
    config = tiny(inter=gpus).model_copy(update={"model": model})
    assert said in planning.where_it_runs(config, Path("p.yaml"), find_machine("perlmutter"))


# --- what is free


def control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, files: dict[str, str]) -> int | None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 2000 kB\nMemFree: 1 kB\nMemAvailable:    1000 kB\n")
    (proc / "self" / "cgroup").write_text(entry)
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)
    monkeypatch.setattr(capacity, "PROC", proc)
    monkeypatch.setattr(capacity, "CGROUPS", groups)
    return free_memory()


NONE = 9_223_372_036_854_771_712


@pytest.mark.parametrize(
    ("entry", "files", "free"),
    [
        ("0::/\n", {}, 1_024_000),
        (
            "0::/user/job\n",
            {
                "user/job/memory.max": "max\n",
                "user/job/memory.current": "5\n",
                "user/job/memory.stat": "inactive_file 1\n",
                "user/memory.max": "500000\n",
                "user/memory.current": "300000\n",
                "user/memory.stat": "anon 1\ninactive_file 40000\n",
            },
            240_000,
        ),
        (
            "4:cpu,memory:/job\n0::/\n",
            {
                "memory/job/memory.limit_in_bytes": "700000\n",
                "memory/job/memory.usage_in_bytes": "600000\n",
                "memory/job/memory.stat": "total_inactive_file 100000\n",
                "memory/memory.limit_in_bytes": f"{NONE}\n",
                "memory/memory.usage_in_bytes": "600000\n",
                "memory/memory.stat": "",
            },
            200_000,
        ),
    ],
    ids=["no limit", "version 2, of a parent", "version 1"],
)
def test_free_memory_is_what_system_and_control_groups_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, files: dict[str, str], free: int
) -> None:
    assert control_groups(tmp_path, monkeypatch, entry, files) == free


def test_where_nobody_says_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "PROC", tmp_path)
    assert free_memory() is None
