"""Pictures: the slices and curves of a report's case, and rows of slices as a PNG."""

import base64
import gzip
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import nibabel as nib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image

from cwdm.arrays import Volume, bounding_box
from cwdm.files import write_atomically
from cwdm.report.data import CaseVolumes

Bytes = npt.NDArray[np.uint8]

LARGEST_DIFFERENCE, LARGEST_SPREAD = 0.5, 0.15
"""What is shown brightest; the spread at which an output is rejected."""

PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))

_GREY = np.uint8(4)
"""Of 256, a step of the viewer's greys: what is left out is noise, which no packing makes smaller."""

_TILE_PIXELS = 256
_THUMBNAIL_PIXELS = 112
_BINS = 80
_MARGIN = 4


# Pictures of a case


def pictures_of(shown: CaseVolumes, modality: str) -> dict[str, Any]:
    """What the template needs of a case's images."""
    images = list(_images(shown, modality))
    widths = [shown.synthesis.shape[i] * shown.spacing_mm[i] for i in (0, 1)]
    planes = []
    for name, axis in PLANES:
        slices = [_slice(image, axis, shown) for image in images]
        percent = round(100 * slices[0].width / _scale(shown) / max(widths), 1)
        tiles = [
            {
                "uri": _uri(picture, "WEBP", quality=82, method=4),
                "alt": f"{image.label}, {name}",
                "width": picture.width,
                "height": picture.height,
                "percent": percent,
            }
            for image, picture in zip(images, slices, strict=True)
        ]
        planes.append({"name": name, "tiles": tiles})
    labels = [{"text": i.label, "scale": i.scale, "synthesised": i.volume is shown.synthesis} for i in images]
    return {"shown": shown, "labels": labels, "planes": planes, "curves": list(_curves(shown, modality))}


class _Image(NamedTuple):
    """A volume and how it is shown: `largest` is brightest, in grey or, for maps, in colours."""

    label: str
    volume: Volume
    largest: float
    colours: str
    scale: str = ""


def _images(shown: CaseVolumes, modality: str) -> Iterator[_Image]:
    for name, volume in shown.conditions.items():
        yield _Image(name, volume, _brightest(volume, shown), "gray")
    yield _Image(f"{modality}, synthesised", shown.synthesis, _brightest(shown.synthesis, shown), "gray")
    if shown.truth is not None and shown.difference is not None:
        yield _Image(f"{modality}, truth", shown.truth, _brightest(shown.truth, shown), "gray")
        yield _Image("difference", shown.difference, LARGEST_DIFFERENCE, "magma", f"0 to {LARGEST_DIFFERENCE:g}")
    if shown.spread is not None:
        most = f"0 to {LARGEST_SPREAD:g}; here at most {shown.spread.max():.2g}"
        yield _Image("spread", shown.spread, LARGEST_SPREAD, "magma", most)


def _brightest(volume: Volume, shown: CaseVolumes) -> float:
    """White: all but the brightest 0.5 % of the brain lies below; what is dark altogether stays dark."""
    inside = volume[shown.mask] if shown.mask.any() else volume.ravel()
    return float(np.clip(np.percentile(inside, 99.5), 0.3, 1.0))


def _slice(image: _Image, axis: int, shown: CaseVolumes) -> Image.Image:
    """One slice, a pixel a millimetre, the head upright and seen from the front or from below."""
    pixels = _quantised(np.take(image.volume, shown.centre[axis], axis), image.largest).T
    if axis != 2:
        pixels = pixels[::-1]  # z runs upwards
    rows, columns = [spacing for i, spacing in enumerate(shown.spacing_mm) if i != axis][::-1]
    scale = _scale(shown)
    size = max(1, round(pixels.shape[1] * columns * scale)), max(1, round(pixels.shape[0] * rows * scale))
    if image.colours != "gray":
        coloured = (matplotlib.colormaps[image.colours](pixels)[..., :3] * 255).astype(np.uint8)
        return Image.fromarray(coloured).resize(size, Image.Resampling.BILINEAR)
    return Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BILINEAR)


def _scale(shown: CaseVolumes) -> float:
    """Pixels a millimetre: one, or less for what would be larger than a tile."""
    longest = max(n * mm for n, mm in zip(shown.synthesis.shape, shown.spacing_mm, strict=True))
    return min(1.0, _TILE_PIXELS / longest)


def _quantised(values: Volume, largest: float) -> Bytes:
    scaled: Volume = np.clip(values / np.float32(largest), 0, 1) * np.float32(255)
    return np.rint(scaled).astype(np.uint8)


def thumbnail(shown: CaseVolumes) -> str:
    picture = _slice(_Image("", shown.synthesis, _brightest(shown.synthesis, shown), "gray"), 2, shown)
    picture.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    return _uri(picture, "WEBP", quality=60)


def _uri(picture: Image.Image, kind: str, **how: int) -> str:
    file = io.BytesIO()
    picture.save(file, kind, **how)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


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
    volumes = [
        {
            "name": image.label,
            "synthesised": image.volume is shown.synthesis,
            "overlay": image.colours != "gray",
            "colours": image.colours,
            "base64": _packed(_quantised(image.volume, image.largest), shown),
        }
        for image in _images(shown, modality)
    ]
    return {"volumes": volumes, "slices": shown.synthesis.shape[2], "slice": shown.centre[2]}


def _packed(voxels: Bytes, shown: CaseVolumes) -> str:
    coarse = np.maximum(voxels - voxels % _GREY, _GREY) * shown.mask  # 0, which is transparent, is outside alone
    affine = np.diag([-shown.spacing_mm[0], -shown.spacing_mm[1], shown.spacing_mm[2], 1.0])  # LPS
    return base64.b64encode(gzip.compress(nib.Nifti1Image(coarse, affine).to_bytes(), 9, mtime=0)).decode()


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
