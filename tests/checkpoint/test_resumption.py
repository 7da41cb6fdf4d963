"""An engine goes on from a checkpoint or a file of weights, on the grid that wrote it and on every other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from axonn.checkpoint.checkpoints import CheckpointState, checkpoint_name, load, save
from axonn.config.train_config import PrecisionConfig
from axonn.distributed.runtime import connect
from axonn.errors import ConfigError
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.gpt.gpt_model import GPT
from axonn.models.weights_file import check_weights, export_weights, import_weights
from tests.helpers.rank_pool import RankPool
from tests.helpers.shard_cases import assembled, detached
from tests.helpers.training import Case, batch_of, make_engine, serial_reference

# --- the engine


State = tuple[list[float], list[float], list[bool], dict[str, torch.Tensor]]


def train_engine(comm: Any, case: Case, folder: Path, resume: str | None, save_after: int | None) -> Any:
    """A job of the rank pool: (losses, scales, applied, master weights and moments) from wherever it starts."""
    with connect(case.grid, comm=comm, transport=case.transport) as runtime:
        engine = make_engine(case, runtime.rank, runtime.transport, runtime.collectives)
        if resume is not None:
            state = load(folder / resume, engine.state_tensors())
            engine.state_loaded()
            engine.load_progress(state.progress)
        results = []
        rows = engine.shard(0)
        for step in range(engine.batches, case.steps):
            results.append(engine.train_batch(*(t[rows.start : rows.stop] for t in batch_of(case, step))))
            if step + 1 == save_after:
                # As JSON, since that is how it comes back.
                progress = json.loads(json.dumps(dict(engine.progress())))
                state = CheckpointState(batches=step + 1, samples=0, seed=7, progress=progress, config={}, grid={})
                save(folder, tensors=engine.state_tensors(), state=state)
        parts = detached(engine.state_tensors())
        return [r.loss for r in results], [r.loss_scale for r in results], [r.applied for r in results], parts


def whole(by_rank: list[Any]) -> State:
    """What all ranks agree on: losses, and each whole tensor of the state, of which all replicas are equal."""
    assert all(one[:3] == by_rank[0][:3] for one in by_rank)
    return *by_rank[0][:3], assembled(parts for *_, parts in by_rank)


GRIDS: dict[str, dict[str, Any]] = {
    "2x2x1x1": {"data": 2, "inter": 2},
    "1x4x1x1": {"inter": 4},
    "1x1x1x1": {},
    "1x1x2x2": {"row": 2, "col": 2},
    "2x1x1x4": {"data": 2, "col": 4},
    "1x2x2x2": {"inter": 2, "row": 2, "col": 2},
}


def case_of(**changes: Any) -> Case:
    return Case(**({"microbatches": 4, "tied": True, "steps": 6, "clip": 0.5} | changes))


def start(pool: RankPool, folder: Path, case: Case) -> State:
    """All batches, with a checkpoint after 3."""
    return whole(pool.run(train_engine, case, folder, None, 3, ranks=case.grid.size))


def check_resumed(pool: RankPool, folder: Path, case: Case, expected: State, rounding: float) -> None:
    """`case` goes on from the checkpoint and must come to what the run that wrote it came to."""
    losses, scales, applied, tensors = whole(
        pool.run(train_engine, case, folder, "step-00000003", None, ranks=case.grid.size)
    )
    assert len(losses) == case.steps - 3
    assert (scales, applied) == (expected[1][3:], expected[2][3:])
    assert tensors.keys() == expected[3].keys()
    assert losses == (pytest.approx(expected[0][3:], rel=rounding) if rounding else expected[0][3:])
    for name, tensor in tensors.items():
        assert (tensor - expected[3][name]).abs().max() <= rounding * expected[3][name].abs().max(), name


@pytest.mark.parametrize("first", GRIDS)
def test_a_grid_goes_on_from_its_own_checkpoint_bit_for_bit_and_from_those_of_others(
    pool: RankPool, tmp_path: Path, first: str
) -> None:
    """Each from three: what is stored does not say who wrote it (`test_checkpoint_grids`)."""
    expected = start(pool, tmp_path, case_of(**GRIDS[first]))
    check_resumed(pool, tmp_path, case_of(**GRIDS[first]), expected, 0)
    names = list(GRIDS)
    for further in (1, 3):
        second = names[(names.index(first) + further) % len(names)]
        check_resumed(pool, tmp_path, case_of(**GRIDS[second]), expected, 1e-10)


def test_how_it_is_computed_may_change(pool: RankPool, tmp_path: Path) -> None:
    expected = start(pool, tmp_path, case_of(inter=2))
    changes: list[dict[str, Any]] = [
        {"schedule": "1f1b"},
        {"chunks": 2, "placement": "v"},
        {"offloaded": True, "k": 1},
        {"recompute": 1},
        {"transport": "torch"},
    ]
    for change in changes:
        check_resumed(pool, tmp_path, case_of(inter=2, **change), expected, 1e-12)


def test_half_precision_goes_on_with_its_masters_and_loss_scale(pool: RankPool, tmp_path: Path) -> None:
    """The scale grows with every batch until one overflows and is skipped."""
    precision = PrecisionConfig(compute="float16", growth_interval=1)
    case = Case(data=1, inter=2, microbatches=2, steps=12, precision=precision)
    expected = start(pool, tmp_path, case)
    _, scales, applied, _ = expected
    assert scales[3] == 8 * scales[0], "the checkpoint's scale is not the first"
    assert False in applied[3:]
    check_resumed(pool, tmp_path, case, expected, 0)


# --- weights of a model


def weights_of_training(comm: Any, case: Case, folder: Path) -> float:
    """A job of the rank pool: trains and saves at the end; the loss of another batch."""
    with connect(case.grid, comm=comm, transport=case.transport) as runtime:
        engine = make_engine(case, runtime.rank, runtime.transport, runtime.collectives)
        rows = engine.shard(0)
        for step in range(case.steps):
            engine.train_batch(*(t[rows.start : rows.stop] for t in batch_of(case, step)))
        state = CheckpointState(batches=case.steps, samples=0, seed=7, progress={}, config={}, grid={})
        save(folder, tensors=engine.state_tensors(), state=state)
        return engine.evaluate_batch(*(t[rows.start : rows.stop] for t in batch_of(case, 99)))


def loss_of_weights(comm: Any, case: Case, file: Path) -> float:
    """A job of the rank pool: the same batch's loss by the weights of a file."""
    with connect(case.grid, comm=comm, transport=case.transport) as runtime:
        engine = make_engine(case, runtime.rank, runtime.transport, runtime.collectives)
        import_weights(file, engine.state_tensors())
        engine.state_loaded()
        rows = engine.shard(0)
        return engine.evaluate_batch(*(t[rows.start : rows.stop] for t in batch_of(case, 99)))


