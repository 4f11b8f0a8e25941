"""Pictures: the slices and curves of a report's case, and rows of slices as a PNG."""

import base64
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import contourpy
import matplotlib
import matplotlib.colors
import nibabel as nib
import numpy as np
import numpy.typing as npt
import PIL.Image
from markupsafe import Markup
from matplotlib.figure import Figure

from cwdm.arrays import Volume, bounding_box
from cwdm.files import write_atomically
from cwdm.report.checkers import TILE_PIXELS, grey
from cwdm.report.data import PREDICTED_STD, SPREAD, CaseVolumes
from cwdm.report.html import webp_uri

Bytes = npt.NDArray[np.uint8]
AnyType = TypeVar("AnyType", bound=np.generic)

LARGEST_DIFFERENCE, LARGEST_STD = 0.5, {SPREAD: 0.15, PREDICTED_STD: 0.20}
"""What is shown brightest; the standard deviations at which an output is rejected."""

MAP = "magma"
"""Colours of what is not an image."""


class Plane(NamedTuple):
    """A direction of view; `left` and `right` are the sides of the head that are seen there."""

    name: str
    axis: int
    left: str
    right: str


PLANES = (Plane("axial", 2, "R", "L"), Plane("coronal", 1, "R", "L"), Plane("sagittal", 0, "A", "P"))
"""Of a volume stored LPS."""

_GREY = np.uint8(4)
"""Of 256, a step of the viewer's greys: what is left out is noise, which no packing makes smaller."""

_THUMBNAIL_PIXELS = 112
_BINS = 80
_MARGIN = 4


# Pictures of a case


def pictures_of(shown: CaseVolumes, case: str, modality: str, number: int) -> dict[str, Any]:
    """What the template needs of a case's images.

    Args:
        number: names what the page defines for this case alone.
    """
    images = list(_images(shown, modality))
    widths = [shown.synthesis.shape[i] * shown.spacing_mm[i] for i in (0, 1)]
    planes = []
    for plane in PLANES:
        slices = [_slice(image, plane.axis, shown) for image in images]
        tiles = [
            {"uri": _uri(picture, quality=88, method=4), "alt": f"{case}: {image.label}, {plane.name}"}
            for image, picture in zip(images, slices, strict=True)
        ]
        doubt = "" if shown.oriented else "?"
        planes.append(
            {
                "name": plane.name,
                "tiles": tiles,
                "left": plane.left + doubt,
                "right": plane.right + doubt,
                "width": slices[0].width,
                "height": slices[0].height,
                "percent": round(100 * slices[0].width / _scale(shown) / max(widths), 1),
                "outline": _outline(shown, plane, f"outline-{number}-{plane.name}"),
            }
        )
    labels = [
        {
            "text": image.label,
            "note": image.note,
            "largest": f"{image.largest:g}" if image.is_map else "",
            "synthesised": image.volume is shown.synthesis,
        }
        for image in images
    ]
    return {"shown": shown, "labels": labels, "planes": planes, "curves": list(_curves(shown, modality))}


def thumbnail(shown: CaseVolumes) -> Markup:
    """The axial slice of the synthesis, small, as a URI."""
    picture = _slice(_Image("", shown.synthesis, _brightest(shown.synthesis, shown), "gray"), 2, shown)
    picture.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    return _uri(picture, quality=60)


def map_colours() -> str:
    """The colours of maps from 0 to the largest value, for a style sheet."""
    colours = (matplotlib.colors.to_hex(colour) for colour in matplotlib.colormaps[MAP](np.linspace(0, 1, 9)))
    return ", ".join(colours)


class _Image(NamedTuple):
    """A volume and how it is shown: `largest` is brightest, in grey or, for maps, in colours."""

    label: str
    volume: Volume
    largest: float
    colours: str = "gray"
    note: str = ""

    @property
    def is_map(self) -> bool:
        return self.colours == MAP


