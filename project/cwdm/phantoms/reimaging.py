"""Patients imaged anew: the anatomy of their images, by other sequences on other scanners.

A few patients become many images of them, whose contrasts are consistent with each other as one scan's are.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cwdm.arrays import Affine, Volume
from cwdm.copies import put_files
from cwdm.errors import CaseError, InputError
from cwdm.files import check_apart, exists, output_errors
from cwdm.images import MODALITIES, CaseFolder, case_files, check_same_grid, find_cases, output_name, read_grid
from cwdm.images import write_nifti as write
from cwdm.phantoms.grids import smooth_field
from cwdm.phantoms.relaxometry import Maps, estimate
from cwdm.phantoms.scanner import draw_protocol
from cwdm.phantoms.variation import Variation
from cwdm.runner import Outcome, run_each

BIAS_MM = (35.0, 50.0, 70.0)
NOTE = "imaged anew by cwdm, no acquisition"
ENDING = "-anew-{:02d}"


def image_anew(
    maps: Maps, spacing_mm: Sequence[float], seed: int | Sequence[int], variation: Variation | None = None
) -> dict[str, NDArray[np.int16]]:
    """All contrasts that there were of a patient, as another scanner would have made them, (X, Y, Z) each.

    Timings, gain and coil are drawn anew for each contrast, and one field strength for all; noise and what else the
    maps do not explain stays what it was.

    Args:
        spacing_mm: of the voxels.
        seed: of numpy's generator; the same seed gives the same voxels.
        variation: how far scanners differ; None: as `Variation()`.
    """
    variation, rng = variation or Variation(), np.random.default_rng(seed)
    protocol = draw_protocol(rng, variation)
    maps = maps.stretched(*np.exp(variation.tissue * np.array([1, 0.6]) * rng.standard_normal(2)))
    images = {}
    for contrast, own in zip(maps.timings, rng.spawn(len(maps.timings)), strict=True):
        field = smooth_field(maps.mask.shape, spacing_mm, float(own.choice(BIAS_MM)), own)[maps.mask]
        signal = maps.signal(contrast, protocol[contrast]) * np.exp(np.float32(own.uniform(*variation.bias)) * field)
        signal *= np.float32(np.exp(own.uniform(*np.log(variation.maximum))) / np.quantile(signal, 0.9995))
        images[contrast] = np.zeros(maps.mask.shape, np.int16)
        images[contrast][maps.mask] = np.clip(np.rint(signal), 1, 32767)  # nowhere 0 inside the mask
    return images


def reimage_cases(
    cases: Path,
    out: Path,
    number: int,
    seed: int,
    variation: Variation | None = None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Write OUT/<case>-anew-00/ and on, with the segmentation of the case if it has one; finished ones are skipped.

    Image number i of a case depends on its files and (seed, i) alone. A case that cannot be used is passed over.

    Args:
        cases: folder of cases with t1n, t2w, t2f and perhaps t1c; never written to.
        number: of images for each case.
        on_outcome: told about each case once it is done.

    Raises:
        InputError: there is no case, or OUT lies in a folder that is only read.
        OutputError: OUT cannot be written.
    """
    check_apart(out, cases)
    return run_each(
        find_cases(cases),
        partial(_reimage, out=out, number=number, seed=seed, variation=variation),
        name=lambda case: case.name,
        is_finished=lambda case: all(_is_whole(case, out, i) for i in range(number)),
        on_outcome=on_outcome,
    )


def _reimage(case: CaseFolder, out: Path, number: int, seed: int, variation: Variation | None) -> None:
    volumes, affine = _read(case)
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    try:
        maps = estimate(volumes, spacing_mm)
    except ValueError as error:
        raise CaseError(case.name, str(error)) from error
    for i in range(number):
        if not _is_whole(case, out, i):
            _write(case, image_anew(maps, spacing_mm, [seed, i], variation), affine, _folder(case, out, i))


def _read(case: CaseFolder) -> tuple[dict[str, Volume], Affine]:
    if case.problem:
        raise CaseError(case.name, case.problem)
    try:
        images = {name: read_grid(case.files[name]) for name in MODALITIES if name in case.files}
    except InputError as error:
        raise CaseError(case.name, str(error)) from error
    volumes = {name: image.volume for name, image in images.items()}
    affines = {name: image.affine for name, image in images.items()}
    first = next(iter(images))
    check_same_grid(case.name, first, volumes, affines)
    return volumes, affines[first]


def _folder(case: CaseFolder, out: Path, i: int) -> Path:
    return out / (case.name + ENDING.format(i))


def _is_whole(case: CaseFolder, out: Path, i: int) -> bool:
    folder = _folder(case, out, i)
    return all(exists(folder / output_name(folder.name, contrast)) for contrast in case.files)


def _write(case: CaseFolder, images: dict[str, NDArray[np.int16]], affine: Affine, folder: Path) -> None:
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    segmentations = [path for name, path in case_files(case).items() if "seg.nii" in name]
    put_files({output_name(folder.name, "seg"): path for path in segmentations[:1]}, folder, True)
    for contrast, image in images.items():
        write(folder / output_name(folder.name, contrast), image, affine, NOTE)
