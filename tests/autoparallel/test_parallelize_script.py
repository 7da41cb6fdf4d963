"""What a training script does around a module, each row of the table in docs/own-model.md: on every rank of every grid
a cut module does the same as the module itself, or says that it does not."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mpi4py import MPI
from torch import nn
from torch.utils.checkpoint import checkpoint

import axonn
from axonn.distributed.runtime import connect
from axonn.distributed.transport import InProcessCollectives, InProcessWorld
from axonn.errors import ConfigError, GridError
from axonn.grid import ProcessGrid
from tests.helpers.rank_pool import RankPool

GRIDS = [ProcessGrid(col=2), ProcessGrid(row=2, col=2), ProcessGrid(data=2, row=2)]
PAGE = Path(__file__).parents[2] / "docs" / "own-model.md"
ROWS: set[str] = set()


def row(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register the test of the row of the table that begins with `name`."""
    ROWS.add(name)
    return lambda test: test


def test_every_row_of_the_table_has_its_test() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("| in a script |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| (.+?) \|", table, re.MULTILINE) == sorted(ROWS, key=_place)


def _place(name: str) -> int:
    return PAGE.read_text(encoding="utf-8").find(f"| {name} |")


class Net(nn.Module):
    """A layer of each kind that is cut, one that stays whole, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Conv2d(3, 12, 3, padding=1)
        self.group_norm = nn.GroupNorm(3, 12)
        self.words = nn.Embedding(24, 12)
        self.mix = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 12))
        self.norm = nn.RMSNorm(12)
        self.bilinear = nn.Bilinear(12, 12, 12)
        self.dropout = nn.Dropout(0.0)
        self.head = nn.Linear(12, 6)

    def forward(self, images: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.group_norm(self.pixels(images))).mean((2, 3)) + self.words(words)
        x = self.norm(x + self.dropout(self.mix(x)))
        y: torch.Tensor = self.head(self.bilinear(x, x) + x)
        return y


ROWS_OF_BATCH = 8
IMAGES = torch.randn(ROWS_OF_BATCH, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
WORDS = torch.arange(ROWS_OF_BATCH) * 5 % 24
LABELS = torch.arange(ROWS_OF_BATCH) % 6


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Net().to(dtype)


class Rank:
    """The script's view of one rank: `model`, cut or not, and which rows of the batch are its own."""

    def __init__(self, model: nn.Module, part: int = 0, parts: int = 1) -> None:
        self.model = model
        size = ROWS_OF_BATCH // parts
        self.rows = slice(part * size, (part + 1) * size)
        self.dtype = next(model.parameters()).dtype

    @property
    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        return IMAGES[self.rows].to(self.dtype), WORDS[self.rows]

    def loss(self, model: nn.Module | None = None) -> torch.Tensor:
        return F.cross_entropy((self.model if model is None else model)(*self.batch), LABELS[self.rows])

    def average(self) -> None:
        if isinstance(self.model, axonn.ParallelModule):
            self.model.average_gradients()

    def backward(self) -> None:
        self.loss().backward()
        self.average()

    def state(self, model: nn.Module | None = None) -> dict[str, torch.Tensor]:
        model = self.model if model is None else model
        return model.full_state_dict() if isinstance(model, axonn.ParallelModule) else copy.deepcopy(model.state_dict())


Script = Callable[[Rank], Any]


def on_ranks(script: Script, grid: ProcessGrid, module: nn.Module, sub_shards: int = 1) -> list[Any]:
    """Results of `script` on every rank."""
    world = InProcessWorld(grid.size)

    def body(rank: int) -> Any:
        collectives = InProcessCollectives(world, grid, rank)
        example = IMAGES.to(next(module.parameters()).dtype), WORDS
        parallel = axonn.parallelize(
            module, grid, example_inputs=example, collectives=collectives, overdecomposition=sub_shards
        )
        return script(Rank(parallel, grid.coordinates(rank).data, grid.data))

    return world.run(body)


def same(script: Script, *, dtype: torch.dtype = torch.float64, tolerance: float = 1e-10, sub_shards: int = 1) -> None:
    """What `script` returns is the same for the module itself and on every rank of every grid."""
    expected = script(Rank(net(dtype)))
    for grid in GRIDS:
        for found in on_ranks(script, grid, net(dtype), sub_shards):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def refused(script: Script, message: str, grids: list[ProcessGrid] | None = None) -> None:
    """On every grid `script` ends with a `ConfigError`."""
    for grid in grids or GRIDS:
        with pytest.raises(ConfigError, match=message):
            on_ranks(script, grid, net())


