"""Pictures of a registration: two images in the squares of a checkerboard, and the outline of a mask."""

from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
from scipy import ndimage

from cwdm.arrays import Mask
from cwdm.report.html import webp_uri
from cwdm.report.scan_records import Tile

Slice = npt.NDArray[np.float32]
Pixels = npt.NDArray[Any]

SQUARE_MM = 24
_OUTLINE = np.array([79, 216, 208], np.uint8)
TILE_PIXELS = 256


def grey(values: Slice, largest: float) -> Pixels:
    """(rows, columns) in 8 bits; `largest` is white."""
    return np.rint(np.clip(values / np.float32(max(largest, 1e-6)), 0, 1) * 255).astype(np.uint8)


def checkerboard(first: Pixels, second: Pixels) -> Pixels:
    """Two images of pixels of a millimetre, by turns in squares; the second is tinted, so that they can be told apart.

    Args:
        first, second: (rows, columns) in 8 bits.

    Returns:
        (rows, columns, 3)
    """
    row, column = np.indices(first.shape) // SQUARE_MM
    odd = ((row + column) % 2 == 1)[..., None]
    tinted = second[..., None] * np.array([1.0, 0.86, 0.62])
    return np.where(odd, tinted, first[..., None]).astype(np.uint8)


def outlined(image: Pixels, mask: Mask) -> Pixels:
    """An image (rows, columns) with the outline of a mask, (rows, columns, 3)."""
    edge = mask & ~ndimage.binary_erosion(mask)
    return np.where(edge[..., None], _OUTLINE, image[..., None])


def picture(pixels: Pixels, left: str, right: str, spacing_mm: tuple[float, float] = (1.0, 1.0)) -> Tile:
    """Pixels (rows, columns[, 3]), so many mm apart, at a pixel a millimetre or less.

    Args:
        left, right: the sides of the head that are seen there.
    """
    height, width = (n * mm for n, mm in zip(pixels.shape[:2], spacing_mm, strict=True))
    scale = min(1.0, TILE_PIXELS / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = PIL.Image.fromarray(np.ascontiguousarray(pixels)).resize(size, PIL.Image.Resampling.BILINEAR)
    return Tile(webp_uri(image, quality=80), *size, left, right)
