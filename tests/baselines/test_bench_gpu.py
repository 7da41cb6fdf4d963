"""make bench-gpu in miniature on a CPU: every form of row, what fails is said, and nothing is taken for a GPU's."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from axonn.errors import ConfigError, RecordError
from axonn.grid import ProcessGrid
from axonn.observability.records import Execution, Failure, Machine, Record, Workload, read_records, write_records
from axonn.spans import Span, SpanKind
from axonn.training import provenance
from baselines import environments
from baselines.gpu import bench_gpu
from baselines.gpu.bench_context import Context, NotMeasured
from baselines.gpu.bench_rows import BenchRow, PartResult, read_parts, write_part
from baselines.gpu.bench_summary import same_device
from baselines.gpu.bench_table import result_of
from baselines.gpu.bench_work import BenchPlan, plan_of
from baselines.gpu.parts import part_gpt, part_largest, part_predicted
from baselines.gpu.parts.part_offload import config_of, state_by_model
from baselines.gpu.parts.parts_common import TOLERANCE, agreement, flops_of
from baselines.gpu.peaks import Peak, data_sheet, peak_of
from baselines.gpu.tasks import task_gpt
from baselines.gpu.tasks.task_memory import run as measure_memory
from baselines.gpu.tasks.task_overlap import covered, hidden_share, tail
from experiments.definition import HERE
from plots import figure, style
from plots.figures import gpu
from plots.report import report_page
from tests.plots.test_report import Page

CPU = torch.device("cpu")
PLAN = plan_of("cpu", quick=True)


def context_of(plan: BenchPlan = PLAN, *, seconds: float = 60.0, **fields: Any) -> Context:
    return Context(plan=plan, part="test", deadline=time.monotonic() + seconds, **fields)


# --- what cannot be measured is refused or said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu", "--quick", "--only", "gpt,ofload"], "unknown part 'ofload'; did you mean 'offload'"),
        (["--device", "cpu"], "only the miniature is measured: make bench-gpu DEVICE=cpu QUICK=1"),
        (["--device", "gpu"], "unknown device 'gpu'; known are cpu, cuda"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        bench_gpu.main(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_way_to_the_miniature_is_said() -> None:
    with pytest.raises(ConfigError, match=r"needs a GPU.*make bench-gpu DEVICE=cpu QUICK=1"):
        bench_gpu.main(["--quick"])


def test_a_part_that_fails_is_a_row_and_time_that_is_used_up_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(context: Context) -> Any:
        raise RuntimeError("a broken part")

    monkeypatch.setitem(bench_gpu.PARTS, "unet", bench_gpu.Share(broken, 1))  # type: ignore[index]
    (row,), _ = bench_gpu.attempt("unet", context_of())
    assert row.failure == Failure(cause="error", detail="RuntimeError: a broken part")
    rows, _ = bench_gpu.attempt("offload", context_of(seconds=0.0))
    ours = [row.failure for row in rows if row.ours]
    assert len(ours) == 2
    assert all(f is not None and f.cause == "timeout" and "was used up" in f.detail for f in ours)


def test_a_task_that_fails_or_hangs_leaves_its_cause(tmp_path: Path) -> None:
    context = context_of(runs=tmp_path)
    with pytest.raises(NotMeasured) as lost:
        context.task("images", name="broken", config={"model": {"kind": "unet"}}, warmup=0, batches=1)
    assert lost.value.failure.cause == "error"
    assert "model.name" in lost.value.failure.detail
    with pytest.raises(NotMeasured) as lost:
        context.task("peak", name="hangs", most_s=3.0, size=30_000)
    assert lost.value.failure.cause == "timeout"


# --- the miniature


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the fast parts, without other frameworks."""
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environments, "FOLDER", folder / "none")
        patch.setattr("baselines.gpu.bench_context._RUNS", folder / "runs")
        status = bench_gpu.main(["--device", "cpu", "--quick", "--only", "unet,offload,largest", "--out", str(folder)])
    assert status == 0
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "summary.json").read_text())["rows"]
    return found


