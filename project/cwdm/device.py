"""The device that a network runs on: a GPU that works, or the CPU."""

import logging
import re

import torch
import torch.nn.functional as F

from cwdm.errors import SettingsError

_log = logging.getLogger(__name__)


def choose_device(name: str = "auto") -> torch.device:
    """The device for a name; a GPU is tried before it is chosen, and named by its index.

    Args:
        name: "auto" takes the current GPU if it works and else the CPU, with a warning if there is one that does not;
            "cpu"; "cuda" demands the current GPU, "cuda:1" that one.

    Raises:
        SettingsError: another name, or a GPU was demanded that is not there or does not work.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
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


def device_name(device: torch.device) -> str:
    """What a record calls a device: the GPU's model, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _try(device: torch.device) -> None:
    """One small convolution; raises if it cannot be computed or comes out wrong."""
    ones = torch.ones(1, 1, 3, 3, 3, device=device)
    if (found := F.conv3d(ones, ones).item()) != 27:
        raise RuntimeError(f"its convolution of ones is {found} instead of 27")