@row("`torch.nn.utils.clip_grad_norm_`, `get_total_norm`")
@pytest.mark.parametrize("order", [2.0, 1.0, 3.0, float("inf"), 0.0])
@pytest.mark.parametrize("by", ["torch", "module", "foreach", "in two steps"])
def test_clipping_by_norm(by: str, order: float) -> None:
    def script(rank: Rank) -> Any:
        model = rank.model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        norms = []
        for _ in range(2):
            optimizer.zero_grad()
            rank.backward()
            parameters = list(model.parameters())
            if by == "in two steps":
                total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], order)
                torch.nn.utils.clip_grads_with_norm_(parameters, 0.1, total)
            elif by == "module" and isinstance(model, axonn.ParallelModule):
                total = model.clip_grad_norm_(0.1, order, error_if_nonfinite=True)
            else:
                foreach = True if by == "foreach" else None
                total = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, order, foreach=foreach)
            norms.append(total)
            optimizer.step()
        return norms, rank.state()

    same(script, sub_shards=2 if by == "module" else 1)


def test_clipping_a_norm_that_is_no_number() -> None:
    def script(rank: Rank) -> None:
        (rank.loss() * float("inf")).backward()
        rank.average()
        for clip in (
            rank.model.clip_grad_norm_,
            lambda *a, **k: torch.nn.utils.clip_grad_norm_(rank.model.parameters(), *a, **k),
        ):
            with pytest.raises(RuntimeError, match="non-finite"):
                clip(1.0, error_if_nonfinite=True)

    for grid in GRIDS:
        on_ranks(script, grid, net())


def test_gradients_that_are_not_averaged_are_neither_clipped_nor_stepped() -> None:
    def clip(rank: Rank) -> None:
        rank.loss().backward()
        torch.nn.utils.clip_grad_norm_(rank.model.parameters(), 1.0)

    def method(rank: Rank) -> None:
        rank.loss().backward()
        rank.model.clip_grad_norm_(1.0)

    def step(rank: Rank) -> None:
        optimizer = torch.optim.AdamW(rank.model.parameters())
        rank.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        rank.loss().backward()
        optimizer.step()

    for script in (clip, method, step):
        refused(script, r"call average_gradients\(\)", [ProcessGrid(data=2), ProcessGrid(data=2, row=2)])


def test_the_norm_of_each_gradient_is_that_of_the_whole_and_what_is_none_is_refused() -> None:
    def script(rank: Rank) -> Any:
        rank.backward()
        named = [p.grad for _, p in sorted(rank.model.named_parameters()) if p.grad is not None]
        halves = [g / 2 for g in named]
        norms = [
            [g.norm(), torch.norm(g), torch.linalg.vector_norm(g, 1), torch.linalg.norm(g)] for g in [*named, *halves]
        ]
        return norms, torch._foreach_norm(named, 2)

    same(script)

    def along_a_dim(rank: Rank) -> None:
        rank.backward()
        rank.model.get_parameter("module.head.weight").grad.norm(dim=-1)

    refused(along_a_dim, "along some dims")


@row("`torch.nn.utils.clip_grad_value_`")
def test_clipping_by_value() -> None:
    def script(rank: Rank) -> Any:
        rank.backward()
        torch.nn.utils.clip_grad_value_(rank.model.parameters(), 0.01)
        torch.optim.SGD(rank.model.parameters(), lr=0.1).step()
        return rank.state()

    same(script)


@row("`torch.autocast`")
@pytest.mark.parametrize("sub_shards", [1, 2])
def test_autocast(sub_shards: int) -> None:
    kinds: set[str] = set()

    def script(rank: Rank) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = rank.model(*rank.batch)
            loss = F.cross_entropy(outputs, LABELS[rank.rows])
        _functions(outputs.grad_fn, kinds, set())
        loss.backward()
        rank.average()
        gradients = [p.grad for p in rank.model.parameters()]
        norm = torch.nn.utils.clip_grad_norm_(rank.model.parameters(), 10.0)
        torch.optim.SGD(rank.model.parameters(), lr=0.1).step()
        types = outputs.dtype, [None if g is None else g.dtype for g in gradients]
        return types, norm.item(), {name: value.double() for name, value in rank.state().items()}

    types, norm, state = script(Rank(net(torch.float32)))
    for grid in GRIDS:
        for found_types, found_norm, found in on_ranks(script, grid, net(torch.float32), sub_shards):
            assert found_types == types
            assert found_norm == pytest.approx(norm, rel=0.03)
            # Steps of 0.1: what is left of a gradient's rounding to 8 bits.
            torch.testing.assert_close(found, state, rtol=0.0, atol=4e-3)
    if sub_shards == 1:
        expected = {"_Linear", "_Conv2d", "_Embedding", "_LayerNorm", "_RMSNorm", "_GroupNorm", "_Redistribute"}
        assert expected <= {kind.removesuffix("Backward") for kind in kinds}