def test_the_miniature_says_that_it_was_measured_on_this_cpu(miniature: Path) -> None:
    summary = json.loads((miniature / "summary.json").read_text())
    assert (summary["kind"], summary["device"], summary["quick"]) == ("measured", "cpu", True)
    assert summary["provenance"]["machine"]["cpu"] == provenance.cpu_name()
    assert set(summary["parts"]) == {"offload", "unet", "largest"}
    assert bench_gpu.default_folder("cpu", quick=True) == bench_gpu.RESULTS / "cpu" / "quick"
    assert bench_gpu.default_folder("cuda", quick=False) == bench_gpu.RESULTS


def test_every_row_has_a_number_or_a_reason(miniature: Path) -> None:
    for row in rows_of(miniature):
        assert ("seconds" in row) != ("failure" in row), row
    (zero,) = [row for row in rows_of(miniature) if row["contender"].startswith("DeepSpeed")]
    assert zero["failure"]["cause"] == "unavailable"
    assert "make baselines" in zero["failure"]["detail"]


def test_offloading_saves_what_the_memory_model_says(miniature: Path) -> None:
    resident, offloaded = [row for row in rows_of(miniature) if row["part"] == "offload" and row.get("ours")]
    for row in (resident, offloaded):
        assert abs(row["model_error_pct"]) < 1.0
    assert resident["memory"]["after_init"] >= 4 * offloaded["memory"]["after_init"]
    assert offloaded["memory"]["host"] > 0
    assert offloaded["loss_difference"] <= TOLERANCE
    assert state_by_model(config_of(context_of(), "device")) == 20 * PLAN.offload.model.parameters


def test_throughput_is_that_of_the_named_formula(miniature: Path) -> None:
    (unet,) = [row for row in rows_of(miniature) if row["part"] == "unet"]
    flops = 3 * PLAN.unet_batch * PLAN.unet.forward_flops
    assert unet["tflops"] == pytest.approx(flops / unet["seconds"] / 1e12)
    assert unet["units_per_s"] == pytest.approx(PLAN.unet_batch / unet["seconds"])
    work = PLAN.gpts[0]
    b, s, n, h, v = work.batch_size, work.model.seq_len, work.model.layers, work.model.hidden, work.model.vocab
    expected = 72 * b * s * n * h * h * (1 + s / (6 * h)) + 6 * b * s * h * v
    assert flops_of(work.model, work.batch_size) == pytest.approx(expected)


def test_records_are_of_the_one_schema(miniature: Path) -> None:
    records = read_records(miniature / "records.json")
    assert {r.ran.framework for r in records} >= {"AxoNN", "PyTorch fully_shard, CPUOffloadPolicy"}
    assert all(r.kind == "measured" and r.machine.device == "cpu" for r in records)
    assert all((r.failure is None) == (r.batch_time_s is not None) for r in records)


def test_parts_are_kept_and_those_of_another_device_left_out(miniature: Path) -> None:
    parts = read_parts(miniature / "parts", list(bench_gpu.PARTS))
    assert list(parts) == ["offload", "unet", "largest"]
    assert same_device(parts, "NVIDIA H100 80GB HBM3") == {}
    part = parts["unet"]
    clean = part.machine.model_copy(update={"commit": "abc"})
    done = part.model_copy(update={"machine": clean})
    assert bench_gpu.is_done(done, clean)
    assert not bench_gpu.is_done(done, clean.model_copy(update={"commit": "abd"}))
    assert not bench_gpu.is_done(
        part.model_copy(update={"machine": clean}), clean.model_copy(update={"commit": "abc+"})
    )
    late = BenchRow(part="unet", model="m", contender="c", failure=Failure(cause="timeout", detail="d"))
    assert not bench_gpu.is_done(done.model_copy(update={"rows": [late]}), clean)
    (miniature / "parts" / "grids.json").write_text('{"schema_": "another"}')
    assert "grids" not in read_parts(miniature / "parts", list(bench_gpu.PARTS))


# --- equal work


