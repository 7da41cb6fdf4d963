"""One comparison for real, on a tiny workload: AxoNN and PyTorch, contenders that fail, and an interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from axonn.observability.records import read_all
from baselines.coordinator import LEAST_ROUNDS
from tests.helpers.rank_pool import ROOT

LIST = """
contenders:
  - {framework: axonn, variant: message-driven, kind: inter-layer}
  - {framework: pytorch/1f1b, label: PyTorch, variant: 1F1B, kind: inter-layer}
  - {framework: pytorch/1f1b, label: PyTorch, variant: other seed, kind: inter-layer, options: {seed: 7}}
  - {framework: pytorch/1f1b, label: PyTorch, variant: a NaN, kind: inter-layer, options: {optimizer: {lr: 1.0e+30}}}
  - {framework: pytorch/gone, label: PyTorch, variant: gone, kind: inter-layer}
"""


def start(tmp_path: Path, *options: str) -> subprocess.Popen[str]:
    (tmp_path / "contenders.yaml").write_text(LIST)
    command = [sys.executable, "-m", "baselines.compare", "--contenders", str(tmp_path / "contenders.yaml")]
    command += ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"), "--ranks", "2", "--quick", *options]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_real_comparison_with_contenders_that_fail(tmp_path: Path) -> None:
    (tmp_path / "wide.yaml").write_text("margin: 1000.0\n")
    process = start(tmp_path, "--tolerances", str(tmp_path / "wide.yaml"))
    text, _ = process.communicate(timeout=250)
    assert process.returncode == 0, text
    assert "PyTorch gone: PyTorch has no strategy 'gone'" in text
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    rows = {row["strategy"]: row for row in summary["rows"]}
    assert set(rows) >= {"message-driven", "1F1B", "other seed"}
    for name in ("message-driven", "1F1B"):
        row = rows[name]
        assert row["losses_agree"] is True
        assert row["loss_difference"] < 1e-5
        assert len(row["batch_times_s"]) == LEAST_ROUNDS
        assert row["memory_bytes"] > 1 << 20
        assert row["ratio"] > 0
        assert row["kind"] == "measured"
    assert rows["message-driven"]["bytes_sent"] > 0
    failures = {failure["strategy"]: failure["cause"] for failure in summary["failures"]}
    assert failures == {"other seed": "not-comparable", "a NaN": "nan"}
    assert [one["strategy"] for one in summary["not_compared"]] == ["gone"]
    (verdict,) = summary["verdicts"]
    assert (verdict["theirs"], verdict["behind"]) == ("PyTorch 1F1B", False)
    records = {record.note: record for record in read_all(tmp_path / "out" / "records")}
    assert len(records) == 4
    assert {note: r.failure.cause for note, r in records.items() if r.failure is not None} == failures
    cases = list(ElementTree.parse(tmp_path / "out" / "junit.xml").getroot().iter("testcase"))
    tags = [child.tag for case in cases for child in case]
    # Whoever ran beside a busy machine says so, too.
    assert tags.count("skipped") == 3
    assert set(tags) == {"skipped", "system-out"}
    assert len(list((tmp_path / "out" / "reference").glob("tiny-*.json"))) == 1


def ranks_of(process: int) -> list[str]:
    """Command lines of processes whose supervisor is this one."""
    mark = f"AXONN_SUPERVISOR={process}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_text())
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_an_interrupted_comparison_leaves_no_ranks(tmp_path: Path) -> None:
    process = start(tmp_path, "--rounds", "50000")
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "round 7 of" in line:
            break
    assert ranks_of(process.pid), "".join(seen)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 130, text
    assert "interrupted" in text
    assert ranks_of(process.pid) == []
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["interrupted"] is True
    assert {row["strategy"] for row in summary["rows"] if row["ratio"] is not None} == {"message-driven", "1F1B"}