def _images(shown: CaseVolumes, modality: str) -> Iterator[_Image]:
    for name, volume in shown.conditions.items():
        yield _Image(name, volume, _brightest(volume, shown))
    yield _Image(f"{modality}, synthesised", shown.synthesis, _brightest(shown.synthesis, shown))
    if shown.truth is not None and shown.difference is not None:
        yield _Image(f"{modality}, truth", shown.truth, _brightest(shown.truth, shown))
        yield _Image("difference", shown.difference, LARGEST_DIFFERENCE, MAP)
    if shown.std is not None:
        largest = LARGEST_STD[shown.std_name]
        yield _Image(shown.std_name, shown.std, largest, MAP, f"here at most {shown.std.max():.2g}")


def _brightest(volume: Volume, shown: CaseVolumes) -> float:
    """White: all but the brightest 0.5 % of the brain lies below; what is dark altogether stays dark."""
    inside = volume[shown.mask] if shown.mask.any() else volume.ravel()
    return float(np.clip(np.percentile(inside, 99.5), 0.3, 1.0))


def _slice(image: _Image, axis: int, shown: CaseVolumes) -> PIL.Image.Image:
    """One slice, a pixel a millimetre, the head upright and seen from the front or from below."""
    pixels = grey(_oriented(image.volume, axis, shown), image.largest)
    rows, columns = [spacing for i, spacing in enumerate(shown.spacing_mm) if i != axis][::-1]
    scale = _scale(shown)
    size = max(1, round(pixels.shape[1] * columns * scale)), max(1, round(pixels.shape[0] * rows * scale))
    if image.is_map:
        pixels = (matplotlib.colormaps[MAP](pixels)[..., :3] * 255).astype(np.uint8)
    return PIL.Image.fromarray(np.ascontiguousarray(pixels)).resize(size, PIL.Image.Resampling.BILINEAR)


def _oriented(volume: npt.NDArray[AnyType], axis: int, shown: CaseVolumes) -> npt.NDArray[AnyType]:
    """The slice of a volume through the centre as (rows, columns)."""
    pixels = np.take(volume, shown.centre[axis], axis).T
    return pixels if axis == 2 else pixels[::-1]  # z runs upwards


def _scale(shown: CaseVolumes) -> float:
    """Pixels a millimetre: one, or less for what would be larger than a tile."""
    longest = max(n * mm for n, mm in zip(shown.synthesis.shape, shown.spacing_mm, strict=True))
    return min(1.0, TILE_PIXELS / longest)


def _uri(picture: PIL.Image.Image, **how: int) -> Markup:
    return Markup(webp_uri(picture, **how))


def _outline(shown: CaseVolumes, plane: Plane, name: str) -> dict[str, Any] | None:
    """The outline of the tumour in a plane as a path in units of voxels; None where the plane holds none of it."""
    if shown.tumour is None:
        return None
    mask = _oriented(shown.tumour, plane.axis, shown)
    if not mask.any():
        return None
    lines = contourpy.contour_generator(z=np.pad(mask, 1).astype(np.float32)).lines(0.5)
    # Points of the padded grid lie in the middles of voxels.
    path = "".join("M" + " ".join(f"{x - 0.5:.1f},{y - 0.5:.1f}" for x, y in np.asarray(line)) for line in lines)
    return {"name": name, "path": path, "columns": mask.shape[1], "rows": mask.shape[0]}


def _curves(shown: CaseVolumes, modality: str) -> Iterator[dict[str, str]]:
    """Histograms of the intensities inside the brain as paths in a box of 320 by 88."""
    named = [(name, f"condition-{i}", volume) for i, (name, volume) in enumerate(shown.conditions.items())]
    named += [(f"{modality}, truth", "truth", shown.truth)] if shown.truth is not None else []
    named += [(f"{modality}, synthesised", "synthesis", shown.synthesis)]
    counts = [np.histogram(np.clip(volume[shown.mask], 0, 1), _BINS, (0, 1))[0] for _, _, volume in named]
    # A bin that towers over all others, as of a constant image, leaves the rest of them visible.
    top = max(1.0, *(float(np.sort(count)[-2:].mean()) for count in counts))
    for (name, kind, _), count in zip(named, counts, strict=True):
        heights = 86 - 82 * np.minimum(count / top, 1)
        points = " ".join(f"{320 * (i + 0.5) / _BINS:.0f},{height:.1f}" for i, height in enumerate(heights))
        yield {"name": name, "kind": kind, "path": f"M{points}"}


