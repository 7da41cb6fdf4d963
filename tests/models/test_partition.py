"""Cutting a chain of layers into stages: never worse than the best of all cuts."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axonn.errors import GridError
from axonn.inter_layer.partition import partition, partition_chunks
from axonn.inter_layer.stage import virtual_spans
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.gpt.gpt_model import GPT
from axonn.schedules import ChunkLayout


def stage_costs(costs: list[int], spans: list[range]) -> list[int]:
    return [sum(costs[i] for i in span) for span in spans]


def quality(costs: list[int], spans: list[range]) -> tuple[int, int]:
    """Largest stage cost, then the sum of squares: smaller is better."""
    sums = stage_costs(costs, spans)
    return max(sums), sum(c * c for c in sums)


def all_cuts(layers: int, stages: int) -> list[list[range]]:
    return [
        [range(a, b) for a, b in pairwise((0, *cuts, layers))] for cuts in combinations(range(1, layers), stages - 1)
    ]


@settings(max_examples=300)
@given(st.data())
def test_no_cut_is_better(data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=9))
    stages = data.draw(st.integers(1, len(costs)))
    spans = partition(costs, stages)
    assert [i for span in spans for i in span] == list(range(len(costs)))
    assert len(spans) == stages
    assert all(spans)
    assert quality(costs, spans) == min(quality(costs, cut) for cut in all_cuts(len(costs), stages))


def test_a_later_stage_may_be_larger_where_that_balances_better() -> None:
    """Alone, the last four layers are best cut into 1, 8, 3 + 3; after a first stage of 12 they may be 1 + 8, 3, 3."""
    assert partition([12, 1, 8, 3, 3], 4) == [range(1), range(1, 3), range(3, 4), range(4, 5)]


def test_a_cut_that_a_greedy_choice_misses() -> None:
    assert partition([9, 1, 1, 1, 1, 9], 3) == [range(1), range(1, 5), range(5, 6)]


def test_one_layer_per_stage_at_the_limit() -> None:
    assert partition([5.0, 1.0, 3.0], 3) == [range(1), range(1, 2), range(2, 3)]


@pytest.mark.parametrize("stages", [4, 100])
def test_more_stages_than_layers_are_refused(stages: int) -> None:
    with pytest.raises(
        GridError, match=f"{stages} stages are more than the 3 into which this model can be cut; lower G_inter"
    ):
        partition([1.0, 1.0, 1.0], stages)


def test_the_stages_of_a_large_model_are_balanced() -> None:
    """GPT of 96 blocks on 48 stages: the head of a large vocabulary costs several blocks, and gets a stage for it."""
    model = GPT(GPTConfig(name="t", layers=96, hidden=6144, heads=48, seq_len=512, vocab=51200))
    spans = virtual_spans(model, ChunkLayout(stages=48))
    costs = [layer.cost for layer in model.layers]
    largest = max(sum(costs[i] for i in span) for span in spans)
    # Halves of layers are the grain: a stage is at most one of them above the mean.
    assert largest < sum(costs) / 48 + costs[2]
    assert spans[0].start == 0
    assert spans[-1].stop == 194


LAYOUTS = st.builds(
    ChunkLayout, stages=st.integers(1, 3), chunks=st.integers(1, 3), placement=st.sampled_from(["loop", "v"])
)


@settings(max_examples=200)
@given(st.data())
def test_chunks_cover_the_chain_and_are_not_worse_than_equal_ones(data: st.DataObject) -> None:
    layout = data.draw(LAYOUTS)
    costs = data.draw(st.lists(st.integers(0, 20), min_size=layout.virtual_stages, max_size=12))
    spans = partition_chunks(costs, layout)
    assert [i for span in spans for i in span] == list(range(len(costs)))
    assert len(spans) == layout.virtual_stages
    assert all(spans)
    assert fullest(costs, spans, layout) <= fullest(costs, partition(costs, layout.virtual_stages), layout)


def fullest(costs: list[int], spans: list[range], layout: ChunkLayout) -> int:
    stages = [0] * layout.stages
    for virtual, span in enumerate(spans):
        stages[layout.place(virtual)[0]] += sum(costs[i] for i in span)
    return max(stages)


def test_a_large_last_layer_is_made_up_for_by_a_small_first_chunk() -> None:
    """In a V the first stage has both ends of the chain; equal chunks would give it 12 of 19."""
    layout = ChunkLayout(stages=2, chunks=2, placement="v")
    spans = partition_chunks([2, 2, 2, 2, 2, 2, 7], layout)
    assert fullest([2, 2, 2, 2, 2, 2, 7], spans, layout) == 10
