"""Megatron-LM: megatron-core on this machine, its own training script on clusters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from axonn.training.framework import Adapter, Capabilities, ClusterWork, Framework, Launch, PrintedRun
from baselines.adapters.megatron.megatron_launch import launch_of
from baselines.adapters.megatron.megatron_local import (
    DISCLOSURE,
    ENVIRONMENT,
    Combined,
    DistributedOptimizer,
    Interleaved,
    MegatronData,
    MegatronPipeline,
    Tensor,
)
from baselines.adapters.megatron.megatron_log import read_log


class MegatronAdapter(Adapter):
    name = "megatron"
    label = "Megatron-LM"
    strategies: ClassVar[dict[str, type[Framework]]] = {
        kind.strategy: kind
        for kind in (Tensor, MegatronPipeline, Interleaved, MegatronData, DistributedOptimizer, Combined)
    }

    def capabilities(self) -> Capabilities:
        reason = ENVIRONMENT.missing
        devices = ENVIRONMENT.devices
        return Capabilities(
            version=ENVIRONMENT.version() if reason is None else None,
            reason=reason,
            strategies={name: kind.__doc__ or "" for name, kind in self.strategies.items()},
            devices=devices,
            precisions=("float32", "bfloat16"),
            disclosure=None if "cuda" in devices else DISCLOSURE,
        )

    def framework(self, strategy: str | None) -> Framework:
        return self.pick(strategy, self.strategies)

    def launch(self, work: ClusterWork) -> Launch:
        return launch_of(work)

    def read(self, lines: Iterable[str]) -> PrintedRun:
        return read_log(lines)
