"""Networks read from files, whose tensors are checked one by one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import torch
from torch import Tensor

from cwdm.checkpoint.record import HEADER_KEY, Record, parse_header
from cwdm.errors import WeightsError, listed
from cwdm.files import open_file, sha256
from cwdm.unet import UNet, UNetConfig

if TYPE_CHECKING:
    from cwdm.diffusion import Schedule

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Checkpoint:
    """A network in evaluation mode with its record, where it came from, and what its users must be told."""

    model: UNet
    record: Record
    path: Path = Path()
    sha256: str = ""
    warnings: tuple[str, ...] = ()


def load(path: Path | str) -> Checkpoint:
    """Read a checkpoint, `.safetensors` or published `.pt`.

    Raises:
        WeightsError: not readable, damaged, of another architecture, or a pickle that holds more than tensors.
    """
    path = Path(path)
    try:
        _check_regular(path)
        model, record = _load_safetensors(path) if path.suffix == ".safetensors" else _load_published(path)
        return Checkpoint(model, record, path, sha256(path))
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from error


def _check_regular(path: Path) -> None:
    """Raise WeightsError where there is no file, OSError where it is none that the libraries can read to its end."""
    try:
        open_file(path).close()
    except FileNotFoundError as error:
        raise WeightsError("no such weights file") from error


def _load_safetensors(path: Path) -> tuple[UNet, Record]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            config, record = parse_header((file.metadata() or {}).get(HEADER_KEY))
            model = empty(config, record.noise_schedule if config.regression else None)
            expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            check_tensors(expected, {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
            return fill(model, {name: file.get_tensor(name) for name in expected}), record
    except safetensors.SafetensorError as error:
        raise WeightsError(f"not a whole safetensors file ({error}); copy or download it again") from error


def _load_published(path: Path) -> tuple[UNet, Record]:
    from cwdm.checkpoint.published import read_published  # here, as our own files need none of it

    return read_published(path)


def new_network(config: UNetConfig, schedule: "Schedule | None" = None) -> UNet:
    """The network of a configuration, with its first weights; see `UNet` for the schedule."""
    if config.given:  # here, as other networks need none of it
        from cwdm.onepass import OnePassUNet

        return OnePassUNet(config)
    return UNet(config, schedule)


def empty(config: UNetConfig, schedule: "Schedule | None" = None) -> UNet:
    """The network without memory for its weights, so that a crafted file can't make us allocate any."""
    with torch.device("meta"):
        return new_network(config, schedule)


def fill(model: UNet, tensors: Mapping[str, Tensor]) -> UNet:
    """The `empty` network with its weights, for evaluation; raises WeightsError where they are no finite numbers."""
    odd = [name for name, tensor in tensors.items() if tensor.dtype not in _FLOATS]
    if odd:
        raise WeightsError(f"expected floating-point numbers, found others in {listed(odd)}")
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise WeightsError(f"NaN or infinity in {listed(broken)}; the file is damaged or its training diverged")
    # Copies, because the file behind a memory map may be replaced while the weights are in use.
    copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
    model.load_state_dict(copies, assign=True)
    return model.eval().requires_grad_(False)


def check_tensors(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise WeightsError where names or shapes are not those expected."""
    missing = [name for name in expected if name not in found]
    left_over = [name for name in found if name not in expected]
    wrong = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    faults = {"missing": missing, "left over": left_over, "of the wrong shape": wrong}
    if any(faults.values()):
        raise WeightsError("; ".join(f"{what}: {listed(names)}" for what, names in faults.items() if names))
