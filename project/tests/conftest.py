"""What several tests need: golden outputs of the published systems and weights made by their recipe."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from cwdm.checkpoint import load_published
from cwdm.published import published_names
from cwdm.unet import UNet, UNetConfig

# Examples take as long as the machine is busy; time is no law that a property test should check.
settings.register_profile("cwdm", deadline=None, print_blob=True)
settings.load_profile("cwdm")

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).resolve().parents[3] / "shared"
CASES = SHARED / "cases"

needs_cases = pytest.mark.skipif(
    not CASES.is_dir(), reason="real cases stand beside the repository in development and CI only"
)


def golden(name: str) -> dict[str, dict[str, Any]]:
    """Settings of the golden runs in one JSON file."""
    return json.loads((GOLDEN / name).read_text())


def recipe(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Weight tensor of the golden recipe for a published name and shape."""
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) >= 2:
        z = z / np.sqrt(np.prod(shape[1:]))
    elif name.endswith("weight"):
        z = 1 + 0.1 * z
    else:
        z = 0.1 * z
    return torch.from_numpy(z.astype(np.float32))


def config_of(settings: dict[str, Any]) -> UNetConfig:
    """Network configuration of a golden run."""
    known = {key: value for key, value in settings.items() if key in UNetConfig.__dataclass_fields__}
    return UNetConfig(**{**known, "channel_mult": tuple(known["channel_mult"])})


def published_state(config: UNetConfig) -> dict[str, torch.Tensor]:
    """State dict with the published names, made by the golden recipe."""
    with torch.device("meta"):
        model = UNet(config)
    return {name: recipe(name, tuple(model.get_parameter(ours).shape)) for name, ours in published_names(model).items()}


def golden_model(settings: dict[str, Any]) -> UNet:
    """The network of a golden run."""
    return load_published(published_state(config_of(settings)))


TINY = UNetConfig(in_channels=32, model_channels=32, channel_mult=(1, 2))
"""A conditional network small enough for tests."""
