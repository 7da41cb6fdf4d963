"""Text as tokens: any text file read as bytes, a `.bin` file of uint16 tokens, or the sources of the standard library.

Samples are windows of the text. Which window is sample number g of a run depends on the seed and g alone, so every grid
reads the same data and a resumed run goes on where it stopped without any saved state.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

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


class TextData:
    """Windows of `seq_len + 1` tokens in an order shuffled anew each epoch.

    Raises `DataError` when the text is shorter than one window or holds a token outside the vocabulary.
    """

    def __init__(self, path: Path | str | None, *, seq_len: int, vocab: int, seed: int) -> None:
        self.tokens = read_tokens(path)
        self.seq_len = seq_len
        self.seed = seed
        self.windows = (len(self.tokens) - 1) // seq_len
        where = "the standard library's sources" if path is None else str(path)
        if self.windows < 1:
            raise DataError(f"{where}: {len(self.tokens)} tokens are fewer than seq_len + 1 = {seq_len + 1}")
        largest = int(self.tokens.max())
        if largest >= vocab:
            raise DataError(f"{where}: token {largest} is outside the vocabulary of {vocab}; raise model.vocab")
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, np.int64)

    @property
    def digest(self) -> str:
        """Hash of the tokens, for the record of a run."""
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()[:16]

    def sample(self, number: int) -> npt.NDArray[np.int64]:
        """Window of global sample `number`: [seq_len + 1] int64."""
        epoch, position = divmod(number, self.windows)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._order = generator.permutation(self.windows)
            self._epoch = epoch
        start = int(self._order[position]) * self.seq_len
        return self.tokens[start : start + self.seq_len + 1].astype(np.int64)

    def batch(self, numbers: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the given global samples, each [samples, seq_len] int64."""
        windows = torch.from_numpy(np.stack([self.sample(n) for n in numbers]))
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
