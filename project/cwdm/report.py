"""Pictures and the HTML report, because people would rather look than read.

The report is one file that needs nothing beside it: styles, script, pictures and, for the cases asked for, volumes
and the viewer stand inside. Its content security policy forbids the browser to fetch anything or to run other scripts.
"""

import base64
import gzip
import hashlib
import io
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import IO, Any, NamedTuple

import jinja2
import matplotlib
import nibabel as nib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from cwdm import __version__
from cwdm.errors import CwdmError, InputError
from cwdm.files import check_writable, write_atomically
from cwdm.report_data import Entry, Places, Records, RunRecord, Shown, read_records, read_shown

Volume = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

MOST_CASES = 60
"""Pictured in a report, the worst first: about 0.15 MB and 2 s each."""

FILE_NAME = "report.html"

LARGEST_DIFFERENCE, LARGEST_SPREAD = 0.5, 0.15
"""What is shown brightest; the spread at which an output is rejected."""

PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))

WORDS = {"failed": "failed", "reject": "reject", "look": "look", "unchecked": "not checked", "ok": "ok"}

_GREY = np.uint8(4)
"""Of 256, a step of the viewer's greys: what is left out is noise, which no packing makes smaller."""

_TILE_PIXELS = 256
_THUMBNAIL_PIXELS = 112
_BINS = 80


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
        box = _around(comparison.truth[:, :, comparison.slice_index])
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


def _around(image: Volume, margin: int = 4) -> tuple[slice, slice]:
    """The part of a slice (X, Y) that is not background, with a margin."""
    occupied = np.argwhere(image) if image.any() else np.argwhere(image == 0)
    (x, y), (last_x, last_y) = np.maximum(occupied.min(axis=0) - margin, 0), occupied.max(axis=0) + margin
    return slice(x, last_x + 1), slice(y, last_y + 1)


# The report


def write_report(
    places: Places,
    viewers: Sequence[str] = (),
    most: int = MOST_CASES,
    path: Path | None = None,
) -> Path:
    """Write one HTML file about all that a report folder tells; memory holds one case at a time.

    Args:
        places: the report folder, and where volumes are looked for.
        viewers: names of cases that get a slice viewer, about 6 MB each.
        most: how many cases are pictured, the worst first; those with a viewer always are.
        path: the file; None: report.html in the report folder.

    Returns:
        The file.

    Raises:
        InputError: there are no records, or none of a case that should have a viewer.
        OutputError: the file cannot be written.
    """
    path = path or places.report / FILE_NAME
    records = read_records(places.report)
    known = {entry.case for entry in records.entries}
    if unknown := [case for case in viewers if case not in known]:
        raise InputError(f"no record of {', '.join(unknown)} in {places.report}; --viewer takes a case's name")
    if places.truth and not places.truth.is_dir():
        raise InputError(f"the folder {places.truth} of true images does not exist; check --truth")
    check_writable(path.parent)
    environment = _environment()
    common = _common_warnings(records.entries)
    pictured = [number for number, entry in enumerate(records.entries) if not entry.failed][:most]
    with tempfile.TemporaryFile() as sections:
        rows = [
            _row(number, entry, places, entry.case in viewers, number in pictured, common, environment, sections)
            for number, entry in enumerate(records.entries)
        ]
        rows.sort(key=_worst_first)
        page = environment.get_template("report.html").generate(
            **_page(records, rows, common, bool(viewers)), sections=_read_back(sections, rows)
        )
        write_atomically(path, lambda file: _write_page(file, page))
    return path


@dataclass(frozen=True)
class Row:
    """A line of the overview, and where in the temporary file the section stands that it leads to."""

    number: int
    entry: Entry
    whys: Sequence[str]
    thumbnail: str = ""
    psnr_db: float | None = None
    ssim: float | None = None
    section_start: int = 0
    section_bytes: int = 0

    @property
    def pictured(self) -> bool:
        return self.section_bytes > 0

    @property
    def spread(self) -> float | None:
        return self.entry.quality.figures.get("spread") if self.entry.quality else None

    @property
    def seconds(self) -> float | None:
        return self.entry.record.seconds if self.entry.record else None


