"""Tensor-parallel `nn.GroupNorm` over cut channels; a group may be on one rank or across several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from axonn.placement import Cut, Placement
from axonn.tensor.autocast import norm_input
from axonn.tensor.context import TensorAxis, TensorContext
from axonn.tensor.layers.layer import TensorLayer, cut, segments_of
from axonn.tensor.layers.norm import mean_and_variance, wide_type


class GroupNorm(TensorLayer):
    """`nn.GroupNorm` over channels, dim 1, that are cut along `axis`: [batch, channels / G_axis, ...] -> the same.

    `segments`: lengths of the segments of the channels that are each cut by themselves, when they are concatenated from
    several sources; groups are numbered through all of them, as in nn.GroupNorm. A group that is on one rank needs no
    communication. Raises `GridError` when the channels cannot be cut so.
    """

    weight: torch.nn.Parameter | None
    bias: torch.nn.Parameter | None

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        context: TensorContext,
        axis: TensorAxis | None = "row",
        segments: Sequence[int] | None = None,
    ) -> None:
        super().__init__(context)
        label = f"num_channels of GroupNorm({num_groups}, {num_channels})"
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"{label} must be a multiple of num_groups")
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.eps = eps
        self.axis: TensorAxis | None = axis
        channel_cut = cut(0, axis, segments_of(num_channels, segments, context, axis, label))
        for name in ("weight", "bias"):
            if affine:
                self.place(name, (num_channels,), channel_cut, device=device, dtype=dtype)
            else:
                self.register_parameter(name, None)
        self._groups = _groups(num_groups, num_channels, context, axis, channel_cut)
        self._tables: dict[tuple[torch.device, torch.dtype], _Tables] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._groups.crossing:
            arguments = x, len(self._groups.counts), self.weight, self.bias, self.eps
            if x.is_cpu or x.is_contiguous():
                return F.group_norm(*arguments)
            return self.context.compiler.run(_channels_last, *arguments, like=x)
        y: torch.Tensor = _GroupNorm.apply(norm_input(x), self.weight, self.bias, self)  # type: ignore[no-untyped-call]
        return y

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, axis={self.axis}"

    def tables(self, like: torch.Tensor) -> _Tables:
        """Return the groups' index tables on the device of `like`; they are made once."""
        key = like.device, like.dtype
        if key not in self._tables:
            self._tables[key] = _Tables.of(self._groups, like)
        return self._tables[key]