def test_engine_and_plain_loop_take_turns_and_their_losses_agree() -> None:
    config = PLAN.gpts[0].config(steps=8).model_dump(mode="json")
    arguments: dict[str, Any] = {"device": CPU, "seconds": 60.0, "config": config, "warmup": 1, "batches": 2}
    found = task_gpt.run(contenders=["engine", "loop"], rounds=3, **arguments)
    assert found["failed"] == {}
    assert [len(found["losses"][name]) for name in ("engine", "loop")] == [7, 7]
    assert [len(found["times"][name]) for name in ("engine", "loop")] == [3, 3]
    engine, loop = found["losses"]["engine"], found["losses"]["loop"]
    assert engine[0] != engine[-1]
    assert "failure" not in agreement(loop, engine)
    # The same weights are made without an engine beside it.
    alone = task_gpt.run(contenders=["loop"], rounds=2, **arguments)["losses"]["loop"]
    assert alone == loop[: len(alone)]
    other = task_gpt.run(contenders=["loop"], rounds=2, **arguments | {"config": config | {"seed": 7}})
    failure = agreement(other["losses"]["loop"], engine)["failure"]
    assert failure.cause == "not-comparable"


def test_a_compiler_that_is_missing_does_not_keep_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    real = task_gpt.plain_loop

    def loop(*arguments: Any, compiled: bool) -> Any:
        def train(step: int) -> float:
            raise RuntimeError("no compiler")

        return SimpleNamespace(train_batch=train) if compiled else real(*arguments, compiled=False)

    monkeypatch.setattr(task_gpt, "plain_loop", loop)
    config = PLAN.gpts[0].config(steps=8)
    found = task_gpt.run(
        device=CPU,
        seconds=60.0,
        config=config.model_dump(mode="json"),
        contenders=["loop", "compiled"],
        warmup=1,
        rounds=2,
        batches=1,
    )
    row = part_gpt.row_of(context_of(), config, "compiled", found, found["losses"]["loop"])
    assert row.failure == Failure(cause="error", detail="RuntimeError: no compiler")
    assert len(found["times"]["loop"]) == 2


def test_contenders_share_a_process_where_memory_allows() -> None:
    small, _, large = plan_of("cuda", quick=False).gpts
    h100 = 85_000_000_000
    assert part_gpt.groups(small, h100) == [["engine", "loop", "compiled"]]
    assert part_gpt.groups(large, h100) == [["engine", "loop"], ["engine", "compiled"]]
    assert part_gpt.groups(large, 40_000_000_000) == [["engine"], ["loop"], ["compiled"]]
    assert [round(w.model.parameters / 1e6) for w in (small, large)] == [163, 1417]


def test_memory_that_runs_out_beside_others_is_tried_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def task(self: Context, task: str, *, contenders: list[str], **arguments: Any) -> dict[str, Any]:
        if len(contenders) > 1:
            raise NotMeasured(Failure(cause="out-of-memory", detail="no room"))
        losses, times = {contenders[0]: [1.0, 0.9]}, {contenders[0]: [2.0, 2.0]}
        return {"losses": losses, "times": times, "failed": {}, "torch": "2"}

    monkeypatch.setattr(Context, "task", task)
    rows = part_gpt.own_rows(context_of(), PLAN.gpts[0], None)
    assert [row.contender for row in rows] == list(part_gpt.LABELS.values())
    assert all(row.failure is None for row in rows)
    assert [(row.ratio, row.paired) for row in rows] == [(None, None), (1.0, False), (1.0, False)]


# --- arithmetic


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
    ],
)
def test_peaks_are_the_dense_ones_of_data_sheets(name: str, tflops: float) -> None:
    known = data_sheet(name)
    assert known is not None
    assert known.tflops == tflops
    assert "data sheet" in known.source


def test_an_unknown_device_is_held_against_its_own_best_product() -> None:
    found = peak_of("Some GPU", {"product_tflops": 123.0, "product_size": 8192})
    assert found.tflops == 123.0
    assert "best measured bfloat16 product of size 8192" in found.source
    assert peak_of("Some GPU", {}).tflops is None


def span(kind: SpanKind, start: float, end: float) -> Span:
    return Span(0, kind, 0, -1, -1, -1, start, end)


def test_copies_are_hidden_as_far_as_they_do_not_make_the_step_longer() -> None:
    assert hidden_share(copies_s=2.0, offloaded_s=3.5, resident_s=3.0) == 0.75
    assert hidden_share(copies_s=2.0, offloaded_s=9.0, resident_s=3.0) == 0.0
    assert hidden_share(copies_s=2.0, offloaded_s=2.9, resident_s=3.0) == 1.0
    assert hidden_share(copies_s=0.0, offloaded_s=3.0, resident_s=3.0) == 0.0
    spans = [
        span(SpanKind.BACKWARD, 0, 4),
        span(SpanKind.COPY, 3, 6),
        span(SpanKind.OPTIMIZER, 5, 7),
        span(SpanKind.COPY, 7, 8),
    ]
    assert tail(spans) == 4
    assert covered(spans) == (4, 2)


