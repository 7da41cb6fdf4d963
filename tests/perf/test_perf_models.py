"""Machine file, kernel, network and memory models: formulas, fits as stated, errors that say what to change."""

import csv
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml

from axonn.config.train_config import load_yaml
from axonn.errors import ConfigError
from axonn.grid import ProcessGrid
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.registry import outline_of
from axonn.perf.machine import coefficient_fit
from axonn.perf.machine.kernel_times import gemm_time, stream_time
from axonn.perf.machine.machine_file import Curve, MachineFile, load_machine
from axonn.perf.machine.network import (
    GroupPlacement,
    all_reduce_time,
    edge,
    message_time,
    place,
    ring_factor,
    shared_with,
)
from axonn.perf.strategy import Strategy
from axonn.perf.timing.memory_model import DoesNotFit, model_state_bytes, stage_memory, stage_parameters
from axonn.perf.timing.stage_times import stage_times
from axonn.schedules import ScheduleSpec

ROOT = Path(__file__).parents[2]
SUMMIT = ROOT / "experiments/machines/summit.yaml"
PUBLISHED = ROOT / "results/published"


@pytest.fixture(scope="module")
def machine() -> MachineFile:
    return load_machine(SUMMIT)


@pytest.fixture(scope="module")
def gpt12b() -> GPTConfig:
    return load_yaml(ROOT / "experiments/models/gpt-12b.yaml", GPTConfig)


def rows_of(name: str) -> list[dict[str, str]]:
    with (PUBLISHED / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- machine file


def test_an_unknown_key_of_a_machine_file_is_an_error_with_a_hint(tmp_path: Path) -> None:
    text = SUMMIT.read_text(encoding="utf-8").replace("  vector_peak:", "  vector_peek:")
    path = tmp_path / "machine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"unknown key 'gpu.vector_peek'; did you mean 'vector_peak'"):
        load_machine(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("unit: TFLOP/s, status: text", "unit: GB/s, status: text"),  # a rate in the unit of a bandwidth
        ("status: text, source", "status: guessed, source"),
        ('source: "IPDPS 2022, section VI; base of its percentages of peak"', "note: none"),
    ],
)
def test_a_number_without_proper_unit_source_or_status_is_refused(tmp_path: Path, old: str, new: str) -> None:
    text = SUMMIT.read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "machine.yaml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"gpu\.peak"):
        load_machine(path)


def test_quantities_convert_to_si(machine: MachineFile) -> None:
    assert machine.gpu.peak.si == 125e12
    assert machine.gpu.memory.si == 16 * 2**30
    assert machine.gpu.kernel_latency.si == pytest.approx(4e-6)


def test_a_curve_is_continuous_and_never_falls(machine: MachineFile) -> None:
    reduce = machine.network.all_reduce
    curves = [reduce.intra_node, reduce.inter_node]
    for p2p in machine.network.p2p.values():
        curves += [p2p.intra_node, p2p.inter_node]
    for curve in curves:
        sizes = np.geomspace(1, 1e10, 400)
        seconds = np.array([curve.seconds(s) for s in sizes])
        assert np.all(np.diff(seconds) > -1e-6)  # fitted pieces may meet a microsecond apart
        for before, after in pairwise(curve.segments):
            middle = (before.max_bytes + after.min_bytes) / 2
            ends = curve.seconds(before.max_bytes), curve.seconds(after.min_bytes)
            assert curve.seconds(middle) == pytest.approx(sum(ends) / 2)


# --- fits are what the file says


@pytest.mark.parametrize(
    ("library", "place_name", "column"),
    [(lib, f"{way}_node", f"{lib}_{way}_ms") for lib in ("mpi", "nccl") for way in ("intra", "inter")],
)
def test_message_curves_have_the_error_they_state(
    machine: MachineFile, library: str, place_name: str, column: str
) -> None:
    curve: Curve = getattr(machine.network.p2p[library], place_name)  # type: ignore[index]
    check_curve(curve, rows_of("ipdps22_fig3_p2p_ms.csv"), column)


@pytest.mark.parametrize("way", ["intra", "inter"])
def test_all_reduce_curves_have_the_error_they_state(machine: MachineFile, way: str) -> None:
    curve: Curve = getattr(machine.network.all_reduce, f"{way}_node")
    check_curve(curve, rows_of("ipdps22_fig4_allreduce_ms.csv"), f"nccl_{way}_ms")


