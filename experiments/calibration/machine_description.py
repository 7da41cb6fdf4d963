"""Machine file from the results of a calibration."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from axonn.config.train_config import FloatType, validate
from axonn.durable_files import replace_durably
from axonn.models.registry import outline_of
from axonn.perf.machine.coefficient_fit import describe_curves
from axonn.perf.machine.kernel_tables import MeasuredKernels
from axonn.perf.machine.machine_file import Curve, Library, MachineFile
from axonn.perf.machine.quantities import Time
from axonn.perf.planner.engine_strategy import strategy_of_config
from axonn.perf.prediction import message_bytes
from axonn.training.provenance import cpu_name
from experiments.calibration.host_costs import host_times, small

_LIBRARIES: tuple[tuple[Library, str], ...] = (("mpi", "mpi"), ("nccl", "torch"))
"""Messaging libraries, each with the transport that uses it."""
QuantityMaker: TypeAlias = Callable[..., dict[str, Any]]
"""A function that makes a quantity of a machine file from value, unit and, optionally, how it was measured."""


@dataclass(frozen=True, kw_only=True)
class CalibrationResults:
    """Results of the ranks. `alone`: of one rank by itself; `all_ranks`: of all at once, None with a single rank."""

    ranks: int
    precision: FloatType
    source: str
    alone: Mapping[str, Any]
    all_ranks: Mapping[str, Any] | None


def machine_of(measured: CalibrationResults, *, name: str) -> MachineFile:
    """Return the machine as the performance model reads it. Raises `ConfigError` for impossible numbers."""
    content = _content(measured, name)
    machine = validate(content, MachineFile, where="what was measured")
    host = host_times(machine, measured.precision, measured.alone["host"], source=measured.source)
    host = host.model_copy(update=_host_of_pipelining(measured))
    return machine.model_copy(update={"gpu": machine.gpu.model_copy(update={"host": host})})


def write_machine(path: Path, machine: MachineFile) -> None:
    """Write a machine file that `load_machine` reads."""
    content = machine.model_dump(mode="json", exclude_none=True)
    header = "# Made by axonn calibrate; every number was measured here.\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(path, header + yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=160))


class _Dumper(yaml.SafeDumper):
    """A YAML dumper that writes each list of numbers on a line of its own."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        plain = all(isinstance(item, int | float) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=plain)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _quantity(source: str, value: float, unit: str, how: str = "") -> dict[str, Any]:
    full_source = f"{source}; {how}" if how else source
    return {"value": float(f"{value:.6g}"), "unit": unit, "status": "measured", "source": full_source}


def _content(measured: CalibrationResults, name: str) -> dict[str, Any]:
    """Return the keys of the machine file, without those of the host."""
    quantity = partial(_quantity, measured.source)
    alone = measured.alone
    tables = [_tables(measured, 1, alone)]
    if measured.all_ranks is not None:
        tables.append(_tables(measured, measured.ranks, measured.all_ranks))
    checked = [validate(table, MeasuredKernels, where="measured kernels") for table in tables]
    peak = quantity(max(table.best_rate for table in checked) / 1e9, "GFLOP/s", "the fastest product")
    device = (_core if alone.get("gpu") is None else _gpu)(measured, quantity, peak)
    bandwidth = quantity(_memory_bandwidth(measured), "GB/s", "a copy, read and written")
    return {
        "name": name,
        "about": device.about,
        "gpu": {
            "peak": peak,
            "alignment": quantity(1, "1", "none is needed"),
            "memory_bandwidth": bandwidth,
            "stream_bandwidth": bandwidth,
            "kernel_latency": quantity(1e6 * alone["empty_kernel"], "us", "addition to one number"),
            "measured": tables,
            **device.gpu,
        },
        "nodes": quantity(1, "1", "a machine by itself"),
        "node": {
            "gpus": quantity(measured.ranks, "1", "ranks that were measured together"),
            "gpus_per_socket": quantity(measured.ranks, "1", "all ranks reach each other alike"),
            "host_memory": quantity(_host_memory(), "GB", "all of it"),
            **device.node,
        },
        "network": _network(measured, quantity),
    }


def _memory_bandwidth(measured: CalibrationResults) -> float:
    """Return the bandwidth of a rank's memory in GB/s: a copy reads and writes."""
    rate: float = (measured.all_ranks or measured.alone)["copy"]
    return 2 * rate / 1e9


def _host_memory() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


@dataclass(frozen=True, kw_only=True)
class _Device:
    """Facts of a machine file that depend on the kind of device: keys of `gpu` and of `node`."""

    about: str
    gpu: dict[str, Any]
    node: dict[str, Any]


