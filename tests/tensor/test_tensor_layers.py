"""Products whose weights are cut in two dimensions equal torch.nn's: Linear, Embedding, Conv2d and attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from axonn.errors import GridError
from axonn.grid import ProcessGrid
from axonn.tensor import (
    NORMAL,
    TRANSPOSED,
    Conv2d,
    Embedding,
    Layout,
    Linear,
    MultiheadAttention,
    TensorAxis,
    TensorContext,
)
from tests.helpers.rank_pool import RankPool
from tests.helpers.tensor_layers import (
    LAYOUTS,
    Accumulation,
    Case,
    Input,
    accumulations,
    compare,
    cut_along,
    extent_of,
    grids,
    on_every_rank,
)

layouts = st.sampled_from(LAYOUTS)
lengths = st.lists(st.integers(1, 2), min_size=1, max_size=3)
"""Of the segments of the features, in parts of which every rank has one."""
SIX = ProcessGrid(row=2, col=3)


def segments_along(axis: TensorAxis | None, parts: list[int], grid: ProcessGrid) -> list[int]:
    return [n * extent_of(grid, axis) for n in parts]


def linear_case(
    *,
    grid: ProcessGrid,
    layout: Layout,
    ins: list[int],
    outs: list[int],
    bias: bool,
    rows: tuple[int, ...],
    accumulation: Accumulation = "autograd",
) -> Case:
    in_segments, out_segments = segments_along(layout.input, ins, grid), segments_along(layout.output, outs, grid)
    features = sum(in_segments), sum(out_segments)
    return Case(
        grid=grid,
        serial=partial(nn.Linear, *features, bias),
        parallel=partial(Linear, *features, bias, layout=layout, in_segments=in_segments, out_segments=out_segments),
        inputs=(Input((*rows, features[0]), cut_along(len(rows), layout.input, in_segments)),),
        output=cut_along(len(rows), layout.output, out_segments),
        accumulation=accumulation,
    )


@settings(max_examples=80)
@given(
    st.builds(
        linear_case,
        grid=grids,
        layout=layouts,
        ins=lengths,
        outs=lengths,
        bias=st.booleans(),
        rows=st.sampled_from([(3,), (2, 3), (2, 1, 3), ()]),
        accumulation=accumulations,
    )
)
def test_linear(case: Case) -> None:
    compare(case)


def embedding_case(
    *,
    grid: ProcessGrid,
    layout: Layout,
    sizes: tuple[int, int],
    padding: int | None,
    rows: tuple[int, ...],
    accumulation: Accumulation = "autograd",
) -> Case:
    (vocabulary,), (features,) = (segments_along(axis, [n], grid) for axis, n in zip(layout, sizes, strict=True))
    padding_idx = None if padding is None else padding % (2 * vocabulary) - vocabulary
    return Case(
        grid=grid,
        serial=partial(nn.Embedding, vocabulary, features, padding_idx),
        parallel=partial(Embedding, vocabulary, features, padding_idx, layout=layout),
        inputs=(Input(rows, below=vocabulary),),
        output=cut_along(len(rows), layout.output, [features]),
        accumulation=accumulation,
    )


@settings(max_examples=80)
@given(
    st.builds(
        embedding_case,
        grid=grids,
        layout=layouts,
        sizes=st.tuples(st.integers(1, 4), st.integers(1, 3)),
        padding=st.none() | st.integers(0, 100),
        rows=st.sampled_from([(30,), (4, 5), ()]),
        accumulation=accumulations,
    )
)
def test_embedding(case: Case) -> None:
    compare(case)


def conv_case(
    *,
    grid: ProcessGrid,
    layout: Layout,
    ins: list[int],
    outs: list[int],
    bias: bool,
    image: tuple[int, ...],
    geometry: dict[str, Any],
    accumulation: Accumulation = "autograd",
) -> Case:
    in_segments, out_segments = segments_along(layout.input, ins, grid), segments_along(layout.output, outs, grid)
    channels = sum(in_segments), sum(out_segments)
    dim = len(image) - 2
    segments = {"in_segments": in_segments, "out_segments": out_segments}
    return Case(
        grid=grid,
        serial=partial(nn.Conv2d, *channels, bias=bias, **geometry),
        parallel=partial(Conv2d, *channels, bias=bias, layout=layout, **segments, **geometry),
        inputs=(Input((*image[:dim], channels[0], *image[dim:]), cut_along(dim, layout.input, in_segments)),),
        output=cut_along(dim, layout.output, out_segments),
        accumulation=accumulation,
    )


def sometimes_pair(values: st.SearchStrategy[int]) -> st.SearchStrategy[Any]:
    return values | st.tuples(values, values)


kernels = sometimes_pair(st.integers(1, 3))
dilations = sometimes_pair(st.integers(1, 2))
geometries = st.fixed_dictionaries(
    {"kernel_size": kernels, "dilation": dilations},
    optional={
        "stride": sometimes_pair(st.integers(1, 3)),
        "padding": sometimes_pair(st.integers(0, 2)),
        "padding_mode": st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    },
) | st.fixed_dictionaries(
    {"kernel_size": sometimes_pair(st.integers(1, 4)), "dilation": dilations},
    optional={
        "padding": st.sampled_from(["same", "valid"]),
        "padding_mode": st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    },
)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@settings(max_examples=120)
@given(
    st.builds(
        conv_case,
        grid=grids,
        layout=layouts,
        ins=lengths,
        outs=lengths,
        bias=st.booleans(),
        image=st.sampled_from([(2, 8, 9), (1, 7, 7), (8, 7)]),
        geometry=geometries,
        accumulation=accumulations,
    )
)
def test_conv2d(case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conv2d_of_images_in_channels_last_order(layout: Layout) -> None:
    case = conv_case(
        grid=SIX,
        layout=layout,
        ins=[2],
        outs=[1, 1],
        bias=True,
        image=(2, 5, 6),
        geometry={"kernel_size": 3, "padding": 1},
    )
    compare(Case(**vars(case) | {"parallel": partial(_channels_last, case.parallel)}))


def _channels_last(make: Callable[..., nn.Module], *, context: TensorContext) -> nn.Module:
    layer = make(context=context)
    layer.register_forward_pre_hook(lambda _, x: (x[0].to(memory_format=torch.channels_last),))
    return layer


def test_conv2d_in_groups_where_no_channels_are_cut() -> None:
    for grid, layout in ((ProcessGrid(), NORMAL), (ProcessGrid(row=2, col=2), Layout(None, None))):
        geometry = {"kernel_size": 3, "groups": 2, "padding": 1}
        compare(conv_case(grid=grid, layout=layout, ins=[4], outs=[6], bias=True, image=(2, 5, 5), geometry=geometry))


class SerialAttention(nn.MultiheadAttention):
    """With the options of its forward."""

    def __init__(self, *args: Any, options: dict[str, Any]) -> None:
        super().__init__(*args, batch_first=True)
        self.options = options

    def forward(self, *sources: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        # One source is all three, two are the query and the rest.
        q, k, v = (sources[min(i, len(sources) - 1)] for i in range(3))
        return super().forward(q, k, v, need_weights=False, **self.options)[0]


class ParallelAttention(MultiheadAttention):
    def __init__(self, *args: Any, options: dict[str, Any], context: TensorContext) -> None:
        super().__init__(*args, context=context)
        self.options = options

    def forward(self, *sources: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(*sources, **self.options)


def attention_case(
    *,
    grid: ProcessGrid,
    size: tuple[int, int],
    sources: int,
    lengths: tuple[int, int, int],
    mask: str,
    bias: bool,
    accumulation: Accumulation = "autograd",
) -> Case:
    batch, queries, keys = lengths[0], lengths[1], lengths[1] if sources == 1 else lengths[2]
    heads = grid.col * size[0]
    embed = heads * grid.row * size[1]
    generator = torch.Generator().manual_seed(4)
    # Query 0 sees a key whatever the mask.
    masks = {
        "causal": torch.ones(queries, keys, dtype=torch.bool).triu(1),
        "boolean": (torch.rand(queries, keys, generator=generator) < 0.4).index_fill_(1, torch.tensor([0]), False),
        "of each head": torch.randn(batch * heads, queries, keys, generator=generator, dtype=torch.float64),
    }
    given = {} if mask == "none" else {"attn_mask": masks[mask]}
    return Case(
        grid=grid,
        serial=partial(SerialAttention, embed, heads, 0.0, bias, options=given),
        parallel=partial(
            ParallelAttention, embed, heads, 0.0, bias, options={"is_causal": True} if mask == "causal" else given
        ),
        inputs=tuple(
            Input((batch, queries if i == 0 else keys, embed), cut_along(2, "row", [embed])) for i in range(sources)
        ),
        output=cut_along(2, "row", [embed]),
        accumulation=accumulation,
        serial_names={"in_proj.weight": "in_proj_weight", "in_proj.bias": "in_proj_bias"},
    )


@settings(max_examples=80)
@given(
    st.builds(
        attention_case,
        grid=grids,
        size=st.tuples(st.integers(1, 2), st.integers(1, 2)),
        sources=st.integers(1, 3),
        lengths=st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4)),
        mask=st.sampled_from(["none", "causal", "boolean", "of each head"]),
        bias=st.booleans(),
        accumulation=accumulations,
    )
)
def test_attention(case: Case) -> None:
    compare(case)


@pytest.mark.parametrize(
    "case",
    [
        linear_case(grid=SIX, layout=NORMAL, ins=[1, 2], outs=[2, 1], bias=True, rows=(2, 3), accumulation="deferred"),
        embedding_case(grid=SIX, layout=TRANSPOSED, sizes=(3, 2), padding=4, rows=(4, 5), accumulation="in place"),
        conv_case(
            grid=SIX,
            layout=NORMAL,
            ins=[1, 2],
            outs=[2],
            bias=True,
            image=(2, 5, 6),
            geometry={"kernel_size": 3, "stride": 2},
        ),
        attention_case(
            grid=SIX, size=(1, 2), sources=1, lengths=(2, 4, 4), mask="causal", bias=True, accumulation="in place"
        ),
    ],
    ids=["linear", "embedding", "conv2d", "attention"],
)
def test_over_gloo(case: Case, pool: RankPool) -> None:
    compare(case, pool)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(Linear, 9, 8), ["in_features of Linear(9, 8)", "row = 2", "G_row to one of [1, 3]", "multiple of 2"]),
        (partial(Linear, 8, 8), ["out_features of Linear(8, 8)", "col = 3", "multiple of 3"]),
        (partial(Linear, 8, 9, in_segments=[3, 5]), ["in_features of Linear(8, 9) (3)", "row = 2"]),
        (partial(Conv2d, 3, 6, 3), ["in_channels of Conv2d(3, 6, 3)", "row = 2"]),
        (partial(Conv2d, 4, 8, 3), ["out_channels of Conv2d(4, 8, 3)", "col = 3"]),
        (partial(Conv2d, 4, 6, 3, groups=2), ["groups = 2", "row = 2", "groups=1", "Layout(None, None)"]),
        (partial(Embedding, 10, 8), ["num_embeddings of Embedding(10, 8)", "col = 3"]),
        (partial(Embedding, 9, 7), ["embedding_dim of Embedding(9, 7)", "row = 2"]),
        (partial(MultiheadAttention, 16, 4), ["num_heads of MultiheadAttention(16, 4)", "col = 3"]),
        (partial(MultiheadAttention, 9, 3), ["in_features of Linear(9, 27)", "row = 2"]),
    ],
)
def test_sizes_that_cannot_be_cut_are_named_with_what_would_work(
    make: Callable[..., nn.Module], words: list[str]
) -> None:
    def error(context: TensorContext, rank: int) -> str:
        with pytest.raises(GridError) as raised:
            make(context=context)
        return str(raised.value)

    for message in on_every_rank(SIX, error):
        assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(Linear, 8, 6, in_segments=[4, 2]), r"in_features of Linear\(8, 6\): .*do not add up to 8"),
        (partial(Linear, 8, 6, layout=Layout("row", "row")), "layout of Linear.*both lie along row"),
        (partial(Embedding, 8, 6, layout=Layout("col", "col")), "layout of Embedding.*both lie along col"),
        (partial(Conv2d, 8, 6, 1, layout=Layout("col", "col")), "layout of Conv2d.*both lie along col"),
        (partial(Embedding, 8, 6, 8), "padding_idx 8"),
        (partial(Conv2d, 8, 6, 1, groups=3), r"groups \(3\).*divisor"),
        (partial(Conv2d, 8, 6, 3, 2, "same"), "'same'.*stride 1"),
        (partial(Conv2d, 8, 6, 3, 1, "full"), "padding 'full'"),
        (partial(Conv2d, 8, 6, 3, padding_mode="mirror"), "padding_mode 'mirror'"),
        (partial(MultiheadAttention, 8, 3), "divisor of embed_dim"),
    ],
)
def test_contradictory_options_are_refused(make: Callable[..., nn.Module], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(context=TensorContext.serial())
