"""Compilation of the operators that DeepSpeed's strategies need on this machine, once, so that no run has to.

`make baselines` runs this: .baselines/deepspeed/bin/python baselines/ranks/deepspeed_build.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

EXTENSIONS = Path(sys.prefix) / "extensions"


def find_operators(device: str) -> None:
    """Set, before DeepSpeed is imported, where operators lie, and what compiles and runs them."""
    os.environ["DS_ACCELERATOR"] = device
    os.environ["TORCH_EXTENSIONS_DIR"] = str(EXTENSIONS)
    # ninja is installed beside this interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def main() -> None:
    resolved = Path(sys.prefix).resolve()
    if resolved != Path(sys.prefix):
        # The ranks are started by the resolved path; operators compiled for another path are not found.
        python = str(resolved / "bin" / "python")
        os.execv(python, [python, *sys.argv])
    import torch

    find_operators("cuda" if torch.cuda.is_available() else "cpu")
    EXTENSIONS.mkdir(exist_ok=True)
    # A build that was killed leaves its lock, on which every later one would wait for ever.
    for lock in EXTENSIONS.glob("*/lock"):
        lock.unlink()
    from deepspeed.accelerator import get_accelerator

    # The communication operators of a machine without a GPU, and the AdamW of ZeRO-Offload.
    for name in ("ShareMemCommBuilder", "CPUAdamBuilder"):
        builder = get_accelerator().create_op_builder(name)
        # Accelerators have no builder for operators that they do not use.
        if builder is not None:
            builder.load(verbose=False)
            print(f"{builder.name} is compiled")


if __name__ == "__main__":
    main()
