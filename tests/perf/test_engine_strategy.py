"""A configuration of the engine as a strategy of the performance model, and back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axonn.config.train_config import TrainConfig
from axonn.errors import ConfigError, GridError
from axonn.grid import ProcessGrid
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.optim.algorithms.adamw import AdamWConfig
from axonn.perf.planner.engine_strategy import config_of_strategy, strategy_of_config
from axonn.schedules import ScheduleSpec

MODEL = GPTConfig(name="g", layers=8, hidden=64, heads=4, seq_len=32, vocab=64)


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"model": MODEL, "batch_size": 16, "microbatch_size": 2, **changes})


def test_a_strategy_has_what_the_engine_does() -> None:
    strategy = strategy_of_config(
        config(grid=ProcessGrid(inter=2, col=2), transport="torch", precision={"compute": "bfloat16"})
    )
    assert strategy.grid == ProcessGrid(inter=2, col=2)
    assert strategy.message_library == "nccl"
    assert strategy.compute == "bfloat16"
    assert strategy.partition == "work"
    assert strategy.overdecomposition == 2, "by default two sub-shards where layers are cut"
    assert strategy.overlap_input_gradients
    assert strategy.accumulate == "in-place"
    assert not strategy.partition_messages
    assert strategy_of_config(config()).overdecomposition == 1


def test_one_chunk_of_all_gradients_has_all_buckets() -> None:
    strategy = strategy_of_config(config(optimizer=AdamWConfig(k=None, bsize=1000)))
    assert strategy.k * strategy.bsize >= MODEL.parameters


def test_automatic_checkpointing_is_what_the_engine_chooses() -> None:
    strategy = strategy_of_config(config(activation_checkpointing="auto"))
    # The limit is 2 microbatches: of the divisors of 8 blocks 4 is the nearest to the root of 16.
    assert strategy.checkpoint_layers == 4


def test_what_the_engine_refuses_is_refused() -> None:
    with pytest.raises(GridError, match="overdecomposition 3"):
        strategy_of_config(config(overdecomposition=3))
    with pytest.raises(ConfigError, match="batch_size 16 is no multiple"):
        strategy_of_config(config(grid=ProcessGrid(data=3)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocking_messages": True}, "blocking_messages True"),
        ({"partition": "layers"}, "partition 'layers'"),
        ({"optimizer": "sharded"}, "optimizer 'sharded'"),
    ],
)
def test_a_strategy_that_the_engine_does_not_run_is_an_error(change: dict[str, Any], said: str) -> None:
    strategy = strategy_of_config(config()).model_copy(update=change)
    with pytest.raises(ConfigError, match=said):
        config_of_strategy(strategy, MODEL, batch_size=16)


@given(
    st.fixed_dictionaries(
        {
            "grid": st.sampled_from(
                [ProcessGrid(), ProcessGrid(inter=2), ProcessGrid(data=2, col=2), ProcessGrid(row=4)]
            ),
            "transport": st.sampled_from(["mpi", "torch"]),
            "activation_checkpointing": st.sampled_from([None, 1, 2]),
            "optimizer": st.builds(
                AdamWConfig, placement=st.sampled_from(["device", "offloaded"]), k=st.integers(1, 9)
            ),
            "overdecomposition": st.sampled_from([None, 1, 2]),
            "schedule": st.sampled_from([ScheduleSpec(), ScheduleSpec(name="1f1b"), ScheduleSpec(pick="1f1b")]),
        }
    )
)
def test_there_and_back_is_the_same_strategy(changes: dict[str, Any]) -> None:
    there = strategy_of_config(config(**changes))
    back = config_of_strategy(there, MODEL, batch_size=16)
    assert strategy_of_config(back) == there
