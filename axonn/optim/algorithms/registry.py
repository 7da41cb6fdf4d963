"""All algorithms by name. Another one is its module in this folder and its line here."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator

from axonn.config.optimizer_config import OptimizerConfig
from axonn.optim.algorithms.adamw import AdamW
from axonn.optim.algorithms.base import Algorithm
from axonn.optim.algorithms.sgd import SGD

ALGORITHMS: dict[str, Algorithm[Any]] = {
    "adamw": AdamW(),
    "sgd": SGD(),
}


def algorithm_of(config: OptimizerConfig) -> Algorithm[Any]:
    """Return the algorithm that `config` configures."""
    return ALGORITHMS[config.name]


def update_streams() -> list[str]:
    """Return the names under which machine files may have measured steps of optimizers."""
    return [algorithm.stream(offloaded=way) for algorithm in ALGORITHMS.values() for way in (False, True)]


def _known(name: str) -> str:
    if name not in ALGORITHMS:
        raise ValueError(f"there is no optimizer '{name}'; known are {', '.join(ALGORITHMS)}")
    return name


AlgorithmName = Annotated[str, AfterValidator(_known)]
"""Name of a registered algorithm."""
