"""A value that is not finite ends a run: where it came from is named, and nothing that it spoiled is kept for good."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from axonn.checkpoint.checkpoints import latest
from axonn.config.train_config import CheckpointConfig, DataConfig
from axonn.distributed.transport import InProcessCollectives, InProcessTransport, InProcessWorld
from axonn.engine import Engine
from axonn.grid import ProcessGrid
from axonn.inter_layer.non_finite import NotFinite
from axonn.models.weights_file import read_weights
from axonn.optim.algorithms.adamw import AdamWConfig
from axonn.training.supervision.supervisor import supervise
from tests.helpers.command_line import TEXT, tiny
from tests.helpers.fault_injection import IN_A_LAYER, harm_ranks
from tests.helpers.training import Case, Outcome, make_engine, train_step

LAYERS = 8
"""Of the test's GPT: embedding, six blocks and the head."""
MICROBATCHES = 4


def spoil(engine: Engine, layer: int, *, backwards: bool, value: float, microbatch: int) -> None:
    """Once, in the forward or the backward of a microbatch through a layer, where this rank has that layer."""
    for chunk in engine.chunks:
        if layer not in chunk.span:
            continue
        module = list(chunk.chain.values())[layer - chunk.span.start]
        seen: list[int] = []

        def after(module: Any, inputs: Any, output: torch.Tensor, seen: list[int] = seen) -> torch.Tensor | None:
            if not torch.is_grad_enabled():
                return None
            seen.append(1)
            if len(seen) != microbatch + 1:
                return None
            if not backwards:
                return output * value
            output.register_hook(lambda gradient: gradient * value)
            return None

        module.register_forward_hook(after)


def train_spoiled(case: Case, layer: int, **how: Any) -> list[tuple[Outcome, list[NotFinite]]]:
    world = InProcessWorld(case.grid.size, order_seed=1)

    def body(rank: int) -> tuple[Outcome, list[NotFinite]]:
        transport = InProcessTransport(world, rank) if case.grid.inter > 1 else None
        engine = make_engine(case, rank, transport, InProcessCollectives(world, case.grid, rank))
        spoil(engine, layer, **how)
        outcome = Outcome()
        train_step(engine, case, 0, outcome)
        return outcome, engine.not_finite()

    return world.run(body)


GRIDS = [
    Case(inter=4, microbatches=MICROBATCHES),
    Case(inter=2, chunks=2, placement="v", schedule="message-driven-zero-bubble", microbatches=MICROBATCHES),
    Case(inter=2, data=2, microbatches=MICROBATCHES),
    Case(inter=2, col=2, sub_shards=1, microbatches=MICROBATCHES),
]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("case", GRIDS, ids=lambda case: str(case.grid))
def test_what_a_layer_spoils_forwards_is_named(case: Case, layer: int, value: float) -> None:
    results = train_spoiled(case, layer, backwards=False, value=value, microbatch=2)
    first = min(place for _, found in results for place in found)
    assert all(not math.isfinite(outcome.losses[0]) for outcome, _ in results)
    assert not first.backwards
    assert first.layers[0] <= layer <= first.layers[1]
    owners = [r for r in range(case.grid.size) if any(p.layers == first.layers for p in results[r][1])]
    assert first.rank in owners
    assert first.microbatch == 2


@pytest.mark.parametrize("layer", range(1, LAYERS))
@pytest.mark.parametrize("case", GRIDS[:2], ids=lambda case: str(case.grid))
def test_what_a_layer_spoils_backwards_is_named(case: Case, layer: int) -> None:
    """Where it comes out of a chunk: what only the first stage's own weights get shows in the next batch."""
    results = train_spoiled(case, layer, backwards=True, value=math.nan, microbatch=1)
    found = [place for _, places in results for place in places]
    chunk = next(span for span in spans_of(case) if layer in span)
    if chunk.start == 0:
        assert found == []
        return
    assert all(math.isnan(outcome.losses[0]) for outcome, _ in results), "a checkpoint could follow"
    assert min(found).backwards
    assert min(found).layers == (chunk.start, chunk.stop - 1)
    assert min(found).microbatch == 1