def _row(
    number: int,
    entry: Entry,
    places: Places,
    viewer: bool,
    pictured: bool,
    common: Sequence[str],
    environment: jinja2.Environment,
    sections: IO[bytes],
) -> Row:
    """Write a case's section and tell what the overview says of it."""
    warnings = [warning for warning in entry.warnings if warning not in common]
    reasons = [entry.reason] if entry.failed else list(entry.quality.reasons if entry.quality else ())
    if entry.failed or not (pictured or viewer):
        return Row(number, entry, reasons + warnings)
    shown = None
    try:
        shown = read_shown(entry, places)
    except (CwdmError, OSError) as error:
        warnings.append(f"not pictured: {getattr(error, 'reason', error)}")
    if shown and places.truth and shown.truth is None:
        warnings.append(f"its true image is not in {places.truth}")
    section = environment.get_template("case.html").render(
        number=number,
        entry=entry,
        words=WORDS,
        whys=reasons,
        warnings=warnings,
        figures=[(name, f"{value:g}") for name, value in (entry.quality.figures if entry.quality else {}).items()],
        **_pictures(shown, entry) if shown else {},
        **_volumes(shown, entry) if shown and viewer else {},
    )
    start, length = sections.tell(), sections.write(_bytes(section))
    row = Row(number, entry, reasons + warnings, section_start=start, section_bytes=length)
    if shown is None:
        return row
    return replace(row, thumbnail=_thumbnail(shown), psnr_db=shown.psnr_db, ssim=shown.ssim)


def _worst_first(row: Row) -> tuple[int, float, int]:
    """By the check, then by the agreement with the truth where there is one."""
    return row.entry.rank, row.psnr_db if row.psnr_db is not None else np.inf, row.number


def _read_back(sections: IO[bytes], rows: Iterable[Row]) -> Iterator[Markup]:
    for row in rows:
        sections.seek(row.section_start)
        yield Markup(sections.read(row.section_bytes).decode())


def _write_page(file: IO[bytes], page: Iterable[str]) -> None:
    for part in page:
        file.write(_bytes(part))


def _bytes(text: str) -> bytes:
    return text.encode(errors="backslashreplace")  # names of files can be any bytes


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("cwdm"), autoescape=True, undefined=_Absent, finalize=_visible
    )


class _Absent(jinja2.ChainableUndefined):
    """What a case without pictures leaves out."""


def _visible(value: Any) -> Any:
    """Text as it is but for what does not print: a name may hold what turns the rest of the line around."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in value)


def _page(records: Records, rows: Sequence[Row], common: Sequence[str], with_viewer: bool) -> dict[str, Any]:
    verdicts = [entry.verdict for entry in records.entries]
    scripts = [_part("templates/report.js")]
    scripts += [_part("vendor/niivue/niivue.umd.js"), _part("templates/viewer.js")] if with_viewer else []
    return {
        "policy": _policy(scripts),
        "program": f"cwdm {__version__}",
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "headline": _headline(verdicts),
        "tally": [(verdict, verdicts.count(verdict)) for verdict in WORDS if verdict in verdicts],
        "words": WORDS,
        "notices": common,
        "faults": records.faults,
        "css": Markup(_part("templates/report.css")),
        "rows": rows,
        "has_truth": any(row.psnr_db is not None for row in rows),
        "has_spread": any(row.spread is not None for row in rows),
        "pictured": sum(row.pictured for row in rows),
        "left_out": sum(not row.pictured and not row.entry.failed for row in rows),
        "made": list(_made(records.entries)),
        "runs": [_run(run) for run in records.runs],
        "viewer_note": _part("vendor/niivue/NOTICE").strip() if with_viewer else "",
        "scripts": [Markup(script) for script in scripts],
    }


def _headline(verdicts: Sequence[str]) -> str:
    count = len(verdicts)
    worth = sum(verdict not in ("ok", "unchecked") for verdict in verdicts)
    cases = "1 case" if count == 1 else f"{count} cases"
    if worth:
        return f"{worth} of {cases} should be looked at"
    return f"{cases}, not checked" if "unchecked" in verdicts else f"{cases}, nothing found to look at"


def _common_warnings(entries: Sequence[Entry]) -> list[str]:
    """What is said of every written case, and so need be said but once."""
    written = [set(entry.warnings) for entry in entries if not entry.failed]
    return sorted(set.intersection(*written)) if len(written) > 1 else []


class _Made(NamedTuple):
    modalities: str
    notice: str
    weights: str
    sha256: str
    sampler: str
    precision: str
    device: str
    program: str
    settings: list[tuple[str, str]]


def _made(entries: Iterable[Entry]) -> Iterator[_Made]:
    """Each way in which cases were made, with the contrasts made so."""
    ways: dict[str, list[Entry]] = {}
    for entry in entries:
        if record := entry.record:
            way = record.model_dump(include={"program", "weights", "sampler", "timesteps", "device", "precision"})
            ways.setdefault(json.dumps([way, record.settings], sort_keys=True), []).append(entry)
    for alike in ways.values():
        record = alike[0].record
        assert record
        modalities = sorted({entry.modality for entry in alike})
        count = len({entry.case for entry in alike})
        cases = "1 case" if count == 1 else f"{count} cases"
        steps = len(record.timesteps)
        yield _Made(
            modalities=f"{', '.join(modalities)} of {cases}",
            notice=str(record.weights_record.get("notice", "")),
            weights=record.weights.file,
            sha256=record.weights.sha256,
            sampler=f"{record.sampler}, {steps} step{'s' * (steps != 1)}",
            precision=record.precision,
            device=record.device,
            program=record.program,
            settings=list(_flat(record.settings)),
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", json.dumps(value) if isinstance(value, bool | list) else str(value)


def _run(run: RunRecord) -> dict[str, Any]:
    counts = {status: sum(case.status == status for case in run.cases) for status in ("written", "skipped", "failed")}
    return {"started": run.started, "seconds": run.seconds, "program": run.program, **counts}


def _policy(scripts: Iterable[str]) -> str:
    """A content security policy under which nothing is fetched, and no script runs but these."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "connect-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _part(name: str) -> str:
    return resources.files("cwdm").joinpath(name).read_text(encoding="utf-8")


