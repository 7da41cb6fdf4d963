"""AxoNN: asynchronous hybrid-parallel training of large networks (data x inter-layer x tensor)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from axonn.autoparallel.parallelize import ParallelModule as ParallelModule
    from axonn.autoparallel.parallelize import parallelize as parallelize

__all__ = ["ParallelModule", "parallelize"]


def __getattr__(name: str) -> Any:
    """`parallelize`, which needs torch, is imported when it is first asked for."""
    if name in __all__:
        from axonn.autoparallel import parallelize as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
