"""The report on made-up summaries: what it says, that it needs nothing else, and how it looks in a real browser."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from axonn.grid import ProcessGrid
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.observability.records import Execution, Machine, Record, Workload, write_records
from experiments.validation.validate import write_validation
from experiments.validation.validation_results import SetResult, ValidationRow
from plots import figure, style
from plots.report import extras as report_extras
from plots.report import figure_sections, report_page, report_tables
from plots.report.__main__ import main as make_report

VOID = {"meta", "link", "img", "br"}
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="{}pt" height="300pt"><rect width="90" height="90"/></svg>'
LONG = 70


def row(kind: str, point: str, **changes: Any) -> dict[str, Any]:
    return {
        "point": point,
        "framework": "AxoNN",
        "model": "gpt-12b",
        "gpus": 48,
        "kind": kind,
        "machine": "summit",
        "batch_time_s": 111.1,
        "pct_peak": None,
        "published_s": None,
        "error_pct": None,
        "grid": {"data": 8, "inter": 6, "row": 1, "col": 1},
        "microbatch_size": 8,
        "parts_s": None,
        "phases_s": None,
        "overlap_s": None,
        "bytes_per_batch": None,
        "memory_bytes": None,
        "source": "a publication",
        "note": None,
    } | changes


MACHINE = {
    "name": "this machine",
    "cpu": "EPYC",
    "cores": 2,
    "torch": "2.13.0",
    "commit": "abc123",
    "host": "secret-host",
}
HERE = {
    "machine": MACHINE,
    "model": "gpt-4x256",
    "gpus": 2,
    "batch_time_s": 4.444,
    "repeats_s": [4.4, 4.444, 4.5],
    "tflops_per_gpu": 0.05,
    "final_loss": 3.25,
}


def summary(name: str, rows: list[dict[str, Any]], **extras: Any) -> dict[str, Any]:
    return {
        "figure": name,
        "title": f"The title of {name}",
        "about": "What it shows.",
        "differs": ["It differs in `this`."],
        "rows": rows,
        "mape_pct": {"predicted": {"AxoNN": 2.5, "all": 2.5}},
        **extras,
        "missing": [],
        "failures": [],
        "policy": {"batches": 11, "warmup_batches": 1, "repeats": 3, "loss_tolerance": 1e-4},
        "provenance": {
            "command": f"make reproduce-{name}",
            "machine": MACHINE,
            "sources": ["a publication, https://example.org/paper"],
            "records": {"published": "a.json", "predicted": ["axonn predict"], "measured": ["runs/a"]},
        },
        "fingerprint": "0",
    }


def leave(content: dict[str, Any], *, picture: bool = True, width: int = 252) -> None:
    """As the figure's module does."""
    path = figure.summary_file(content["figure"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    if picture:
        style.OUT.mkdir(exist_ok=True)
        (style.OUT / f"{content['figure']}.svg").write_text(SVG.format(width))


def comparison(name: str, **extras: Any) -> dict[str, Any]:
    rows = [
        row("published", "a"),
        row(
            "predicted",
            "a",
            batch_time_s=113.3,
            published_s=111.1,
            error_pct=1.98,
            parts_s={"compute": 100.0, "bubble": 1.0},
        ),
        row("measured", "a", batch_time_s=117.7, published_s=111.1, error_pct=5.94),
        row("measured", "here", **HERE),
        row("measured", "here", **HERE | {"framework": "DeepSpeed", "batch_time_s": 8.888}),
    ]
    return summary(name, rows, **extras)


@pytest.fixture
def results(elsewhere: Path) -> Path:
    """Figures of all kinds, with extras known and unknown, something missing, something failed."""
    leave(
        summary(
            "fig3",
            [
                row("published", "on", batch_time_s=None, phases_s={"inter_layer": 34.0, "all_reduce": 4.0}),
                row("predicted", "on", batch_time_s=40.0, phases_s={"inter_layer": 33.0, "all_reduce": 4.4}),
            ],
            parts={"on": {"compute_s": 30.1, "bubble_s": 3.2}, "off": {"compute_s": 31.1, "bubble_s": 8.2}},
        )
    )
    failed = {"kind": "measured", "ran": {"framework": "Meg<b>"}, "asked": {"model": "m", "gpus": 2}}
    missing = [f"point {i} AxoNN is not measured; run: axonn run experiments/fig6.yaml" for i in range(3)]
    leave(
        comparison("fig6")
        | {
            "title": "<script>alert(1)</script> & more",
            "missing": missing,
            "failures": [failed | {"failure": {"cause": "nan", "detail": "loss is nan"}}],
        }
    )
    long = [
        row(
            "predicted",
            f"p{i}",
            model=f"begin{i}x with a long name that has to go over several lines of its cell, end{i}x",
        )
        for i in range(LONG)
    ]
    volume = [
        {"grid": {"data": 1, "inter": 1, "row": 4, "col": 4}, "bytes_per_gpu": 3_200_000_000, "speedup": 1.43}
    ] * 3
    leave(summary("fig7", long, volume=volume), width=600)
    leave(summary("memory", [row("published", "a"), row("predicted", "a", memory_bytes=12_000_000_000)]), picture=False)
    return elsewhere


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str


class Page(HTMLParser):
    """All elements in order; a tag that closes another than the last open one is a fault."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self.open: list[Element] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {k: v or "" for k, v in attrs}, "")
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def all(self, *tags: str) -> list[Element]:
        return [e for e in self.elements if e.tag in tags]

    def table(self, caption: str, *, inside: str = "summary") -> list[dict[str, str]]:
        """Rows by heading, of the first such table from the section `inside` on."""
        elements = iter(self.elements)
        next(e for e in elements if e.attributes.get("id") == inside)
        next(e for e in elements if e.tag == "caption" and e.text.startswith(caption))
        texts: list[list[str]] = []
        for e in elements:
            if e.tag == "table":
                break
            if e.tag == "tr":
                texts.append([])
            elif e.tag in {"th", "td"}:
                texts[-1].append(e.text)
        return [dict(zip(texts[0], cells, strict=True)) for cells in texts[1:]]


def test_page_is_sound_and_needs_nothing_else(results: Path) -> None:
    text = report_page.render()
    page = Page(text)
    ids = [e.attributes["id"] for e in page.elements if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    for e in page.elements:
        for name in ("src", "href"):
            value = e.attributes.get(name, "#top")
            assert value.startswith(("#", "data:")), value
            if value.startswith("#"):
                assert value[1:] in ids
        assert not any(name.startswith("on") for name in e.attributes)
        assert e.attributes.get("aria-labelledby", ids[0]) in ids
    assert not page.all("script", "iframe", "object", "form")
    assert page.all("html")[0].attributes["lang"] == "en-GB"
    levels = [int(e.tag[1]) for e in page.all("h1", "h2", "h3", "h4", "h5")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(len(e.attributes["alt"]) > 20 for e in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table")) > 5
    assert all(e.attributes["scope"] in {"row", "col"} for e in page.all("th"))
    # Names of hosts are nobody's business.
    assert "secret-host" not in text


def test_text_from_records_is_escaped(results: Path) -> None:
    text = report_page.render()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in text
    assert "Meg&lt;b&gt;" in text
    assert "<code>this</code>" in text


def test_same_inputs_same_bytes(results: Path) -> None:
    make_report(["--out", str(results / "a.html")])
    make_report(["--out", str(results / "b.html")])
    assert (results / "a.html").read_bytes() == (results / "b.html").read_bytes()


def test_every_number_stands_under_its_kind(results: Path) -> None:
    page = Page(report_page.render())
    (scale,) = page.table("At the published scale (Summit): time of a batch", inside="fig3")
    # Nothing but its phases is published of this one.
    assert scale["predicted (s)"] == "40.00"
    assert "published (s)" not in scale
    phases = page.table("Phases of a batch")
    assert [(r["phase"], r["published (s)"], r["predicted (s)"], r["error (%)"]) for r in phases] == [
        ("inter layer", "34.00", "33.00", "\N{MINUS SIGN}2.9"),
        ("all reduce", "4.00", "4.40", "+10.0"),
    ]
    here = page.table("Measured on the machine at hand")
    assert [(r["framework"], r["measured, median (s)"], r["measured, ratio to AxoNN"]) for r in here] == [
        ("AxoNN", "4.444", "1.000"),
        ("DeepSpeed", "8.888", "2.000"),
    ]
    assert "published (s)" not in here[0]


def test_published_predicted_and_collected_measurements_are_told_apart(elsewhere: Path) -> None:
    leave(comparison("fig6"))
    (only,) = Page(report_page.render()).table("At the published scale")
    assert only["published (s)"] == "111.1"
    assert only["predicted (s)"] == "113.3"
    assert only["error of predicted (%)"] == "+2.0"
    assert only["measured (s)"] == "117.7"
    assert only["error of measured (%)"] == "+5.9"


def test_what_is_not_there_is_named_with_its_command(results: Path) -> None:
    page = Page(report_page.render())
    boxes = [e.text for e in page.all("div") if "box" in e.attributes.get("class", "").split()]
    assert any("not made; make reproduce-fig5" in text for text in boxes)
    assert any("Missing: 3" in text and text.count("axonn run experiments/fig6.yaml") == 1 for text in boxes)
    assert any("Failed" in text and "loss is nan" in text for text in boxes)
    assert any("picture is missing" in text for text in boxes)
    assert any("axonn predict --validate" in text for text in boxes)
    assert any("make compare-baselines" in text for text in boxes)
    assert any("make validate-local" in text for text in boxes)
    status = {r["figure"]: r["status"] for r in page.table("Every figure")}
    assert status["Figure 3"] == "complete"
    assert status["Figure 5"] == "not made: make reproduce-fig5"
    assert status["Figure 6"] == "3 missing; 1 failed"


@pytest.mark.parametrize("content", ["", "[]", '{"figure": "other"}', '{"figure": "fig6", "rows": 3}'])
def test_a_file_that_is_no_summary_is_said(elsewhere: Path, content: str) -> None:
    path = figure.summary_file("fig6")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    made = figure_sections.section("fig6")
    assert not made.made
    assert made.status == "has a summary that is none: make reproduce-fig6"


def test_files_of_another_schema_are_said(elsewhere: Path) -> None:
    for name in ("predicted/validation.json", "local/validation.json", "baselines/summary.json"):
        path = figure.RESULTS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"schema": "another"}')
    text = report_page.render()
    assert "validation.json has another schema" in text
    assert "validation.json: RecordError; run: make validate-local" in text
    assert "No comparison with other frameworks is there" in text


def test_published_sets_are_tabled(elsewhere: Path) -> None:
    point = ValidationRow(
        label="a", group="", quantity="batch_time_s", model="m", measured=247.5, predicted=248.7, error_pct=0.48
    )
    other = point.model_copy(update={"label": "b", "quantity": "tflops_per_gpu", "fits": False})
    found = SetResult(
        name="tiny", title="Two", source="x & y", status="text", machine="summit", rows=[point, other], mean_pct=0.48
    )
    path = figure.RESULTS / "predicted" / "validation.json"
    write_validation([found], command="axonn predict --validate tiny", path=path)
    page = Page(report_page.render())
    (times,) = page.table("tiny: time of a batch, s")
    assert (times["point"], times["published"], times["predicted"], times["error (%)"]) == (
        "a",
        "247.5",
        "248.7",
        "+0.5",
    )
    assert page.table("tiny: TFLOP/s per GPU")[0]["remark"] == "does not fit in memory"
    assert page.table("All sets")[0]["mean error (%)"] == "0.5"
    # A file of some of the sets is not taken for the whole.
    assert any("Only some of the sets" in e.text and "ipdps22-fig9" in e.text for e in page.all("div"))


def test_runs_on_this_machine_are_tabled(elsewhere: Path) -> None:
    model = GPTConfig(name="m", layers=2, hidden=8, heads=2, seq_len=4, vocab=8)
    common: dict[str, Any] = {
        "experiment": "local",
        "point": "2 stages",
        "asked": Workload.of(model, gpus=2, batch_size=4, precision="float32"),
        "ran": Execution(framework="AxoNN", version="1", grid=ProcessGrid(inter=2)),
        "machine": Machine(name="this machine", cores=2),
        "source": "test",
    }
    measured = Record(kind="measured", batch_time_s=0.2, **common)
    write_records(
        figure.RESULTS / "local" / "validation.json",
        [measured, Record(kind="predicted", batch_time_s=0.19, **common)],
    )
    (only,) = Page(report_page.render()).table("A batch on this machine", inside="local")
    assert (only["run"], only["measured (ms)"], only["predicted (ms)"]) == ("2 stages", "200.0", "190.0")
    assert only["error of predicted (%)"] == "\N{MINUS SIGN}5.0"


def test_other_frameworks_are_tabled(elsewhere: Path) -> None:
    path = figure.RESULTS / "baselines" / "summary.json"
    path.parent.mkdir()
    work = {"workload": "small", "condition": "loopback"}
    own = work | {"framework": "PyTorch", "strategy": "DDP", "parallelism": "data", "batch_time_s": 1.5, "ratio": 1.25}
    verdict = work | {
        "kind": "data",
        "ours": "AxoNN data",
        "theirs": "PyTorch DDP",
        "ratio": 0.8,
        "low": 0.75,
        "high": 0.9,
    }
    content = {"rows": [own], "verdicts": [verdict], "quick": True, "failures": [own | {"cause": "nan", "detail": "d"}]}
    path.write_text(json.dumps(content))
    page = Page(report_page.render())
    (judged,) = page.table("AxoNN's fastest")
    assert (judged["measured ratio"], judged["95% interval"]) == ("0.800", "0.750 to 0.900")
    (measured,) = page.table("All that was measured")
    assert measured["measured, median batch (s)"] == "1.500"
    assert any("a quick try, whose times mean nothing" in e.text for e in page.all("div"))
    assert any("PyTorch DDP, small: nan: d" in e.text for e in page.all("div"))


STRANGE = [
    None, 0, True, math.inf, "text", [], {}, [1, "a", None], [[1, 2], [3]], [{}, {"a": [1, {"b": 2}]}],
    {"a": {"b": {"c": {"d": {"e": 1}}}}}, {"a": [{"b": 1}], "c": 2, "d": {}}, [{"a_s": 1.0}, {"a_s": "none"}],
    {"x": [0.5] * 100}, {1.5: {"a": 1}}, list(range(500)),
    [{"grid": {"data": None, "inter": "x", "row": 1, "col": 1}}] * 100,
]  # fmt: skip


def test_extras_of_any_form_are_shown_or_left_alone(elsewhere: Path) -> None:
    extras = {f"extra_{i}": value for i, value in enumerate(STRANGE)}
    odd = [row("predicted", "a", gpus=None, grid=None, batch_time_s="x"), {"kind": "measured"}, 7]
    leave(
        comparison("fig6", **extras) | {"rows": odd, "policy": 3, "provenance": [], "differs": "one", "missing": None}
    )
    page = Page(report_page.render())
    captions = {e.text for e in page.all("caption")}
    assert "Extra 4" in captions
    assert any("40 more rows" in e.text for e in page.all("p"))


def test_extras_have_units_in_their_headings() -> None:
    rows = [{"hidden_share_pct": 71.25, "sent_bytes": 3_200_000_000, "wait_s": 0.0041, "gpus": 256, "error_pct": -3.21}]
    (found,) = report_extras.rendered("overlap", rows)
    assert [h.text for h in found.headings] == ["hidden share (%)", "sent (GB)", "wait (ms)", "GPUs", "error (%)"]
    assert found.rows == [["71.2", "3.200", "4.100", "256", "\N{MINUS SIGN}3.2"]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([16384, 48, None], ["16,384", "48", "\N{EN DASH}"]),
        ([247.5, 1.25], ["247.5", "1.2"]),
        ([12345.6], ["12,346"]),
        ([0.01234, 0.5], ["0.0123", "0.5000"]),
        ([711.0, 0.00004], ["711.0", "0.00004"]),
        ([float("nan"), 2.0], ["\N{EN DASH}", "2.000"]),
    ],
)
def test_digits_are_sensible(values: list[Any], expected: list[str]) -> None:
    assert report_tables.numbers(values)[1] == expected


def test_errors_have_signs() -> None:
    assert report_tables.errors([2.04, -0.01, -12.36])[1] == ["+2.0", "0.0", "\N{MINUS SIGN}12.4"]


def test_large_drawings_are_shown_as_bitmaps(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    style.OUT.mkdir()
    (style.OUT / "a.svg").write_text(SVG.format(252))
    png = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (1050).to_bytes(4, "big") + (600).to_bytes(4, "big")
    (style.OUT / "a.png").write_bytes(png)
    vector = figure_sections.picture_of("a", "alt")
    assert vector is not None
    assert vector.source.startswith("data:image/svg+xml;base64,")
    monkeypatch.setattr(figure_sections, "LARGEST_VECTOR", 50)
    bitmap = figure_sections.picture_of("a", "alt")
    assert bitmap is not None
    assert bitmap.source.startswith("data:image/png;base64,")
    assert vector.width == bitmap.width


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on this machine; install the package: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; run: make install")
    with sync_api.sync_playwright() as driver:
        # Root has no sandbox; the page is our own.
        found = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


@dataclass
class Opened:
    page: Any
    requests: list[str]
    said: list[str]


@pytest.fixture
def opened(browser: Any, results: Path) -> Iterator[Opened]:
    path = results / "report.html"
    path.write_text(report_page.render())
    context = browser.new_context(viewport={"width": 390, "height": 844}, offline=True)
    page = context.new_page()
    found = Opened(page, [], [])
    page.on("request", lambda request: found.requests.append(request.url))
    page.on("console", lambda message: found.said.append(message.text))
    page.on("pageerror", lambda error: found.said.append(str(error)))
    page.goto(path.as_uri())
    yield found
    context.close()


def test_in_a_browser(opened: Opened, results: Path) -> None:
    page = opened.page
    sources = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.alt])")
    assert len(sources) == 3
    assert all(complete and width > 0 and alt for complete, width, alt in sources)
    # Neither the folded tables nor the open ones make the page itself scroll.
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    for width in (390, 360, 320, 768, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        wide, inner = page.evaluate("[document.scrollingElement.scrollWidth, innerWidth]")
        assert wide <= inner == width
        # Wide tables can be scrolled to their end, each inside of its own box, by keyboard, too.
        boxes = page.evaluate(
            "[...document.querySelectorAll('.scroll')].map(e => [e.getBoundingClientRect().right, e.tabIndex])"
        )
        assert all(right <= width and index == 0 for right, index in boxes)
    for link in page.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href'))"):
        assert page.evaluate("id => document.getElementById(id) !== null", link.removeprefix("#"))
    page.click("nav a[href='#fig7']")
    assert page.url.endswith("report.html#fig7")
    text = page.inner_text("main")
    for word in ("Published", "Predicted", "Measured", "published (s)", "predicted (s)", "measured, median (s)"):
        assert word in text
    assert {url.partition("#")[0] for url in opened.requests if not url.startswith("data:")} == {
        (results / "report.html").as_uri()
    }
    assert opened.said == []


def test_tables_fit_on_paper(opened: Opened) -> None:
    # A4 without its margins.
    opened.page.set_viewport_size({"width": round(182 / 25.4 * 96), "height": 900})
    opened.page.emulate_media(media="print")
    widths = opened.page.evaluate(
        "[...document.querySelectorAll('table, img')].map(e => e.getBoundingClientRect().right)"
    )
    assert max(widths) <= round(182 / 25.4 * 96)


def test_in_print(opened: Opened) -> None:
    pdfium = pytest.importorskip("pypdfium2", reason="pypdfium2 is not installed; run: make install")
    document = pdfium.PdfDocument(opened.page.pdf(format="A4", prefer_css_page_size=True))
    pages = ["".join(page.get_textpage().get_text_range().split()) for page in document]
    assert 6 <= len(pages) <= 30
    assert all(len(text) > 20 for text in pages)
    # Each row of a long table lies on one page as a whole.
    for i in range(LONG):
        begins = [number for number, text in enumerate(pages) if f"begin{i}x" in text]
        ends = [number for number, text in enumerate(pages) if f"end{i}x" in text]
        assert begins == ends
        assert len(begins) == 1
    # Sections begin on pages of their own; there is nothing to click.
    assert sum(text.startswith("Figure") for text in pages) >= 3
    assert not any("Backtothetop" in text for text in pages)
