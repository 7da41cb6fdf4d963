"""A comparison as JUnit XML, which CI systems show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, ElementTree, SubElement, indent

from baselines.comparison import Result, Verdict
from baselines.contenders import Contender
from baselines.coordinator import Stopped


def write_junit(
    path: Path, results: Sequence[Result], verdicts: Sequence[Verdict], refused: Mapping[str, Sequence[Contender]]
) -> None:
    """Write one test case for each verdict and each contender.

    `refused`: contenders by the reason why they cannot run.
    """
    root = Element("testsuites")
    _suite(root, "AxoNN against the best other framework", [_of_verdict(v) for v in verdicts])
    cases = [_of_result(r) for r in results]
    cases += [_case(c.kind, c.name, "skipped", reason) for reason, some in refused.items() for c in some]
    _suite(root, "contenders", cases)
    indent(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def text_of(verdict: Verdict) -> str:
    """Return a verdict in one line."""
    if verdict.ratio is None:
        return verdict.reason or ""
    processor_text = (
        ""
        if verdict.processor_ratio is None
        else f", and {verdict.processor_ratio:.3f} ({verdict.processor_low:.3f} to {verdict.processor_high:.3f}) "
        "of its processor time"
    )
    left_out = f", {verdict.busy_rounds} more left out since the machine was busy" if verdict.busy_rounds else ""
    reason = "" if verdict.stopped is None else f": {STOPPED[verdict.stopped]}"
    return (
        f"{verdict.ours} takes {verdict.ratio:.3f} ({verdict.low:.3f} to {verdict.high:.3f}) of the time of "
        f"{verdict.theirs}, the fastest other framework{processor_text}; up to {1 + verdict.margin:.2f} is allowed; "
        f"{verdict.rounds} rounds{left_out}{reason}"
    )


STOPPED: dict[Stopped, str] = {
    "converged": "the intervals are narrow enough",
    "minutes": "the minutes are spent",
    "rounds": "as many as were to be",
    "interrupted": "interrupted",
}
"""Reasons for which no more rounds were made, as text."""


def _of_verdict(verdict: Verdict) -> Element:
    name = f"AxoNN against {verdict.theirs or 'others'}"
    outcome = "skipped" if verdict.ratio is None else "failure" if verdict.behind else None
    return _case(f"{verdict.workload}, {verdict.condition}, {verdict.kind}", name, outcome, text_of(verdict))


def _of_result(result: Result) -> Element:
    where = f"{result.workload}, {result.condition.name}, {result.contender.kind}"
    if result.failure is not None:
        # Failures of other frameworks are not failures of this test, as in the exit code.
        outcome = "failure" if result.contender.ours else "skipped"
        return _case(where, result.contender.name, outcome, f"{result.failure.cause}: {result.failure.detail}")
    if result.busy and not result.with_busy:
        return _case(where, result.contender.name, "skipped", "the machine was busy with other work in all its rounds")
    left_out = f"the machine was busy with other work in {result.busy_rounds} of {len(result.turns)} rounds"
    case = _case(where, result.contender.name, None, left_out if result.busy_rounds else "")
    case.set("time", f"{sum(result.seconds):.3f}")
    return case


def _case(where: str, name: str, outcome: str | None, text: str) -> Element:
    case = Element("testcase", classname=where, name=name)
    if outcome is not None:
        SubElement(case, outcome, message=_printable(text))
    elif text:
        SubElement(case, "system-out").text = _printable(text)
    return case


def _printable(text: str) -> str:
    """Return the text without control characters, which XML cannot hold: a framework's output may have some."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def _suite(root: Element, name: str, cases: Sequence[Element]) -> None:
    def count(tag: str) -> str:
        return str(sum(case.find(tag) is not None for case in cases))

    suite = SubElement(root, "testsuite", name=name, tests=str(len(cases)))
    suite.set("failures", count("failure"))
    suite.set("skipped", count("skipped"))
    suite.set("errors", "0")
    suite.extend(cases)
