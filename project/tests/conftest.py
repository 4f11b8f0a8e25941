"""What several tests need: the golden outputs of the published systems and weights made by their recipe."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

SHARED = Path(__file__).resolve().parents[3] / "shared"
GOLDEN = SHARED / "golden"
CASES = SHARED / "cases"

needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="golden outputs stand beside the repository in development and CI only"
)
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
