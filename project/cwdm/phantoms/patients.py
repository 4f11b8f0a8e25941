"""Physics-based synthetic patients: a folded brain with a glioma, in four modalities, on demand.

A patient is made in three steps: *anatomy*, layers of tissue that are the same for the same seed at any resolution;
*physics*, which makes signals of them; and the *scanner*, for each modality by itself.
`benchmarks/phantoms.py` holds the result against patients.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cwdm.arrays import Affine
from cwdm.errors import InputError
from cwdm.files import output_errors
from cwdm.images import MODALITIES, is_nifti, output_name, read_grid, write_nifti
from cwdm.phantoms.anatomy import make_anatomy
from cwdm.phantoms.grids import Shape
from cwdm.phantoms.scanner import scan, signals_of
from cwdm.phantoms.variation import Variation


@dataclass(frozen=True)
class Phantom:
    """One synthetic patient.

    Attributes:
        volumes: t1n, t1c, t2w and t2f, each int16 (X, Y, Z), 0 outside one common brain mask.
        seg: uint8 (X, Y, Z): 1 necrotic core, 2 oedema, 3 enhancing tumour, 0 elsewhere.
        affine: (4, 4) float64, voxel indices to RAS millimetres; the array is stored LPS.
    """

    volumes: dict[str, NDArray[np.int16]]
    seg: NDArray[np.uint8]
    affine: Affine


def make_phantom(
    seed: int | Sequence[int],
    shape: Shape = (240, 240, 155),
    spacing_mm: float = 1.0,
    variation: Variation | None = None,
) -> Phantom:
    """Make the patient that belongs to a seed.

    Args:
        seed: of numpy's generator; the same seed gives the same voxels.
        shape: (X, Y, Z) in voxels; the brain needs about 150 x 200 x 150 mm.
        spacing_mm: edge of the cubic voxels; with another spacing the same patient appears at that resolution.
        variation: how far patients and scanners differ; None: as `Variation()`.
    """
    variation = variation or Variation()
    anatomy_rng, signal_rng, *scan_rngs = np.random.default_rng(seed).spawn(2 + len(MODALITIES))
    anatomy = make_anatomy(anatomy_rng, shape, spacing_mm, variation)
    signals = signals_of(signal_rng, anatomy, variation)
    with ThreadPoolExecutor(2) as pool:
        scans = pool.map(partial(scan, anatomy=anatomy, variation=variation), scan_rngs, signals.values())
        volumes = dict(zip(signals, scans, strict=True))
    affine = np.diag([-spacing_mm, -spacing_mm, spacing_mm, 1.0])
    affine[1, 3] = (shape[1] - 1) * spacing_mm
    return Phantom(volumes, anatomy.grid.embed(anatomy.seg), affine)


def write_phantom(phantom: Phantom, folder: Path, name: str) -> Path:
    """Write <folder>/<name>/<name>-<modality>.nii.gz and <name>-seg.nii.gz; returns the case's folder.

    Images of the same patient that are there already stay.

    Raises:
        InputError: another file has the name of one; nothing is written then.
        OutputError: the folder cannot be written to.
    """
    case = folder / name
    with output_errors(folder):
        case.mkdir(parents=True, exist_ok=True)
    volumes: dict[str, NDArray[Any]] = {**phantom.volumes, "seg": phantom.seg}
    paths = {case / output_name(name, suffix): volume for suffix, volume in volumes.items()}
    there = {path for path, volume in paths.items() if _is_written(path, volume, phantom.affine)}
    for path, volume in paths.items():
        if path not in there:
            write_nifti(path, volume, phantom.affine)
    return case


def _is_written(path: Path, volume: NDArray[Any], affine: Affine) -> bool:
    """Whether an image is there; raises InputError where that is something else."""
    if not os.path.lexists(path):
        return False
    with suppress(InputError):  # no image at all
        found = read_grid(path)
        if np.array_equal(found.volume, volume) and np.allclose(found.affine, affine):
            return True
    raise InputError(
        f"{path} is there and is no image of this synthetic patient; move it away or choose another output folder"
    )


def write_phantoms(
    out: Path,
    cases: int,
    seed: int,
    shape: Shape = (240, 240, 155),
    spacing_mm: float = 1.0,
    variation: Variation | None = None,
    on_case: Callable[[str], None] = lambda name: None,
    first: int = 0,
    around: Callable[[Phantom], Phantom] | None = None,
) -> list[Path]:
    """Write cases BraTS-PHANTOM-00000-000 and on; returns their folders. Files that are there already stay.

    Case number i, from `first` on, depends on (seed, i) alone. `on_case` is called with a case's name once it is there.
    `around` adds what lies around the brain, see `add_skull`.

    Raises:
        InputError: another file has the name of an image in a case that is not finished.
        OutputError: the folder cannot be written to.
    """
    folders = []
    for number in range(first, first + cases):
        name = f"BraTS-PHANTOM-{number:05d}-000"
        folder = out / name
        if not all(is_nifti(folder / output_name(name, suffix)) for suffix in (*MODALITIES, "seg")):
            phantom = make_phantom([seed, number], shape, spacing_mm, variation)
            write_phantom(around(phantom) if around else phantom, out, name)
        folders.append(folder)
        on_case(name)
    return folders
