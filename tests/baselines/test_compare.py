"""The comparison with other frameworks: statistics, equal work, verdicts, what it writes, who takes part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import comb, inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from axonn.errors import ConfigError
from axonn.observability.machine_usage import BatchUsage
from axonn.observability.records import Failure
from axonn.training.framework import Capabilities
from baselines import compare, contenders
from baselines.comparison import (
    Result,
    Tolerances,
    busy_lines,
    exit_code,
    load_tolerances,
    paired_ratio,
    results_of,
    rows_of,
    verdicts_of,
)
from baselines.comparison_outcome import record_of
from baselines.comparison_session import MEMORY_SHARE, SessionPart, conditions_over_link, groups_of, job_bytes
from baselines.comparison_tables import show
from baselines.contenders import KINDS, Contender, choose, load_contenders, refusal
from baselines.coordinator import LEAST_ROUNDS, LOOPBACK, Condition, ContenderResult, Turn
from baselines.equal_work import BATCHES, difference, disagreement
from baselines.junit import text_of, write_junit
from baselines.statistics import median_interval, middle_half
from experiments.slow_link import message_bytes
from experiments.workloads import MICROBATCHES
from plots.figures.baselines import draw, panels_of
from tests.helpers.busy import BUSY, QUIET, usage

LINK = Condition(name="link", kbit=1000)


# --- statistics


@pytest.mark.parametrize("n", [*range(1, 25), 60])
def test_the_interval_holds_the_median_with_its_confidence(n: int) -> None:
    """By the definition of order statistics, counted out anew."""
    values = [float(i) for i in range(n)]
    spread = median_interval(values[::-1])
    assert spread.low + spread.high == n - 1
    cut = int(spread.low)
    outside = 2 * sum(comb(n, i) for i in range(cut + 1)) / 2**n
    if cut > 0:
        assert outside <= 0.05
    # It could not be narrower.
    if cut + 1 <= (n - 1) / 2:
        assert 2 * sum(comb(n, i) for i in range(cut + 2)) / 2**n > 0.05


def test_quartiles_of_few_values_are_their_ends() -> None:
    assert middle_half([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert middle_half([1.0, 2.0, 3.0, 4.0, 100.0]) == (3.0, 2.0, 4.0)


# --- equal work


def test_losses_of_equal_work_agree_and_others_say_why_not() -> None:
    reference = [4.0, 3.0, 2.0, 1.5, 1.2]
    assert disagreement([x * (1 + 5e-5) for x in reference] + [9.0], reference, "float32") is None
    for losses, text in (
        ([4.0, 3.0, 2.001, 1.5, 1.2], "5.0e-04, more than 1e-04 for float32"),
        ([4.0, 3.0, float("nan"), 1.5, 1.2], "differ"),
        (reference[: BATCHES - 1], f"only 4 losses to compare, {BATCHES} are needed"),
        ([], "only 0 losses"),
    ):
        found = disagreement(losses, reference, "float32")
        assert found is not None
        assert found.cause == "not-comparable"
        assert text in found.detail
    assert disagreement([4.0, 3.0, 2.001, 1.5, 1.2], reference, "bfloat16") is None
    assert difference([4.0, float("nan")], reference) == inf
    assert difference([], reference) is None


# --- verdicts, tables, files

OURS = Contender(framework="axonn", variant="plain", kind="tensor")
OURS_TOO = Contender(framework="axonn", variant="other", kind="tensor")
THEIRS = Contender(framework="pytorch/tensor", label="PyTorch", variant="DTensor", kind="tensor")
SHIM = Contender(framework="megatron/tensor", label="Megatron-LM", variant="tensor", kind="tensor")


def result(contender: Contender, seconds: Sequence[float], **changes: Any) -> Result:
    turns = [Turn(condition="loopback", group=0, round=i, seconds=s) for i, s in enumerate(seconds)]
    about = {"workload": "tiny", "condition": LOOPBACK, "ranks": 2, "tokens": 512, "turns": turns, "losses": [1.0] * 6}
    return Result(**{"contender": contender, **about, **changes})


def failed(contender: Contender, seconds: Sequence[float] = (), cause: Any = "dead-rank") -> Result:
    return result(contender, seconds, failure=Failure(cause=cause, detail="it \x1b[31mdied"))


TIMES = [1.0, 2.0, 1.1, 1.05, 0.9, 1.0, 1.2, 1.0]


@pytest.mark.parametrize(
    ("factors", "margin", "behind"),
    [
        ([0.9] * 8, 0.05, False),
        ([1.04] * 8, 0.05, False),
        ([1.10] * 8, 0.05, True),
        ([1.10] * 8, 0.15, False),
        # The median says behind, but the interval, here from least to largest, does not.
        ([1.10, 1.12, 1.0, 1.2, 1.1, 1.1, 1.1, 1.3], 0.05, False),
        ([1.10, 1.12, 1.06, 1.2, 1.1, 1.1, 1.1, 1.3], 0.05, True),
    ],
)
def test_ours_is_behind_only_beyond_margin_and_spread(factors: list[float], margin: float, behind: bool) -> None:
    # The machine drifts by a factor of 2, which paired rounds do not see.
    results = [
        result(OURS, [t * f for t, f in zip(TIMES, factors, strict=True)]),
        result(OURS_TOO, [3.0] * 8),
        result(THEIRS, TIMES),
        result(SHIM, [4.0] * 8),
    ]
    (verdict,) = verdicts_of(results, Tolerances(margin=0.0, kinds={"tensor": margin}))
    assert (verdict.ours, verdict.theirs) == ("AxoNN plain", "PyTorch DTensor")
    assert verdict.ratio == pytest.approx(sorted(factors)[3] / 2 + sorted(factors)[4] / 2)
    assert (verdict.low, verdict.high) == (pytest.approx(min(factors)), pytest.approx(max(factors)))
    assert verdict.behind == behind
    assert exit_code(results, [verdict]) == int(behind)


def test_a_contender_that_did_other_work_gets_no_ratio_and_is_no_best_one() -> None:
    results = [result(OURS, TIMES), failed(THEIRS, [t / 2 for t in TIMES], "not-comparable"), result(SHIM, [4.0] * 8)]
    (verdict,) = verdicts_of(results, Tolerances(margin=0.05))
    assert verdict.theirs == "Megatron-LM tensor"
    rows = {row["framework"]: row for row in rows_of(results, {"megatron/tensor": {"disclosure": "a shim"}})}
    assert (rows["PyTorch"]["ratio"], rows["PyTorch"]["losses_agree"]) == (None, False)
    assert rows["PyTorch"]["failure"]["cause"] == "not-comparable"
    assert rows["Megatron-LM"]["ratio"] == pytest.approx(4.0 / 1.025, rel=0.02)
    assert (rows["AxoNN"]["ratio"], rows["AxoNN"]["spread"]) == (1.0, [1.0, 1.0])
    assert (rows["Megatron-LM"]["disclosure"], rows["AxoNN"]["disclosure"]) == ("a shim", None)
    assert rows["AxoNN"]["tokens_per_s"] == pytest.approx(512 / 1.025)


def test_nothing_compared_and_our_own_failure_are_no_success() -> None:
    alone = [result(OURS, TIMES), failed(THEIRS)]
    (verdict,) = verdicts_of(alone, Tolerances(margin=0.05))
    assert verdict.ratio is None
    assert "the other frameworks" in (verdict.reason or "")
    assert exit_code(alone, [verdict]) == 1
    assert exit_code([], []) == 1
    partly = [result(OURS, TIMES), failed(OURS_TOO), result(THEIRS, TIMES)]
    assert exit_code(partly, verdicts_of(partly, Tolerances(margin=0.05))) == 1
    assert exit_code(partly[::2], verdicts_of(partly[::2], Tolerances(margin=0.05))) == 0


def with_usage(one: Result, usages: Sequence[BatchUsage]) -> Result:
    turns = [turn.model_copy(update={"usage": use}) for turn, use in zip(one.turns, usages, strict=True)]
    return one.model_copy(update={"turns": turns})


def test_processor_seconds_have_a_ratio_of_their_own() -> None:
    ours = with_usage(result(OURS, [1.0, 3.0] * 4), [usage(processor_s=1.9)] * 8)
    theirs = with_usage(result(THEIRS, [3.0, 1.0] * 4), [usage(processor_s=2.0)] * 8)
    (verdict,) = verdicts_of([ours, theirs], Tolerances(margin=0.05))
    assert (verdict.low, verdict.high) == (pytest.approx(1 / 3), 3.0)
    assert verdict.processor_ratio == verdict.processor_low == verdict.processor_high == pytest.approx(0.95)
    rows = {row["framework"]: row for row in rows_of([ours, theirs], {})}
    assert (rows["AxoNN"]["processor_s"], rows["PyTorch"]["processor_s"]) == (1.9, 2.0)
    assert rows["PyTorch"]["processor_ratio"] == pytest.approx(2.0 / 1.9)
    assert "0.950 (0.950 to 0.950) of its processor time" in text_of(verdict)


def test_rounds_of_a_busy_machine_are_in_no_ratio(tmp_path: Path) -> None:
    """In three rounds others took half of the cores, and AxoNN's batches twice the time."""
    loud = [BUSY] * 3 + [QUIET] * 5
    ours = with_usage(result(OURS, [2.0] * 3 + [1.0] * 5), loud)
    theirs = with_usage(result(THEIRS, [1.1] * 8), [QUIET] * 8)
    (verdict,) = verdicts_of([ours, theirs], Tolerances(margin=0.05))
    assert (verdict.ratio, verdict.rounds, verdict.busy_rounds) == (pytest.approx(1 / 1.1), 5, 3)
    assert not verdict.behind
    assert "5 rounds, 3 more left out since the machine was busy" in text_of(verdict)
    assert (ours.busy, ours.busy_rounds, ours.time.median) == (False, 3, 1.0)
    (line,) = busy_lines([ours, theirs])
    assert "during 3 of 16 batches (others took 50% of the cores meanwhile): left out of ratios; run it again" in line
    assert record_of(ours).busy is False
    # Taken in, they count.
    both = [one.model_copy(update={"with_busy": True}) for one in (ours, theirs)]
    (verdict,) = verdicts_of(both, Tolerances(margin=0.05))
    assert (verdict.rounds, verdict.busy_rounds) == (8, 0)
    assert verdict.high == pytest.approx(2.0 / 1.1)
    # Where there was nothing else, nothing is compared, and everything says why.
    all_loud = [with_usage(result(who, TIMES), [BUSY] * 8) for who in (OURS, THEIRS)]
    (verdict,) = verdicts_of(all_loud, Tolerances(margin=0.05))
    assert verdict.ratio is None
    assert "the machine was busy with other work in all 8 rounds; run it again when the machine is idle" in text_of(
        verdict
    )
    rows = rows_of(all_loud, {})
    assert [(row["busy"], row["in_ratios"], row["ratio"]) for row in rows] == [(True, False, None)] * 2
    assert record_of(all_loud[0]).busy is True
    write_junit(tmp_path / "junit.xml", all_loud, [verdict], {})
    cases = list(ElementTree.parse(tmp_path / "junit.xml").getroot().iter("testcase"))
    assert len(cases) == 3
    assert all("busy" in case.find("skipped").get("message") for case in cases)
    console = Console(width=120, record=True, file=(tmp_path / "screen").open("w"))
    show(console, rows, all_loud, [verdict], {})
    assert console.export_text().count("(busy)") == 3
    summary = {"rows": rows, "quick": False, "provenance": {"machine": {"cores": 2, "cpu": "some"}}}
    _, svg = draw(summary, tmp_path)
    assert svg.read_text().count('<g id="busy"') == 2


