"""Prediction of one point: its open settings are filled in by their rules, then the performance model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from axonn.errors import ConfigError
from axonn.models.registry import outline_of
from axonn.perf.layers.model_outline import ModelOutline
from axonn.perf.machine.machine_file import MachineFile
from axonn.perf.prediction import Prediction, predict
from axonn.perf.strategy import Strategy
from axonn.perf.timing.jitter import Jitter
from experiments.validation.published_sets import Case, Open, Quantity, Variant


@dataclass(frozen=True)
class PredictedCase:
    """A point with its prediction; `chosen` has the outcome of its rules."""

    case: Case
    strategy: Strategy
    outline: ModelOutline
    prediction: Prediction
    chosen: list[str]

    def quantity(self, name: Quantity) -> float:
        """Return the prediction of a published number, in its unit."""
        p = self.prediction
        match name:
            case "batch_time_s" | "pipeline_s":
                return getattr(p, name)  # type: ignore[no-any-return]
            case "step_s":
                return p.batch_time_s - p.pipeline_s
            case "all_reduce_s":
                return p.last.reducing
            case "optimizer_s":
                return p.last.updating
            case "tflops_per_gpu":
                flops = self.case.batch_size * self.outline.flops_recomputing
                return flops / p.batch_time_s / self.case.gpus / 1e12
            case "model_tflops_per_gpu":
                return self.case.batch_size * self.outline.flops / p.batch_time_s / self.case.gpus / 1e12
            case "samples_per_s":
                return self.case.batch_size / p.batch_time_s

    @property
    def flops(self) -> float:
        """Floating-point operations of the batch, with recomputation counted as in the prediction's TFLOP/s."""
        p = self.prediction
        return 1e12 * p.tflops_per_gpu * self.case.gpus * p.batch_time_s


def predict_case(
    case: Case,
    machine: MachineFile,
    *,
    where: str,
    rules: Sequence[Open] = (),
    variant: Variant | None = None,
    record: bool = False,
    jitter: Jitter | None = None,
) -> PredictedCase:
    """Predict a point, with its open settings fixed by their `rules` and the assumptions of the variant.

    `record` and `jitter`: see `axonn.perf.prediction.predict`. Raises `ConfigError` naming `where` and the point.
    """
    outlines: dict[int, ModelOutline] = {}

    def one(case: Case, chosen: list[str], *, record: bool = False, jitter: Jitter | None = None) -> PredictedCase:
        final = case if variant is None else case.under(variant, where)
        strategy = final.checked(where)
        strategy.process_grid(machine).check_world(final.gpus)
        strategy.check(final.model)
        outline = outlines.setdefault(id(final.model), outline_of(final.model))
        size = final.batch_size
        prediction = predict(outline, machine, strategy, batch_size=size, record=record, jitter=jitter)
        return PredictedCase(final, strategy, outline, prediction, chosen)

    chosen: list[str] = []
    best: PredictedCase | None = None
    for rule in rules:
        tried: list[tuple[dict[str, Any], Case, PredictedCase]] = []
        for value, candidate in case.candidates(rule, where):
            if not candidate.divides(where, variant):
                continue
            tried.append((value, candidate, one(candidate, [])))
            if rule.take == "first-that-fits" and tried[-1][2].prediction.fits:
                break
        if not tried:
            raise ConfigError(
                f"{where}: point '{case.label}': no value of '{rule.setting}' divides its batch; add some"
            )
        # If nothing fits, the one with the least memory is taken; its row says that it does not fit.
        fitting = [t for t in tried if t[2].prediction.fits] or [min(tried, key=lambda t: t[2].prediction.memory.total)]
        value, case, best = min(fitting, key=lambda t: t[2].prediction.batch_time_s)
        chosen.append(f"{rule.setting}: {_short(value)}")
    if best is not None and not record and jitter is None:
        return replace(best, chosen=chosen)
    return one(case, chosen, record=record, jitter=jitter)


def _short(value: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {_short(v) if isinstance(v, Mapping) else v}" for k, v in value.items())
