"""Group norm over channels that are cut, where a group may lie on one rank or across several."""

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

    `segments`: lengths of the segments of the channels that are each cut by themselves, when they have been
    concatenated from several sources; groups are counted through all of them, as nn.GroupNorm does. A group that lies
    on one rank needs no communication. Raises `GridError` when the channels cannot be cut so.
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
        what = f"num_channels of GroupNorm({num_groups}, {num_channels})"
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"{what} must be a multiple of num_groups")
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.eps = eps
        self.axis: TensorAxis | None = axis
        of_channels = cut(0, axis, segments_of(num_channels, segments, context, axis, what))
        for name in ("weight", "bias"):
            if affine:
                self.place(name, (num_channels,), of_channels, device=device, dtype=dtype)
            else:
                self.register_parameter(name, None)
        self._groups = _groups(num_groups, num_channels, context, axis, of_channels)
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
        """Where the groups lie, as tensors on the device of `like`; made once."""
        key = like.device, like.dtype
        if key not in self._tables:
            self._tables[key] = _Tables.of(self._groups, like)
        return self._tables[key]


def _channels_last(
    x: torch.Tensor, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """`F.group_norm` of [batch, channels, height, width] that lie channels last, and stay so: that of a GPU would copy
    them into the other order."""
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
    """The groups of which a rank has channels, numbered as they follow each other on it."""

    counts: list[int]
    """Channels of each that it has."""
    crossing: list[int]
    """The groups, by their numbers in the whole, of which several ranks have channels: the same on every rank."""
    shares: list[list[float]]
    """[rank][crossing group]: what share of its channels the rank has."""
    mine: dict[int, int]
    """Number on this rank -> index in `crossing`, of the crossing groups of which it has channels."""


def _groups(
    groups: int, channels: int, context: TensorContext, axis: TensorAxis | None, of_channels: Cut | None
) -> _Groups:
    size = channels // groups
    placement = Placement(shape=(channels,), cuts=() if of_channels is None else (of_channels,))
    held = []
    for rank in range(context.extent(axis)):
        there = context.here if axis is None else context.here._replace(**{axis: rank})
        (boxes,) = zip(*(piece.whole for piece in placement.pieces(context.grid, there)), strict=True)
        held.append(Counter(channel // size for box in boxes for channel in range(box.start, box.stop)))
    crossing = [group for group in range(groups) if sum(group in there for there in held) > 1]
    here = held[context.index(axis)]
    return _Groups(
        counts=list(here.values()),
        crossing=crossing,
        shares=[[there[group] / size for group in crossing] for there in held],
        mine={number: crossing.index(group) for number, group in enumerate(here) if group in crossing},
    )


class _Tables(NamedTuple):
    """Where a rank's groups lie. C: its channels, R: its groups, K: crossing groups of all ranks."""

    members: torch.Tensor
    """[R, largest count]: the channels of each group; C where there are no more."""
    group: torch.Tensor
    """[C]: the group of each channel."""
    counts: torch.Tensor
    """[R]: channels of each."""
    shares: torch.Tensor
    """[ranks, 1, K]: what share of a crossing group a rank has."""
    mine: torch.Tensor
    """Numbers here of the crossing groups, and their"""
    places: torch.Tensor
    """indices among the K."""

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

    def total(self, of_channels: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., R]: the sum over the channels of each group, in a fixed order."""
        return F.pad(of_channels, (0, 1))[..., self.members].sum(-1)

    def spread(self, of_groups: torch.Tensor) -> torch.Tensor:
        """[..., R] -> [..., C, 1]: to each channel the value of its group."""
        return of_groups[..., self.group].unsqueeze(-1)

    def crossing(self, of_groups: torch.Tensor) -> torch.Tensor:
        """[..., R] -> [..., K]: this rank's values of the crossing groups, zero where it has none of a group."""
        found = of_groups.new_zeros(*of_groups.shape[:-1], self.shares.shape[-1])
        found[..., self.places] = of_groups[..., self.mine]
        return found

    def replace_crossing(self, of_groups: torch.Tensor, crossing: torch.Tensor) -> None:
        """Put the values of the crossing groups [..., K] in place of this rank's own [..., R]."""
        of_groups[..., self.mine] = crossing[..., self.places]


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, layer: GroupNorm
    ) -> torch.Tensor:
        local = x.to(wide_type(x.dtype)).flatten(2) if x.dim() > 2 else x.to(wide_type(x.dtype)).unsqueeze(2)
        tables = layer.tables(local)
        # Means and mean squared differences: of each channel, of each group here, of each group.
        of_channel = local.mean(-1)
        squares = (local - of_channel.unsqueeze(-1)).square().mean(-1)
        mean = tables.total(of_channel) / tables.counts
        squares += (of_channel.unsqueeze(-1) - tables.spread(mean)).squeeze(-1).square()
        variance = tables.total(squares) / tables.counts
        whole = mean_and_variance(
            tables.crossing(mean), tables.crossing(variance), tables.shares, layer.context, layer.axis
        )
        tables.replace_crossing(mean, whole[0])
        tables.replace_crossing(variance, whole[1])
        scale = tables.spread((variance + layer.eps).rsqrt())
        normal = (local - tables.spread(mean)).mul_(scale).to(x.dtype)
        ctx.save_for_backward(normal, scale, weight)
        ctx.layer = layer
        y = normal if weight is None else normal * weight.unsqueeze(-1)
        return (y if bias is None else y + bias.unsqueeze(-1)).view(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        normal, scale, weight = ctx.saved_tensors
        layer = ctx.layer
        of_output, wide = gradient.reshape(normal.shape).to(scale.dtype), normal.to(scale.dtype)
        tables = layer.tables(wide)
        sums = torch.stack([of_output.sum(-1), (of_output * wide).sum(-1)])
        of_groups = tables.total(sums if weight is None else sums * weight)
        crossing = tables.crossing(of_groups)
        pending = layer.context.start_all_reduce(crossing, layer.axis)
        of_bias, of_weight = sums.sum(1)
        of_normal = of_output if weight is None else of_output * weight.unsqueeze(-1)
        pending.wait()
        tables.replace_crossing(of_groups, crossing)
        values = layer.num_channels // layer.num_groups * normal.shape[-1]
        first, second = tables.spread(of_groups / values)
        of_input = (of_normal - first - wide * second).mul_(scale).to(gradient.dtype).view(gradient.shape)
        if weight is None:
            return of_input, None, None, None
        return of_input, of_weight.to(weight.dtype), of_bias.to(weight.dtype), None