def test_only_rounds_of_the_same_group_are_paired() -> None:
    def turns(seconds: Mapping[tuple[int, int], float]) -> list[Turn]:
        return [Turn(condition="loopback", group=g, round=r, seconds=s) for (g, r), s in seconds.items()]

    ours = result(OURS, [], turns=turns({(0, 0): 1.0, (0, 1): 1.0, (1, 0): 5.0, (1, 1): 5.0, (1, 2): 4.0}))
    theirs = result(THEIRS, [], turns=turns({(1, 0): 10.0, (1, 1): 11.0, (1, 2): 8.0, (1, 3): 1.0}))
    ratio = paired_ratio(over=ours, under=theirs)
    assert ratio is not None
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 2.2)
    assert paired_ratio(over=theirs, under=result(OURS, [])) is None


def test_measured_groups_become_one_result_for_each_condition() -> None:
    def group(number: int, losses: list[float]) -> ContenderResult:
        turns = [
            Turn(condition=name, group=number, round=i, seconds=1.0 + number, link_bytes=sent)
            for i in range(2)
            for name, sent in (("link", 600), ("other", None))
        ]
        return ContenderResult(
            turns=turns, losses=losses, memory_bytes=number, bytes_per_batch={"inter": 40, "data": 2}
        )

    reference = [4.0, 3.0, 2.0, 1.5, 1.2]
    about: dict[str, Any] = {
        "workload": "tiny",
        "conditions": [LINK, Condition(name="other")],
        "ranks": 2,
        "tokens": 512,
        "precision": "float32",
        "reference": reference,
    }
    link, other = results_of(OURS, [group(0, reference), group(1, reference)], **about)
    assert (link.bytes_sent, other.bytes_sent) == (300, 42)
    assert [(t.group, t.round) for t in link.turns] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert (link.memory_bytes, link.loss_difference, link.failure) == (1, 0.0, None)
    # One group with other losses is enough.
    (wrong, _) = results_of(OURS, [group(0, reference), group(1, [4.0, 3.0, 2.5, 1.5, 1.2])], **about)
    assert wrong.failure is not None
    assert wrong.loss_difference == pytest.approx(0.25)


