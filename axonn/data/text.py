"""Text as tokens: any text file read as bytes, a `.bin` file of uint16 tokens, or the sources of the standard library.

Samples are windows of the text, in the order of `axonn.data.order`. The last windows can be held out: training never
reads them; evaluation reads only them, in order.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from axonn.data.order import SampleOrder
from axonn.durable_files import opened, reason_of
from axonn.errors import DataError

_LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "lib2to3"}


def standard_library_text() -> bytes:
    """Return the sources of Python's standard library, concatenated by path: real text that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not _LEFT_OUT & set(p.relative_to(root).parts[:-1]))
    if not files:
        raise DataError(f"no Python sources in {root}; give a text file with data.path")
    return b"".join(p.read_bytes() for p in files)


def read_tokens(path: Path | str | None) -> npt.NDArray[np.integer]:
    """Read tokens: uint16 from a `.bin` file, bytes from any other, the standard library's sources if `path` is None.

    Raises `DataError` when the file cannot be read or ends within a token.
    """
    if path is None:
        return np.frombuffer(standard_library_text(), dtype=np.uint8)
    path = Path(path)
    try:
        with opened(path) as file:
            if path.suffix != ".bin":
                return np.frombuffer(file.read(), dtype=np.uint8)
            size = os.fstat(file.fileno()).st_size
            if size % 2:
                raise DataError(f"{path}: holds an odd number of bytes, but a .bin file holds uint16 tokens")
            return np.memmap(file, dtype=np.uint16, mode="r") if size else np.empty(0, np.uint16)
    except (OSError, MemoryError) as error:
        raise DataError(f"{path}: cannot be read: {reason_of(error, path)}") from error


class TextData:
    """Windows of `seq_len + 1` tokens in an order shuffled anew each epoch.

    `held_out`: the share of the windows, rounded up and taken from the end, that is used for evaluation only. Raises
    `DataError` when the text is too short or holds a token outside the vocabulary.
    """

    def __init__(self, path: Path | str | None, *, seq_len: int, vocab: int, seed: int, held_out: float = 0.0) -> None:
        self.tokens = read_tokens(path)
        self.seq_len = seq_len
        windows = (len(self.tokens) - 1) // seq_len
        where = "the standard library's sources" if path is None else str(path)
        if windows < 1:
            raise DataError(f"{where}: {len(self.tokens)} tokens are fewer than seq_len + 1 = {seq_len + 1}")
        self._order = SampleOrder(
            windows, seed=seed, held_out=held_out, where=where, what=f"windows of {seq_len} tokens"
        )
        self.held_out_windows = self._order.held_out
        self.windows = self._order.trained
        """Number of windows to train on."""
        largest = int(self.tokens.max())
        if largest >= vocab:
            raise DataError(f"{where}: token {largest} is outside the vocabulary of {vocab}; raise model.vocab")

    @property
    def summary(self) -> str:
        """Number of tokens, as text."""
        return f"{len(self.tokens)} tokens"

    @property
    def digest(self) -> str:
        """Hash of the tokens, for the record of a run."""
        return hashlib.sha256(np.ascontiguousarray(self.tokens).data).hexdigest()[:16]

    def sample(self, number: int) -> npt.NDArray[np.int64]:
        """Return the window of global sample `number`: [seq_len + 1] int64."""
        return self._window(self._order.item(number))

    def held_out_sample(self, number: int) -> npt.NDArray[np.int64]:
        """Return held-out window `number`, [seq_len + 1] int64; after the last the first follows again."""
        return self._window(self._order.held_out_item(number))

    def batch(self, numbers: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets of the global samples `numbers`, each [samples, seq_len] int64."""
        return _inputs_and_targets([self.sample(n) for n in numbers])

    def held_out_batch(self, numbers: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `batch` does, for held-out samples."""
        return _inputs_and_targets([self.held_out_sample(n) for n in numbers])

    def _window(self, number: int) -> npt.NDArray[np.int64]:
        start = number * self.seq_len
        return self.tokens[start : start + self.seq_len + 1].astype(np.int64)


def _inputs_and_targets(samples: list[npt.NDArray[np.int64]]) -> tuple[torch.Tensor, torch.Tensor]:
    windows = torch.from_numpy(np.stack(samples))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
