"""AxoNN: asynchronous hybrid-parallel training of large networks (data x inter-layer x tensor).

The Python interface is the names of this package; each is imported when it is first used, so `import axonn` alone does
not load PyTorch.

- `Engine` trains a `GPT`, a `UNet` or any other `axonn.models.base.PipelineModel` on one rank of a `ProcessGrid`;
  `axonn.distributed.runtime.connect` gives it transport and collectives.
- `TrainConfig`, with a `GPTConfig` or `UNetConfig` as its model, is the configuration that `axonn train` reads.
- `parallelize` makes an ordinary PyTorch module tensor-parallel, as a `ParallelModule`.
- `make_schedule` returns the pipeline schedule of one stage, as a pure state machine.
- `read_spans` reads the spans that a rank recorded.
- `AxonnError` is the base of every error that the suite raises on purpose.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from axonn.autoparallel.parallelize import ParallelModule, parallelize
    from axonn.config.train_config import TrainConfig
    from axonn.engine import Engine
    from axonn.errors import AxonnError
    from axonn.grid import ProcessGrid
    from axonn.models.gpt.gpt_config import GPTConfig
    from axonn.models.gpt.gpt_model import GPT
    from axonn.models.unet.unet_config import UNetConfig
    from axonn.models.unet.unet_model import UNet
    from axonn.schedules import make_schedule
    from axonn.spans import read_spans

__all__ = [
    "GPT",
    "AxonnError",
    "Engine",
    "GPTConfig",
    "ParallelModule",
    "ProcessGrid",
    "TrainConfig",
    "UNet",
    "UNetConfig",
    "make_schedule",
    "parallelize",
    "read_spans",
]

_MODULES = {
    "GPT": "axonn.models.gpt.gpt_model",
    "AxonnError": "axonn.errors",
    "Engine": "axonn.engine",
    "GPTConfig": "axonn.models.gpt.gpt_config",
    "ParallelModule": "axonn.autoparallel.parallelize",
    "ProcessGrid": "axonn.grid",
    "TrainConfig": "axonn.config.train_config",
    "UNet": "axonn.models.unet.unet_model",
    "UNetConfig": "axonn.models.unet.unet_config",
    "make_schedule": "axonn.schedules",
    "parallelize": "axonn.autoparallel.parallelize",
    "read_spans": "axonn.spans",
}


def __getattr__(name: str) -> Any:
    """Import a name of the interface when it is first used: most of them need PyTorch."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
