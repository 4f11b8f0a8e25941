"""What a report shows of a patient: registrations as checkerboards, brain masks, and the synthesis in native space."""

from collections.abc import Iterator

import numpy as np

from cwdm import __version__
from cwdm.arrays import Affine, Mask, Volume
from cwdm.images import ORIENTATION, Image, Orientation
from cwdm.report import PLANES, Panel, Plane, ScanRecord, Tile, checkerboard, grey, outlined, picture
from cwdm.scans.align import Aligned
from cwdm.scans.derivatives import Provenance
from cwdm.scans.itk import RAS_LPS, Matrix, grid, resample, resample_mask, sitk, to_volume
from cwdm.scans.judge import VERDICTS
from cwdm.scans.patient import Patient
from cwdm.scans.steps import InSpace, Synthetic

_EXTENT_MM = 200, 240, 200
"""Of what is shown of a head, along x, y and z."""

_LARGEST_STD = 0.15
"""Share of the brightest voxel that is shown brightest."""


Place = tuple[tuple[int, ...], Affine]
"""Shape and affine of a grid."""


AXIAL, CORONAL, SAGITTAL = PLANES


def record_of(
    name: str, patient: Patient | None, scans: InSpace | None, made: tuple[Synthetic, ...], failure: str = ""
) -> ScanRecord:
    """The record of a patient, as far as it came.

    Args:
        failure: why it came no further.
    """
    judgement = scans.judgement if scans else None
    provenance = made[0].provenance if made else None
    verdict = max((one.provenance.verdict for one in made), default=judgement.verdict if judgement else "ok", key=_rank)
    checked = [*(judgement.findings if judgement else ()), *(line for one in made for line in one.findings)]
    passed = [one.line for one in patient.passed_over] if patient else []
    warnings = [line for one in made for line in one.warnings]
    return ScanRecord(
        program=f"cwdm {__version__}",
        patient=name,
        verdict="failed" if failure else verdict,
        reasons=(failure,) if failure else tuple(checked),
        remarks=(*(patient.remarks if patient else ()), *dict.fromkeys(warnings), *passed),
        inputs={modality: scan.source for modality, scan in patient.scans.items()} if patient else {},
        masks=dict(scans.masked_by) if scans else {},
        synthesised={one.modality: one.like for one in made},
        space=scans.aligned.space.name if scans else "",
        reference=scans.aligned.reference if scans else "",
        metrics=judgement.metrics if judgement else {},
        weights=provenance.weights if provenance else "",
        settings=_flat(provenance) if provenance else {},
        panels=tuple(_panels(scans, made)) if scans else (),
    )


def _rank(verdict: str) -> int:
    return [str(one) for one in VERDICTS].index(verdict)


def _flat(provenance: Provenance) -> dict[str, str]:
    return {key: str(provenance.settings[key]) for key in ("sampler", "precision", "made_with")}


def _panels(scans: InSpace, made: tuple[Synthetic, ...]) -> Iterator[Panel]:
    yield _registrations(scans.aligned)
    for one in made:
        yield _synthesis(scans.aligned, one)


# Registrations


def _registrations(aligned: Aligned) -> Panel:
    """A row a modality: before and after registration, and its mask."""
    views = (AXIAL, CORONAL)
    columns = [f"{what}, {plane.name}" for what in ("before", "after", "brain mask") for plane in views]
    rows, tiles = [], []
    middle = _middle(aligned)
    slices = {plane: _grid_of(plane, middle) for plane in views}
    for modality in aligned.heads:
        before, other = _before(aligned, modality)
        if other is None:
            continue
        row = []
        for matrix in (before, aligned.matrices[modality]):
            for plane, place in slices.items():
                first, second = _against(aligned, other, place), _slice(aligned, modality, matrix, place)
                row.append(_tile(checkerboard(_flattened(first, plane), _flattened(second, plane)), plane))
        for plane, place in slices.items():
            image = _slice(aligned, modality, aligned.matrices[modality], place)
            mask = _mask(aligned, modality, place)
            row.append(_tile(outlined(_flattened(image, plane), _flattened(mask, plane)), plane))
        rows.append(f"{modality} and {other}")
        tiles.append(tuple(row))
    title = f"Registration, in the space {aligned.space.name}"
    return Panel(title, tuple(columns), tuple(rows), tuple(tiles))


