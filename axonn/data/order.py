"""Order of the samples of a run.

The item that is sample g is a function of the seed and g alone, so every grid reads the same data, and a resumed run
continues where it stopped without any saved state.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from axonn.config.train_config import TrainConfig
from axonn.errors import DataError

HELD_OUT_FOR_EVALUATION = 0.05
"""Share of the data that is held out when evaluation is configured and `data.held_out` is 0."""


def held_out_of(config: TrainConfig) -> float:
    """Return the share of the data that `config` holds out from training."""
    return config.data.held_out or (HELD_OUT_FOR_EVALUATION if config.evaluation is not None else 0.0)


class SampleOrder:
    """Order of `items` items, shuffled anew each epoch.

    `held_out`: the share of the items, rounded up and taken from the end, that is used for evaluation only. Raises
    `DataError` when none is left to train on; `where` and `what` name the data and its items in it.
    """

    def __init__(self, items: int, *, seed: int, held_out: float, where: str, what: str) -> None:
        self.seed = seed
        self.held_out = math.ceil(items * held_out)
        """Number of items that are held out."""
        self.trained = items - self.held_out
        """Number of items to train on."""
        if self.trained < 1:
            raise DataError(
                f"{where}: of {items} {what} none is left to train on; lower data.held_out ({held_out:g}) or give more"
            )
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def item(self, number: int) -> int:
        """Return the item of global sample `number`."""
        epoch, position = divmod(number, self.trained)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._order = generator.permutation(self.trained)
            self._epoch = epoch
        return int(self._order[position])

    def held_out_item(self, number: int) -> int:
        """Return held-out item `number`; after the last the first follows again."""
        if not self.held_out:
            raise DataError("no data is held out to evaluate on; set data.held_out")
        return self.trained + number % self.held_out
