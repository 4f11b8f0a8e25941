"""Spaces that images are brought into: those of atlases, and that of one of the patient's own images.

The atlases' images are data files with licences of their own, which stand beside them.
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files

import numpy as np

from cwdm.arrays import Affine
from cwdm.errors import SettingsError
from cwdm.images import Image, read_grid
from cwdm.scans.register import Brain, prepare

SPACES = ("sri24", "mni152", "native")


@dataclass(frozen=True)
class Space:
    """A grid in a space.

    Attributes:
        name: `sri24`, in which BraTS distributes its images (240×240×155); `mni152`, as challenges since 2025 do
            (182×218×182); or `native`, the grid of the image that the others are registered to.
        shape: (X, Y, Z) voxels.
        affine: (4, 4), voxel indices to RAS mm.
    """

    name: str
    shape: tuple[int, ...]
    affine: Affine

    @property
    def atlas(self) -> Brain | None:
        """The atlas's T1-weighted brain, ready to be registered to; None for `native`."""
        return None if self.name == "native" else _atlas_brain(self.name)


def find_space(name: str, reference: Image) -> Space:
    """The space of a name.

    Args:
        reference: the image whose grid is `native`.

    Raises:
        SettingsError: there is no space of that name.
    """
    if name == "native":
        return Space("native", reference.volume.shape, reference.affine)
    if name not in SPACES:
        raise SettingsError(f"space {name!r}: expected {', '.join(SPACES[:-1])} or {SPACES[-1]}")
    atlas = _atlas(name)
    return Space(name, atlas.volume.shape, atlas.affine)


@cache
def _atlas(name: str) -> Image:
    with as_file(files("cwdm.scans") / "atlases" / f"{name}.nii.gz") as path:
        return read_grid(path)


@cache
def _atlas_brain(name: str) -> Brain:
    atlas = _atlas(name)
    return prepare(atlas, np.asarray(atlas.volume > 0), biased=False)