def _channels_last(
    x: torch.Tensor, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Compute `F.group_norm` of [batch, channels, height, width] in channels-last format, and keep the format.

    On a GPU `F.group_norm` would copy them to the contiguous format.
    """
    batch, channels, height, width = x.shape
    wide = x.to(wide_type(x.dtype)).permute(0, 2, 3, 1).reshape(batch, height * width, groups, channels // groups)
    variance, mean = torch.var_mean(wide, (1, 3), correction=0, keepdim=True)
    normal = ((wide - mean) * (variance + eps).rsqrt()).view(batch, height, width, channels)
    if weight is not None:
        normal = normal * weight
    if bias is not None:
        normal = normal + bias
    return normal.to(x.dtype).permute(0, 3, 1, 2)


class _Groups(NamedTuple):
    """The groups of which a rank has channels, numbered in their order on it."""

    counts: list[int]
    """Number of channels of each group on this rank."""
    crossing: list[int]
    """Global numbers of the groups of which several ranks have channels; the same on every rank."""
    shares: list[list[float]]
    """Share of a crossing group's channels that a rank has: [rank][crossing group]."""
    mine: dict[int, int]
    """Local number -> index in `crossing`, for the crossing groups of which this rank has channels."""


def _groups(
    groups: int, channels: int, context: TensorContext, axis: TensorAxis | None, channel_cut: Cut | None
) -> _Groups:
    size = channels // groups
    placement = Placement(shape=(channels,), cuts=() if channel_cut is None else (channel_cut,))
    groups_by_rank = []
    for rank in range(context.extent(axis)):
        coordinates = context.coordinates if axis is None else context.coordinates._replace(**{axis: rank})
        (boxes,) = zip(*(piece.whole for piece in placement.pieces(context.grid, coordinates)), strict=True)
        groups_by_rank.append(Counter(channel // size for box in boxes for channel in range(box.start, box.stop)))
    crossing = [group for group in range(groups) if sum(group in counts for counts in groups_by_rank) > 1]
    own_groups = groups_by_rank[context.index(axis)]
    return _Groups(
        counts=list(own_groups.values()),
        crossing=crossing,
        shares=[[counts[group] / size for group in crossing] for counts in groups_by_rank],
        mine={number: crossing.index(group) for number, group in enumerate(own_groups) if group in crossing},
    )


class _Tables(NamedTuple):
    """Index tables of a rank's groups. C: its channels, R: its groups, K: crossing groups of all ranks."""

    members: torch.Tensor
    """Channels of each group: [R, largest count], padded with C."""
    group: torch.Tensor
    """Group of each channel: [C]."""
    counts: torch.Tensor
    """Number of channels of each group: [R]."""
    shares: torch.Tensor
    """Share of a crossing group's channels that a rank has: [ranks, 1, K]."""
    mine: torch.Tensor
    """Local numbers of this rank's crossing groups."""
    places: torch.Tensor
    """Indices of the same groups among the K."""

    @classmethod
    def of(cls, groups: _Groups, like: torch.Tensor) -> _Tables:
        channels = torch.arange(sum(groups.counts))
        parts = list(torch.split(channels, groups.counts))
        members = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=len(channels))
        counts = torch.tensor(groups.counts)
        tables = cls(
            members=members,
            group=torch.arange(len(counts)).repeat_interleave(counts),
            counts=counts.to(like.dtype),
            shares=torch.tensor(groups.shares, dtype=like.dtype).unsqueeze(1),
            mine=torch.tensor(list(groups.mine), dtype=torch.int64),
            places=torch.tensor(list(groups.mine.values()), dtype=torch.int64),
        )
        return cls(*(t.to(like.device) for t in tables))

    def total(self, channel_values: torch.Tensor) -> torch.Tensor:
        """Sum over the channels of each group, in a fixed order: [..., C] -> [..., R]."""
        return F.pad(channel_values, (0, 1))[..., self.members].sum(-1)

    def spread(self, group_values: torch.Tensor) -> torch.Tensor:
        """Give each channel the value of its group: [..., R] -> [..., C, 1]."""
        return group_values[..., self.group].unsqueeze(-1)

    def crossing(self, group_values: torch.Tensor) -> torch.Tensor:
        """Return this rank's values of the crossing groups, zero for those that it is not in: [..., R] -> [..., K]."""
        values = group_values.new_zeros(*group_values.shape[:-1], self.shares.shape[-1])
        values[..., self.places] = group_values[..., self.mine]
        return values

    def replace_crossing(self, group_values: torch.Tensor, crossing: torch.Tensor) -> None:
        """Replace this rank's values [..., R] of the crossing groups by `crossing` [..., K]."""
        group_values[..., self.mine] = crossing[..., self.places]


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, layer: GroupNorm
    ) -> torch.Tensor:
        local = x.to(wide_type(x.dtype)).flatten(2) if x.dim() > 2 else x.to(wide_type(x.dtype)).unsqueeze(2)
        tables = layer.tables(local)
        # Means and mean squared differences: of each channel, of each group on this rank, of each whole group.
        channel_mean = local.mean(-1)
        squares = (local - channel_mean.unsqueeze(-1)).square().mean(-1)
        mean = tables.total(channel_mean) / tables.counts
        squares += (channel_mean.unsqueeze(-1) - tables.spread(mean)).squeeze(-1).square()
        variance = tables.total(squares) / tables.counts
        crossing_moments = mean_and_variance(
            tables.crossing(mean), tables.crossing(variance), tables.shares, layer.context, layer.axis
        )
        tables.replace_crossing(mean, crossing_moments[0])
        tables.replace_crossing(variance, crossing_moments[1])
        scale = tables.spread((variance + layer.eps).rsqrt())
        normal = (local - tables.spread(mean)).mul_(scale).to(x.dtype)
        ctx.save_for_backward(normal, scale, weight)
        ctx.layer = layer
        y = normal if weight is None else normal * weight.unsqueeze(-1)
        return (y if bias is None else y + bias.unsqueeze(-1)).view(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        normal, scale, weight = ctx.saved_tensors
        layer = ctx.layer
        grad_output, wide = grad.reshape(normal.shape).to(scale.dtype), normal.to(scale.dtype)
        tables = layer.tables(wide)
        sums = torch.stack([grad_output.sum(-1), (grad_output * wide).sum(-1)])
        group_sums = tables.total(sums if weight is None else sums * weight)
        crossing = tables.crossing(group_sums)
        reduction = layer.context.start_all_reduce(crossing, layer.axis)
        grad_bias, grad_weight = sums.sum(1)
        grad_normal = grad_output if weight is None else grad_output * weight.unsqueeze(-1)
        reduction.wait()
        tables.replace_crossing(group_sums, crossing)
        values = layer.num_channels // layer.num_groups * normal.shape[-1]
        first, second = tables.spread(group_sums / values)
        grad_input = (grad_normal - first - wide * second).mul_(scale).to(grad.dtype).view(grad.shape)
        if weight is None:
            return grad_input, None, None, None
        return grad_input, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None