def _before(aligned: Aligned, modality: str) -> tuple[Matrix, str | None]:
    """Where the header puts an image, and what it is shown against: the reference or, for that, the atlas."""
    if modality != aligned.reference:
        return aligned.matrices[aligned.reference], aligned.reference
    return np.eye(4), "atlas" if aligned.space.atlas is not None else None


def _against(aligned: Aligned, other: str, place: Place) -> Volume:
    """A slice of what an image is shown against, in 8 bits."""
    atlas = aligned.space.atlas
    if other != "atlas" or atlas is None:
        return _slice(aligned, other, aligned.matrices[other], place)
    moved = sitk.Resample(atlas.image, grid(*place), sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkFloat32)
    return grey(to_volume(moved), 1.0)


def _slice(aligned: Aligned, modality: str, matrix: Matrix, place: Place) -> Volume:
    image, mask = aligned.heads[modality]
    return grey(resample(image.volume, image.affine, *place, matrix), _brightest(image.volume, mask))


def _mask(aligned: Aligned, modality: str, place: Place) -> Mask:
    image, mask = aligned.heads[modality]
    return resample_mask(mask, image.affine, *place, aligned.matrices[modality])


def _middle(aligned: Aligned) -> np.ndarray:
    """The middle of the brain in RAS mm of the space."""
    voxels = np.argwhere(aligned.brain)
    centre = voxels.mean(axis=0) if len(voxels) else (np.array(aligned.space.shape) - 1) / 2
    return (aligned.space.affine @ np.append(centre, 1))[:3]


def _grid_of(plane: Plane, middle: np.ndarray) -> Place:
    """One slice of cubes of a millimetre through a point, its axes those of LPS."""
    shape = [1 if axis == plane.axis else mm for axis, mm in enumerate(_EXTENT_MM)]
    affine = RAS_LPS.copy()
    affine[:3, 3] = middle - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return tuple(shape), affine


def _flattened(volume: Volume | Mask, plane: Plane, index: int = 0) -> np.ndarray:
    """A slice of a volume stored LPS as (rows, columns), the head upright."""
    pixels = np.take(volume, index, plane.axis).T
    return pixels if plane is AXIAL else pixels[::-1]


def _tile(pixels: np.ndarray, plane: Plane, spacing_mm: tuple[float, float] = (1.0, 1.0)) -> Tile:
    return picture(pixels, plane.left, plane.right, spacing_mm)


def _brightest(volume: Volume, mask: Mask) -> float:
    inside = volume[mask] if mask.any() else volume.ravel()
    return float(np.percentile(inside, 99.5))


# Synthesis


def _synthesis(aligned: Aligned, one: Synthetic) -> Panel:
    """A row a plane, on the grid that the image was brought to."""
    image, mask = aligned.heads[one.like]
    shown = {one.like: (image, _brightest(image.volume, mask))}
    largest = _brightest(one.image.volume, one.image.volume != 0)
    shown[f"{one.modality}, synthesised"] = one.image, largest
    if one.std is not None:
        shown["standard deviation"] = one.std, _LARGEST_STD * largest
    order = Orientation.to(ORIENTATION, image.affine)
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)[list(order.axes)]
    middle = [round(float(index.mean())) for index in np.nonzero(order.apply(mask))]
    tiles = [
        tuple(_native_tile(volume, brightest, order, plane, middle, spacing) for volume, brightest in shown.values())
        for plane in (AXIAL, CORONAL, SAGITTAL)
    ]
    rows = tuple(plane.name for plane in (AXIAL, CORONAL, SAGITTAL))
    return Panel(f"{one.modality} on the grid of {one.like}", tuple(shown), rows, tuple(tiles))


def _native_tile(
    image: Image, brightest: float, order: Orientation, plane: Plane, middle: list[int], spacing: np.ndarray
) -> Tile:
    pixels = _flattened(grey(order.apply(image.volume), brightest), plane, middle[plane.axis])
    columns_mm, rows_mm = (float(mm) for axis, mm in enumerate(spacing) if axis != plane.axis)
    return _tile(pixels, plane, (rows_mm, columns_mm))
