"""Launches of Megatron-LM: the published configurations as goldens, and what it would refuse is refused before.

All goldens, before they had the options of checkpoints, have been put through `parse_args`, `validate_args` and
`core_transformer_config_from_args` of Megatron-LM's own megatron/training/arguments.py at core_v0.16.0, which took
them.

`python -m tests.baselines.test_megatron_launch` writes the goldens anew.
"""

from __future__ import annotations

import re
import signal
from typing import Any

import pytest

from axonn.config.train_config import validate
from axonn.errors import LaunchError
from axonn.perf.strategy import Strategy
from axonn.training.framework import ClusterWork
from baselines.adapters.megatron.megatron_adapter import MegatronAdapter
from experiments.cluster_work import cluster_work
from experiments.definition import HERE, load_experiment, load_model
from experiments.validation.published_sets import find_data_sets, load_data_set
from tests.helpers.launches import GOLDENS, as_text, point_work

FOLDER = GOLDENS / "megatron"
OTHERS = ("ipdps22-fig5", "ipdps22-fig6", "ipdps22-fig8", "ipdps22-fig9", "poster-unet")
"""Without a point of Megatron-LM of their own: those of AxoNN and of U-Nets, and the points of fig6.yaml."""


def published() -> dict[str, ClusterWork]:
    """Every published configuration of Megatron-LM, by the name of its golden."""
    panel = load_experiment(HERE / "fig6.yaml").predicted
    assert panel is not None
    works = {
        f"fig6-{point.model}-{point.gpus}": point_work(panel, point)
        for point in panel.points
        if point.framework == "Megatron-LM"
    }
    for path in find_data_sets():
        if path.stem in OTHERS:
            continue
        data, cases = load_data_set(path)
        for case in cases:
            if case.group in ("Megatron-LM", "one stage", "several stages", "full recomputation", "present work"):
                label = re.sub(r"[^a-z0-9]+", "-", case.label.lower())
                works[f"{data.name}-{label}"] = cluster_work(
                    case, machine=data.machine, name=f"{data.name}: {case.label}"
                )
    return works


WORKS = published()


def test_every_published_configuration_has_a_golden() -> None:
    assert len(WORKS) == 4 + 10 + 9 + 4
    assert sorted(WORKS) == sorted(path.stem for path in FOLDER.glob("*.txt"))


@pytest.mark.parametrize("name", sorted(WORKS))
def test_launch_is_the_golden(name: str) -> None:
    launch = MegatronAdapter().launch(WORKS[name])
    assert not launch.files
    assert as_text(launch) == (FOLDER / f"{name}.txt").read_text()


def work(strategy: dict[str, Any], model: str = "gpt-12b", batch_size: int = 2048, **changes: Any) -> ClusterWork:
    base: dict[str, Any] = {
        "order": ["inter", "data", "row", "col"],
        "schedule": {"name": "1f1b"},
        "blocking_messages": True,
        "message_library": "nccl",
        "microbatch_size": 1,
    }
    made = validate(base | strategy, Strategy, where="test")
    g = made.grid
    given: dict[str, Any] = {"gpus": g.size, "gpus_per_node": 6, "steps": 11} | changes
    return ClusterWork(name="work", model=load_model(model), strategy=made, batch_size=batch_size, **given)


def flags(asked: ClusterWork) -> dict[str, str | None]:
    return dict(
        (line.split(" ", 1)[0], line.split(" ", 1)[1] if " " in line else None)
        for line in as_text(MegatronAdapter().launch(asked)).splitlines()
        if line.startswith("--")
    )


def test_every_setting_reaches_a_flag() -> None:
    asked = flags(
        work(
            {
                "grid": {"data": 2, "inter": 4, "col": 8},
                "schedule": {"name": "interleaved-1f1b", "chunks": 3},
                "sequence_parallel": True,
                "recompute": "selective",
                "optimizer": "sharded",
                "overlap_reduction": True,
                "compute": "bfloat16",
                "accumulate": "in-place",
                "microbatch_size": 2,
            },
            gradient_clipping=0.5,
            data="/data/text",
        )
    )
    expected = {
        "--tensor-model-parallel-size": "8",
        "--pipeline-model-parallel-size": "4",
        "--num-layers-per-virtual-pipeline-stage": "4",
        "--micro-batch-size": "2",
        "--global-batch-size": "2048",
        "--recompute-granularity": "selective",
        "--clip-grad": "0.5",
        "--data-path": "/data/text",
        "--vocab-size": "51199",
    }
    assert expected.items() <= asked.items()
    assert {"--sequence-parallel", "--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce"} <= set(asked)
    absent = {
        "--fp16",
        "--mock-data",
        "--no-gradient-accumulation-fusion",
        "--recompute-method",
        "--use-tp-pp-dp-mapping",
    }
    assert not absent & set(asked)


