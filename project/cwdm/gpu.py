"""A GPU that is tried before it is chosen."""

import logging
import re

import torch
import torch.nn.functional as F

from cwdm.errors import SettingsError

_log = logging.getLogger(__name__)


def choose_gpu(name: str) -> torch.device:
    """The GPU for a name, by its index; for "auto" the CPU, with a warning, if it does not work.

    Raises:
        SettingsError: as `cwdm.device.choose_device`.
    """
    if not re.fullmatch(r"auto|cuda(:\d{1,3})?", name, re.ASCII):
        raise SettingsError(f"device {name!r}: expected auto, cpu, cuda, or cuda:N for GPU number N")
    if not torch.cuda.is_available():
        raise SettingsError(
            f"a GPU was demanded (--device {name}), but PyTorch finds none; check the driver and, in a container, "
            "--gpus all; or use --device cpu"
        )
    try:
        device = torch.device(name) if ":" in name else torch.device("cuda", torch.cuda.current_device())
        _try(device)
    except Exception as error:  # whatever a driver, a library or PyTorch's build may raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fault = f"PyTorch {torch.__version__} finds a GPU but cannot use it ({reason})"
        if name != "auto":
            raise SettingsError(
                f"{fault}; update its driver or install a PyTorch that was built for it, or use --device cpu"
            ) from error
        _log.warning("%s; going on with the CPU", fault)
        return torch.device("cpu")
    return device


def _try(device: torch.device) -> None:
    """One small convolution; raises if it cannot be computed or comes out wrong."""
    ones = torch.ones(1, 1, 3, 3, 3, device=device)
    if (found := F.conv3d(ones, ones).item()) != 27:
        raise RuntimeError(f"its convolution of ones is {found} instead of 27")
