"""Networks of the published files, which carry tensors and nothing else."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from cwdm.checkpoint.reading import check_tensors, empty, fill
from cwdm.checkpoint.record import Record
from cwdm.errors import WeightsError, listed
from cwdm.published import PUBLISHED_CT, published_config, published_names, read_tensors
from cwdm.unet import UNet, UNetConfig


def load_published(state_dict: Mapping[str, Tensor], config: UNetConfig | None = None) -> UNet:
    """Network with the weights of a published state dict.

    Args:
        config: None to read it off names and shapes, which do not tell the GroupNorms' groups: 32, as published.

    Raises:
        WeightsError: tensors are missing, left over or of the wrong shape; the message lists them.
    """
    if unnamed := [repr(name) for name in state_dict if not isinstance(name, str)]:
        raise WeightsError(f"expected a plain state dict of names and tensors, found {listed(unnamed)}")
    bad = [name for name, value in state_dict.items() if not isinstance(value, Tensor)]
    if bad:
        raise WeightsError(f"expected a plain state dict of tensors, found other objects under {listed(bad)}")
    config = config or published_config({name: tuple(tensor.shape) for name, tensor in state_dict.items()})
    model = empty(config)
    names = published_names(model)
    check_tensors(
        expected={name: tuple(model.get_parameter(ours).shape) for name, ours in names.items()},
        found={name: tuple(tensor.shape) for name, tensor in state_dict.items()},
    )
    return fill(model, {ours: state_dict[name] for name, ours in names.items()})


def read_published(path: Path) -> tuple[UNet, Record]:
    """A published file, and what holds for all of its kind; raises WeightsError."""
    model = load_published(read_tensors(path))
    if model.config.in_channels > model.config.out_channels:
        return model, Record()
    return model, Record(value_range=(-1.0, 1.0), orientation="LAS" if path.name.startswith(PUBLISHED_CT) else "LPS")
