"""Comparison of the performance model with published measurements (`axonn predict --validate`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean

import pandas as pd
from pydantic import ValidationError

from axonn.errors import AxonnError, ConfigError
from axonn.perf.machine.quantities import Size
from axonn.perf.timing.constant_rate import naive_constants, naive_predict
from axonn.training.provenance import commit, described_files, fingerprint, source_files
from experiments.definition import find_machine, slug
from experiments.predicted_case import PredictedCase, predict_case
from experiments.predictor import PREDICTED
from experiments.validation.published_sets import DataSet, Quantity, Ratio, Variant, load_data_set, rules_for
from experiments.validation.validation_results import (
    Goal,
    SetResult,
    Validation,
    ValidationRow,
    VariantRow,
    fitted_constants,
)

RESULT = PREDICTED / "validation.json"
_RATED: tuple[Quantity, ...] = ("batch_time_s", "pipeline_s", "tflops_per_gpu")
"""Quantities that the constant-TFLOP/s predictor covers."""


def validate_set(path: Path, *, on_point: Callable[[str], None] = lambda label: None) -> SetResult:
    """Predict every point of a data set; `on_point` is called with each label before it is predicted.

    Raises `ConfigError` for mistakes in the file.
    """
    data, cases = load_data_set(path)
    where = str(path)

    def all_of(variant: Variant | None) -> dict[str, PredictedCase]:
        machine = find_machine((variant and variant.machine) or data.machine)
        if variant is not None and variant.memory_gb is not None:
            memory = Size(value=variant.memory_gb, unit="GB", source=f"{data.name}: {variant.label}", status="assumed")
            machine = machine.model_copy(update={"gpu": machine.gpu.model_copy(update={"memory": memory})})
        predicted = {}
        for case in cases:
            on_point(f"{data.name} {case.label}" + (f" ({variant.label})" if variant else ""))
            try:
                predicted[case.label] = predict_case(
                    case, machine, rules=rules_for(data, case), variant=variant, where=where
                )
            except AxonnError as error:
                text = str(error) if str(error).startswith(where) else f"{where}: point '{case.label}': {error}"
                raise ConfigError(text) from error
        return predicted

    base = all_of(None)
    rows = _with_constant_rate(list(base.values()), _rows(base.values()))
    ratios = [_ratio_row(ratio, base, rows) for ratio in data.ratios]
    variants = [_variant_row(data, variant, all_of(variant)) for variant in data.variants]
    if variants:
        variants.insert(0, _variant_row(data, Variant(label="as above"), base))
    return _summed_up(data, rows, ratios, variants)


def fingerprint_of(paths: Sequence[Path]) -> str:
    """Return a hash of the data sets, experiments whose points they may use, machines, models and predicting code."""
    code = source_files(__name__)
    described = described_files(
        "experiments/*.yaml", "experiments/models/*.yaml", "experiments/machines/*.yaml", "results/published/*.json"
    )
    return fingerprint(
        [p.name for p in paths], [*paths, *code, *(p for p in described if p.stem not in ("local", "local-gpu"))]
    )


def result_file(names: Sequence[str]) -> Path:
    """Return the result file of all sets, or a file of its own for those that are named."""
    return RESULT.with_name(f"validation-{slug('-'.join(Path(n).stem for n in names))}.json") if names else RESULT


def done_validation(paths: Sequence[Path], *, result: Path | None = None) -> Validation | None:
    """Return what an earlier call for the same sets wrote to `result` (default `RESULT`), if nothing has changed."""
    try:
        validation = Validation.model_validate_json((result or RESULT).read_bytes())
    except (OSError, ValidationError):
        return None
    return validation if validation.fingerprint == fingerprint_of(paths) else None


def write_validation(
    results: Sequence[SetResult], *, command: str, path: Path | None = None, mark: str | None = None
) -> Validation:
    """Write the results, and the fitted constants of all machines that they used, to `path` (default `RESULT`).

    `mark`: the `fingerprint_of` the sets.
    """
    path = path or RESULT
    machines = list(dict.fromkeys(result.machine for result in results))
    validation = Validation(
        command=command,
        commit=commit(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        fingerprint=mark,
        sets=list(results),
        fitted=[fit for name in machines for fit in fitted_constants(find_machine(name))],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = validation.model_dump(mode="json", by_alias=True, exclude_none=True)
    path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    return validation


def points_of(path: Path) -> int:
    """Return how often `validate_set` calls `on_point`."""
    data, cases = load_data_set(path)
    return len(cases) * (1 + len(data.variants))


def _rows(cases: Iterable[PredictedCase]) -> list[ValidationRow]:
    return [
        ValidationRow(
            label=p.case.label,
            group=p.case.group,
            quantity=quantity,
            model=p.case.model.name,
            measured=measured,
            predicted=(predicted := p.quantity(quantity)),
            error_pct=100 * (predicted / measured - 1),
            chosen=p.chosen,
            memory_gb=p.prediction.memory.total / 1e9,
            fits=p.prediction.fits,
            note=p.case.note,
        )
        for p in cases
        for quantity, measured in p.case.published.items()
    ]


def _with_constant_rate(cases: Sequence[PredictedCase], rows: Sequence[ValidationRow]) -> list[ValidationRow]:
    """Return the rows with the predictions of a constant rate of all GPUs."""
    by_label = {p.case.label: p for p in cases}
    batches = [_batch(row, by_label[row.label]) if row.quantity in _RATED else None for row in rows]
    rated = [(batch, row.model) for batch, row in zip(batches, rows, strict=True) if batch is not None]
    if not rated:
        return list(rows)
    fitted, held_out = naive_constants([batch for batch, _ in rated], [model for _, model in rated])
    return [
        row if batch is None else _with_rates(row, batch, fitted, held_out.get(row.model))
        for row, batch in zip(rows, batches, strict=True)
    ]


def _batch(row: ValidationRow, predicted: PredictedCase) -> tuple[float, int, float]:
    """Return the FLOPs, GPUs and seconds that give the measured rate."""
    if row.quantity == "tflops_per_gpu":
        return row.measured * 1e12, 1, 1.0
    return predicted.flops, predicted.case.gpus, row.measured


def _with_rates(
    row: ValidationRow, batch: tuple[float, int, float], fitted: float, held_out: float | None
) -> ValidationRow:
    """Return a row with the predictions of the rate fitted on all rows, and of that fitted on other models' rows."""

    def value(rate: float) -> float:
        flops, gpus, _ = batch
        rates = row.quantity == "tflops_per_gpu"
        return rate / 1e12 if rates else naive_predict(flops=flops, gpus=gpus, flops_per_s=rate)

    def error(rate: float) -> float:
        return 100 * (value(rate) / row.measured - 1)

    return row.model_copy(
        update={
            "constant": value(fitted),
            "constant_error_pct": error(fitted),
            "constant_held_out_error_pct": None if held_out is None else error(held_out),
        }
    )


