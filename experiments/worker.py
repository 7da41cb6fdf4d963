"""What runs on every rank of a measured point: python -m experiments.worker RUN_FOLDER.

The rank leaves a trail in the run folder, from which the supervisor outside knows how it is: `rank-K.json` (its state),
`rank-K.alive` (touched every second), and from rank 0 `batches.jsonl`, one line per finished batch.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

HEARTBEAT_S = 1.0
SUPERVISOR = "AXONN_SUPERVISOR"
"""Variable with the process id of the supervisor, on whose machine the ranks run."""


def set_state(folder: Path, rank: int, state: str, **details: Any) -> None:
    """Write `rank-K.json`, atomically."""
    temporary = folder / f".rank-{rank}.{os.getpid()}"
    temporary.write_text(json.dumps({"state": state, "pid": os.getpid(), "time": time.time(), **details}))
    temporary.replace(folder / f"rank-{rank}.json")


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _heartbeat(folder: Path, rank: int) -> None:
    path = folder / f"rank-{rank}.alive"
    launcher = os.getppid()
    supervisor = int(os.environ.get(SUPERVISOR, launcher))
    while True:
        if os.getppid() != launcher or not _runs(supervisor):
            # Nobody is left who would end this rank.
            os._exit(1)
        path.touch()
        time.sleep(HEARTBEAT_S)


def _cause(error: BaseException) -> str:
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "can't allocate" in str(error):
        return "out-of-memory"
    return "nan" if isinstance(error, FloatingPointError) else "error"


def _train(folder: Path, rank: int) -> None:
    import torch

    from axonn.config import TrainConfig, validate
    from axonn.grid import ProcessGrid
    from axonn.runtime import connect
    from axonn.trace import SpanRecorder, write_spans
    from experiments.framework import load_framework

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    spec = json.loads((folder / "spec.json").read_text())
    config = validate(spec["config"], TrainConfig, where=f"{folder}/spec.json")
    framework = load_framework(spec["framework"])
    with connect(ProcessGrid(**config.grid.model_dump())) as runtime:
        spans = SpanRecorder(rank, clock_offset=runtime.clock_offset)
        with framework.trainer(config, runtime, spans) as trainer:
            runtime.barrier()
            before = time.perf_counter()
            with open(folder / "batches.jsonl", "a", buffering=1) as log:
                for step in range(config.steps):
                    loss = trainer.train_batch(step)
                    now = time.perf_counter()
                    # From one finished batch to the next: the rate at which the whole job trains.
                    if rank == 0:
                        log.write(json.dumps({"step": step, "loss": loss, "seconds": now - before}) + "\n")
                    before = now
                    if not math.isfinite(loss):
                        raise FloatingPointError(f"the loss of batch {step} is {loss}; lower optimizer.lr")
        if spans.spans:
            write_spans(folder / f"spans-{rank}.parquet", spans.spans)
        runtime.barrier()
    # Linux counts resident memory in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    set_state(folder, rank, "done", memory_bytes=peak)


def main() -> None:
    from axonn.runtime import launched_as

    folder = Path(sys.argv[1])
    rank, _ = launched_as()
    set_state(folder, rank, "started")
    threading.Thread(target=_heartbeat, args=(folder, rank), daemon=True).start()
    try:
        _train(folder, rank)
    except BaseException as error:
        set_state(folder, rank, "failed", cause=_cause(error), detail=f"{type(error).__name__}: {error}")
        traceback.print_exc()
        sys.stderr.flush()
        # No clean-up that could wait for ranks which will never come; the launcher ends the others.
        os._exit(1)


if __name__ == "__main__":
    main()
