"""What a user of `parallelize` meets beside equality: reports, errors, dropout, state, data parallelism, a real job."""

from __future__ import annotations

import operator
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mpi4py import MPI
from torch import nn

import axonn
from axonn.autoparallel.layouts.shardings import Form, Shard
from axonn.distributed.runtime import connect
from axonn.distributed.transport import InProcessCollectives, InProcessWorld
from axonn.errors import ConfigError, GridError
from axonn.grid import ProcessGrid
from tests.helpers.parallel_cases import TiedByHand
from tests.helpers.parallelizing import check, kinds
from tests.helpers.plain_models import Awkward, Classifier, LanguageModel
from tests.helpers.rank_pool import RankPool


def on(grid: ProcessGrid, body: Callable[[InProcessCollectives], Any]) -> list[Any]:
    """Results of `body(collectives)` on every rank."""
    world = InProcessWorld(grid.size)
    return world.run(lambda rank: body(InProcessCollectives(world, grid, rank)))


def function(forward: Callable[..., Any], **modules: nn.Module) -> nn.Module:
    """A module whose forward is `forward(self, ...)`."""
    made: nn.Module = type("Made", (nn.Module,), {"forward": forward})()
    for name, module in modules.items():
        made.add_module(name, module)
    return made


def serially(module: nn.Module, *example: Any, **options: Any) -> axonn.ParallelModule:
    return axonn.parallelize(module, ProcessGrid(), example_inputs=example, **options)


def test_what_stays_whole_is_said_with_the_reason() -> None:
    (outcome, *_) = check(Awkward(), [torch.randn(3, 12, dtype=torch.float64)], row=1, col=2, sub_shards=2)
    assert {line.name: line.reason for line in outcome.report.whole} == {
        "batch_norm": "batch norm mixes rows, and its statistics are those of whole channels",
        "grouped": "grouped convolution (groups = 12)",
        "transposed": "parallelize does not cut ConvTranspose2d",
        "recurrent": "parallelize does not cut LSTM",
    }
    assert outcome.report.sub_shards_problem.startswith("batch_norm: rows are mixed")
    text = str(outcome.report)
    assert "G_col=2" in text
    assert all(line.reason in text for line in outcome.report.whole)
    assert all(line.name in text for line in outcome.report.layers)
    assert all(line.reason in text for line in outcome.report.redistributions)


def test_sizes_that_one_axis_divides_are_cut_along_that_axis_only() -> None:
    module = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 5))
    (outcome, *_) = check(module, [torch.randn(2, 9, dtype=torch.float64)], row=2, col=3)
    first, second = outcome.report.layers
    assert first.input == Shard("col", Form(1, (9,)))
    assert first.output == Shard("row", Form(1, (8,)))
    assert (second.input, second.output) == (Shard("row", Form(1, (8,))), None)
    assert second.note == (
        "in_features (8) is no multiple of col = 3; out_features (5) is no multiple of row = 2 or col = 3"
    )


def test_an_unknown_operation_gets_what_is_whole() -> None:
    module = function(lambda self, x: self.b(torch.fft.fft(self.a(x)).real), a=nn.Linear(12, 12), b=nn.Linear(12, 12))
    (outcome, *_) = check(module, [torch.randn(2, 12, dtype=torch.float64)], row=2, col=2, sub_shards=2)
    (line,) = [line for line in outcome.report.of_kind("gather") if line.user != "output"]
    assert line.reason == "fft_fft is not an operation that is known"
    assert outcome.report.sub_shards_problem == "fft_fft: rows are mixed: fft_fft is not an operation that is known"


def test_a_cut_that_does_not_fit_what_it_joins_is_gathered() -> None:
    module = function(lambda self, x, y: torch.cat([self.a(x), y], 1), a=nn.Linear(12, 12))
    inputs = [torch.randn(2, 12, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)]
    (outcome, *_) = check(module, inputs, row=2, col=2)
    (line,) = outcome.report.of_kind("gather")
    assert isinstance(line.source, Shard)
    assert line.reason == f"dim 1 of cat (3) cannot be cut along {line.source.axis} = 2"


def test_a_gradient_of_what_all_parts_read_is_summed() -> None:
    module = function(
        lambda self, x: self.b(self.a(x) * self.gate(x)),
        a=nn.Linear(12, 12),
        b=nn.Linear(12, 12),
        gate=nn.Linear(12, 1),
    )
    for outcome in check(module, [torch.randn(2, 12, dtype=torch.float64)], row=2, col=2):
        assert kinds(outcome)["sum of gradients"] == 1


