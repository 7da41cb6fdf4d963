"""Measured kernels in a machine file: reading between the points, and numbers that cannot be."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from axonn.config.train_config import TrainConfig
from axonn.errors import ConfigError
from axonn.grid import ProcessGrid
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.perf.layers.kernel_operations import AttentionKernel, Convolution, MemoryBoundKernel, Product
from axonn.perf.machine.kernel_tables import ProductTable, StreamTable
from axonn.perf.machine.kernel_times import Kernels
from axonn.perf.machine.machine_file import MachineFile, load_machine
from axonn.perf.planner.engine_strategy import strategy_of_config
from axonn.perf.prediction import predict

ROOT = Path(__file__).parents[2]
SIZES = (16, 128, 1024)


def rate_table(*, rate: float = 1e9) -> dict[str, Any]:
    """Products at one rate."""
    us = [2e6 * m * n * k / rate for m, n, k in product(SIZES, repeat=3)]
    return {"m": list(SIZES), "n": list(SIZES), "k": list(SIZES), "us": us}


def content(**tables: Any) -> dict[str, Any]:
    """A machine file like Summit's whose device has tables, at 1 GFLOP/s."""
    machine: dict[str, Any] = yaml.safe_load((ROOT / "experiments/machines/summit.yaml").read_text())
    gpu = machine["gpu"]
    for key in ("gemm", "in_layer"):
        gpu.pop(key, None)
    gpu["peak"] = {"value": 2, "unit": "GFLOP/s", "status": "measured", "source": "test"}
    products = {role: rate_table() for role in ("forward", "input", "weight")}
    gpu["measured"] = [{"busy": 1, "precision": "float32", "source": "test", "products": products, **tables}]
    return machine


def load(tmp_path: Path, machine: dict[str, Any]) -> MachineFile:
    path = tmp_path / "machine.yaml"
    path.write_text(yaml.safe_dump(machine))
    return load_machine(path)


@st.composite
def tables(draw: st.DrawFn) -> ProductTable:
    axes = [sorted(draw(st.sets(st.integers(1, 4096), min_size=1, max_size=4))) for _ in range(3)]
    points = len(axes[0]) * len(axes[1]) * len(axes[2])
    us = draw(st.lists(st.floats(1e-3, 1e6), min_size=points, max_size=points))
    return ProductTable(m=axes[0], n=axes[1], k=axes[2], us=us)


@given(tables())
def test_a_table_is_exact_on_its_points(table: ProductTable) -> None:
    for sizes, seconds in table.points:
        assert table.at(*sizes) == pytest.approx(seconds, rel=1e-9)


@given(tables(), st.data())
def test_between_its_points_a_table_stays_between_their_times(table: ProductTable, data: st.DataObject) -> None:
    sizes = [data.draw(st.floats(axis[0], axis[-1])) for axis in (table.m, table.n, table.k)]
    around = [
        (max(size for size in axis if size <= value), min(size for size in axis if size >= value))
        for value, axis in zip(sizes, (table.m, table.n, table.k), strict=True)
    ]
    corners = [
        seconds
        for point, seconds in table.points
        if all(size in ends for size, ends in zip(point, around, strict=True))
    ]
    assert min(corners) * (1 - 1e-9) <= table.at(*sizes) <= max(corners) * (1 + 1e-9)


@given(st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4), st.lists(st.floats(1, 1e5), min_size=2, max_size=9))
def test_with_times_that_grow_more_elements_never_take_less_time(steps: list[float], sizes: list[float]) -> None:
    grown = [sum(steps[: i + 1]) for i in range(4)]
    table = StreamTable(elements=[10, 100, 1000, 10000], us=grown)
    times = [table.at(size) for size in sorted(sizes)]
    assert all(b >= a * (1 - 1e-9) for a, b in pairwise(times))


