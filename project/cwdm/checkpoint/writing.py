"""Networks written to our safetensors, with their record."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from cwdm.checkpoint.record import FORMAT, HEADER_KEY, Record
from cwdm.safetensors_file import write_tensors
from cwdm.unet import UNet, UNetConfig


def save(
    path: Path | str,
    model: UNet,
    record: Record,
    dtype: torch.dtype = torch.float32,
    before: Callable[[str], None] | None = None,
) -> None:
    """Write our safetensors, whole or not at all; `dtype` may be float16 or bfloat16 to halve the size.

    Args:
        before: told the file's sha256 before it has its name.
    """
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    save_tensors(Path(path), tensors, model.config, record, before)


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    config: UNetConfig,
    record: Record,
    before: Callable[[str], None] | None = None,
) -> None:
    """Write our safetensors like `save`, of a network's tensors by name."""
    shape = asdict(config)
    for name in ("given", "products"):
        if not shape[name]:
            del shape[name]  # unknown to older versions, which read all other networks
    header = {"format": FORMAT, "config": shape, "record": record.model_dump(mode="json")}
    write_tensors(path, tensors, {"format": "pt", HEADER_KEY: json.dumps(header)}, before)
