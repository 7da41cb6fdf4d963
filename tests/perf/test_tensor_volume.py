"""The closed form of the tensor-parallel volume is what the exact model counts, and finds its minimum."""

from __future__ import annotations

from math import sqrt

import pytest

from axonn.grid import ProcessGrid
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.registry import outline_of
from axonn.models.unet.unet_config import UNetConfig
from axonn.perf.layers.layer_cost import TRANSPOSED, LinearCost
from axonn.perf.layers.local_layers import WholeLossCost
from axonn.perf.layers.model_outline import ModelOutline, OutlineLink
from axonn.perf.timing.communication import Training
from tests.helpers.tensor_volume import Widths, best_by_trying, best_tensor_grid, factorisations, neighbours, widths_of

RANKS = (16, 64, 256)
BATCH = 256


def gpt(hidden: int, layers: int, vocab: int = 51200) -> GPTConfig:
    return GPTConfig(name="test", layers=layers, hidden=hidden, heads=256, seq_len=512, vocab=vocab)


def unet(width: int, multipliers: tuple[int, ...], attention: tuple[int, ...], size: int) -> UNetConfig:
    return UNetConfig(
        name="test",
        image_size=size,
        width=width,
        multipliers=multipliers,
        blocks=2,
        attention_levels=attention,
        head_channels=4,
    )


GPTS = [gpt(256, 4), gpt(1024, 24), gpt(2048, 24), gpt(4096, 32), gpt(8192, 48), gpt(12288, 96)]
LARGE = [model for model in GPTS if model.hidden >= 1024]
UNETS = [
    unet(256, (1, 2, 2, 2), (1,), 32),
    unet(512, (1, 2, 3, 4), (1, 2, 3), 64),
    unet(768, (1, 2, 4), (2,), 64),
    unet(1024, (1, 2, 4, 4), (2, 3), 64),
]


def elements_sent(outline: ModelOutline, grid: ProcessGrid) -> float:
    """Along row and col, of everything that a rank issues: norms, re-layouts and loss too."""
    training = Training(outline=outline, grid=grid, batch_size=BATCH, microbatch_size=BATCH // grid.data)
    return sum(volume.elements for axis, volume in training.volume().items() if axis in ("row", "col"))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("grid", list(factorisations(16)), ids=str)
def test_the_elements_of_a_linear_layer(grid: ProcessGrid, transposed: bool) -> None:
    layer = LinearCost(positions=8, inputs=48, outputs=80, layout=TRANSPOSED if transposed else ("row", "col"))
    outline = ModelOutline(links=[OutlineLink(name="only", parts={"linear": layer})], loss=WholeLossCost())
    out, inp = (48, 80) if transposed else (80, 48)
    expected = 2 * (8 * BATCH / 16) * ((grid.row - 1) * out + (grid.col - 1) * inp)
    assert elements_sent(outline, grid) == pytest.approx(expected, rel=1e-12)
    assert widths_of(outline).sent(grid, BATCH) == pytest.approx(expected, rel=1e-12)


def test_the_widths_of_a_transformer() -> None:
    """12 and 4 times hidden for each layer and token; forwards that run twice are those of qkv and fc1, and of the two
    transposed layers. The head sums logits along row, and its input's gradient along col, as the embedding its
    output."""
    model = gpt(1024, 24)
    per_layer = 1024 * 512 * 24
    head = Widths(51200 * 512, 2 * 1024 * 512)
    assert widths_of(outline_of(model)) == Widths(12 * per_layer + head.row, 4 * per_layer + head.col)
    again = widths_of(outline_of(model), recompute=True)
    assert again == Widths((12 + 7) * per_layer + head.row, (4 + 2) * per_layer + head.col)


def kind_and_width(model: GPTConfig | UNetConfig) -> str:
    return f"{model.kind} {model.hidden if isinstance(model, GPTConfig) else model.width}"


@pytest.mark.parametrize("model", [*GPTS, *UNETS], ids=kind_and_width)
@pytest.mark.parametrize("ranks", RANKS)
def test_the_closed_form_finds_the_least_of_all_that_is_issued(model: GPTConfig | UNetConfig, ranks: int) -> None:
    """Over all factorisations, for each G_tensor, and with G_data as large as memory allows."""
    outline = outline_of(model)
    widths = widths_of(outline)
    grids = [grid for grid in factorisations(ranks) if fits(model, grid)]
    sent = {grid: elements_sent(outline, grid) for grid in grids}
    for tensor in sorted({grid.tensor for grid in grids}):
        row, col = best_tensor_grid(widths, tensor)
        closed = ProcessGrid(data=ranks // tensor, row=row, col=col)
        assert best_by_trying([grid for grid in grids if grid.tensor == tensor], sent.__getitem__) == closed
        assert best_by_trying([grid for grid in grids if grid.tensor >= tensor], sent.__getitem__) == closed


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("model", [*GPTS, *UNETS], ids=kind_and_width)
def test_the_closed_form_finds_the_least_of_the_formula(model: GPTConfig | UNetConfig, recompute: bool) -> None:
    widths = widths_of(outline_of(model), recompute=recompute)
    for ranks in (*RANKS, 96, 384):
        grids = list(factorisations(ranks))
        for tensor in {grid.tensor for grid in grids}:
            found = best_by_trying([g for g in grids if g.tensor == tensor], lambda grid: widths.sent(grid, BATCH))
            assert (found.row, found.col) == best_tensor_grid(widths, tensor)


def fits(model: GPTConfig | UNetConfig, grid: ProcessGrid) -> bool:
    """Whether every part is whole, whichever way G_tensor is split."""
    return grid.tensor <= (model.heads if isinstance(model, GPTConfig) else model.width // model.head_channels)


@pytest.mark.parametrize("model", LARGE, ids=lambda model: str(model.hidden))
@pytest.mark.parametrize("ranks", RANKS)
def test_for_large_transformers_the_best_is_next_to_the_published_optimum(model: GPTConfig, ranks: int) -> None:
    """One of the two divisors of G_tensor around sqrt(3 G_tensor)."""
    widths = widths_of(outline_of(model))
    for tensor in {grid.tensor for grid in factorisations(ranks)}:
        _, col = best_tensor_grid(widths, tensor)
        assert col in neighbours(sqrt(3 * tensor), tensor)
        # Embedding and head widen it a little.
        assert widths.best_col(tensor) == pytest.approx(sqrt(3 * tensor), rel=0.12)


def test_a_small_transformer_with_a_large_vocabulary_is_better_off_elsewhere() -> None:
    """So what is said of large ones is not true of all."""
    assert best_tensor_grid(widths_of(outline_of(gpt(256, 4))), 64) == (2, 32)
    assert neighbours(sqrt(3 * 64), 64) == (8, 16)


@pytest.mark.parametrize(
    ("ideal", "tensor", "expected"), [(6.9, 16, (4, 8)), (4.0, 16, (4,)), (0.3, 16, (1,)), (40.0, 16, (16,))]
)
def test_neighbouring_divisors(ideal: float, tensor: int, expected: tuple[int, ...]) -> None:
    assert neighbours(ideal, tensor) == expected


def test_every_factorisation_once() -> None:
    grids = list(factorisations(64))
    assert len(set(grids)) == len(grids) == 28  # Ways to share six factors of two among three axes.
    assert all(grid.size == 64 and grid.inter == 1 for grid in grids)