def test_embedding_with_a_norm_limit_stays_whole() -> None:
    module = nn.Sequential(nn.Embedding(24, 12, max_norm=100.0), nn.Linear(12, 12), nn.Linear(12, 12))
    (outcome, *_) = check(module, [torch.tensor([[1, 2, 3], [4, 5, 6]])], row=2, col=2)
    assert [(line.name, line.reason) for line in outcome.report.whole] == [("0", "embedding with max_norm")]


def test_parameters_that_are_tied_lie_alike_or_are_whole_together() -> None:
    for outcome in check(TiedByHand(), [torch.randn(2, 12, dtype=torch.float64)], row=2, col=2):
        assert len(list(outcome.parallel.parameters())) == 4
        # As the product by hand cannot take a weight that is cut in both dims, it is cut in one at most.
        assert len(outcome.parallel.placements()["module.a.weight"].cuts) <= 1
        assert len(outcome.parallel.placements()["module.b.weight"].cuts) == 2


def test_outputs_can_be_left_as_they_lie() -> None:
    module = nn.Sequential(nn.Linear(12, 8)).double()
    x = torch.randn(2, 12, dtype=torch.float64)

    def body(collectives: InProcessCollectives) -> tuple[torch.Tensor, axonn.ParallelModule]:
        parallel = axonn.parallelize(
            module, collectives.grid, example_inputs=(x,), collectives=collectives, gather_output=False
        )
        return parallel(x), parallel

    for y, parallel in on(ProcessGrid(row=2, col=2), body):
        (part,) = parallel.report.outputs
        assert part is not None
        index = parallel.context.index(part.axis)
        torch.testing.assert_close(y, module(x).chunk(2, 1)[index], rtol=0, atol=1e-12)


class TestDropout:
    def outputs(self, grid: ProcessGrid, sub_shards: int, *, seed: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
        torch.manual_seed(0)
        module = LanguageModel(tied=False, dropout=0.5).double()
        tokens = torch.arange(20).view(4, 5) % 48

        def body(collectives: InProcessCollectives) -> tuple[torch.Tensor, torch.Tensor]:
            parallel = axonn.parallelize(
                module,
                grid,
                example_inputs=(tokens,),
                collectives=collectives,
                overdecomposition=sub_shards,
                seed=seed,
            )
            with parallel.at(2, [10, 11, 14, 15]):
                y = parallel(tokens)
                y.square().mean().backward()
            gradient = parallel.module.get_parameter("blocks.0.norm1.weight").grad
            assert gradient is not None
            return y.detach(), gradient

        return on(grid, body)

    def test_masks_are_the_same_on_every_grid_and_in_sub_shards(self) -> None:
        ((expected, gradient),) = self.outputs(ProcessGrid(), 1)
        for grid, sub_shards in ((ProcessGrid(), 2), (ProcessGrid(row=2, col=2), 1), (ProcessGrid(col=3, row=2), 3)):
            for y, _ in self.outputs(grid, sub_shards):
                torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(self.outputs(ProcessGrid(), 2)[0][1], gradient, rtol=0, atol=1e-12)
        assert not torch.allclose(self.outputs(ProcessGrid(), 1, seed=4)[0][0], expected)

    def test_each_use_of_a_module_has_masks_of_its_own(self) -> None:
        module = function(lambda self, x: self.drop(x) - self.drop(x), drop=nn.Dropout(0.5))
        parallel = serially(module, torch.ones(2, 64))
        with parallel.at(0, [0, 1]):
            assert parallel(torch.ones(2, 64)).abs().sum() > 0

    def test_a_function_is_made_a_layer_that_follows_the_mode(self) -> None:
        module = function(lambda self, x: F.dropout(x, 0.5, self.training))
        parallel = serially(module, torch.ones(2, 64))
        with parallel.at(0, [0, 1]):
            assert 0 < int((parallel(torch.ones(2, 64)) == 0).sum()) < 128
        torch.testing.assert_close(parallel.eval()(torch.ones(2, 64)), torch.ones(2, 64))

    def test_without_a_position_it_is_an_error(self) -> None:
        parallel = serially(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), torch.ones(2, 4))
        with pytest.raises(ConfigError, match="position"):
            parallel(torch.ones(2, 4))


