"""The numeric tests, once under each instruction set that PyTorch and its libraries can be held to.

    .venv/bin/python -m tests.helpers.isa [--short] [--only NAME] [--margin 3] [--workers 2]

`make test-isa` runs all of it, .ci/run the short form. With `--margin` every bound of `tests/helpers/rounding.py` is
that many times smaller: what fails then has less room than that.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.helpers.rounding import MARGIN

ROOT = Path(__file__).parents[2]
NUMERIC = [
    "accumulation",
    "agreement",
    "algorithms",
    "combined",
    "compiled",
    "cut_parameters",
    "determinism",
    "equality",
    "exact_sum",
    "interleave",
    "isa",
    "optimizer",
    "optimizer_ranks",
    "parallelize",
    "parallelize_errors",
    "parallelize_parts",
    "parallelize_script",
    "parallelize_use",
    "precision",
    "random",
    "resumption",
    "tensor_dropout",
    "tensor_layers",
    "tensor_norms",
    "tensor_overlap",
    "tensor_redistribution",
    "unet",
    "unet_training",
]
"""Each test_NAME.py below tests/ whose results go through floating-point kernels and are held to bounds or bits."""
SHORT = ("isa", "exact_sum", "accumulation", "optimizer", "precision")
"""What CI runs under a second instruction set: each kind of bound, every type."""
SWITCHES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Of PyTorch's own kernels, of oneDNN (convolutions, products in half types) and of MKL (other products)."""
INSTRUCTION_SETS = {
    "default": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
}
"""What each of SWITCHES is set to."""


def environment(name: str, given: Mapping[str, str]) -> dict[str, str]:
    """`given`, held to an instruction set."""
    return {**given, **dict(zip(SWITCHES, INSTRUCTION_SETS[name], strict=True))}


def available(name: str) -> bool:
    """Whether this processor has it: PyTorch takes what it can."""
    program = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    env = environment(name, os.environ)
    found = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    return found.stdout.strip().lower() == name


def test_files(*, short: bool) -> list[str]:
    """Paths of the test files, from the root of the project."""
    files = {path.stem.removeprefix("test_"): path for path in (ROOT / "tests").rglob("test_*.py")}
    return [str(files[name].relative_to(ROOT)) for name in (SHORT if short else NUMERIC)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="a few files")
    parser.add_argument("--only", choices=INSTRUCTION_SETS, action="append", help="this one; may be repeated")
    parser.add_argument("--margin", type=float, help="make bounds so many times smaller")
    parser.add_argument("--workers", type=int, default=2, help="files at a time")
    options = parser.parse_args()
    failed = []
    for name in options.only or INSTRUCTION_SETS:
        if not available(name):
            print(f"NOT TESTED: {name}, which this processor does not have", flush=True)
            continue
        print(f"under {name}:", flush=True)
        env = environment(name, os.environ) | ({MARGIN: str(options.margin)} if options.margin else {})
        files = test_files(short=options.short)
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(options.workers), "--dist", "loadfile", *files]
        if subprocess.run(command, env=env, cwd=ROOT, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed under {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
