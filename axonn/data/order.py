"""Which item of the data is sample number g of a run: a function of the seed and g alone, so that every grid reads the
same data and a resumed run goes on where it stopped without any saved state."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from axonn.config.train_config import TrainConfig
from axonn.errors import DataError

HELD_OUT_FOR_EVALUATION = 0.05
"""What is held out when evaluation is asked for and `data.held_out` is 0."""


def held_out_of(config: TrainConfig) -> float:
    """The part of the data that `config` keeps from training."""
    return config.data.held_out or (HELD_OUT_FOR_EVALUATION if config.evaluation is not None else 0.0)


class SampleOrder:
    """`items` in an order shuffled anew each epoch; the last of them, `held_out` rounded up, are only evaluated on.

    `where` and `what` name the data and its items in the `DataError` that is raised when none is left to train on.
    """

    def __init__(self, items: int, *, seed: int, held_out: float, where: str, what: str) -> None:
        self.seed = seed
        self.held_out = math.ceil(items * held_out)
        """Items that are held out."""
        self.trained = items - self.held_out
        """Items to train on."""
        if self.trained < 1:
            raise DataError(
                f"{where}: of {items} {what} none is left to train on; lower data.held_out ({held_out:g}) or give more"
            )
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def item(self, number: int) -> int:
        """That of global sample `number`."""
        epoch, position = divmod(number, self.trained)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._order = generator.permutation(self.trained)
            self._epoch = epoch
        return int(self._order[position])

    def held_out_item(self, number: int) -> int:
        """Held-out item `number`, from the first again after the last."""
        if not self.held_out:
            raise DataError("no data is held out to evaluate on; set data.held_out")
        return self.trained + number % self.held_out