def test_the_mode_of_each_module_is_kept() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    module.eval()
    parallel = serially(module, torch.ones(2, 4))
    assert not any(part.training for part in parallel.modules())


def test_training_with_data_parallel_ranks_equals_serial_training() -> None:
    torch.manual_seed(0)
    module = Classifier().double()
    grid = ProcessGrid(data=2, row=2, col=2)
    tokens, labels = torch.arange(32).view(8, 4) % 24, torch.arange(8) % 5

    def train(model: nn.Module, rows: slice, after: Callable[[], None]) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(tokens[rows]), labels[rows]).backward()
            after()
            optimizer.step()

    def body(collectives: InProcessCollectives) -> dict[str, torch.Tensor]:
        parallel = axonn.parallelize(
            module, grid, example_inputs=(tokens[:4],), collectives=collectives, overdecomposition=2
        )
        half = grid.coordinates(collectives.rank).data
        train(parallel, slice(4 * half, 4 * half + 4), parallel.average_gradients)
        return parallel.full_state_dict()

    found = on(grid, body)
    train(module, slice(None), lambda: None)
    for state in found:
        for name, value in module.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-10)


def test_sub_shards_without_gradients_and_with_other_numbers_of_rows() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    parallel = serially(module, torch.ones(2, 4), overdecomposition=3)
    x = torch.randn(7, 4)
    with torch.no_grad():
        assert not parallel(x).requires_grad
        torch.testing.assert_close(parallel(x), module(x))
    y = parallel(x)
    assert y.requires_grad
    y.sum().backward()
    with pytest.raises(RuntimeError, match="retain_graph"):
        y.sum().backward()
    with pytest.raises(ConfigError, match="2 rows cannot be cut into overdecomposition = 3"):
        parallel(x[:2])


def test_a_weight_that_is_used_by_hand_is_said_to_stay_whole() -> None:
    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(12, 12))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight)

    (outcome, *_) = check(ByHand(), [torch.randn(2, 12, dtype=torch.float64)], row=2, col=2)
    (line,) = outcome.report.whole
    assert (line.name, line.reason) == ("weight", "linear with these arguments is not an operation that is known")


def test_an_input_without_rows_gets_the_sum_of_the_gradients_of_the_sub_shards() -> None:
    module = function(lambda self, x, scale: self.a(x) * scale, a=nn.Linear(12, 12))
    inputs = [torch.randn(3, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)]
    for outcome in check(module, inputs, row=2, col=2, sub_shards=2):
        assert outcome.report.sub_shards == 2


def test_frozen_parameters_stay_so() -> None:
    module = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    module[0].requires_grad_(False)
    for outcome in check(module, [torch.randn(2, 12, dtype=torch.float64)], row=2, col=2, sub_shards=2):
        assert [p.requires_grad for p in outcome.parallel.parameters()] == [False, False, True, True]


def job(comm: MPI.Intracomm, overdecomposition: int) -> tuple[torch.Tensor, torch.Tensor]:
    grid = ProcessGrid(row=2, col=2)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12), nn.GELU(), nn.Linear(12, 12))
    x = torch.arange(48.0).view(4, 12) / 48
    with connect(grid, comm=comm):
        parallel = axonn.parallelize(module, grid, example_inputs=(x,), overdecomposition=overdecomposition)
        y = parallel(x)
        y.sum().backward()
        for p in parallel.parameters():
            p.data.copy_(p.grad)
        gradients = parallel.full_state_dict()
    module(x).sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad)
    return y.detach(), module(x).detach()


@pytest.mark.parametrize("overdecomposition", [1, 2])
def test_collectives_are_those_of_the_running_job(pool: RankPool, overdecomposition: int) -> None:
    for y, expected in pool.run(job, overdecomposition, ranks=4):
        torch.testing.assert_close(y, expected)


