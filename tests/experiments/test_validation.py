"""Data sets of published measurements, and what `axonn predict --validate` makes of them."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from axonn.errors import ConfigError
from axonn.perf.machine.machine_file import MachineFile
from axonn.perf.timing.constant_rate import naive_constants, naive_predict
from experiments.definition import find_machine
from experiments.predicted_case import PredictedCase, predict_case
from experiments.validation.published_sets import FOLDER, Case, find_data_sets, load_data_set
from experiments.validation.validate import done_validation, points_of, rank_correlation, validate_set, write_validation
from experiments.validation.validation_results import SetResult, Validation, ValidationRow, fitted_constants
from experiments.validation.validation_tables import goal_table, remarks, set_table, summary_table, variant_table
from tests.helpers.command_line import CommandLine

TINY: dict[str, Any] = {
    "name": "tiny",
    "title": "Two models",
    "source": "nowhere",
    "status": "text",
    "machine": "summit",
    "defaults": {"batch_size": 64, "strategy": {"microbatch_size": 2, "grid": {"inter": 2}}},
    "points": [
        {"label": name, "gpus": 2, "published": seconds,
         "model": {"name": name, "layers": n, "hidden": 1024, "heads": 16, "seq_len": 512, "vocab": 51200}}
        for name, n, seconds in (("small", 2, 0.3), ("medium", 4, 0.5), ("large", 8, 0.9))
    ],
}  # fmt: skip


def write(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", find_data_sets(), ids=lambda p: p.stem)
def test_shipped_sets_are_sound(path: Path) -> None:
    data, cases = load_data_set(path)
    assert data.name == path.stem
    assert cases
    assert any(case.published for case in cases) or data.ratios
    # Of what is not published, the rule is written down.
    assert all(len(rule.rule) > 5 for rule in data.open)


def test_a_set_is_predicted_point_by_point(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.yaml", targets={"mean_pct": 1e6, "max_pct": 1e-6})
    seen: list[str] = []
    result = validate_set(path, on_point=seen.append)
    assert seen == ["tiny small", "tiny medium", "tiny large"]
    assert len(seen) == points_of(path)
    assert [row.measured for row in result.rows] == [0.3, 0.5, 0.9]
    for row in result.rows:
        assert row.error_pct == pytest.approx(100 * (row.predicted / row.measured - 1))
        assert row.fits
    errors = [abs(row.error_pct) for row in result.rows]
    assert result.mean_pct == pytest.approx(sum(errors) / 3)
    assert result.max_pct == max(errors)
    assert result.rank_correlation == 1.0
    assert [goal.met for goal in result.goals] == [True, False]


def test_the_constant_rate_is_fitted_on_all_points_and_on_the_other_models(tmp_path: Path) -> None:
    rows = validate_set(write(tmp_path / "tiny.yaml")).rows
    # The rate is that of one of the points: its own error is none, unless it is held out.
    exact = [row for row in rows if abs(row.constant_error_pct or 0.0) < 1e-9]
    assert len(exact) == 1
    assert abs(exact[0].constant_held_out_error_pct or 0.0) > 0.1


def test_rules_for_open_settings_are_carried_out(tmp_path: Path) -> None:
    def chosen(take: str, sizes: list[int], **changes: Any) -> str:
        among = [{"microbatch_size": size} for size in sizes]
        rule = {"setting": "microbatch", "rule": "as asked", "take": take, "among": among}
        (choice,) = validate_set(write(tmp_path / "tiny.yaml", open=[rule], **changes)).rows[2].chosen
        return choice.removeprefix("microbatch: microbatch_size ")

    assert chosen("first-that-fits", [4, 8, 1]) == "4"
    # 7 does not divide the batch; 64 in one go leaves a stage idle half of the time.
    assert chosen("fastest-that-fits", [7, 64, 8]) == "8"
    large = {"batch_size": 2048, "strategy": {"grid": {"inter": 2}}}
    assert chosen("first-that-fits", [2048, 2], defaults=large) == "2"
    with pytest.raises(ConfigError, match="no value of 'microbatch' divides its batch"):
        chosen("first-that-fits", [7])


def test_rates_are_those_of_the_predicted_time(tmp_path: Path) -> None:
    """FLOPs with and without recomputation, samples: of one point, each beside its batch time."""
    parts = {"batch_time_s": 0.4, "tflops_per_gpu": 30.0, "model_tflops_per_gpu": 25.0, "samples_per_s": 160.0}
    point = {key: value for key, value in TINY["points"][0].items() if key != "published"} | {"parts": parts}
    result = validate_set(write(tmp_path / "tiny.yaml", points=[point]))
    predicted = {row.quantity: row.predicted for row in result.rows}
    model = load_data_set(tmp_path / "tiny.yaml")[1][0].model
    seconds = predicted["batch_time_s"]
    assert predicted["samples_per_s"] == pytest.approx(64 / seconds)
    for quantity, recompute in (("tflops_per_gpu", True), ("model_tflops_per_gpu", False)):
        flops = 64 * model.training_flops(recompute=recompute)
        assert predicted[quantity] == pytest.approx(flops / 1e12 / 2 / seconds)


def test_a_variant_changes_one_key_of_a_model(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.yaml", variants=[{"label": "wide", "model": {"hidden": 2048}}])
    data, cases = load_data_set(path)
    wide = [case.under(data.variants[0], "tiny.yaml").model for case in cases]
    assert [model.model_dump() for model in wide] == [case.model.model_dump() | {"hidden": 2048} for case in cases]
    path = write(tmp_path / "tiny.yaml", variants=[{"label": "wide", "model": {"hiden": 2048}}])
    with pytest.raises(ConfigError, match=r"unknown key 'hiden'; did you mean 'hidden'"):
        validate_set(path)


def test_variants_and_ratios_say_what_hangs_on_an_assumption(tmp_path: Path) -> None:
    ratio = {"label": "large over small", "slower": "large", "faster": "small", "published": 3.0}
    variants = [{"label": "batch 128", "batch_scale": 2.0}, {"label": "no memory", "memory_gb": 0.1}]
    result = validate_set(write(tmp_path / "tiny.yaml", ratios=[ratio], variants=variants))
    by = {row.label: row.predicted for row in result.rows}
    assert result.ratios[0].predicted == pytest.approx(by["large"] / by["small"])
    assert result.mean_pct == pytest.approx(sum(abs(row.error_pct) for row in result.rows) / 3)
    unpublished = [{**point, "published": None} for point in TINY["points"]]
    alone = validate_set(write(tmp_path / "tiny.yaml", ratios=[ratio], points=unpublished))
    assert alone.mean_pct == abs(result.ratios[0].error_pct)
    same, twice, none = result.variants
    assert same.predicted["large: batch_time_s"] == by["large"]
    assert 1.8 < twice.predicted["large: batch_time_s"] / by["large"] < 2
    assert same.fits
    assert not none.fits


def test_parts_of_a_batch_are_rows_of_their_own(tmp_path: Path) -> None:
    point = {
        **TINY["points"][0],
        "published": None,
        "parts": {"pipeline_s": 0.25, "optimizer_s": 0.01, "tflops_per_gpu": 40.0},
    }
    result = validate_set(write(tmp_path / "tiny.yaml", points=[point]))
    assert [row.quantity for row in result.rows] == ["pipeline_s", "optimizer_s", "tflops_per_gpu"]
    assert [row.constant is None for row in result.rows] == [False, True, False]
    assert result.rank_correlation is None
    parts = ("batch_time_s", "pipeline_s", "all_reduce_s", "optimizer_s")
    point = {**TINY["points"][0], "published": None, "parts": dict.fromkeys(parts, 1.0)}
    rows = validate_set(write(tmp_path / "tiny.yaml", points=[point])).rows
    assert rows[0].predicted == pytest.approx(sum(row.predicted for row in rows[1:]), rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targts": {}}, "unknown key 'targts'; did you mean 'targets'"),
        ({"points": []}, "has no points"),
        ({"points": [{"label": "a", "gpus": 2, "model": "gpt-12b", "strategy": {"microbatchsize": 1}}]},
         "point 'a': unknown key 'microbatchsize'; did you mean 'microbatch_size'"),
        ({"points": [{"label": "a", "gpus": 2}]}, "point 'a' has no model, nor have the defaults"),
        ({"points": [{"label": "a", "gpus": 2, "model": "gpt-13b"}]}, "there is no model 'gpt-13b'; .*known are"),
        ({"points": 2 * TINY["points"]}, "two points have the same label"),
        ({"ratios": [{"label": "r", "slower": "smal", "faster": "large", "published": 1.0}]},
         "ratios names the point 'smal'; did you mean 'small'"),
        ({"open": [{"setting": "x", "rule": "y", "take": "first-that-fits"}]}, "take and among belong together"),
        ({"points": [{**TINY["points"][0], "model": {"name": "x", "hiden": 3}}]},
         "point 'small': model: unknown key 'hiden'; did you mean 'hidden'"),
        ({"points": [{**TINY["points"][0], "parts": {"pipeline": 3.0}}]},
         "unknown key 'points.0.parts.pipeline'; did you mean 'pipeline_s'"),
        ({"points": [{**TINY["points"][0], "published": 0.0}]}, "points.0.published.: Input should be greater than 0"),
        ({"points": [{**TINY["points"][0], "gpus": 3}]}, "point 'small': the grid .* needs 2 ranks, but 3 run"),
        ({"targets": {"groups": {"AxoNN": 3.0}}}, "targets name a group without points: AxoNN"),
        ({"machine": "sumit"}, "there is no machine 'sumit'; .*known are"),
    ],
)  # fmt: skip
def test_bad_sets_say_what_is_wrong(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate_set(write(tmp_path / "tiny.yaml", **changes))


def test_ranks_are_correlated_as_spearman_does() -> None:
    def rows(*pairs: tuple[float, float]) -> list[ValidationRow]:
        blank = {"group": "", "quantity": "batch_time_s", "model": "m", "error_pct": 0.0}
        return [ValidationRow(label=str(i), measured=m, predicted=p, **blank) for i, (m, p) in enumerate(pairs)]

    assert rank_correlation(rows((1, 1), (2, 4), (3, 9))) == pytest.approx(1)
    assert rank_correlation(rows((1, 9), (2, 4), (3, 1))) == pytest.approx(-1)
    # 1 - 6 sum d^2 / n (n^2 - 1) with d = 1, 1, 0
    assert rank_correlation(rows((1, 2), (2, 1), (3, 3))) == pytest.approx(1 - 6 * 2 / 24)
    assert rank_correlation(rows((1, 2), (2, 1))) is None


def test_every_fitted_constant_of_a_machine_is_reported() -> None:
    found = {fit.what: fit for fit in fitted_constants(find_machine("summit"))}
    assert {"gpu.gemm", "gpu.in_layer", "network.p2p.mpi.intra_node", "network.all_reduce.inter_node"} <= set(found)
    assert all(fit.points and fit.source for fit in found.values())


def test_the_result_is_written_in_its_schema(tmp_path: Path) -> None:
    result: SetResult = validate_set(write(tmp_path / "tiny.yaml"))
    written = write_validation([result], command="test", path=tmp_path / "out" / "validation.json")
    text = (tmp_path / "out" / "validation.json").read_text(encoding="utf-8")
    assert json.loads(text)["schema"] == "axonn-validation/1"
    assert Validation.model_validate_json(text) == written


def test_the_command_prints_one_table_per_set(
    axonn: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("experiments.validation.validate.RESULT", tmp_path / "validation.json")
    code, output, _ = axonn("predict", "--validate", write(tmp_path / "tiny.yaml"), "ipdps22-fig8")
    assert code == 0
    for expected in ("tiny: Two models", "ipdps22-fig8: All-reduce", "k = 64", "All data sets", "network.p2p.mpi"):
        assert expected in output
    # The same again is read from the file, and printed alike.
    file = tmp_path / "validation-tiny-ipdps22-fig8.json"
    before = file.read_bytes()
    # What holds all sets is not replaced by some.
    assert not (tmp_path / "validation.json").exists()
    assert "written to" in output
    code, again, _ = axonn("predict", "--validate", str(tmp_path / "tiny.yaml"), "ipdps22-fig8")
    assert code == 0
    assert "nothing to do" in again
    assert "k = 64" in again
    assert file.read_bytes() == before
    sets = [tmp_path / "tiny.yaml", FOLDER / "ipdps22-fig8.yaml"]
    assert done_validation(sets, result=file) is not None
    # With other sets, or another content of one, it is not the same.
    assert done_validation(sets[:1], result=file) is None
    write(tmp_path / "tiny.yaml", title="Another")
    assert done_validation(sets, result=file) is None
    axonn.refuses("there is no data set 'fig8'; known are", "predict", "--validate", "fig8")
    axonn.refuses("give one experiment file", "predict")


def calls_of(work: Callable[[], object]) -> int:
    """Calls that `work` makes: of functions, Python's own included, and of generators for each item."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_the_work_is_linear_in_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a set, predicting, fitting constants and printing tables; predictions themselves are counted alone."""
    known: dict[str, PredictedCase] = {}
    predicted = 0

    def once_for_each_model(case: Case, machine: MachineFile, **options: Any) -> PredictedCase:
        nonlocal predicted
        predicted += 1
        if case.model.name not in known:
            known[case.model.name] = predict_case(case, machine, **options)
        return replace(known[case.model.name], case=case)

    monkeypatch.setattr("experiments.validation.validate.predict_case", once_for_each_model)

    def work(count: int, models: int) -> int:
        """Calls for `count` rows of as many groups, and of so many models, each named by a rule and a variant."""
        nonlocal predicted
        points = [
            {"label": f"point {i}", "group": f"group {i}", "gpus": 2, "published": 0.2 + 0.001 * (i * 7919 % count),
             "model": TINY["points"][0]["model"] | {"name": f"model-{i % models}", "layers": 2}}
            for i in range(count)
        ]  # fmt: skip
        labels = [point["label"] for point in points]
        path = write(
            tmp_path / "many.yaml",
            points=points,
            open=[{"setting": "all", "rule": "as asked", "points": labels}],
            variants=[{"label": "slower", "points": labels, "strategies": {label: {} for label in labels}}],
            ratios=[{"label": f"r{i}", "slower": labels[i], "faster": labels[-i], "published": 1.0} for i in range(9)],
            targets={"groups": {f"group {i}": 1.0 for i in range(count)}},
        )
        predicted = 0

        def all_of_it() -> None:
            result = validate_set(path)
            list(remarks(result))
            for table in (set_table(result), variant_table(result), summary_table([result]), goal_table([result])):
                assert table.row_count

        calls = calls_of(all_of_it)
        assert predicted == 2 * count
        return calls

    for models in (2, 10_000):
        work(20, models)
        small, large = (work(count, models) for count in (100, 200))
        assert large < 2.2 * small, f"{small} calls for 100 rows, {large} for 200"


@given(
    st.lists(st.tuples(st.floats(1e9, 1e15), st.integers(1, 512), st.floats(1e-3, 1e3)), min_size=1, max_size=12),
    st.lists(st.integers(0, 3), min_size=12, max_size=12),
)
def test_the_constant_rate_has_the_least_error(batches: list[tuple[float, int, float]], names: list[int]) -> None:
    """Of all rates, those of the batches come into question; each is tried."""
    groups = names[: len(batches)]

    def error(rate: float, chosen: list[tuple[float, int, float]]) -> float:
        return sum(abs(naive_predict(flops=f, gpus=g, flops_per_s=rate) / s - 1) for f, g, s in chosen)

    def least(chosen: list[tuple[float, int, float]]) -> float:
        return min(error(f / g / s, chosen) for f, g, s in chosen)

    fitted, held_out = naive_constants(batches, groups)
    assert error(fitted, batches) == pytest.approx(least(batches), rel=1e-9)
    assert held_out.keys() == ({*groups} if len({*groups}) > 1 else set())
    for name, rate in held_out.items():
        others = [batch for batch, group in zip(batches, groups, strict=True) if group != name]
        assert error(rate, others) == pytest.approx(least(others), rel=1e-9)