def _functions(node: Any, found: set[str], seen: set[Any]) -> None:
    if node is None or node in seen:
        return
    seen.add(node)
    found.add(type(node).__name__)
    for following, _ in node.next_functions:
        _functions(following, found, seen)


@row("`torch.amp.GradScaler`")
@pytest.mark.parametrize("overflows", [False, True])
def test_grad_scaler(overflows: bool) -> None:
    def script(rank: Rank) -> Any:
        optimizer = torch.optim.AdamW(rank.model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(rank.loss()).backward()
            rank.average()
            cut = isinstance(rank.model, axonn.ParallelModule)
            # One value of one gradient, which one rank holds.
            if overflows and not (cut and (rank.model.context.coordinates.row or rank.model.context.coordinates.col)):
                rank.model.get_parameter("module.mix.0.weight" if cut else "mix.0.weight").grad[0, 0] = float("inf")
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(rank.model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        return scaler.get_scale(), rank.state()

    same(script)
    assert (script(Rank(net()))[0] < 1024) is overflows


@row("gradient accumulation")
@pytest.mark.parametrize("sub_shards", [1, 2])
def test_gradients_of_several_backwards_add_up(sub_shards: int) -> None:
    def script(rank: Rank) -> Any:
        for scale in (1.0, 0.5, 0.25):
            (rank.loss() * scale).backward()
        rank.average()
        norm = torch.nn.utils.clip_grad_norm_(rank.model.parameters(), 0.1)
        torch.optim.SGD(rank.model.parameters(), lr=0.1).step()
        return norm, rank.state()

    same(script, sub_shards=sub_shards)


@row("`zero_grad`, with `set_to_none` or not")
@pytest.mark.parametrize("set_to_none", [False, True])
def test_zero_grad(set_to_none: bool) -> None:
    def script(rank: Rank) -> Any:
        optimizer = torch.optim.SGD(rank.model.parameters(), lr=0.1)
        for _ in range(2):
            rank.backward()
            norm = torch.nn.utils.clip_grad_norm_(rank.model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        rank.model.zero_grad(set_to_none=set_to_none)
        return norm, rank.state(), [p.grad is None for p in rank.model.parameters()]

    same(script)


@row("`torch.optim`, with parameter groups and weight decay")
@pytest.mark.parametrize(
    "name", ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "ASGD", "Rprop"]
)
def test_optimizers(name: str) -> None:
    def script(rank: Rank) -> Any:
        plain = [p for p in rank.model.parameters() if p.dim() < 2]
        decayed = [p for p in rank.model.parameters() if p.dim() >= 2]
        decay = {} if name == "Rprop" else {"weight_decay": 0.1}
        groups = [{"params": plain}, {"params": decayed, "lr": 0.02, **decay}]
        optimizer = getattr(torch.optim, name)(groups, lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            rank.backward()
            optimizer.step()
        return rank.state()

    same(script, tolerance=1e-7)


@row("`torch.optim.Adafactor`, `LBFGS`, `Muon`")
@pytest.mark.parametrize("name", ["Adafactor", "LBFGS", "Muon"])
def test_optimizers_that_look_at_whole_weights(name: str) -> None:
    def script(rank: Rank) -> None:
        weight = rank.model.get_parameter("module.head.weight")
        optimizer = getattr(torch.optim, name)([weight])
        rank.backward()
        optimizer.step(*([rank.loss] if name == "LBFGS" else []))

    refused(script, f"{name} takes norms or products of whole parameters")


@row("learning-rate schedulers")
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=5),
    ],
    ids=["cosine", "one cycle"],
)
def test_schedulers(schedule: Callable[[torch.optim.Optimizer], Any]) -> None:
    def script(rank: Rank) -> Any:
        optimizer = torch.optim.AdamW(rank.model.parameters(), lr=0.05)
        scheduler = schedule(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            rank.backward()
            optimizer.step()
            scheduler.step()
        return scheduler.get_last_lr(), rank.state()

    same(script)


@row("frozen parameters, before and after")
def test_frozen_parameters() -> None:
    def script(rank: Rank) -> Any:
        prefix = "module." if isinstance(rank.model, axonn.ParallelModule) else ""
        mix = rank.model.get_submodule(f"{prefix}mix")
        mix.requires_grad_(False)
        for _ in range(2):
            optimizer = torch.optim.AdamW([p for p in rank.model.parameters() if p.requires_grad], lr=0.01)
            rank.backward()
            norm = torch.nn.utils.clip_grad_norm_(rank.model.parameters(), 0.1)
            optimizer.step()
            rank.model.zero_grad()
            mix.requires_grad_(True)
        return norm, rank.state()

    same(script)


@row("`train()`, `eval()`")
def test_modes() -> None:
    def script(rank: Rank) -> Any:
        rank.model.eval()
        modes = {module.training for module in rank.model.modules()}
        outputs = rank.loss()
        rank.model.train()
        return outputs.item() if rank.rows == slice(0, ROWS_OF_BATCH) else None, modes, rank.model.training

    expected = script(Rank(net()))
    for grid in GRIDS[:2]:
        for found in on_ranks(script, grid, net()):
            assert found[0] == pytest.approx(expected[0], abs=1e-12)
            assert found[1:] == ({False}, True)


@row("`torch.no_grad`, `torch.inference_mode`")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("sub_shards", [1, 3])
def test_without_gradients(mode: Callable[[], Any], sub_shards: int) -> None:
    def script(rank: Rank) -> Any:
        with mode():
            outputs = rank.model(*rank.batch)
            assert outputs.is_inference() is (mode is torch.inference_mode)
            assert not outputs.requires_grad
        rank.backward()
        gradient = torch.nn.utils.get_total_norm([p.grad for p in rank.model.parameters() if p.grad is not None])
        return gradient

    same(script, sub_shards=sub_shards)


@row("`copy.deepcopy`")
def test_copies_train_by_themselves() -> None:
    def script(rank: Rank) -> Any:
        before = rank.state()
        other = Rank(copy.deepcopy(rank.model))
        other.rows = rank.rows
        other.backward()
        norm = torch.nn.utils.clip_grad_norm_(other.model.parameters(), 0.1)
        torch.optim.SGD(other.model.parameters(), lr=0.1).step()
        assert all(torch.equal(a, b) for a, b in zip(before.values(), rank.state().values(), strict=True))
        return norm, other.state()

    same(script)


@row("`torch.optim.swa_utils.AveragedModel` (EMA, SWA)")
@pytest.mark.parametrize("ema", [False, True])
def test_averaged_models(ema: bool) -> None:
    def script(rank: Rank) -> Any:
        function = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9) if ema else None
        averaged = torch.optim.swa_utils.AveragedModel(rank.model, multi_avg_fn=function, use_buffers=True)
        optimizer = torch.optim.SGD(rank.model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            rank.backward()
            optimizer.step()
            averaged.update_parameters(rank.model)
        return rank.state(averaged.module), rank.state()

    same(script)


@row("`torch.utils.checkpoint` around the module")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("sub_shards", [1, 2])
def test_checkpointing_around(reentrant: bool, sub_shards: int) -> None:
    def script(rank: Rank) -> Any:
        images, words = rank.batch
        outputs = checkpoint(rank.model, images.requires_grad_(), words, use_reentrant=reentrant)
        F.cross_entropy(outputs, LABELS[rank.rows]).backward()
        rank.average()
        norm = torch.nn.utils.clip_grad_norm_(rank.model.parameters(), 0.1)
        torch.optim.SGD(rank.model.parameters(), lr=0.1).step()
        return norm, rank.state()

    same(script, sub_shards=sub_shards)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a = nn.Linear(12, 12)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = checkpoint(self.a, x, use_reentrant=self.reentrant)
        return y


@row("`torch.utils.checkpoint` inside of its forward")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_inside(reentrant: bool) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.*call the parallel module.* in it instead"):
        axonn.parallelize(Checkpointed(reentrant), ProcessGrid(), example_inputs=(torch.zeros(2, 12),))


@row("`torch.compile`")
@pytest.mark.parametrize("sub_shards", [1, 2])
def test_compile(sub_shards: int) -> None:
    def script(rank: Rank) -> Any:
        compiled = torch.compile(rank.model, backend="eager") if isinstance(rank.model, axonn.ParallelModule) else None
        rank.loss(compiled).backward()
        rank.average()
        norm = torch.nn.utils.clip_grad_norm_(rank.model.parameters(), 0.1)
        torch.optim.SGD(rank.model.parameters(), lr=0.1).step()
        return norm, rank.state()

    same(script, sub_shards=sub_shards)


@row("`.to(dtype)`, `.double()`, `.half()`")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype: torch.dtype) -> None:
    def script(rank: Rank) -> Any:
        rank.model.to(dtype)
        rank.dtype = dtype
        outputs = rank.loss()
        rank.backward()
        torch.nn.utils.clip_grad_norm_(rank.model.parameters(), 0.1)
        torch.optim.SGD(rank.model.parameters(), lr=0.1).step()
        return torch.zeros(1, dtype=outputs.dtype), {name: value.double() for name, value in rank.state().items()}

    same(script, dtype=torch.float32, tolerance=1e-9 if dtype == torch.float64 else 1e-2)


