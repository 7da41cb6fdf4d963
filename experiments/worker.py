"""What runs on every rank of a training run or a measured point: python -m experiments.worker RUN_FOLDER.

The rank leaves a trail in the run folder, from which the supervisor outside knows how it is: `rank-K.json` (its state),
`rank-K.alive` (touched every second), `spans-K.parquet` (a folder), and from rank 0 `batches.jsonl`, one line per
finished batch.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
import traceback
from dataclasses import asdict
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
    from axonn.trace import SpanRecorder
    from axonn.traffic import Traffic, sent_by_axis
    from experiments.framework import ResumableTrainer, load_framework
    from experiments.loop import TrainingLoop

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    spec = json.loads((folder / "spec.json").read_text())
    config = validate(spec["config"], TrainConfig, where=f"{folder}/spec.json")
    checkpoint = None if spec["checkpoint"] is None else Path(spec["checkpoint"])
    framework = load_framework(spec["framework"])
    memory: dict[str, int] = {}
    traffic: list[Traffic] = []
    with connect(ProcessGrid(**config.grid.model_dump()), transport=config.transport) as runtime:
        spans = SpanRecorder(rank, clock_offset=runtime.clock_offset, folder=folder / f"spans-{rank}.parquet")
        with framework.trainer(config, runtime, spans) as trainer:
            loop = TrainingLoop(config, trainer, runtime=runtime, spans=spans, folder=folder)
            loop.run(loop.start(checkpoint))
            if isinstance(trainer, ResumableTrainer):
                memory |= trainer.memory()
                traffic += trainer.traffic()
        runtime.barrier()
    # Linux counts resident memory in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    set_state(
        folder,
        rank,
        "done",
        memory_bytes=peak,
        memory=memory,
        bytes_per_batch=sent_by_axis(traffic),
        traffic=[asdict(part) for part in traffic],
    )


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
