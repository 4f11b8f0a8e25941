"""Weights that were never trained, the same on every machine: to try the system, to time it and to test it."""

import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cwdm import checkpoint
from cwdm.checkpoint import Record, load_published
from cwdm.errors import WeightsError
from cwdm.files import check_writable, exists
from cwdm.images import MODALITIES
from cwdm.published import published_names
from cwdm.unet import UNet, UNetConfig

NOTICE = "untrained weights: the image means nothing"


def untrained_state(config: UNetConfig) -> dict[str, Tensor]:
    """State dict with the published names, every tensor from a stream of numbers that its name starts."""
    with torch.device("meta"):
        model = UNet(config)
    return {
        name: _tensor(name, tuple(model.get_parameter(ours).shape)) for name, ours in published_names(model).items()
    }


def write_untrained(folder: Path, config: UNetConfig, record: Record) -> list[Path]:
    """One file for each modality, our format, with a notice that every output's record repeats.

    Raises:
        WeightsError: a file is there already.
        OutputError: the folder cannot be written.
    """
    check_writable(folder)
    paths = [folder / f"{modality}.safetensors" for modality in MODALITIES]
    if there := [path for path in paths if exists(path)]:
        raise WeightsError(f"{there[0]} exists; untrained weights replace no others, choose another folder")
    model = load_published(untrained_state(config), config)
    for path, modality in zip(paths, MODALITIES, strict=True):
        checkpoint.save(path, model, record.model_copy(update={"modality": modality, "notice": NOTICE}))
    return paths


def _tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) >= 2:
        scaled = z / np.sqrt(np.prod(shape[1:]))
    elif name.endswith("weight"):
        scaled = 1 + 0.1 * z
    else:
        scaled = 0.1 * z
    return torch.from_numpy(scaled.astype(np.float32))
