"""Small cases, written with nibabel, sound but for what a test puts into them."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from cwdm.errors import CaseError
from cwdm.images import MODALITIES, Case, case_folder, read_case

SHAPE = (12, 10, 9)
AFFINE = np.array([[-1.0, 0, 0, 5], [0, -1, 0, 239], [0, 0, 1, -7], [0, 0, 0, 1]])
NAME = "BraTS-GLI-00001-000"


def brain(seed: int = 0, dtype: Any = np.int16) -> np.ndarray:
    """A block of noise in a background of zeros."""
    volume = np.zeros(SHAPE, dtype)
    volume[3:9, 2:8, 2:7] = np.random.RandomState(seed).randint(1, 100, (6, 6, 5))
    return volume


def save(path: Path, data: np.ndarray | None = None, affine: np.ndarray = AFFINE, **fields: Any) -> Path:
    """Write an image; `fields` go into its header as they are."""
    image = nib.Nifti1Image(brain() if data is None else data, affine)
    contents = image.to_bytes()
    header = nib.Nifti1Header(contents[:348])
    for name, value in fields.items():
        header[name] = value
    contents = header.binaryblock + contents[348:]
    path.write_bytes(gzip.compress(contents) if path.suffix == ".gz" else contents)
    return path


def make_case(folder: Path, missing: str = "t1n", name: str = NAME) -> Path:
    """A sound case in `folder`/`name`."""
    (folder / name).mkdir(parents=True)
    for seed, modality in enumerate(MODALITIES):
        if modality != missing:
            save(folder / name / f"{name}-{modality}.nii.gz", brain(seed))
    return folder / name


def read(folder: Path) -> Case:
    return read_case(case_folder(folder))


def fault(folder: Path) -> str:
    """Why a case cannot be used; every message names the case."""
    with pytest.raises(CaseError) as caught:
        read(folder)
    assert caught.value.case == folder.name
    assert str(caught.value).startswith(f"{folder.name}: ")
    return caught.value.reason


def edited(offset: int, value: bytes) -> Callable[[Path], object]:
    """Overwrite bytes of the uncompressed file; offsets are those of the NIfTI-1 standard."""

    def edit(path: Path) -> None:
        contents = bytearray(gzip.decompress(path.read_bytes()))
        contents[offset : offset + len(value)] = value
        path.write_bytes(gzip.compress(contents))

    return edit