def fitting(monkeypatch: pytest.MonkeyPatch, most: dict[str, int]) -> list[tuple[str, int]]:
    """Models with more layers than `most` of the placement run out of memory; what was tried."""
    tried = []

    def task(self: Context, task: str, *, config: dict[str, Any], **arguments: Any) -> dict[str, Any]:
        placement, layers = config["optimizer"]["placement"], config["model"]["layers"]
        tried.append((placement, layers))
        if layers > most[placement]:
            raise NotMeasured(Failure(cause="out-of-memory", detail="CUDA out of memory"))
        return {"seconds": 1.0, "memory": {}, "batch_peak": None}

    monkeypatch.setattr(Context, "task", task)
    return tried


def test_the_largest_model_is_searched_from_where_the_memory_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = fitting(monkeypatch, {"device": 14, "offloaded": 200})
    plan = plan_of("cuda", quick=False)
    peak = Peak(device="d", source="s", memory=85_000_000_000)
    monkeypatch.setattr(part_largest, "free_memory", lambda: 130_000_000_000)
    (resident, offloaded), about = part_largest.measure(context_of(plan, peak=peak))
    layers = [n for placement, n in tried if placement == "device"]
    assert len(layers) <= part_largest.PROBES
    assert resident.model == "gpt-14x4096"
    assert layers[0] in range(14, 18)
    assert resident.note is not None
    assert "out-of-memory" in resident.note
    assert offloaded.note is not None
    assert "limited by host memory" in offloaded.note
    assert offloaded.parameters is not None
    assert resident.parameters is not None
    assert offloaded.parameters > 2 * resident.parameters
    assert about["device_bytes"] == 85_000_000_000


def test_no_model_that_fits_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    fitting(monkeypatch, {"device": 0, "offloaded": 0})
    rows, _ = part_largest.measure(context_of())
    assert all(row.failure is not None and row.failure.cause == "out-of-memory" for row in rows)


@pytest.mark.parametrize(
    ("trains", "refused", "step"), [(None, 24, 21), (None, 1, None), (24, None, 26), (100, None, 100), (20, 24, 22)]
)
def test_the_next_model_to_try(trains: int | None, refused: int | None, step: int | None) -> None:
    found = part_largest.next_layers(trains, refused, 100)
    assert found == (None if trains == 100 else step)
    assert part_largest.next_layers(23, 24, 100) is None


def test_memory_is_counted_by_category() -> None:
    config = config_of(context_of(), "offloaded")
    found = measure_memory(device=CPU, seconds=60.0, config=config.model_dump(mode="json"), warmup=1, batches=1)
    memory = found["memory"]
    parts = sum(memory[name] for name in ("parameters", "gradients", "optimizer_state", "buckets"))
    assert memory["after_init"] == parts
    assert "step_peak" not in memory, "nobody counts what is allocated on a CPU"


# --- predicted


def test_predictions_need_a_machine_file_of_this_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def reason(context: Context) -> str:
        ((row,), _) = part_predicted.measure(context)
        assert row.failure is not None
        return row.failure.detail

    assert "run it first" in reason(context_of())
    config = PLAN.gpts[0].config(steps=2)
    row = BenchRow(
        part="gpt", model="m", contender="AxoNN", ours=True, seconds=2.0, config=config.model_dump(mode="json")
    )
    part = PartResult(
        part="gpt", rows=[row], quick=True, seconds=1.0, created="now", command="c", machine=Machine(name="x")
    )
    write_part(tmp_path, part)
    earlier = read_parts(tmp_path, ["gpt"])
    context = context_of(earlier=earlier, peak=Peak(device="NVIDIA H100", source="s"))
    monkeypatch.setattr(part_predicted, "LOCAL", tmp_path / "none.yaml")
    assert "axonn calibrate makes it" in reason(context)
    monkeypatch.setattr(part_predicted, "LOCAL_GPU", HERE / "machines" / "summit.yaml")
    on_gpu = context_of(plan_of("cuda", quick=True), earlier=earlier, peak=context.peak)
    assert "measured was on 'nvidia h100'" in reason(on_gpu)
    monkeypatch.setattr(part_predicted, "describes", lambda machine, context: None)
    ((found,), _) = part_predicted.measure(on_gpu)
    assert found.failure is None
    assert found.predicted_s is not None
    assert found.error_pct == pytest.approx(100 * (found.predicted_s / 2.0 - 1))
    assert "predicted" in result_of(found)