def _ratio(ratio: Ratio, by_label: Mapping[str, PredictedCase]) -> float:
    return by_label[ratio.slower].prediction.batch_time_s / by_label[ratio.faster].prediction.batch_time_s


def _ratio_row(ratio: Ratio, by_label: Mapping[str, PredictedCase], rows: Sequence[ValidationRow]) -> ValidationRow:
    slower, faster = by_label[ratio.slower], by_label[ratio.faster]
    predicted = _ratio(ratio, by_label)
    # At a constant rate, time is proportional to work per GPU.
    constant = slower.flops / slower.case.gpus / (faster.flops / faster.case.gpus)
    return ValidationRow(
        label=ratio.label,
        group="",
        quantity="ratio",
        model=faster.case.model.name,
        measured=ratio.published,
        predicted=predicted,
        error_pct=100 * (predicted / ratio.published - 1),
        constant=constant,
        constant_error_pct=100 * (constant / ratio.published - 1),
        chosen=[f"{p.case.label}: {choice}" for p in (slower, faster) for choice in p.chosen],
        fits=slower.prediction.fits and faster.prediction.fits,
    )


def _variant_row(data: DataSet, variant: Variant, by_label: Mapping[str, PredictedCase]) -> VariantRow:
    touched = [p for p in by_label.values() if variant.labels is None or p.case.label in variant.labels]
    predicted = {row.key: row.predicted for row in _rows(touched)}
    predicted |= {p.case.label: p.quantity(data.quantity) for p in touched if not p.case.published}
    predicted |= {ratio.label: _ratio(ratio, by_label) for ratio in data.ratios}
    return VariantRow(
        label=variant.label,
        predicted=predicted,
        mean_pct=mean(abs(row.error_pct) for row in rows) if (rows := _rows(by_label.values())) else None,
        chosen=list(dict.fromkeys(choice for p in touched for choice in p.chosen)),
        fits=all(p.prediction.fits for p in touched),
    )


def _summed_up(
    data: DataSet, rows: list[ValidationRow], ratios: list[ValidationRow], variants: list[VariantRow]
) -> SetResult:
    judged = rows or ratios
    errors = [abs(row.error_pct) for row in judged]
    by_group: dict[str, list[float]] = {}
    for row in rows:
        if row.group:
            by_group.setdefault(row.group, []).append(abs(row.error_pct))
    groups = {name: mean(group_errors) for name, group_errors in by_group.items()}
    in_sample = [abs(r.constant_error_pct) for r in judged if r.constant_error_pct is not None]
    held_out = [abs(r.constant_held_out_error_pct) for r in rows if r.constant_held_out_error_pct is not None]
    return SetResult(
        name=data.name,
        title=data.title,
        source=data.source,
        status=data.status,
        machine=data.machine,
        rows=rows,
        ratios=ratios,
        mean_pct=mean(errors) if errors else None,
        max_pct=max(errors, default=None),
        bias_pct=mean(row.error_pct for row in judged) if judged else None,
        rank_correlation=rank_correlation(rows),
        constant_mean_pct=mean(in_sample) if in_sample else None,
        constant_held_out_pct=mean(held_out) if held_out else None,
        groups=groups,
        goals=_goals(data, errors, groups, ratios),
        open=data.open,
        variants=variants,
    )


def rank_correlation(rows: Sequence[ValidationRow]) -> float | None:
    """Return Spearman's rank correlation of measured and predicted; None for fewer than three or mixed quantities."""
    if len(rows) < 3 or len({row.quantity for row in rows}) > 1:
        return None
    table = pd.DataFrame({"measured": [r.measured for r in rows], "predicted": [r.predicted for r in rows]}).rank()
    if table.nunique().min() < 2:
        return None
    return float(table["measured"].corr(table["predicted"]))


def _goals(
    data: DataSet, errors: Sequence[float], groups: Mapping[str, float], ratios: Sequence[ValidationRow]
) -> list[Goal]:
    targets = data.targets
    bounds = [("mean error", targets.mean_pct, mean(errors) if errors else 0.0)]
    bounds += [("largest error", targets.max_pct, max(errors, default=0.0))]
    bounds += [(f"error of {row.label}", targets.ratio_pct, abs(row.error_pct)) for row in ratios]
    bounds += [(f"mean error of {name}", bound, groups[name]) for name, bound in targets.groups.items()]
    return [
        Goal(what=label, bound=bound, reached=reached, met=reached <= bound)
        for label, bound, reached in bounds
        if bound is not None
    ]
