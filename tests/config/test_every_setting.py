"""Every setting that the schemas have is carried out by every framework, or refused, or its launch says what it does.

A setting that is added and that nobody reads fails here: another value of it has to change something.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import pytest

from axonn.config.train_config import TrainConfig, validate
from axonn.errors import AxonnError
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.optim.algorithms.adamw import AdamWConfig
from axonn.perf.strategy import Strategy
from axonn.training.framework import ClusterWork, Launch, adapter_names, load_adapter, load_framework
from baselines.environments import Environment
from tests.helpers.asked_for import leaf_names, leaves, over

MODEL = {"name": "small", "layers": 8, "hidden": 64, "heads": 4, "seq_len": 16, "vocab": 512}
_ALL_AXES = {"data": 2, "inter": 2, "row": 2, "col": 2}
_PIPELINE = {
    "order": ["inter", "data", "row", "col"],
    "schedule": {"name": "1f1b"},
    "blocking_messages": True,
    "message_library": "nccl",
}
BASES: dict[str, list[dict[str, Any]]] = {
    "axonn": [
        {"grid": _ALL_AXES, "optimizer": "offloaded", "schedule": {"in_flight_limit": 4}},
        {"grid": _ALL_AXES, "schedule": {"name": "1f1b"}, "compute": "bfloat16"},
    ],
    "megatron": [
        {"grid": {"data": 2, "inter": 2, "col": 2}, **_PIPELINE},
        {"grid": {"data": 2, "inter": 2, "col": 2}, **_PIPELINE, "compute": "bfloat16"},
        {"grid": {"data": 2, "inter": 4, "col": 2}, **_PIPELINE, "schedule": {"name": "interleaved-1f1b", "chunks": 2}},
    ],
    "deepspeed": [
        {"grid": {"data": 2, "inter": 2, "col": 2}, **_PIPELINE},
        {"grid": {"data": 2, "inter": 2, "col": 2}, **_PIPELINE, "compute": "bfloat16"},
    ],
    "pytorch": [
        {"grid": {"inter": 4}, "schedule": {"name": "1f1b"}, "compute": "float32", "recompute": "none"},
        {"grid": {"data": 4}, "compute": "float32", "recompute": "none"},
        {"grid": {"col": 4}, "compute": "float32", "recompute": "none"},
    ],
    "reference": [{"grid": {"inter": 2, "data": 2}, "schedule": {"in_flight_limit": 2}}],
}  # fmt: skip
"""Points that each framework does."""
VALUES: dict[str, Sequence[Any]] = {
    "grid.data": [4],
    "grid.inter": [8],
    "grid.row": [4],
    "grid.col": [4],
    "order": [["row", "col", "inter", "data"], ["col", "row", "data", "inter"]],
    "microbatch_size": [4],
    "schedule.name": ["gpipe", "message-driven-zero-bubble"],
    "schedule.in_flight_limit": [3],
    "schedule.pick": ["1f1b"],
    "schedule.chunks": [4],
    "schedule.placement": ["v"],
    "blocking_messages": [True, False],
    "message_library": ["mpi", "nccl"],
    "partition_messages": [True, False],
    "algorithm": ["sgd"],
    "optimizer": ["device", "offloaded", "sharded"],
    "bsize": [1000],
    "k": [7],
    "buckets_resident": [3],
    "recompute": ["full", "selective", "none"],
    "checkpoint_layers": [2],
    "compute": ["float64", "float32", "bfloat16", "float16"],
    "partition": ["layers", "work"],
    "overdecomposition": [2],
    "overlap_input_gradients": [True, False],
    "sequence_parallel": [True],
    "reduce_type": ["float64", "float32", "bfloat16", "float16"],
    "overlap_reduction": [True],
    "optimizer_kernels": ["fused", "separate"],
    "clip_norm": [True],
    "agree_on_overflow": ["before", "after", "never"],
    "accumulate": ["in-place", "separate"],
}
"""Other values of each setting of a strategy."""
OF_THE_MODEL: dict[str, Sequence[Any]] = {
    "layers": [16],
    "hidden": [128],
    "heads": [8],
    "seq_len": [32],
    "vocab": [1024],
    "tied_head": [True],
    "dropout": [0.1],
    "attention_dropout": [0.1],
}
OF_THE_WORK: dict[str, Sequence[Any]] = {
    "batch_size": [64],
    "steps": [5],
    "gradient_clipping": [0.5],
    "data": ["/work/tokens"],
}
NAMES = {"name", "kind", "gpus", "gpus_per_node", "device", "model", "strategy"}
"""Of a work or a model: what says who or where it is."""
_DEVICE = "of the offloaded optimizer, which is refused or noted where it is asked for"
WITHOUT_EFFECT: dict[str, dict[str, str]] = {
    name: {"bsize": _DEVICE, "k": _DEVICE, "buckets_resident": _DEVICE}
    for name in ("megatron", "deepspeed", "pytorch", "reference")
}
"""By framework, settings without effect in whatever it runs, with the reason."""


def work_of(base: dict[str, Any], *, model: dict[str, Any] | None = None, **changes: Any) -> ClusterWork:
    strategy = validate({"microbatch_size": 2, **base}, Strategy, where="test")
    grid = strategy.grid
    own: dict[str, Any] = {"batch_size": 32, "steps": 3} | changes
    if strategy.clip_norm:
        own = {"gradient_clipping": 1.0} | own
    ranks = grid.size
    return ClusterWork(
        name="small",
        model=GPTConfig(**{**MODEL, **(model or {})}),
        strategy=strategy,
        gpus=ranks,
        gpus_per_node=4,
        **own,
    )


def launched(adapter: str, work: ClusterWork) -> Launch | None:
    """None where it is refused, with a reason."""
    try:
        return load_adapter(adapter).launch(work)
    except AxonnError as error:
        reason = str(error)
    assert len(reason) > 20
    return None


def test_there_are_other_values_of_every_setting() -> None:
    assert set(VALUES) == set(leaf_names(Strategy))
    assert set(OF_THE_MODEL) | NAMES >= set(GPTConfig.model_fields)
    assert set(OF_THE_WORK) | NAMES >= {field.name for field in fields(ClusterWork)}
    assert set(BASES) == set(adapter_names())


@pytest.mark.parametrize("adapter", sorted(BASES))
def test_every_setting_of_a_strategy_is_carried_out_or_refused(adapter: str) -> None:
    silent = []
    for base in BASES[adapter]:
        plain = work_of(base)
        before = launched(adapter, plain), plain.gpus
        assert before[0] is not None, base
        settings = leaves(plain.strategy.model_dump(mode="json"))
        for key, values in VALUES.items():
            for value in values:
                if value == settings.get(key) or key in WITHOUT_EFFECT.get(adapter, {}):
                    continue
                if plain.strategy.optimizer != "offloaded" and key in ("bsize", "k", "buckets_resident"):
                    continue
                if plain.strategy.recompute != "full" and key == "checkpoint_layers":
                    continue
                if key == "reduce_type" and value == settings["compute"]:
                    continue
                if key == "agree_on_overflow" and value == plain.strategy.agreement:
                    continue
                name, _, inside = key.partition(".")
                try:
                    other = work_of(over(base, {name: {inside: value} if inside else value}))
                except AxonnError:
                    continue
                if (launched(adapter, other), other.gpus) == before:
                    silent.append(f"{key} {value!r} of {base}")
    assert not silent, "\n".join(silent)


@pytest.mark.parametrize("adapter", sorted(BASES))
def test_every_setting_of_the_work_is_carried_out_or_refused(adapter: str) -> None:
    for base in BASES[adapter]:
        before = launched(adapter, work_of(base))
        for key, values in OF_THE_MODEL.items():
            for value in values:
                assert launched(adapter, work_of(base, model={key: value})) != before, f"model.{key} {value!r}"
        for key, values in OF_THE_WORK.items():
            for value in values:
                assert launched(adapter, work_of(base, **{key: value})) != before, f"{key} {value!r}"


HERE_ON_2 = {
    "pytorch/loop": {},
    "pytorch/ddp": {"data": 2},
    "pytorch/fully-shard": {"data": 2},
    "pytorch/1f1b": {"inter": 2},
    "pytorch/gpipe": {"inter": 2},
    "pytorch/tensor": {"col": 2},
    "deepspeed/pipeline": {"inter": 2},
    "deepspeed/zero-1": {"data": 2},
    "megatron/pipeline": {"inter": 2},
    "megatron/tensor": {"col": 2},
    "reference/pipeline": {"inter": 2},
    "reference/data": {"data": 2},
}
"""Grids on which each framework is measured here."""
CARRIED_OUT = {
    *(f"model.{key}" for key in ("name", "layers", "hidden", "heads", "seq_len", "vocab")),
    *("batch_size", "microbatch_size", "seed", "steps", "stall_limit_s", "data.path"),
    *("grid.data", "grid.inter", "grid.row", "grid.col"),
    *("optimizer.lr", "optimizer.betas", "optimizer.eps", "optimizer.weight_decay"),
    *("precision.compute", "transport", "compile"),
    # Of the offloaded optimizer, which is refused.
    *("optimizer.bsize", "optimizer.k", "optimizer.buckets_resident"),
}
"""What every framework does as it is told, or that tells it nothing."""
ELSE: dict[str, Any] = {
    "model.kind": None,
    "model.tied_head": True,
    "model.dropout": 0.1,
    "model.attention_dropout": 0.1,
    "schedule.name": "message-driven-zero-bubble",
    "schedule.in_flight_limit": 3,
    "schedule.pick": "1f1b",
    "schedule.chunks": 4,
    "schedule.placement": "v",
    "optimizer.name": "sgd",
    "optimizer.clip_norm": 1.0,
    "optimizer.schedule.name": "cosine",
    "optimizer.schedule.warmup": 2,
    "optimizer.schedule.decay_until": 7,
    "optimizer.schedule.final": 0.5,
    "optimizer.placement": "offloaded",
    "data.held_out": 0.2,
    "precision.master": "float64",
    "precision.gradients": "float64",
    "precision.loss_scale": 8.0,
    "precision.growth_interval": 7,
    "activation_checkpointing": 1,
    "overdecomposition": 2,
    "evaluation": {"every": 1},
    "checkpoints": {"every": 1},
    "initial_weights": "weights.safetensors",
}
"""Another value of each key that not every framework carries out."""
WITHOUT_EFFECT_HERE = {"model.kind", "optimizer.schedule.decay_until", "optimizer.schedule.final",
                       "precision.growth_interval"}  # fmt: skip
"""Keys that say nothing without another one, which is refused."""
TIED = {"pytorch/loop", "pytorch/ddp", "pytorch/fully-shard", "deepspeed/zero-1", "reference/data"}


def test_every_key_of_a_training_configuration_is_known_here() -> None:
    defaults = {"model": GPTConfig, "optimizer": AdamWConfig}
    names = {f"{part}.{key}" for part, kind in defaults.items() for key in leaf_names(kind)}
    names |= {*leaf_names(TrainConfig)} - {"model"}
    assert names == CARRIED_OUT | set(ELSE)


@pytest.mark.parametrize("framework", sorted(HERE_ON_2))
def test_every_key_of_a_training_configuration_is_carried_out_or_refused(
    framework: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if every framework were installed: nothing is run.
    monkeypatch.setattr(Environment, "missing", None)
    plain = {"model": MODEL, "grid": HERE_ON_2[framework], "batch_size": 8, "microbatch_size": 2}
    found = load_framework(framework)
    assert found.unavailable(validate(plain, TrainConfig, where="test")) is None
    silent = []
    for key, value in ELSE.items():
        if key in WITHOUT_EFFECT_HERE or (key == "model.tied_head" and framework in TIED):
            continue
        if key.startswith("schedule.") and "inter" not in HERE_ON_2[framework]:
            continue
        change = value
        for part in reversed(key.split(".")):
            change = {part: change}
        reason = found.unavailable(validate(over(plain, change), TrainConfig, where="test"))
        if reason is None:
            silent.append(key)
    assert not silent, f"{framework} ignores {', '.join(silent)}"
