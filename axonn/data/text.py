"""Text as tokens: any text file read as bytes, a `.bin` file of uint16 tokens, or the sources of the standard library.

Samples are windows of the text. Which window is sample number g of a run depends on the seed and g alone, so every grid
reads the same data and a resumed run goes on where it stopped without any saved state.

The last windows of the text can be held out: training never reads them, evaluation reads only them, in their order.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from axonn.config import TrainConfig
from axonn.errors import DataError

_LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "lib2to3"}


def standard_library_text() -> bytes:
    """The sources of Python's standard library, concatenated by path: real text that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not _LEFT_OUT & set(p.relative_to(root).parts[:-1]))
    if not files:
        raise DataError(f"no Python sources in {root}; give a text file with data.path")
    return b"".join(p.read_bytes() for p in files)


def read_tokens(path: Path | str | None) -> npt.NDArray[np.integer]:
    """Tokens of a file: uint16 from `.bin`, bytes from anything else, the standard library's sources from None.

    Raises `DataError` when the file cannot be read or holds half a token.
    """
    if path is None:
        return np.frombuffer(standard_library_text(), dtype=np.uint8)
    path = Path(path)
    try:
        if path.suffix == ".bin":
            if path.stat().st_size % 2:
                raise DataError(f"{path}: holds an odd number of bytes, but a .bin file holds uint16 tokens")
            return np.memmap(path, dtype=np.uint16, mode="r") if path.stat().st_size else np.empty(0, np.uint16)
        return np.frombuffer(path.read_bytes(), dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


HELD_OUT_FOR_EVALUATION = 0.05
"""What is held out when evaluation is asked for and `data.held_out` is 0."""


def held_out_of(config: TrainConfig) -> float:
    """The part of the text that `config` keeps from training."""
    return config.data.held_out or (HELD_OUT_FOR_EVALUATION if config.evaluation is not None else 0.0)


class TextData:
    """Windows of `seq_len + 1` tokens in an order shuffled anew each epoch.

    `held_out`: the part of the windows, rounded up and taken from the end, that is only evaluated on. Raises
    `DataError` when the text is too short or holds a token outside the vocabulary.
    """

    def __init__(self, path: Path | str | None, *, seq_len: int, vocab: int, seed: int, held_out: float = 0.0) -> None:
        self.tokens = read_tokens(path)
        self.seq_len = seq_len
        self.seed = seed
        windows = (len(self.tokens) - 1) // seq_len
        where = "the standard library's sources" if path is None else str(path)
        if windows < 1:
            raise DataError(f"{where}: {len(self.tokens)} tokens are fewer than seq_len + 1 = {seq_len + 1}")
        self.held_out_windows = math.ceil(windows * held_out)
        self.windows = windows - self.held_out_windows
        """Windows to train on."""
        if self.windows < 1:
            raise DataError(
                f"{where}: of {windows} windows of {seq_len} tokens none is left to train on; lower data.held_out "
                f"({held_out:g}) or give more text"
            )
        largest = int(self.tokens.max())
        if largest >= vocab:
            raise DataError(f"{where}: token {largest} is outside the vocabulary of {vocab}; raise model.vocab")
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, np.int64)

    @classmethod
    def of(cls, config: TrainConfig) -> TextData:
        """The data of a training run."""
        return cls(
            config.data.path,
            seq_len=config.model.seq_len,
            vocab=config.model.vocab,
            seed=config.seed,
            held_out=held_out_of(config),
        )

    @property
    def digest(self) -> str:
        """Hash of the tokens, for the record of a run."""
        return hashlib.sha256(np.ascontiguousarray(self.tokens).data).hexdigest()[:16]

    def sample(self, number: int) -> npt.NDArray[np.int64]:
        """Window of global sample `number`: [seq_len + 1] int64."""
        epoch, position = divmod(number, self.windows)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._order = generator.permutation(self.windows)
            self._epoch = epoch
        return self._window(int(self._order[position]))

    def held_out_sample(self, number: int) -> npt.NDArray[np.int64]:
        """Held-out window `number`, from the first again after the last: [seq_len + 1] int64."""
        if not self.held_out_windows:
            raise DataError("no data is held out to evaluate on; set data.held_out")
        return self._window(self.windows + number % self.held_out_windows)

    def batch(self, numbers: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the given global samples, each [samples, seq_len] int64."""
        return _inputs_and_targets([self.sample(n) for n in numbers])

    def held_out_batch(self, numbers: range) -> tuple[torch.Tensor, torch.Tensor]:
        """As `batch`, of held-out samples."""
        return _inputs_and_targets([self.held_out_sample(n) for n in numbers])

    def _window(self, number: int) -> npt.NDArray[np.int64]:
        start = number * self.seq_len
        return self.tokens[start : start + self.seq_len + 1].astype(np.int64)


def _inputs_and_targets(samples: list[npt.NDArray[np.int64]]) -> tuple[torch.Tensor, torch.Tensor]:
    windows = torch.from_numpy(np.stack(samples))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
