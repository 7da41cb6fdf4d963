"""Resumption of a run in its folder: traces of batches that are trained again are removed first."""

from __future__ import annotations

import shutil
from pathlib import Path

from axonn.checkpoint.checkpoints import clean, latest
from axonn.checkpoint.rank_group import RankGroup
from axonn.observability.rank_usage import USAGE
from axonn.training.metrics import BATCHES, EVALUATIONS, cut_rows

CHECKPOINTS = "checkpoints"


def forget_batches(folder: Path, *, after: int) -> None:
    """Remove metrics and spans of all but the first `after` batches; checkpoints stay."""
    if after == 0:
        for spans in folder.glob("spans-*"):
            shutil.rmtree(spans)
        for path in (folder / BATCHES, folder / EVALUATIONS, *folder.glob(USAGE)):
            path.unlink(missing_ok=True)
        return
    for path in (folder / BATCHES, *folder.glob(USAGE)):
        cut_rows(path, lambda row: row["step"] < after)
    cut_rows(folder / EVALUATIONS, lambda row: row["batches"] <= after)
    for stale in folder.glob("spans-*.parquet/*.parquet"):
        # A file of spans ends at every checkpoint, so none has to be cut.
        if stale.stem.isdecimal() and int(stale.stem) >= after:
            stale.unlink()


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest good checkpoint of a run folder, or None; metrics and spans of later batches are removed.

    Collective over all ranks: one rank looks and shares the result. Raises `CheckpointError` where files cannot be
    changed.
    """
    ranks = RankGroup(None)
    newest_folder: list[Path] = []

    def look() -> None:
        clean(folder / CHECKPOINTS)
        newest = latest(folder / CHECKPOINTS, warn=lambda message: print(message, flush=True))
        forget_batches(folder, after=0 if newest is None else newest.state.batches)
        if newest is not None:
            newest_folder.append(newest.folder)

    ranks.agree(look, f"{folder}: what an earlier start left cannot be removed")
    first = ranks.gather(newest_folder)[0]
    return first[0] if first else None