# The viewer


def viewer_volumes(shown: CaseVolumes, modality: str) -> dict[str, Any]:
    """What the slice viewer shows: each image as NIfTI in 8 bits, 0 outside the brain, packed for a page."""
    images = list(_images(shown, modality))
    volumes = [_viewed(image, _coarse(grey(image.volume, image.largest), shown), shown) for image in images]
    if shown.tumour is not None:
        volumes.append(_viewed(_Image("segmentation", shown.synthesis, 1, "red"), np.uint8(255) * shown.tumour, shown))
    i, j, k = shown.centre
    centre_mm = np.array([-i, -j, k]) * shown.spacing_mm
    return {
        "volumes": volumes,
        "slices": shown.synthesis.shape[2],
        "slice": shown.centre[2],
        "centre_mm": json.dumps([round(float(value), 3) for value in centre_mm]),
    }


def _viewed(image: _Image, voxels: Bytes, shown: CaseVolumes) -> dict[str, Any]:
    affine = np.diag([-shown.spacing_mm[0], -shown.spacing_mm[1], shown.spacing_mm[2], 1.0])  # LPS
    packed = gzip.compress(nib.Nifti1Image(voxels, affine).to_bytes(), 9, mtime=0)
    return {
        "name": image.label,
        "synthesised": image.volume is shown.synthesis and image.colours == "gray",
        "overlay": image.colours != "gray",
        "colours": image.colours,
        "largest": f"{image.largest:g}",
        "base64": Markup(base64.b64encode(packed).decode()),
    }


def _coarse(voxels: Bytes, shown: CaseVolumes) -> Bytes:
    """With fewer greys; 0, which is transparent, is outside the brain alone."""
    return np.maximum(voxels - voxels % _GREY, _GREY) * shown.mask


# Comparisons


@dataclass(frozen=True)
class Comparison:
    """What is shown of one case: volumes (X, Y, Z) in [0, 1], stored LPS.

    Attributes:
        conditions: name -> volume.
        caption: a line about the figures of merit.
        slice_index: the axial slice to show.
    """

    name: str
    conditions: Mapping[str, Volume]
    target: str
    synthesis: Volume
    truth: Volume
    caption: str
    slice_index: int


def draw_comparisons(path: Path, comparisons: Sequence[Comparison], title: str) -> None:
    """Write a PNG with a row a case: conditions, synthesis, truth and their absolute difference."""
    figure = Figure(figsize=(15, 3.3 * len(comparisons) + 0.8), facecolor="black", layout="constrained")
    figure.suptitle(title, color="white", fontsize=14)
    axes = figure.subplots(len(comparisons), 6, squeeze=False)
    for row, comparison in zip(axes, comparisons, strict=True):
        difference = np.abs(comparison.synthesis - comparison.truth)
        shown = comparison.truth[:, :, comparison.slice_index] != 0
        box = bounding_box(shown if shown.any() else ~shown, _MARGIN)
        images = {
            **comparison.conditions,
            f"{comparison.target}, synthesised": comparison.synthesis,
            f"{comparison.target}, truth": comparison.truth,
            "|difference|": difference,
        }
        for axis, (label, volume) in zip(row, images.items(), strict=True):
            colours = "magma" if volume is difference else "gray"
            axis.imshow(volume[*box, comparison.slice_index].T, cmap=colours, vmin=0, vmax=1)
            axis.set_title(label, color="white", fontsize=10)
            axis.axis("off")
        row[3].text(
            0.5, -0.04, comparison.caption, color="white", fontsize=9, ha="center", va="top", transform=row[3].transAxes
        )
        row[0].text(
            0.0, -0.04, comparison.name, color="white", fontsize=9, ha="left", va="top", transform=row[0].transAxes
        )

    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))
