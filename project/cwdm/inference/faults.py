"""What an error means for the cases after it, in one line."""

import gc
import traceback
from collections.abc import Callable

import torch

from cwdm.errors import CaseError, CwdmError, DeviceLostError
from cwdm.out_of_memory import is_out_of_memory


def explain(error: Exception, works: Callable[[], bool], log: Callable[[str], None]) -> str:
    """One line about an error; the memory it holds on to is let go.

    Args:
        works: asked after an error that no one expected, whether the device can still be used.
        log: told where such an error comes from.

    Raises:
        DeviceLostError: it cannot.
    """
    if isinstance(error, CwdmError):
        return error.reason if isinstance(error, CaseError) else str(error)
    if is_out_of_memory(error):
        error.__traceback__ = None  # its frames keep the network's tensors alive
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return "not enough memory"
    for line in "".join(traceback.format_exception(error)).splitlines():
        log(line)
    error.__traceback__ = None
    reason = f"unexpected {type(error).__name__}: {error}"
    if not works():
        raise DeviceLostError(f"the GPU no longer works: {reason}")
    return reason
