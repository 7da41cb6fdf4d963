"""A comparison as JUnit XML, which CI systems show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, ElementTree, SubElement, indent

from baselines.comparison import Result, Verdict
from baselines.contenders import Contender


def write_junit(
    path: Path, results: Sequence[Result], verdicts: Sequence[Verdict], refused: Mapping[str, Sequence[Contender]]
) -> None:
    """One test case for each verdict and each contender; `refused`: contenders by the reason why they cannot run."""
    root = Element("testsuites")
    _suite(root, "AxoNN against the best other framework", [_of_verdict(v) for v in verdicts])
    of_contenders = [_of_result(r) for r in results]
    of_contenders += [_case(c.kind, c.name, "skipped", reason) for reason, some in refused.items() for c in some]
    _suite(root, "contenders", of_contenders)
    indent(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def text_of(verdict: Verdict) -> str:
    """A verdict in one line."""
    if verdict.ratio is None:
        return verdict.reason or ""
    return (
        f"{verdict.ours} takes {verdict.ratio:.3f} ({verdict.low:.3f} to {verdict.high:.3f}) of the time of "
        f"{verdict.theirs}, the fastest other framework; up to {1 + verdict.margin:.2f} is allowed"
    )


def _of_verdict(verdict: Verdict) -> Element:
    name = f"AxoNN against {verdict.theirs or 'others'}"
    what = "skipped" if verdict.ratio is None else "failure" if verdict.behind else None
    return _case(f"{verdict.workload}, {verdict.condition}, {verdict.kind}", name, what, text_of(verdict))


def _of_result(result: Result) -> Element:
    where = f"{result.workload}, {result.condition.name}, {result.contender.kind}"
    if result.failure is not None:
        # Others' failures are no fault of what is tested here, as the exit code has it.
        what = "failure" if result.contender.ours else "skipped"
        return _case(where, result.contender.name, what, f"{result.failure.cause}: {result.failure.detail}")
    case = _case(where, result.contender.name, None, "")
    case.set("time", f"{sum(result.seconds):.3f}")
    return case


def _case(where: str, name: str, what: str | None, text: str) -> Element:
    case = Element("testcase", classname=where, name=name)
    if what is not None:
        SubElement(case, what, message=_printable(text))
    elif text:
        SubElement(case, "system-out").text = _printable(text)
    return case


def _printable(text: str) -> str:
    """Without control characters, which XML cannot hold: a framework's output may have some."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def _suite(root: Element, name: str, cases: Sequence[Element]) -> None:
    def count(tag: str) -> str:
        return str(sum(case.find(tag) is not None for case in cases))

    suite = SubElement(root, "testsuite", name=name, tests=str(len(cases)))
    suite.set("failures", count("failure"))
    suite.set("skipped", count("skipped"))
    suite.set("errors", "0")
    suite.extend(cases)