def random_noise(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + torch.randn_like(x)


def branching(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x if x.sum() > 0 else -x


def assigning(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[:, 0] = 0
    return y


def changing_a_view(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.view(-1).add_(1)
    return y


def changing_a_buffer(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    self.inner.seen.add_(1)
    return x


def any_number(self: nn.Module, *xs: torch.Tensor) -> torch.Tensor:
    return xs[0]


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (random_noise, "randn_like .* draws random numbers"),
        (branching, "cannot be traced .*: .* parallelise the modules inside"),
        (assigning, "assigns to a part of a tensor; write it without"),
        (changing_a_view, "reads another view"),
        (changing_a_buffer, "add_ changes inner.seen of the module"),
        (any_number, r"any number of arguments \(xs\)"),
        (lambda self, x: self.inner(x), r"cannot be traced in inner \(Made\)"),
        (lambda self, x: x.view(7, -1), "does not run on the example inputs"),
        (lambda self, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), "draws random numbers"),
    ],
)
def test_what_cannot_be_traced_is_named(forward: Callable[..., Any], message: str) -> None:
    inner = function(branching)
    inner.register_buffer("seen", torch.zeros(1))
    with pytest.raises(ConfigError, match=message):
        serially(function(forward, inner=inner), torch.ones(2, 4))


def in_place(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = self.a(x)
    before = y + 1
    y.add_(1)
    z = operator.iadd(y, 2)
    F.relu_(y)
    return before + self.b(y) + z


def test_what_is_changed_in_place_is_read_changed() -> None:
    module = function(in_place, a=nn.Linear(12, 12), b=nn.Linear(12, 12))
    for outcome in check(module, [torch.randn(2, 12, dtype=torch.float64)], row=2, col=2):
        assert not outcome.report.whole


def test_errors_say_what_to_change() -> None:
    module = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=r"Linear is a single layer: put it into nn\.Sequential"):
        axonn.parallelize(module[0], ProcessGrid())
    with pytest.raises(ConfigError, match=r"example_inputs=\(torch\.zeros\(shape of input\),\)"):
        axonn.parallelize(module, ProcessGrid())
    with pytest.raises(ConfigError, match="do not fit forward"):
        axonn.parallelize(module, ProcessGrid(), example_inputs=(1, 2))
    with pytest.raises(GridError, match="G_inter=1"):
        axonn.parallelize(module, ProcessGrid(inter=2), example_inputs=(torch.ones(2, 4),))
    with pytest.raises(GridError, match="init_process_group"):
        axonn.parallelize(module, ProcessGrid(row=2), example_inputs=(torch.ones(2, 4),))
    with pytest.raises(ConfigError, match="at least 1"):
        serially(module, torch.ones(2, 4), overdecomposition=0)
    world = InProcessWorld(2)
    collectives = InProcessCollectives(world, ProcessGrid(row=2), 0)
    with pytest.raises(GridError, match="collectives are of the grid"):
        axonn.parallelize(module, ProcessGrid(col=2), example_inputs=(torch.ones(2, 4),), collectives=collectives)
    with pytest.raises(GridError, match="collectives are of rank 0"):
        axonn.parallelize(
            module, ProcessGrid(row=2), example_inputs=(torch.ones(2, 4),), collectives=collectives, rank=1
        )


def test_constants_of_the_example_are_part_of_the_graph() -> None:
    def forward(self: nn.Module, x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 2.0) -> torch.Tensor:
        return x * scale if mask is None else x * mask

    x = torch.ones(2, 4)
    parallel = serially(function(forward), x)
    torch.testing.assert_close(parallel(x), 2 * x)
    with pytest.raises(ConfigError, match=r"argument scale was 2\.0 in example_inputs"):
        parallel(x, scale=3.0)
    with pytest.raises(ConfigError, match="argument mask was None"):
        parallel(x, mask=x)
    named = axonn.parallelize(function(forward), ProcessGrid(), example_inputs={"x": x, "mask": x})
    torch.testing.assert_close(named(mask=3 * x, x=x), 3 * x)
    with pytest.raises(ConfigError, match="argument mask was a tensor"):
        named(x)


def test_rows_written_in_the_code_are_not_cut() -> None:
    parallel = serially(function(lambda self, x: x.view(2, 2, 2)), torch.ones(2, 4), overdecomposition=2)
    assert "the number of rows is written in the code" in parallel.report.sub_shards_problem
    parallel = serially(function(lambda self, x: x.mean()), torch.ones(2, 4), overdecomposition=2)
    assert parallel.report.sub_shards_problem == "mean: rows are mixed: mean reduces dim 0, 1"
    parallel = serially(function(lambda self, x: x + x.t()), torch.ones(2, 2), overdecomposition=2)
    assert "rows are mixed" in parallel.report.sub_shards_problem


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, axonn; assert 'torch' not in sys.modules; assert axonn.parallelize"
    subprocess.run([sys.executable, "-c", code], check=True)