def test_it_saves_when_it_is_told_to_end_and_goes_on_from_there() -> None:
    launch = MegatronAdapter().launch(work({"grid": {"inter": 2}}))
    asked = flags(work({"grid": {"inter": 2}}))
    assert asked["--save"] == asked["--load"] == "checkpoints"
    assert "--exit-signal-handler" in asked
    # Its option takes the name of a member of Python's `signal.Signals`.
    assert asked["--exit-signal"] == signal.Signals[f"SIG{launch.stop_signal}"].name
    assert int(asked["--save-interval"] or 0) > int(asked["--train-iters"] or 0), "none in between"


def test_replicas_may_be_the_slowest_axis() -> None:
    asked = work({"grid": {"data": 2, "inter": 4}, "order": ["data", "inter", "row", "col"]})
    assert "--use-tp-pp-dp-mapping" in flags(asked)


def test_recomputation_of_several_layers() -> None:
    assert flags(work({"grid": {"inter": 6}, "checkpoint_layers": 4}))["--recompute-num-layers"] == "4"
    assert "--recompute-granularity" not in flags(work({"grid": {"inter": 6}, "recompute": "none"}))


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        ({"grid": {"row": 2}}, "row"),
        ({"grid": {"inter": 4}, "schedule": {"name": "message-driven"}}, "no schedule 'message-driven'"),
        ({"grid": {"inter": 4}, "schedule": {"name": "zero-bubble"}}, "no schedule 'zero-bubble'"),
        ({"grid": {"inter": 5}}, "layers"),
        ({"grid": {"col": 5}}, "heads"),
        ({"grid": {"data": 3}}, "batch_size"),
        ({"grid": {"data": 2}, "optimizer": "offloaded"}, "optimizer"),
        ({"grid": {"inter": 6}, "checkpoint_layers": 3}, "checkpoint_layers"),
        ({"grid": {"inter": 6}, "schedule": {"name": "interleaved-1f1b", "chunks": 3}}, "layers"),
        ({"grid": {"inter": 6}, "schedule": {"name": "interleaved-1f1b", "chunks": 2}}, "microbatches"),
        (
            {"grid": {"inter": 2}, "schedule": {"name": "interleaved-1f1b", "chunks": 2}, "blocking_messages": True},
            "blocking_messages",
        ),
        ({"grid": {"data": 2, "col": 2}, "order": ["col", "inter", "row", "data"]}, "order"),
        ({"grid": {"col": 2}, "overdecomposition": 2}, "overdecomposition"),
        ({"grid": {"inter": 2}, "partition": "work"}, "partition"),
        ({"grid": {"inter": 2}, "algorithm": "sgd"}, "launched with AdamW, not sgd"),
        ({"grid": {}, "compute": "float64"}, "float64"),
        ({"grid": {}, "clip_norm": True}, "gradient_clipping"),
    ],
)
def test_what_it_cannot_do_is_refused(strategy: dict[str, Any], why: str) -> None:
    with pytest.raises(LaunchError, match=why):
        MegatronAdapter().launch(work(strategy))


def test_a_grid_of_other_ranks_is_refused() -> None:
    with pytest.raises(LaunchError, match="2 ranks for 3 GPUs"):
        MegatronAdapter().launch(work({"grid": {"data": 2}}, gpus=3))


def test_a_unet_is_refused() -> None:
    data, cases = load_data_set(find_data_sets(["poster-unet"])[0])
    of_unet = next(iter(cases[1].candidates(data.open[-1], "test")))[1]
    work = cluster_work(of_unet, machine=data.machine)
    with pytest.raises(LaunchError, match="is none"):
        MegatronAdapter().launch(work)


if __name__ == "__main__":
    for name, asked in WORKS.items():
        (FOLDER / f"{name}.txt").write_text(as_text(MegatronAdapter().launch(asked)), encoding="utf-8")