@row("saving and loading: `full_state_dict`, `load_full_state_dict`")
def test_the_whole_state_is_saved_and_loaded() -> None:
    trained = Rank(net())
    trained.backward()
    torch.optim.SGD(trained.model.parameters(), lr=0.1).step()
    file = io.BytesIO()
    torch.save(trained.state(), file)

    def script(rank: Rank) -> Any:
        state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        if isinstance(rank.model, axonn.ParallelModule):
            rank.model.load_full_state_dict(state)
        else:
            rank.model.load_state_dict(state)
        rank.backward()
        torch.optim.SGD(rank.model.parameters(), lr=0.1).step()
        return rank.state()

    same(script)


@row("`state_dict` of module, optimizer, scaler and scheduler")
def test_each_rank_goes_on_from_its_own_state() -> None:
    def script(rank: Rank) -> Any:
        def made() -> tuple[Any, ...]:
            optimizer = torch.optim.AdamW(rank.model.parameters(), lr=0.05)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
            return rank.model, optimizer, schedule, torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)

        def step(parts: tuple[Any, ...]) -> None:
            _, optimizer, schedule, scaler = parts
            optimizer.zero_grad()
            scaler.scale(rank.loss()).backward()
            rank.average()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()

        parts = made()
        step(parts)
        file = io.BytesIO()
        torch.save([part.state_dict() for part in parts], file)
        step(parts)
        expected = rank.state()
        parts = made()
        for part, state in zip(parts, torch.load(io.BytesIO(file.getvalue()), weights_only=True), strict=True):
            part.load_state_dict(state)
        step(parts)
        torch.testing.assert_close(rank.state(), expected, rtol=0, atol=0)
        return expected

    same(script)