# --- the machine


def test_the_gpu_is_told_as_nvidia_smi_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def printed(text: str) -> None:
        done = SimpleNamespace(stdout=text)
        monkeypatch.setattr(provenance.subprocess, "run", lambda *a, **k: done)

    printed(
        "NVIDIA H100 80GB HBM3, 570.86.15, 1980, 1980, 700.00\nNVIDIA H100 80GB HBM3, 570.86.15, 345, 1980, 700.00\n"
    )
    clocks = {"sm_mhz": 1980.0, "sm_max_mhz": 1980.0, "power_limit_w": 700.0}
    assert provenance.gpu_facts() == {"device": "NVIDIA H100 80GB HBM3", "driver": "570.86.15", "clocks": clocks}
    printed("NVIDIA Thing, 570.1, [N/A], 1980, [N/A]\n")
    assert provenance.gpu_facts() == {"device": "NVIDIA Thing", "driver": "570.1", "clocks": {"sm_max_mhz": 1980.0}}
    printed("")
    assert provenance.gpu_facts() == {}

    def missing(*arguments: Any, **options: Any) -> Any:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(provenance.subprocess, "run", missing)
    assert provenance.gpu_facts() == {}
    monkeypatch.setattr(provenance.subprocess, "run", subprocess.run)


def test_a_record_keeps_driver_and_clocks(tmp_path: Path) -> None:
    machine = Machine(name="m", device="NVIDIA H100", driver="570", cuda="13.0", clocks={"sm_mhz": 1980.0})
    record = Record(
        kind="measured",
        experiment="gpu",
        point="p",
        asked=Workload.of(PLAN.gpts[0].model, gpus=1, batch_size=8, precision="bfloat16"),
        ran=Execution(framework="AxoNN", version="1", grid=ProcessGrid()),
        machine=machine,
        source="s",
        batch_time_s=1.0,
    )
    write_records(tmp_path / "r.json", [record])
    (read,) = read_records(tmp_path / "r.json")
    assert read.machine == machine
    assert provenance.this_machine().driver is None


# --- the report


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(figure, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(style, "OUT", tmp_path / "out")
    return tmp_path


def test_the_report_says_that_nothing_was_measured_on_a_gpu(elsewhere: Path) -> None:
    text = report_page.render()
    assert "Nothing has been measured on a GPU here" in text
    assert "make bench-gpu" in text


def test_what_was_measured_is_drawn_and_tabled(miniature: Path, elsewhere: Path) -> None:
    path = figure.RESULTS / "gpu" / "summary.json"
    path.parent.mkdir(parents=True)
    path.write_text((miniature / "summary.json").read_text())
    assert {p.suffix for p in gpu.draw(gpu.load(path), style.OUT, "gpu")} == {".png", ".svg"}
    page = Page(report_page.render())
    resident, offloaded, _ = page.table("The memory optimisation", inside="gpu")
    assert resident["what"] == "AxoNN, state on the device"
    assert offloaded["error of that (%)"] in {"0.0", "+0.0", "\N{MINUS SIGN}0.0"}
    boxes = [e.text for e in page.all("div")]
    assert any("the miniature, whose times mean nothing" in text for text in boxes)
    assert any("Part gpt was not measured; run: make bench-gpu" in text for text in boxes)


def test_a_miniature_never_takes_the_place_of_a_gpus_picture() -> None:
    assert gpu.picture_name(gpu.SUMMARY) == "gpu"
    assert gpu.picture_name(gpu.RESULTS / "cpu" / "quick" / "summary.json") == "gpu-cpu-quick"


@pytest.mark.parametrize("content", ["", "[]", '{"rows": []}', '{"rows": 3}'])
def test_what_is_no_summary_is_said(elsewhere: Path, content: str) -> None:
    path = figure.RESULTS / "gpu" / "summary.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(RecordError, match="make bench-gpu"):
        gpu.load(path)
    assert "no summary of a run" in report_page.render()