def test_past_the_grid_the_rate_stays_and_below_it_the_time() -> None:
    table = StreamTable(elements=[10, 1000], us=[2.0, 50.0])
    assert table.at(4000) == pytest.approx(4 * 50e-6)
    assert table.at(1) == pytest.approx(2e-6)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("us", [1.0], "us has 1 numbers, the grid of elements has 2 points"),
        ("us", [1.0, -3.0], "us has -3.0: a time in microseconds must be positive"),
        ("us", [1.0, 0.0], "must be positive"),
        ("us", [1.0, float("inf")], "should be a finite number"),
        ("elements", [1000, 10], "elements must list sizes from 1 on, each larger than the one before"),
        ("elements", [], "elements must list sizes"),
    ],
)
def test_a_table_that_cannot_be_says_what_is_wrong(key: str, value: list[Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        StreamTable.model_validate({"elements": [10, 1000], "us": [1.0, 2.0], key: value})


def test_a_machine_file_with_tables_gives_their_times(tmp_path: Path) -> None:
    gelu = {"elements": [1000, 100_000], "us": [10.0, 500.0]}
    machine = load(tmp_path, content(streams={"gelu": gelu}))
    kernels = Kernels(machine.gpu, element=4)
    assert kernels.seconds(Product(128, 128, 128)) == pytest.approx(2 * 128**3 / 1e9)
    assert kernels.seconds(MemoryBoundKernel("gelu", 1000, 2000)) == pytest.approx(10e-6)
    # What was not measured goes by the formulas: bytes over bandwidth, and products.
    silu = MemoryBoundKernel("silu", 10**6, 2 * 10**6)
    assert kernels.seconds(silu) == pytest.approx(4e-6 + 8e6 / machine.gpu.stream_bandwidth.si)
    convolution = Convolution(1, 16, 16, 32, 3)
    assert kernels.seconds(convolution) == pytest.approx(convolution.flops / 1e9, rel=0.01)
    assert kernels.seconds(AttentionKernel(4, 128, 16, causal=True, dropout=False)) > 4 * 2 * 2 * 128**2 * 16 / 1e9


def test_tables_are_chosen_by_how_many_devices_compute(tmp_path: Path) -> None:
    machine = content()
    (alone,) = machine["gpu"]["measured"]
    busy = {role: rate_table(rate=0.5e9) for role in alone["products"]}
    machine["gpu"]["measured"].append({**alone, "busy": 4, "products": busy})
    gpu = load(tmp_path, machine).gpu
    seconds = {n: Kernels(gpu, element=4, busy=n).seconds(Product(128, 128, 128)) for n in (1, 2, 4, 9)}
    assert seconds[2] == seconds[4] == seconds[9] == pytest.approx(2 * seconds[1])


def test_a_type_that_was_not_measured_is_an_error(tmp_path: Path) -> None:
    machine = load(tmp_path, content())
    with pytest.raises(ConfigError, match=r"measured in float32, not in a type of 2 bytes.*--precision"):
        Kernels(machine.gpu, element=2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["gpu"]["peak"].update(value=0.5), r"peak is 0.5 GFLOP/s, but a product in measured reaches 1"),
        (lambda m: m["gpu"]["peak"].update(unit="GB/s"), r"gpu.peak.unit"),
        (lambda m: m["gpu"]["peak"].update(value=-1), r"gpu.peak.value"),
        (lambda m: m["gpu"].pop("measured"), r"gemm and measured both say how long products take"),
        (lambda m: m["gpu"]["memory_bandwidth"].update(value=0), r"gpu.memory_bandwidth.value"),
        (lambda m: m["gpu"]["measured"][0]["products"].pop("weight"), r"products lack the role weight"),
        (
            lambda m: m["network"]["all_reduce"].update(
                slowdown={"value": 0.5, "unit": "1", "status": "measured", "source": "test"}
            ),
            r"network.all_reduce.slowdown is less than 1",
        ),
        (lambda m: m["network"]["all_reduce"].pop("inter_node_nodes"), r"belong together; give all three or none"),
    ],
)
def test_a_machine_file_with_an_absurd_or_missing_number_names_the_key(tmp_path: Path, change: Any, said: str) -> None:
    machine = content()
    change(machine)
    with pytest.raises(ConfigError, match=said):
        load(tmp_path, machine)


def test_a_single_node_is_not_asked_for_messages_to_others(tmp_path: Path) -> None:
    machine = content()
    for curves in machine["network"]["p2p"].values():
        curves.pop("inter_node")
    for key in ("inter_node", "inter_node_ranks", "inter_node_nodes"):
        machine["network"]["all_reduce"].pop(key)
    node = load(tmp_path, machine)
    model = GPTConfig(name="g", layers=8, hidden=64, heads=4, seq_len=32, vocab=64)

    def seconds(inter: int) -> float:
        config = TrainConfig(model=model, grid=ProcessGrid(inter=inter), batch_size=4, microbatch_size=1)
        return predict(model, node, strategy_of_config(config), batch_size=4).batch_time_s

    assert seconds(2) > 0
    with pytest.raises(ConfigError, match="single node, and the ranks do not fit on it; use fewer ranks"):
        seconds(8)