def test_gradients_are_saved_as_tensors() -> None:
    def script(rank: Rank) -> None:
        rank.backward()
        gradient = rank.model.get_parameter("module.head.weight").grad
        for other in (copy.deepcopy(gradient), pickle.loads(pickle.dumps(gradient))):
            assert type(other) is torch.Tensor
            assert torch.equal(other, gradient.as_subclass(torch.Tensor))

    on_ranks(script, ProcessGrid(col=2), net())


def pickled(comm: MPI.Intracomm, grid: ProcessGrid) -> Any:
    """A job of the rank pool: train, save the module, load it, go on; the losses, and those of the module itself."""

    def train(rank: Rank) -> Any:
        rank.model.zero_grad()
        rank.backward()
        norm = torch.nn.utils.clip_grad_norm_(rank.model.parameters(), 0.1)
        torch.optim.SGD(rank.model.parameters(), lr=0.1).step()
        return norm, rank.state()

    expected = Rank(net())
    train(expected)
    with connect(grid, comm=comm):
        parallel = axonn.parallelize(net(), grid, example_inputs=(IMAGES, WORDS))
        here = parallel.context.coordinates.data, grid.data
        train(Rank(parallel, *here))
        file = io.BytesIO()
        torch.save(parallel, file)
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        found = train(Rank(loaded, *here))
        assert str(loaded.report) == str(parallel.report)
        with pytest.raises(ConfigError, match=r"average_gradients"):
            torch.nn.parallel.DistributedDataParallel(loaded)
        others = comm.allgather(file.getvalue())
        try:
            torch.load(io.BytesIO(others[comm.Get_rank() - 1]), weights_only=False)
            refusal = ""
        except GridError as error:
            refusal = str(error)
    return found, train(expected), refusal


@row("`DistributedDataParallel` around the module")
@row("`torch.save(parallel)`, pickle")
@pytest.mark.parametrize("grid", [ProcessGrid(col=2), ProcessGrid(data=2, row=2)], ids=str)
def test_a_saved_module_is_loaded_by_the_rank_that_saved_it(pool: RankPool, grid: ProcessGrid) -> None:
    for found, expected, refusal in pool.run(pickled, grid, ranks=grid.size):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        assert "each rank has its own" in refusal


def test_a_saved_module_needs_a_job() -> None:
    def script(rank: Rank) -> bytes:
        return pickle.dumps(rank.model)

    for data in on_ranks(script, ProcessGrid(col=2), net()):
        with pytest.raises(GridError, match="init_process_group"):
            pickle.loads(data)
