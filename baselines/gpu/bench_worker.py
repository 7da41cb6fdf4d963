"""One task in a process of its own: python -m baselines.gpu.bench_worker FOLDER

The folder holds task.json; result.json is left there, with the result or the cause of the failure.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from axonn.device.devices import rank_device
from axonn.durable_files import replace_durably
from baselines.gpu.tasks import task_fsdp, task_gpt, task_images, task_memory, task_overlap, task_peak

TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "peak": task_peak.run,
    "gpt": task_gpt.run,
    "memory": task_memory.run,
    "fits": task_memory.fits,
    "fsdp": task_fsdp.run,
    "images": task_images.run,
    "copies": task_overlap.run,
}


def cause_of(error: BaseException) -> str:
    """Return the cause as `axonn.observability.records.Failure` names it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in str(error).lower():
        return "out-of-memory"
    if isinstance(error, ImportError | NotImplementedError):
        return "unavailable"
    return "nan" if isinstance(error, FloatingPointError) else "error"


def main() -> None:
    folder = Path(sys.argv[1])
    spec = json.loads((folder / "task.json").read_text())
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        device = rank_device(spec["device"])
        if device.type == "cuda":
            torch.cuda.set_device(device)
        content = {"result": TASKS[spec["task"]](device=device, seconds=spec["seconds"], **spec["arguments"])}
    except BaseException as error:
        traceback.print_exc()
        detail = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        content = {"failure": {"cause": cause_of(error), "detail": detail[:500]}}
    replace_durably(folder / "result.json", json.dumps(content))
    sys.stdout.flush()
    sys.stderr.flush()
    # Libraries with threads of their own have been seen to abort at exit, after all work was done.
    os._exit(0)


if __name__ == "__main__":
    main()
