"""Cases as training sees them: decoded, and cut to the window that inference would take."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from cwdm.arrays import Mask
from cwdm.images import (
    DecodedFile,
    ImageSettings,
    Subject,
    Volumes,
    centred_window,
    choose_window,
    tight_window,
)
from cwdm.images import decode_file as decode_whole
from cwdm.images import in_window as lay
from cwdm.training.settings import DataSettings

Triple = tuple[int, int, int]


def decode(subject: Subject, data: DataSettings, multiple: int = 1) -> Volumes:
    """A case, read from its files.

    Args:
        multiple: of voxels along each axis of a window around the brain.

    Raises:
        CaseError: a file cannot be used, or the files lie on different grids.
    """
    pairs = zip(subject.files, images_of(data, len(subject.files)), strict=True)
    return in_window(subject, [decode_file(subject.name, file, image, data) for file, image in pairs], data, multiple)


def images_of(data: DataSettings, files: int) -> Sequence[ImageSettings]:
    """What the settings say of each file of a case."""
    intensity: Literal["percentiles", "brain"] = "brain" if data.intensities == "brain" else "percentiles"
    return data.images or [ImageSettings(file="", intensity=intensity)] * files


def decode_file(case: str, file: Path, image: ImageSettings, data: DataSettings) -> DecodedFile:
    """One file of a case; raises CaseError if it cannot be used."""
    window = data.window if isinstance(data.window, list) else ()
    return decode_whole(case, file, image, window, data.downsample)


def in_window(subject: Subject, files: Sequence[DecodedFile], data: DataSettings, multiple: int) -> Volumes:
    """The files of a case in their window; raises CaseError where their grids differ or the brain is too large."""
    return lay(subject, files, lambda files: _window(files, data, multiple))


def _window(files: Sequence[DecodedFile], data: DataSettings, multiple: int) -> tuple[Triple, Triple]:
    """First voxel and size of what is kept of the volumes."""
    if data.window == "brain":
        x, y, z = data.crop or (0, 0, 0)
        window = tight_window(_corners(files), multiple, (x, y, z))
    elif data.layout == "brats" and data.condition_on != "nothing":
        x, y, z = data.window
        window, _ = choose_window(_corners(files), multiple, (x, y, z))
    else:
        return centred_window(files, data.window, data.downsample)
    return window.start, window.size


def _corners(files: Sequence[DecodedFile]) -> Mask:
    """Stands for the brain: windows look only at where it begins and ends along each axis."""
    mask = np.zeros(files[0].shape, np.bool_)
    mask[tuple(min(file.start[axis] for file in files) for axis in range(3))] = True
    mask[tuple(max(file.start[axis] + file.size[axis] for file in files) - 1 for axis in range(3))] = True
    return mask
