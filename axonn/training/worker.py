"""Program of every rank of a training run or a measured point: python -m axonn.training.worker RUN_FOLDER.

Besides the files of all ranks (`axonn.training.run_folder`) it writes the folder `spans-K.parquet`.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from axonn.training.run_folder import (
    NEWEST,
    SPEC,
    STOPPED,
    SUPERVISOR,
    Heartbeats,
    Progress,
    Turns,
    run_with_heartbeat,
    set_state,
)

if TYPE_CHECKING:
    import torch

    from axonn.observability.traffic import Traffic


def _train(folder: Path, rank: int, progress: Progress) -> int:
    """Train as the folder's spec says; return the exit status."""
    import torch

    from axonn.config.train_config import TrainConfig, validate
    from axonn.device.devices import rank_device
    from axonn.distributed.runtime import connect
    from axonn.spans import SpanRecorder
    from axonn.training.framework import InProcessFramework, ResumableTrainer, load_framework
    from axonn.training.loop import TrainingLoop
    from axonn.training.resumption import newest_checkpoint

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    spec = json.loads((folder / SPEC).read_text())
    config = validate(spec["config"], TrainConfig, where=f"{folder}/{SPEC}")
    named = None if spec["checkpoint"] is None else Path(spec["checkpoint"])
    framework = load_framework(spec["framework"])
    assert isinstance(framework, InProcessFramework)
    turns = Turns(folder, rank) if spec["turns"] else None
    memory: dict[str, int] = {}
    traffic: list[Traffic] = []
    device = rank_device(spec["device"])
    if rank == 0 and SUPERVISOR not in os.environ:
        progress.watched = Heartbeats(folder, config.grid.size), config.stall_limit_s
    with connect(config.grid, transport=config.transport, device=device) as runtime:
        spans = SpanRecorder(
            rank,
            clock_offset=runtime.clock_offset,
            folder=folder / f"spans-{rank}.parquet",
            on_span=progress.note,
        )
        # Before any rank has spans in the folder.
        checkpoint = newest_checkpoint(folder) if spec["checkpoint"] == NEWEST else named
        with framework.trainer(config, runtime, spans if turns is None else None) as trainer:
            loop = TrainingLoop(
                config,
                trainer,
                runtime=runtime,
                spans=spans,
                folder=folder,
                turns=turns,
                stoppable=spec["stoppable"],
                on_progress=progress.note,
            )
            stopped = loop.run(loop.start(checkpoint))
            if isinstance(trainer, ResumableTrainer):
                memory |= trainer.memory()
                traffic += trainer.traffic()
        state = "stopped" if stopped else "done"
        _set_final_state(folder, rank, state, device=device, memory=memory, traffic=traffic)
        # A launcher may end all ranks as soon as one has ended with another status than 0.
        runtime.barrier()
    return STOPPED if stopped else 0


def _set_final_state(
    folder: Path, rank: int, state: str, *, device: torch.device, memory: dict[str, int], traffic: list[Traffic]
) -> None:
    from axonn.device.devices import peak_bytes
    from axonn.observability.traffic import sent_by_axis

    set_state(
        folder,
        rank,
        state,
        memory_bytes=peak_bytes(device),
        memory=memory,
        bytes_per_batch=sent_by_axis(traffic),
        traffic=[asdict(part) for part in traffic],
    )


def main() -> None:
    """Train on this rank, and end the process with its exit status."""
    from axonn.distributed.runtime import launched_as

    folder = Path(sys.argv[1])
    rank, _ = launched_as()
    progress = Progress()
    sys.exit(run_with_heartbeat(folder, rank, lambda: _train(folder, rank, progress), progress=progress))


if __name__ == "__main__":
    main()
