"""Harm done inside of ranks: code that each Python process of a run executes before anything else."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import pytest

from experiments import definition

# Only ranks are harmed, and not the launcher, which may be a Python program too.
_HEAD = """\
import os, sys
if "axonn.training.worker" in sys.orig_argv:
    RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
"""


def harm_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """From now on ranks that this process starts execute `code` first, where `RANK` is their number."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_HEAD + textwrap.indent(textwrap.dedent(code), "    "))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(definition.ROOT)]))


IN_A_LAYER = """
from axonn.inter_layer.stage import StageChunk

made = StageChunk.__init__

def harmed(self, model, span, **options):
    made(self, model, span, **options)
    calls = [0]
    for number, module in zip(span, self.chain.values()):
        if number == {layer} and {where}:
            def after(module, inputs, output, calls=calls):
                calls[0] += 1
                if calls[0] == {call}:
                    if {backwards}:
                        output.register_hook(lambda gradient: gradient * {value})
                    else:
                        return output * {value}
            module.register_forward_hook(after)

StageChunk.__init__ = harmed
"""
"""Makes what comes out of a layer, or the gradient that comes into it, not finite once, in its call number `call`."""
