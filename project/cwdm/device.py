"""The device that a network runs on: a GPU that works, or the CPU."""

import torch


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
    from cwdm.gpu import choose_gpu  # here, as many machines have none

    return choose_gpu(name)


def device_name(device: torch.device) -> str:
    """What a record calls a device: the GPU's model, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