def test_the_tolerances_of_the_host_come_before_the_default(tmp_path: Path) -> None:
    (tmp_path / "default.yaml").write_text("margin: 0.05\n")
    (tmp_path / "node7.yaml").write_text("margin: 0.1\nkinds: {data: 0.2}\n")
    (tmp_path / "given.yaml").write_text("margin: 0.3\n")
    assert load_tolerances(None, "other", tmp_path) == Tolerances(margin=0.05)
    mine = load_tolerances(None, "node7.cluster.example", tmp_path)
    assert (mine.of("data"), mine.of("tensor")) == (0.2, 0.1)
    assert load_tolerances(tmp_path / "given.yaml", "node7", tmp_path).margin == 0.3
    (tmp_path / "given.yaml").write_text("margins: 0.3\n")
    with pytest.raises(ConfigError, match="margin"):
        load_tolerances(tmp_path / "given.yaml", "node7", tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_tolerances(tmp_path / "none.yaml", "node7", tmp_path)
    assert load_tolerances(None, "no host of this name").margin > 0


def test_junit_has_a_case_for_each_verdict_and_each_contender(tmp_path: Path) -> None:
    results = [result(OURS, [2 * t for t in TIMES]), result(THEIRS, TIMES), failed(SHIM)]
    verdicts = verdicts_of(results, Tolerances(margin=0.05))
    path = tmp_path / "deep" / "junit.xml"
    write_junit(path, results, verdicts, {"make baselines installs it": [OURS_TOO]})
    suites = ElementTree.parse(path).getroot()
    counts = [(s.get("tests"), s.get("failures"), s.get("skipped")) for s in suites]
    assert counts == [("1", "1", "0"), ("4", "0", "2")]
    against, *others = suites.iter("testcase")
    assert (against.get("classname"), against.get("name")) == (
        "tiny, loopback, tensor",
        "AxoNN against PyTorch DTensor",
    )
    failure = against.find("failure")
    assert failure is not None
    assert "takes 2.000 (2.000 to 2.000)" in (failure.get("message") or "")
    assert [[child.tag for child in case] for case in others] == [[], [], ["skipped"], ["skipped"]]
    died, skipped = (case[0].get("message") for case in others[2:])
    assert died == "dead-rank: it [31mdied"
    assert skipped == "make baselines installs it"


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_is_readable_and_says_who_is_missing(width: int, tmp_path: Path) -> None:
    results = [result(OURS, TIMES, memory_bytes=3 << 29, bytes_sent=12_345_678), result(SHIM, [2.0] * 8)]
    results += [failed(THEIRS, TIMES, "not-comparable")]
    verdicts = verdicts_of(results, Tolerances(margin=0.05))
    console = Console(width=width, record=True, file=(tmp_path / "screen").open("w"))
    rows = rows_of(results, {"megatron/tensor": {"disclosure": "runs with a shim", "version": "1"}})
    show(console, rows, results, verdicts, {"not installed; make baselines": [OURS_TOO]})
    text = console.export_text()
    for part in ("1,536", "12.3", "[1] runs with a shim", "AxoNN other: not installed; make baselines", "(not-comp"):
        assert part in text
    table = text.partition("[1] runs")[0].splitlines()
    assert max(map(len, table)) <= width
    # In a narrow log, names go on in the next line.
    names = ("Megatron-LM tensor [1]", "PyTorch DTensor") if width == 120 else ("Megatron-LM", "PyTorch")
    for name, number in zip(names, ("1.9", "none"), strict=True):
        assert any(line.lstrip().startswith(name) and number in line for line in table)


def test_the_picture_shows_all_rows(tmp_path: Path) -> None:
    link = {"condition": LINK}
    results = [result(OURS, TIMES), result(SHIM, [2.0] * 8), failed(THEIRS, TIMES, "not-comparable")]
    results += [result(OURS, TIMES, **link), result(THEIRS, [3.0] * 8, **link)]
    rows = rows_of(results, {"megatron/tensor": {"disclosure": "a shim", "version": "1"}})
    panels = panels_of(rows)
    assert [title for title, _ in panels] == ["tiny, loopback", "tiny, emulated link"]
    assert [[len(some) for _, some in groups] for _, groups in panels] == [[3], [2]]
    summary = {"rows": rows, "quick": True, "provenance": {"machine": {"cores": 2, "cpu": "some"}}}
    png, svg = draw(summary, tmp_path)
    assert png.stat().st_size > 10_000
    text = svg.read_text()
    assert "<svg" in text


# --- who takes part


def test_the_contenders_of_the_file_make_valid_configurations() -> None:
    found = load_contenders()
    for ranks in (2, 4):
        mine = choose(found, frameworks=[], kinds=[], ranks=ranks)
        assert {c.kind for c in mine} == set(KINDS if ranks == 4 else KINDS[:3])
        for kind in {c.kind for c in mine}:
            # Ratios are to ours, and somebody has to be there for it.
            assert {c.ours for c in mine if c.kind == kind} == {True, False}
        for contender in mine:
            config = contender.config("small", ranks, steps=3)
            g = config.grid
            assert g.size == ranks
            assert (config.batch_size, config.microbatch_size, config.steps) == (32, 4, 3)
            assert config.model == contender.config("small", 2 * ranks, steps=1).model
    named = choose(found, frameworks=["pytorch/ddp", "deepspeed"], kinds=["data"], ranks=2)
    assert [c.framework for c in named] == ["axonn", "pytorch/ddp", "deepspeed/zero-1"]
    with pytest.raises(ConfigError, match=r"unknown: pytorh; known are .*pytorch"):
        choose(found, frameworks=["pytorh"], kinds=[], ranks=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("contenders: [{framework: axonn, variant: a, kind: combined}]", "needs a grid"),
        ("contenders: [{framework: axonn, variant: a, kind: data, grid: {inter: 2}}]", "'rest'"),
        ("contenders: [{framework: axonn, variant: a, kind: data, grid: {depth: rest}}]", "axes"),
        ("contenders: [{framework: axonn, variant: a, kind: dada}]", "kind"),
        ("contenders: [{framework: axonn, variant: a, kind: data, rank: 2}]", "unknown key"),
        (
            "contenders: [{framework: axonn, variant: a, kind: data}, {framework: axonn, variant: A, kind: data}]",
            "twice",
        ),
    ],
)
def test_a_wrong_list_of_contenders_is_said(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "contenders.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_contenders(path)


def test_who_cannot_run_says_why() -> None:
    unknown = Contender(framework="pytorch/no-such", label="PyTorch", variant="none", kind="data")
    assert "no strategy 'no-such'" in (refusal(unknown, "tiny", 2, "cpu") or "")
    assert "unknown framework" in (refusal(unknown.model_copy(update={"framework": "torch"}), "tiny", 2, "cpu") or "")
    assert refusal(OURS, "tiny", 2, "cpu") is None
    on_gpus = refusal(OURS, "tiny", 2, "cuda")
    assert on_gpus is None if torch.cuda.is_available() else "needs a GPU" in (on_gpus or "")
    with pytest.MonkeyPatch.context() as patch:
        adapter = SimpleNamespace(capabilities=lambda: Capabilities(version="1", strategies={}, devices=("cpu",)))
        patch.setattr(contenders, "load_adapter", lambda name: adapter)
        assert "--device cuda" in (refusal(OURS, "tiny", 2, "cuda") or "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contenders, "load_adapter", lambda name: 1 / 0)
        assert "adapter failed: ZeroDivisionError" in (refusal(OURS, "tiny", 2, "cpu") or "")
    # 4 heads.
    assert "heads" in (refusal(OURS, "tiny", 8, "cpu") or "")
    swallowed = OURS.model_copy(update={"options": {"overdecompositon": 1}})
    assert "overdecomposition" in (refusal(swallowed, "tiny", 2, "cpu") or "")


def part(some: Sequence[Contender]) -> SessionPart:
    about: dict[str, Any] = {
        "workload": "wide",
        "ranks": 2,
        "link": False,
        "device": "cpu",
        "conditions": {},
        "runs": Path("runs"),
    }
    return SessionPart(contenders=list(some), least_rounds=5, most_rounds=9, seconds=1.0, **about)


def test_groups_fit_the_memory_and_have_ours_in_each() -> None:
    some = choose(load_contenders(), frameworks=[], kinds=[], ranks=2)
    kinds = [kind for kind, _ in groups_of(part(some), 1 << 60)]
    assert kinds == ["inter-layer", "tensor", "data"]
    least = max(job_bytes(c, "wide", 2) for c in some)
    available = int(4.1 * least / MEMORY_SHARE)
    groups = list(groups_of(part(some), available))
    assert len(groups) > 3
    for kind, members in groups:
        assert sum(job_bytes(c, "wide", 2) for c in members) <= MEMORY_SHARE * available
        assert [c for c in members if c.ours] == [c for c in some if c.kind == kind and c.ours]
    others = [c.key for _, members in groups for c in members if not c.ours]
    assert sorted(others) == sorted(c.key for c in some if not c.ours)
    # Too little for any two: one at a time all the same.
    assert all(sum(not c.ours for c in members) == 1 for _, members in groups_of(part(some), 1))


@pytest.mark.parametrize("ranks", [2, 4])
def test_rates_make_messages_take_their_share_of_the_compute(ranks: int) -> None:
    forward, backward, share, parameters = 0.02, 0.04, 0.1, 9_000_000
    rates = conditions_over_link(
        "small", ranks, forward=forward, backward=backward, parameters=parameters, layer_share=share
    )
    compute = 2 * MICROBATCHES * (forward + backward) / ranks

    def seconds(size: float, condition: Condition) -> float:
        assert condition.kbit is not None
        return 8 * size / (1000 * condition.kbit)

    message = message_bytes("small")
    taken = [seconds(message, c) / (forward * 2 / ranks) for c in rates["inter-layer"]]
    assert taken == pytest.approx([0.2, 0.5], rel=1e-3)
    # Two all-reduces of a layer forward and two backward, as rings, from all ranks.
    layer = 4 * MICROBATCHES * message * 2 * (ranks - 1)
    assert seconds(layer, rates["tensor"][0]) == pytest.approx(0.5 * share * compute, rel=1e-3)
    assert seconds(8 * (ranks - 1) * parameters, rates["data"][0]) == pytest.approx(0.5 * compute, rel=1e-3)


def test_options_that_contradict_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--rounds", "3"], ["--link", "--no-link"], ["--workloads", "huge"], ["--kinds", "depth"]):
        with pytest.raises(SystemExit) as ended:
            compare.parse_options(wrong)
        assert ended.value.code == 2
    assert f"at least {LEAST_ROUNDS}" in capsys.readouterr().err
    assert compare.parse_options(["--quick"]).workloads == ["tiny"]
    assert contenders.FILE.exists()