def check_curve(curve: Curve, rows: list[dict[str, str]], column: str) -> None:
    errors = [abs(curve.seconds(float(r["bytes"])) / (float(r[column]) * 1e-3) - 1) for r in rows]
    assert curve.fit.points == len(rows)
    assert 100 * np.mean(errors) == pytest.approx(curve.fit.in_sample_error_pct, abs=0.1)
    assert curve.fit.held_out_error_pct < 7


def test_the_slowdown_inside_layers_is_the_fit_of_the_published_layers(
    machine: MachineFile, capsys: pytest.CaptureFixture[str]
) -> None:
    coefficient_fit.main([str(PUBLISHED / "v100_kernels_ms.csv"), "--machine", str(SUMMIT)])
    printed = yaml.safe_load(capsys.readouterr().out)
    stated = machine.gpu.in_layer
    assert printed["gemm_slowdown"] == pytest.approx(stated.gemm_slowdown, abs=2e-3)
    assert printed["stream_slowdown"] == pytest.approx(stated.stream_slowdown, abs=2e-3)
    assert printed["fit"]["in_sample_error_pct"] == pytest.approx(stated.fit.in_sample_error_pct, abs=0.1)
    assert printed["fit"]["held_out_error_pct"] == pytest.approx(stated.fit.held_out_error_pct, abs=0.1)
    assert stated.fit.held_out_error_pct < 8


def test_the_gemm_curve_states_a_useful_fit(machine: MachineFile) -> None:
    report = machine.gpu.gemm.fit
    assert report.points == 160
    assert report.in_sample_error_pct < 12
    assert report.held_out_error_pct < 1.3 * report.in_sample_error_pct


