"""Sizes halved by averaging and doubled by nearest neighbour, in whatever way is fast on a device."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Resample = Literal["down", "up"] | None

LAYOUT = torch.channels_last_3d


def resized(x: Tensor, resample: Resample) -> list[int]:
    """Spatial sizes of (B, C, X, Y, Z) after `resize`."""
    return [{None: n, "down": n // 2, "up": 2 * n}[resample] for n in x.shape[2:]]


def resize(x: Tensor, resample: Resample) -> Tensor:
    """Halve by averaging or double by nearest neighbour, each spatial axis of (B, C, X, Y, Z)."""
    if resample == "up":
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    if resample == "down" and x.device.type == "cpu":
        # The same mean of eight neighbours; avg_pool3d is 40 times slower in channels_last, and knows no bfloat16.
        return F.interpolate(x, scale_factor=0.5, mode="trilinear")
    return F.avg_pool3d(x, 2) if resample == "down" else x


def resample(x: Tensor, change: Resample) -> Tensor:
    """`resize` that keeps channels_last_3d.

    On a GPU, PyTorch's pooling makes contiguous tensors of it, and its interpolation goes through them.
    """
    if change is None or x.device.type == "cpu" or not x.is_contiguous(memory_format=LAYOUT):
        return resize(x, change)
    return halve(x) if change == "down" else double(x)


def halve(x: Tensor) -> Tensor:
    """Means of eight neighbours, (B, C, 2 X, 2 Y, 2 Z) -> (B, C, X, Y, Z), in channels_last_3d."""
    pairs = x.movedim(1, -1).unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
    return pairs.mean((2, 4, 6)).movedim(-1, 1)


def double(x: Tensor) -> Tensor:
    """Every voxel eight times, (B, C, X, Y, Z) -> (B, C, 2 X, 2 Y, 2 Z), in channels_last_3d."""
    batch, channels, *sizes = x.shape
    copies = x.movedim(1, -1)[:, :, None, :, None, :, None].expand(-1, -1, 2, -1, 2, -1, 2, -1)
    return copies.reshape(batch, *(2 * n for n in sizes), channels).movedim(-1, 1)