def spans_of(case: Case) -> list[range]:
    world = InProcessWorld(case.grid.size)
    spans: list[list[range]] = world.run(
        lambda rank: (
            make_engine(
                case, rank, InProcessTransport(world, rank), InProcessCollectives(world, case.grid, rank)
            ).virtual_spans
        )
    )
    return spans[0]


def test_nothing_is_found_where_all_is_well() -> None:
    case = Case(inter=2, microbatches=MICROBATCHES)
    for outcome, found in train_spoiled(case, 1, backwards=False, value=1.0, microbatch=2):
        assert found == []
        assert math.isfinite(outcome.losses[0])


def test_the_first_of_several_is_the_first_in_the_network() -> None:
    places = [
        NotFinite(True, 0, 0, 3, (6, 7)),
        NotFinite(False, 2, 0, 2, (4, 5)),
        NotFinite(False, 1, 3, 1, (2, 3)),
        NotFinite(False, 1, 1, 5, (2, 3)),
    ]
    assert min(places) == places[3]
    assert str(places[3]) == "what comes out of layers 2 to 3 for microbatch 1"
    assert str(NotFinite(True, 0, 0, 3, (6, 6))) == "gradients that come out of layer 6 for microbatch 0"


# --- in a run


def spoiled_run(folder: Path, monkeypatch: pytest.MonkeyPatch, grid: ProcessGrid, **how: Any) -> tuple[Any, Path]:
    """A run of six batches of four microbatches, one of whose layers is spoiled, and the folder of its checkpoints."""
    harm_ranks(folder / "harm", monkeypatch, IN_A_LAYER.format(**{"where": "True", "value": 'float("nan")'} | how))
    config = tiny(
        steps=6,
        checkpoints=CheckpointConfig(every=1, keep=9),
        data=DataConfig(path=str(TEXT)),
        optimizer=AdamWConfig(lr=1e-3),
    ).model_copy(update={"grid": ProcessGrid(data=grid.data, inter=grid.inter, row=grid.row, col=grid.col)})
    return supervise("axonn", config, folder / "run", timeout_s=250), folder / "run" / "checkpoints"


def check_good(checkpoints: Path, batches: int) -> None:
    newest = latest(checkpoints)
    assert newest is not None
    assert newest.state.batches == batches
    assert all(weight.isfinite().all() for weight in read_weights(newest.folder).values())


def test_a_run_names_the_rank_whose_layer_was_spoiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, checkpoints = spoiled_run(
        tmp_path, monkeypatch, ProcessGrid(inter=2), layer=5, backwards=False, call=4 * 3 + 2
    )
    assert outcome.failure is not None
    assert (outcome.failure.cause, outcome.failure.rank) == ("nan", 1)
    assert outcome.failure.detail.endswith(
        "the loss of batch 3 is nan: what comes out of layer 5 for microbatch 1 on rank 1 was the first that was "
        "not finite; lower optimizer.lr"
    )
    assert len(outcome.losses) == 4
    check_good(checkpoints, 3)


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of the batch was fine; its gradient was not, and went into weights of the only stage."""
    outcome, checkpoints = spoiled_run(
        tmp_path, monkeypatch, ProcessGrid(data=2), layer=1, backwards=True, call=2 * 2 + 1, where="RANK == 1"
    )
    assert outcome.failure is not None
    # The replicas have added their gradients up: both have it.
    assert (outcome.failure.cause, outcome.failure.rank) == ("nan", 0)
    assert "after batch 2 some values are no numbers: rank 0: exp_avg." in outcome.failure.detail
    assert "; nothing was saved; lower optimizer.lr" in outcome.failure.detail
    check_good(checkpoints, 2)