@pytest.mark.skipif("DEEPBENCH_GEMM_CSV" not in os.environ, reason="needs DEEPBENCH_GEMM_CSV, the path of the CSV")
def test_the_gemm_curve_has_the_error_it_states(machine: MachineFile) -> None:
    gpu = machine.gpu
    with open(os.environ["DEEPBENCH_GEMM_CSV"], newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    every = replace_alignment(machine)  # the benchmark pads its matrices
    errors = [
        abs(gemm_time(every.gpu, int(r["m"]), int(r["n"]), int(r["k"])) / (float(r["time_ms"]) * 1e-3) - 1)
        for r in rows
    ]
    assert len(rows) == gpu.gemm.fit.points
    assert 100 * np.mean(errors) == pytest.approx(gpu.gemm.fit.in_sample_error_pct, abs=0.2)


def replace_alignment(machine: MachineFile) -> MachineFile:
    alignment = machine.gpu.alignment.model_copy(update={"value": 1.0})
    return machine.model_copy(update={"gpu": machine.gpu.model_copy(update={"alignment": alignment})})


def test_the_fit_finds_the_coefficients_that_made_the_data() -> None:
    rng = np.random.default_rng(3)
    shapes = np.stack(
        [rng.integers(1, 60, 60) * 128, rng.integers(1, 60, 60) * 64, rng.integers(2, 60, 60) * 64], axis=1
    )
    true = np.array([6e-6, 100.0, 0.7, 0.8, 0.88, 0.8, 0.6, 0.4, 0.3])
    machine = {"peak": 125e12, "bandwidth": 900e9, "multiprocessors": 80}
    seconds = coefficient_fit.gemm_model(true, shapes.astype(float), **machine)  # type: ignore[arg-type]
    found = coefficient_fit.fit_gemm(shapes.astype(float), seconds, **machine)  # type: ignore[arg-type]
    again = coefficient_fit.gemm_model(found, shapes.astype(float), **machine)  # type: ignore[arg-type]
    assert np.mean(np.abs(again / seconds - 1)) < 0.03


def test_the_fit_and_the_model_are_one_formula(machine: MachineFile) -> None:
    curve = machine.gpu.gemm
    p = np.array(
        [
            curve.launch_us * 1e-6,
            curve.k_overhead,
            curve.memory_efficiency,
            curve.wave_quantisation,
            *(t.efficiency for t in curve.tiles),
        ]
    )
    shapes = [(4096, 13536, 4512), (512, 2112, 6336), (8, 4096, 512), (1504, 4512, 1024), (1024, 8, 65536)]
    vectorised = coefficient_fit.gemm_model(
        p, np.array(shapes, dtype=float), peak=125e12, bandwidth=900e9, multiprocessors=80
    )
    assert [gemm_time(machine.gpu, *s) for s in shapes] == pytest.approx(list(vectorised))


# --- kernels


def test_more_work_never_takes_less_time(machine: MachineFile) -> None:
    sizes = [8, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
    for m, n, k in [(4096, 4096, 4096), (512, 1504, 4512), (128, 128, 128)]:
        for times in (
            [gemm_time(machine.gpu, s, n, k) for s in sizes],
            [gemm_time(machine.gpu, m, s, k) for s in sizes],
            [gemm_time(machine.gpu, m, n, s) for s in sizes],
            [gemm_time(machine.gpu, m, n, k, batch=s) for s in sizes],
        ):
            assert all(a <= b * (1 + 1e-12) for a, b in pairwise(times))


def test_no_product_is_faster_than_the_peak(machine: MachineFile) -> None:
    for s in (64, 512, 4096, 16384):
        assert 2 * s**3 / gemm_time(machine.gpu, s, s, s) < machine.gpu.peak.si
        assert 2 * (s + 1) ** 3 / gemm_time(machine.gpu, s + 1, s + 1, s + 1) < machine.gpu.vector_peak.si


def test_only_odd_dimensions_run_without_matrix_units(machine: MachineFile) -> None:
    """Head widths 188 and 156 of the published models, and 780 of a cut layer, are multiples of 4 only."""
    aligned = gemm_time(machine.gpu, 2048, 2336, 9360)
    assert gemm_time(machine.gpu, 2048, 2340, 9360) == pytest.approx(aligned, rel=0.01)
    assert gemm_time(machine.gpu, 2048, 2339, 9360) > 3 * aligned


def test_streams_take_bytes_over_bandwidth(machine: MachineFile) -> None:
    assert stream_time(machine.gpu, 750e9, kernels=3) == pytest.approx(1 + 12e-6)


def test_small_shards_and_small_microbatches_are_less_efficient(machine: MachineFile, gpt12b: GPTConfig) -> None:
    def per_sequence(microbatch: int, col: int) -> float:
        strategy = Strategy(grid=ProcessGrid(col=col, inter=2), microbatch_size=microbatch, partition_messages=False)
        stage = stage_times(outline_of(gpt12b), machine, strategy)[0]
        compute = stage.forward + stage.backward - stage.reduce_forward - stage.reduce_backward
        return col * compute / microbatch

    assert per_sequence(1, 1) > per_sequence(2, 1) > per_sequence(8, 1)
    assert per_sequence(2, 12) > per_sequence(2, 3) > per_sequence(2, 1)


# --- network


def test_ring_all_reduce_is_its_formula_on_the_configuration_it_was_measured_with(machine: MachineFile) -> None:
    """Six ranks of a node and twelve of two are the measured curves; others move 2 (n - 1) / n over their links."""
    reduce = machine.network.all_reduce
    whole = GroupPlacement(6, 1, 6, 2, 1, 1)
    assert all_reduce_time(machine, 1e8, whole) == pytest.approx(reduce.intra_node.seconds(1e8))
    two = GroupPlacement(12, 2, 6, 2, 1, 1)
    alone = machine.model_copy(update={"network": machine.network.model_copy(update={"nccl_injection": None})})
    assert all_reduce_time(alone, 1e8, two) == pytest.approx(reduce.inter_node.seconds(1e8))
    assert [ring_factor(n) for n in (2, 4, 8)] == [1.0, 1.5, 1.75]


def test_all_reduce_of_nothing_or_alone_takes_no_time(machine: MachineFile) -> None:
    assert all_reduce_time(machine, 1e9, GroupPlacement(1, 1, 1, 1, 1, 1)) == 0
    assert all_reduce_time(machine, 0, GroupPlacement(6, 1, 6, 2, 1, 1)) == 0


def test_groups_that_share_links_share_their_bandwidth(machine: MachineFile) -> None:
    alone = GroupPlacement(8, 8, 1, 1, 2, 1)  # two groups: one per port
    shared = replace(alone, sharing_network=6)
    latency = 3 * machine.network.all_reduce.inter_node.latency(1e9)
    two, six = (all_reduce_time(machine, 1e9, p) - latency for p in (alone, shared))
    assert six / two == pytest.approx(3)


def test_in_training_runs_nccl_has_less_of_the_network(machine: MachineFile) -> None:
    """Collectives and messages of NCCL; the message-passing library has all of it."""
    slow = machine.network.nccl_injection
    assert slow is not None
    half = slow.model_copy(update={"value": slow.value / 2})
    slower = machine.model_copy(update={"network": machine.network.model_copy(update={"nccl_injection": half})})
    group = GroupPlacement(8, 8, 1, 1, 6, 1)
    latency = 3 * machine.network.all_reduce.inter_node.latency(1e9)
    for m, gb_per_s in ((machine, slow.value), (slower, half.value)):
        # Six rings of eight, each byte 7/4 times; measured at 22.5 GB/s where 40 GB/s through the sockets hold it up.
        bus = m.network.all_reduce.intra_node.asymptotic_bandwidth * ring_factor(6) / ring_factor(12)
        seconds = 6e9 * 1.75 / (gb_per_s * 1e9) * bus / m.network.all_reduce.inter_node.asymptotic_bandwidth
        assert all_reduce_time(m, 1e9, group) - latency == pytest.approx(seconds)
        assert message_time(m, 4e7, library="nccl", same_node=False, flows=6).transfer == pytest.approx(
            6 * 4e7 / (gb_per_s * 1e9)
        )
    times = [message_time(m, 4e7, library="mpi", same_node=False, flows=6) for m in (machine, slower)]
    assert times[0] == times[1]


def test_groups_of_unequal_size_share_a_node_while_they_last(machine: MachineFile) -> None:
    where = GroupPlacement(2, 2, 1, 1, 6, 1)
    assert shared_with(where, 2.0, [2.0] * 6) == where
    # 7 units go through the node: 3.5 times the largest group's own. A small group shares with all others to its end.
    assert shared_with(where, 2.0, [2.0, 1.0, 1.0, 1.0, 1.0, 1.0]).sharing_network == pytest.approx(3.5)
    assert shared_with(where, 1.0, [2.0, 1.0, 1.0, 1.0, 1.0, 1.0]) == where
    alone = replace(where, sharing_network=1)
    assert shared_with(alone, 2.0, [2.0, 1.0]) == alone


def test_a_group_inside_a_socket_beats_one_across_sockets_and_nodes(machine: MachineFile) -> None:
    def time(grid: ProcessGrid) -> float:
        return all_reduce_time(machine, 4e7, place(grid, ("col",), 0, machine))

    inside = time(ProcessGrid(data=16, col=3, ranks_per_node=6))
    across = time(ProcessGrid(data=8, col=6, ranks_per_node=6))
    straddling = time(ProcessGrid(data=4, col=12, ranks_per_node=6))
    assert inside < across < straddling


def test_placement_counts_what_is_shared(machine: MachineFile) -> None:
    axonn = ProcessGrid(data=8, inter=6, ranks_per_node=6)  # inter fastest: each node a pipeline
    assert place(axonn, ("data",), 0, machine) == GroupPlacement(8, 8, 1, 1, 6, 1)
    megatron = ProcessGrid(data=8, inter=2, col=3, order=("inter", "data", "row", "col"), ranks_per_node=6)
    assert place(megatron, ("col",), 0, machine) == GroupPlacement(3, 1, 3, 1, 1, 1)
    assert place(megatron, ("data",), 0, machine) == GroupPlacement(8, 4, 2, 2, 3, 3)


def test_edges_know_when_they_leave_the_node() -> None:
    axonn = ProcessGrid(data=4, inter=12, ranks_per_node=6)
    assert [edge(axonn, s).same_node for s in range(11)] == [s != 5 for s in range(11)]
    assert edge(axonn, 5).flows == 1
    baseline = ProcessGrid(data=8, inter=2, col=3, order=("inter", "data", "row", "col"), ranks_per_node=6)
    assert edge(baseline, 0).flows == 6


def test_messages_that_leave_a_node_together_share_its_injection(machine: MachineFile) -> None:
    one = message_time(machine, 4e7, library="mpi", same_node=False)
    six = message_time(machine, 4e7, library="mpi", same_node=False, flows=6)
    assert one.seconds == pytest.approx(machine.network.p2p["mpi"].inter_node.seconds(4e7))
    assert six.transfer == pytest.approx(6 * 4e7 / machine.network.injection.si)
    assert message_time(machine, 4e7, library="mpi", same_node=True).seconds < one.seconds


# --- memory


def test_model_state_is_the_published_formula_to_the_byte() -> None:
    phi = 1_994_000_000
    assert model_state_bytes(phi) == 20 * phi
    assert model_state_bytes(phi, optimizer="offloaded", bsize=4_000_000, buckets=1) == 4 * phi + 16 * 4_000_000
    assert model_state_bytes(phi, optimizer="offloaded", bsize=4_000_000, buckets=2) == 4 * phi + 32 * 4_000_000
    assert model_state_bytes(phi, optimizer="sharded", shards=8) == 4 * phi + 2 * phi
    assert model_state_bytes(phi, optimizer="sharded", shards=1) == 20 * phi


def test_stages_hold_every_parameter_once(gpt12b: GPTConfig) -> None:
    strategy = Strategy(grid=ProcessGrid(data=8, inter=6), microbatch_size=8)
    counts = stage_parameters(outline_of(gpt12b), strategy)
    # The last stage holds a copy of the embedding as its head.
    assert gpt12b.tied_head
    assert sum(counts) == gpt12b.parameters + gpt12b.vocab * gpt12b.hidden
    assert counts[1] == 8 * (12 * 4512**2 + 13 * 4512)
    cut = stage_parameters(outline_of(gpt12b), Strategy(grid=ProcessGrid(inter=6, col=3), microbatch_size=8))
    # Cut along col: the matrices, the biases of QKV and FC1; whole: norms, biases of projection and FC2.
    assert cut[1] == 8 * (12 * 4512**2 + 7 * 4512) // 3 + 8 * 6 * 4512


def test_what_does_not_fit_says_so_with_numbers(machine: MachineFile, gpt12b: GPTConfig) -> None:
    grid = ProcessGrid(data=8, inter=6)
    full = Strategy(grid=grid, microbatch_size=8)
    memory = stage_memory(outline_of(gpt12b), machine, full, stage=0, held=6)
    assert memory.model_state == 20 * stage_parameters(outline_of(gpt12b), full)[0]
    # The input of every layer, and the mask of the embedding's dropout.
    assert memory.checkpoints == 6 * (8 * 2 + 1) * (8 * 512 * 4512)
    assert not memory.fits
    with pytest.raises(DoesNotFit, match=r"stage 0 needs 4\d\.\d\d GB .*has 17\.18 GB; use more stages"):
        memory.check()
    small = full.model_copy(update={"optimizer": "offloaded"})
    for stage in (0, 5):
        stage_memory(outline_of(gpt12b), machine, small, stage=stage, held=6).check()


# --- strategy


def test_a_strategy_refuses_what_does_not_divide(gpt12b: GPTConfig) -> None:
    strategy = Strategy(grid=ProcessGrid(data=8, inter=6, col=5), microbatch_size=3)
    with pytest.raises(ConfigError, match="batch_size 100 is no multiple"):
        strategy.microbatches(100)
    with pytest.raises(ConfigError, match=r"heads \(24\) .* change col"):
        strategy.check(gpt12b)
    with pytest.raises(ConfigError, match="50 stages need"):
        Strategy(grid=ProcessGrid(inter=50), microbatch_size=1).virtual_spans(outline_of(gpt12b))
    outline = outline_of(gpt12b)
    stages = Strategy(grid=ProcessGrid(inter=5), microbatch_size=1).spans_of_stages(outline)
    assert [len({outline.links[i].block for i in span} - {None}) for (span,) in stages] == [10, 10, 10, 9, 9]


def test_a_strategy_reads_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "strategy.yaml"
    path.write_text(
        "grid: {data: 8, inter: 2, col: 3}\norder: [inter, data, row, col]\nmicrobatch_size: 2\n"
        "schedule: {name: 1f1b}\nblocking_messages: true\nmessage_library: nccl\noptimizer: sharded\n",
        encoding="utf-8",
    )
    strategy = load_yaml(path, Strategy)
    assert strategy.order == ("inter", "data", "row", "col")
    assert strategy.schedule == ScheduleSpec(name="1f1b")
    path.write_text("grid: {}\nmicrobatch_size: 2\nblocking_message: true\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="did you mean 'blocking_messages'"):
        load_yaml(path, Strategy)
