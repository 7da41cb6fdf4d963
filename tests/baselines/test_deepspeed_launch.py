"""The launch of Megatron-DeepSpeed says all of a strategy, or refuses it; published configurations beside goldens.

`python -m tests.baselines.test_deepspeed_launch` writes the goldens anew.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from axonn.errors import LaunchError
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.perf.strategy import Strategy
from axonn.training.framework import ClusterWork, Launch
from axonn.training.run_folder import STOP
from baselines.adapters.deepspeed.deepspeed_adapter import DeepSpeedAdapter
from baselines.adapters.deepspeed.deepspeed_launch import CONFIG_FILE
from experiments.definition import ROOT, PredictedPanel, PredictedPoint, load_experiment
from tests.helpers.launches import check_goldens, point_work, write_goldens

PANEL = load_experiment(ROOT / "experiments" / "fig6.yaml").predicted
assert PANEL is not None
PUBLISHED = [point for point in PANEL.points if point.framework == "DeepSpeed"]


def test_published_configurations_are_launched_as_their_goldens_say() -> None:
    assert check_goldens("deepspeed", "DeepSpeed") == 8


@pytest.mark.parametrize("point", PUBLISHED, ids=lambda point: point.model)
def test_the_batch_of_the_file_is_the_product_that_deepspeed_checks(point: PredictedPoint) -> None:
    work = point_work(PANEL, point)
    launch = DeepSpeedAdapter().launch(work)
    settings, flags = json.loads(launch.files[CONFIG_FILE]), flags_of(launch)
    product = settings["train_micro_batch_size_per_gpu"] * settings["gradient_accumulation_steps"]
    assert product * work.strategy.grid.data == settings["train_batch_size"] == int(flags["--global-batch-size"])
    assert settings["train_micro_batch_size_per_gpu"] == int(flags["--micro-batch-size"])
    ranks = int(flags["--tensor-model-parallel-size"]) * int(flags["--pipeline-model-parallel-size"])
    assert ranks * work.strategy.grid.data == point.gpus
    assert settings["zero_optimization"]["stage"] == int(flags["--zero-stage"]) == 1
    # An absent key would clip at 1.
    assert settings["gradient_clipping"] == float(flags["--clip-grad"]) == 0.0


def flags_of(launch: Launch) -> dict[str, str]:
    arguments = list(launch.command)
    return {
        flag: "" if value.startswith("--") else value
        for flag, value in zip(arguments, [*arguments[1:], "--"], strict=True)
        if flag.startswith("--")
    }


MODEL = GPTConfig(name="small", layers=8, hidden=64, heads=4, seq_len=32, vocab=512)
PLAIN: dict[str, Any] = {
    "grid": {"inter": 2, "data": 2, "col": 2},
    "order": ["inter", "data", "row", "col"],
    "microbatch_size": 2,
    "schedule": {"name": "1f1b"},
    "blocking_messages": True,
    "message_library": "nccl",
    "optimizer": "sharded",
}


def work_of(strategy: dict[str, Any] | None = None, **changes: Any) -> ClusterWork:
    made = Strategy.model_validate(PLAIN | (strategy or {}))
    work = ClusterWork(name="small-8", model=MODEL, strategy=made, batch_size=32, steps=4, gpus=8, gpus_per_node=4)
    return replace(work, **changes)


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ({"grid": {"inter": 2, "row": 2, "col": 2}}, "set grid.row to 1"),
        ({"order": ["data", "row", "col", "inter"]}, "set order so"),
        ({"schedule": {"name": "message-driven"}}, "schedule: {name: 1f1b}"),
        ({"schedule": {"name": "1f1b", "chunks": 2}}, "schedule: {name: 1f1b}"),
        ({"schedule": {"name": "1f1b", "in_flight_limit": 1}}, "schedule: {name: 1f1b}"),
        ({"blocking_messages": False}, "set blocking_messages"),
        ({"message_library": "mpi"}, "set message_library: nccl"),
        ({"optimizer": "offloaded"}, "ZeRO-Offload"),
        ({"partition": "work"}, "set partition: layers"),
        ({"overdecomposition": 2}, "set overdecomposition to 1"),
        ({"overlap_input_gradients": True}, "overlap_input_gradients"),
        ({"sequence_parallel": True}, "unset sequence_parallel"),
        ({"overlap_reduction": True}, "unset overlap_reduction"),
        ({"optimizer_kernels": "separate"}, "set optimizer_kernels: fused"),
        ({"agree_on_overflow": "before"}, "set agree_on_overflow: after"),
        ({"accumulate": "in-place"}, "set accumulate: separate"),
        ({"compute": "float64"}, "set compute so"),
        ({"reduce_type": "float64"}, "set reduce_type so"),
        ({"clip_norm": True}, "set gradient_clipping"),
        ({"microbatch_size": 3}, "no multiple of G_data x microbatch_size"),
        ({"grid": {"inter": 2, "data": 1, "col": 4}, "microbatch_size": 64}, "no multiple"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(strategy: dict[str, Any], said: str) -> None:
    with pytest.raises(LaunchError, match="Megatron-DeepSpeed cannot run small-8") as caught:
        DeepSpeedAdapter().launch(work_of(strategy))
    assert said in str(caught.value)


def test_it_saves_when_the_stop_file_is_there_and_goes_on() -> None:
    flags = flags_of(DeepSpeedAdapter().launch(work_of()))
    assert flags["--kill-switch-file"] == STOP
    assert flags["--save"] == flags["--load"]
    assert int(flags["--save-interval"]) > int(flags["--train-iters"]), "none in between"


def test_a_grid_of_other_size_and_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(LaunchError, match="8 ranks for 16 GPUs"):
        DeepSpeedAdapter().launch(work_of(gpus=16))
    with pytest.raises(LaunchError, match="16 stages need as many layers"):
        DeepSpeedAdapter().launch(work_of({"grid": {"inter": 16}}, gpus=16))


@pytest.mark.parametrize(
    ("strategy", "flag", "value"),
    [
        ({"recompute": "none"}, "--recompute-granularity", None),
        ({"recompute": "selective"}, "--recompute-granularity", "selective"),
        ({"recompute": "selective"}, "--recompute-method", None),
        ({"recompute": "full"}, "--deepspeed-activation-checkpointing", ""),
        ({"checkpoint_layers": 3}, "--recompute-num-layers", "3"),
        ({"compute": "bfloat16"}, "--bf16", ""),
        ({"compute": "bfloat16"}, "--fp16", None),
        ({"compute": "float32"}, "--fp16", None),
        ({"optimizer": "device"}, "--zero-stage", "0"),
        ({}, "--no-pipeline-parallel", None),
        ({"grid": {"data": 4, "col": 2}}, "--no-pipeline-parallel", ""),
        ({}, "--untie-embeddings-and-output-weights", ""),
    ],
)
def test_a_field_of_the_strategy_is_the_flag_that_does_it(
    strategy: dict[str, Any], flag: str, value: str | None
) -> None:
    assert flags_of(DeepSpeedAdapter().launch(work_of(strategy))).get(flag) == value


@pytest.mark.parametrize(
    ("strategy", "key", "value"),
    [
        ({"compute": "bfloat16"}, "bf16", {"enabled": True}),
        ({"compute": "bfloat16"}, "fp16", None),
        ({"compute": "float32"}, "fp16", None),
        ({"reduce_type": "float32"}, "communication_data_type", "fp32"),
        ({}, "communication_data_type", None),
        ({"partition_messages": False}, "pipeline", {"pipe_partitioned": False, "grad_partitioned": False}),
        ({}, "pipeline", {"pipe_partitioned": True, "grad_partitioned": True}),
        ({"optimizer": "device"}, "zero_optimization", {"stage": 0, "overlap_comm": False}),
        (
            {"grid": {"data": 4, "col": 2}, "overlap_reduction": True},
            "zero_optimization",
            {"stage": 1, "overlap_comm": True},
        ),
    ],
)
def test_a_field_of_the_strategy_is_the_key_that_does_it(strategy: dict[str, Any], key: str, value: Any) -> None:
    assert json.loads(DeepSpeedAdapter().launch(work_of(strategy)).files[CONFIG_FILE]).get(key) == value


def test_clipping_stands_in_both_places() -> None:
    launch = DeepSpeedAdapter().launch(work_of(gradient_clipping=0.5))
    assert json.loads(launch.files[CONFIG_FILE])["gradient_clipping"] == 0.5
    assert flags_of(launch)["--clip-grad"] == "0.5"


def test_named_data_are_taken_and_need_no_note() -> None:
    named, unnamed = (DeepSpeedAdapter().launch(work_of(data=data)) for data in ("/data/text_document", None))
    assert flags_of(named)["--data-path"] == "/data/text_document"
    assert not any("no synthetic data" in note for note in named.notes)
    # 4 batches of 32 sequences of 32 tokens.
    assert any("at least 4096 tokens below 512" in note for note in unnamed.notes)


def test_the_vocabulary_has_the_tokens_of_the_model_and_its_padding_is_said() -> None:
    launch = DeepSpeedAdapter().launch(work_of(model=MODEL.model_copy(update={"vocab": 500})))
    assert int(flags_of(launch)["--vocab-size"]) + 1 == 500
    assert any("padded from 500 to 512" in note for note in launch.notes)
    assert not any("padded" in note for note in DeepSpeedAdapter().launch(work_of()).notes)


def test_a_unet_has_no_launch() -> None:
    panel = PredictedPanel(
        machine="summit",
        batch_size=64,
        precision="float16",
        frameworks={"DeepSpeed": PLAIN},
        points=[PredictedPoint(framework="DeepSpeed", model="unet-3.5b", gpus=8, strategy={})],
    )
    with pytest.raises(LaunchError, match="is none; take ours"):
        DeepSpeedAdapter().launch(point_work(panel, panel.points[0]))


def test_work_of_a_point_has_the_steps_of_the_papers_and_the_nodes_of_the_machine() -> None:
    work = point_work(PANEL, PUBLISHED[0])
    assert (work.name, work.steps, work.gpus, work.gpus_per_node, work.batch_size) == ("gpt-12b-48", 11, 48, 6, 16384)
    assert point_work(PANEL, PUBLISHED[0], steps=3, data="x").steps == 3
    off = PUBLISHED[0].model_copy(update={"gpus": 96})
    with pytest.raises(LaunchError, match="48 ranks for 96 GPUs"):
        point_work(PANEL, off)


def test_every_field_of_a_strategy_has_been_thought_of() -> None:
    """A new one has to be mapped or refused in `deepspeed_launch`, and then named here."""
    flagged = {"grid", "microbatch_size", "recompute", "checkpoint_layers", "compute", "clip_norm"}
    in_file = {"partition_messages", "optimizer", "reduce_type", "overlap_reduction"}
    refused = {
        "order",
        "schedule",
        "blocking_messages",
        "message_library",
        "partition",
        "overdecomposition",
        "overlap_input_gradients",
        "sequence_parallel",
        "algorithm",
        "optimizer_kernels",
        "agree_on_overflow",
        "accumulate",
    }
    of_the_offloaded_optimizer = {"bsize", "k", "buckets_resident"}
    assert set(Strategy.model_fields) == flagged | in_file | refused | of_the_offloaded_optimizer


if __name__ == "__main__":
    write_goldens("deepspeed", "DeepSpeed")