# Pictures of a case


def _pictures(shown: Shown, entry: Entry) -> dict[str, Any]:
    """What the template needs of a case's images."""
    images = list(_images(shown, entry.modality))
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
    return {"shown": shown, "labels": labels, "planes": planes, "curves": list(_curves(shown, entry.modality))}


class _Image(NamedTuple):
    """A volume and how it is shown: `largest` is brightest, in grey or, for maps, in colours."""

    label: str
    volume: Volume
    largest: float
    colours: str
    scale: str = ""


def _images(shown: Shown, modality: str) -> Iterator[_Image]:
    for name, volume in shown.conditions.items():
        yield _Image(name, volume, _brightest(volume, shown), "gray")
    yield _Image(f"{modality}, synthesised", shown.synthesis, _brightest(shown.synthesis, shown), "gray")
    if shown.truth is not None and shown.difference is not None:
        yield _Image(f"{modality}, truth", shown.truth, _brightest(shown.truth, shown), "gray")
        yield _Image("difference", shown.difference, LARGEST_DIFFERENCE, "magma", f"0 to {LARGEST_DIFFERENCE:g}")
    if shown.spread is not None:
        most = f"0 to {LARGEST_SPREAD:g}; here at most {shown.spread.max():.2g}"
        yield _Image("spread", shown.spread, LARGEST_SPREAD, "magma", most)


def _brightest(volume: Volume, shown: Shown) -> float:
    """White: all but the brightest 0.5 % of the brain lies below; what is dark altogether stays dark."""
    inside = volume[shown.mask] if shown.mask.any() else volume.ravel()
    return float(np.clip(np.percentile(inside, 99.5), 0.3, 1.0))


def _slice(image: _Image, axis: int, shown: Shown) -> Image.Image:
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


def _scale(shown: Shown) -> float:
    """Pixels a millimetre: one, or less for what would be larger than a tile."""
    longest = max(n * mm for n, mm in zip(shown.synthesis.shape, shown.spacing_mm, strict=True))
    return min(1.0, _TILE_PIXELS / longest)


def _quantised(values: Volume, largest: float) -> Bytes:
    scaled: Volume = np.clip(values / np.float32(largest), 0, 1) * np.float32(255)
    return np.rint(scaled).astype(np.uint8)


def _thumbnail(shown: Shown) -> str:
    picture = _slice(_Image("", shown.synthesis, _brightest(shown.synthesis, shown), "gray"), 2, shown)
    picture.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    return _uri(picture, "WEBP", quality=60)


def _uri(picture: Image.Image, kind: str, **how: int) -> str:
    file = io.BytesIO()
    picture.save(file, kind, **how)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _curves(shown: Shown, modality: str) -> Iterator[dict[str, str]]:
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


def _volumes(shown: Shown, entry: Entry) -> dict[str, Any]:
    """What the slice viewer shows: each image as NIfTI in 8 bits, 0 outside the brain, packed for a page."""
    volumes = [
        {
            "name": image.label,
            "synthesised": image.volume is shown.synthesis,
            "overlay": image.colours != "gray",
            "colours": image.colours,
            "base64": _packed(_quantised(image.volume, image.largest), shown),
        }
        for image in _images(shown, entry.modality)
    ]
    return {"volumes": volumes, "slices": shown.synthesis.shape[2], "slice": shown.centre[2]}


def _packed(voxels: Bytes, shown: Shown) -> str:
    coarse = np.maximum(voxels - voxels % _GREY, _GREY) * shown.mask  # 0, which is transparent, is outside alone
    affine = np.diag([-shown.spacing_mm[0], -shown.spacing_mm[1], shown.spacing_mm[2], 1.0])  # LPS
    return base64.b64encode(gzip.compress(nib.Nifti1Image(coarse, affine).to_bytes(), 9, mtime=0)).decode()
