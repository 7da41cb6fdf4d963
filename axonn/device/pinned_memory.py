"""Page-locked (pinned) host memory, which a GPU can copy from and to by itself."""

from __future__ import annotations

import weakref

import torch


def pinned_zeros(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Return zeros [elements] in page-locked host memory, without wasting any of it.

    PyTorch's own pinned memory comes in powers of two, up to twice what the state of a large model needs; so ordinary
    memory is locked in place. Where that is refused, for instance by a limit, PyTorch's is used.
    """
    zeros = torch.zeros(elements, dtype=dtype, device="cpu")
    if not zeros.nbytes:
        return zeros
    try:
        cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        locked = int(cuda.cudaHostRegister(zeros.data_ptr(), zeros.nbytes, 0)) == 0
    except (AssertionError, RuntimeError):
        locked = False
    if not locked:
        del zeros
        return torch.zeros(elements, dtype=dtype, device="cpu", pin_memory=True)
    # Tied to the storage, since views of it outlive the tensor.
    weakref.finalize(zeros.untyped_storage(), cuda.cudaHostUnregister, zeros.data_ptr()).atexit = False
    return zeros
