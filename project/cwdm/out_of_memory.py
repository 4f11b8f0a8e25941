"""Whether an error says that memory was too small, in whosever words."""

import torch

SIGNS = (
    "out of memory",
    "can't allocate memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_SUPPORTED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "unable to find an engine to execute this computation",
    "Unable to find a valid cuDNN algorithm",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was too small: PyTorch's own, or what its libraries make of it.

    cuDNN says "not supported" or finds no engine where the memory that its algorithms need is not there.
    """
    told = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in told for sign in SIGNS)
    )
