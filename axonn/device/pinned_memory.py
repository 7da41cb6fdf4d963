"""Host memory that a GPU copies from and to by itself."""

from __future__ import annotations

import weakref

import torch


def pinned_zeros(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros [elements] in page-locked host memory, of no more bytes than they need.

    PyTorch's own pinned memory comes in powers of two, which for the state of a large model is up to twice as much: so
    ordinary memory is locked where it lies. PyTorch's is taken where that is refused, for instance by a limit.
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
    # Of the storage, since views of it outlive the tensor.
    weakref.finalize(zeros.untyped_storage(), cuda.cudaHostUnregister, zeros.data_ptr()).atexit = False
    return zeros
