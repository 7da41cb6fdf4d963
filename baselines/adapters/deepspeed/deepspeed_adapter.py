"""DeepSpeed: ZeRO data parallelism and its pipeline engine here; Megatron-DeepSpeed's training script on clusters."""

from __future__ import annotations

from collections.abc import Iterable

from axonn.training.framework import Adapter, Capabilities, ClusterWork, Framework, Launch, PrintedRun
from baselines.adapters.deepspeed.deepspeed_frameworks import ENVIRONMENT, HALF_TOO, OFFLOAD_DISCLOSURE, STRATEGIES
from baselines.adapters.deepspeed.deepspeed_launch import launch_of
from baselines.adapters.deepspeed.deepspeed_log import read_log


class DeepSpeedAdapter(Adapter):
    name = "deepspeed"
    label = "DeepSpeed"

    def capabilities(self) -> Capabilities:
        reason = ENVIRONMENT.missing
        return Capabilities(
            version=ENVIRONMENT.version() if reason is None else None,
            reason=reason,
            strategies={name: kind.__doc__ or "" for name, kind in STRATEGIES.items()},
            devices=ENVIRONMENT.devices,
            precisions=HALF_TOO,
            disclosure=OFFLOAD_DISCLOSURE,
        )

    def framework(self, strategy: str | None) -> Framework:
        return self.pick(strategy, STRATEGIES)

    def launch(self, work: ClusterWork) -> Launch:
        return launch_of(work)

    def read(self, lines: Iterable[str]) -> PrintedRun:
        return read_log(lines)