@pytest.mark.parametrize("offloaded", [False, True])
def test_weights_trained_on_a_tensor_grid_are_the_serial_ones(pool: RankPool, tmp_path: Path, offloaded: bool) -> None:
    """One file, whole, and every other grid goes on from it."""
    case = Case(row=2, col=2, microbatches=2, tied=True, offloaded=offloaded)
    (loss,) = set(pool.run(weights_of_training, case, tmp_path, ranks=4))
    file = tmp_path / "w.safetensors"
    assert export_weights(tmp_path / checkpoint_name(case.steps), file) == case.model.parameters
    check_weights(file, GPT(case.model))
    weights, expected = load_file(file), serial_reference(case).parameters
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.shape == expected[name].shape
        assert (weight - expected[name]).abs().max() <= 1e-10 * expected[name].abs().max(), name
    (again,) = set(pool.run(loss_of_weights, case, file, ranks=4))
    assert again == loss
    others: list[dict[str, Any]] = [{"row": 1, "col": 4}, {"data": 2, "row": 1, "col": 1}, {"inter": 2, "row": 1}]
    for grid in others:
        other = replace(case, **grid)
        assert pool.run(loss_of_weights, other, file, ranks=other.grid.size) == [pytest.approx(loss, rel=1e-12)] * (
            other.grid.size
        )


def test_the_engine_starts_from_a_file_of_weights(tmp_path: Path) -> None:
    case = Case(tied=True, dtype="float64")
    engine = make_engine(case, 0, None, None)
    engine.train_batch(*batch_of(case, 0))
    state = CheckpointState(batches=1, samples=0, seed=0, progress={}, config={}, grid={})
    count = export_weights(save(tmp_path, tensors=engine.state_tensors(), state=state), tmp_path / "w.safetensors")
    assert count == case.model.parameters
    weights = load_file(tmp_path / "w.safetensors")
    assert "head.output.weight" not in weights
    check_weights(tmp_path / "w.safetensors", GPT(case.model))
    other = make_engine(case, 0, None, None)
    import_weights(tmp_path / "w.safetensors", other.state_tensors())
    other.state_loaded()
    batch = batch_of(case, 1)
    assert other.evaluate_batch(*batch) == engine.evaluate_batch(*batch)
    untied = GPTConfig(**(case.model.model_dump() | {"tied_head": False}))
    with pytest.raises(ConfigError, match=r"not in the file: head\.output\.weight"):
        check_weights(tmp_path / "w.safetensors", GPT(untied))