def _core(measured: CalibrationResults, quantity: QuantityMaker, peak: dict[str, Any]) -> _Device:
    """Return the facts of one core per rank, each of which the machine file calls a GPU."""
    bandwidth = _memory_bandwidth(measured)
    return _Device(
        about=f"{measured.ranks} ranks, one core each, computing in {measured.precision}; a machine by itself.",
        gpu={
            "name": f"one core of {cpu_name()}",
            "vector_peak": peak | {"source": f"{measured.source}; a core has no matrix units beside"},
            "memory": quantity(_host_memory() / measured.ranks, "GB", "a rank's share of the host's"),
            "multiprocessors": quantity(1, "1", "a rank computes in one thread"),
        },
        node={
            "nvlink": quantity(bandwidth / 2, "GB/s", "a copy"),
            "host_link": quantity(bandwidth / 2, "GB/s", "a copy: device and host are one"),
            "host_memory_bandwidth": quantity(bandwidth * measured.ranks, "GB/s", "copies of all ranks"),
        },
    )


def _gpu(measured: CalibrationResults, quantity: QuantityMaker, peak: dict[str, Any]) -> _Device:
    """Return the facts of one GPU."""
    properties, link_rate = measured.alone["gpu"], measured.alone["host_link"] / 1e9
    link = quantity(link_rate, "GB/s", "a copy of page-locked memory, in the slower direction")
    return _Device(
        about=f"{properties['name']}, one GPU measured by itself, computing in {measured.precision}. Links between "
        "GPUs were not measured: what is said of them is the link to the host, through which ranks that share a GPU "
        "exchange.",
        gpu={
            "name": properties["name"],
            "vector_peak": peak | {"source": f"{measured.source}; what has no measured kernel is taken for a product"},
            "memory": quantity(properties["memory"] / 1e9, "GB", "as the driver says"),
            "multiprocessors": quantity(properties["multiprocessors"], "1", "as the driver says"),
        },
        node={
            "nvlink": link,
            "host_link": link,
            "host_memory_bandwidth": quantity(
                2 * link_rate, "GB/s", "no more than the link to the GPU was seen to take"
            ),
        },
    )


def _tables(measured: CalibrationResults, busy: int, results: Mapping[str, Any]) -> dict[str, Any]:
    return {"busy": busy, "precision": measured.precision, "source": measured.source, **results["kernels"]}


def _network(measured: CalibrationResults, quantity: QuantityMaker) -> dict[str, Any]:
    """Return the keys of the network. A single rank sends nothing: its links then follow from copies."""
    results = measured.all_ranks
    if results is None:
        rate = measured.alone.get("host_link", measured.alone["copy"])
        sizes = [1 << i for i in range(8, 23, 2)]
        seconds = [1e-6 + size / rate for size in sizes]
        results = {
            "message_bytes": sizes,
            "messages_mpi": seconds,
            "messages_torch": seconds,
            "all_reduce_bytes": sizes,
            "all_reduce": seconds,
            "beside": 1.0,
        }
    sizes = results["message_bytes"]
    p2p = {
        library: {"intra_node": _curve(sizes, results[f"messages_{transport}"], measured.source)}
        for library, transport in _LIBRARIES
    }
    reduced = _curve(results["all_reduce_bytes"], results["all_reduce"], measured.source)
    fastest = max(size / seconds for size, seconds in zip(sizes, results["messages_torch"], strict=True))
    return {
        "injection": quantity(fastest / 1e9, "GB/s", "messages over the loopback interface; there is one node"),
        "ports": quantity(1, "1", "the loopback interface"),
        "p2p": p2p,
        "all_reduce": {
            "intra_node": reduced,
            "intra_node_ranks": quantity(measured.ranks, "1"),
            "slowdown": quantity(results["beside"], "1", "products beside an all-reduce"),
        },
    }


def _host_of_pipelining(measured: CalibrationResults) -> dict[str, Any]:
    """Return the host times of a pipeline: of messages, and of the rest of a task."""
    results = measured.all_ranks
    if results is None:
        return {}
    messages: dict[Library, Curve] = {}
    for library, transport in _LIBRARIES:
        curve = _curve(results["message_bytes"], results[f"host_{transport}"], measured.source)
        messages[library] = validate(curve, Curve, where="messages")
    one = small(1, measured.precision)
    nbytes = message_bytes(outline_of(one.model), strategy_of_config(one))
    rest = max(1e-8, results["pipelined"] - messages["mpi"].seconds(nbytes))
    time = Time(value=float(f"{1e6 * rest:.6g}"), unit="us", source=measured.source, status="measured")
    return {"messages": messages, "pipelined": time}


def _curve(sizes: Sequence[int], seconds: Sequence[float], source: str) -> dict[str, Any]:
    rows = [{"bytes": str(n), "t_ms": repr(1e3 * t)} for n, t in zip(sizes, seconds, strict=True)]
    curve: Any = describe_curves(rows, segments=max(1, len(rows) // 4), min_bytes=0)["t"]
    curve["fit"]["source"] = source
    return dict(curve)
