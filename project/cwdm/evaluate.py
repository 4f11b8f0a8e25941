"""Folders of synthesised images against the true ones: figures of every case, their summary, CSV, JSON and a table."""

import csv
import io
import os
import statistics
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from cwdm import __version__, metrics
from cwdm.brats import MODALITIES, Affine, CaseFolder, Volume, check_same_grid, find_cases, output_name, read_grid
from cwdm.errors import CaseError, CwdmError, InputError, OutputError, SettingsError
from cwdm.files import check_writable, write_atomically, write_json
from cwdm.preprocess import brain_mask, normalise
from cwdm.segment import REGIONS, Segmenter, labels_of, one_at_a_time, segment_pair

MOST_WORKERS = 8
"""A pair of full-size volumes takes half a gigabyte; more workers than this hardly help, since the disk is shared."""


@dataclass(frozen=True)
class Figure:
    """What a number means.

    Attributes:
        title: for people, with the unit.
        higher_is_better: decides which case is the worst.
        rule: how it is computed.
        doubt: what could not be confirmed about the rule it follows; empty where nothing is open.
    """

    title: str
    higher_is_better: bool
    rule: str
    doubt: str = ""


_UNIT = (
    "each image on [0, 1] by its own 0.1 and 99.9 percentiles, as the networks are trained, and 0 outside the brain; "
)
_PAPER = (
    "the paper (arXiv:2411.17203) gives the figure; which scaling, SSIM window and background it used "
    "could not be confirmed"
)
_BRASYN_2023 = "the scorer of 2023 could not be confirmed; this is torchmetrics' SSIM with its defaults"
_BRASYN_2024 = (
    "the published script (hongweilibran/BraSyn, ssim.py) does not run with today's torchmetrics; this is what "
    "its comments say, while some take the mean over the whole volume"
)
_BRASYN_2025 = "only the figure's name could be confirmed; its scaling and regions are those of 2024, brain only"
_BRASYN_UNIT = "each image on [0, 1] by its own 0.5 and 99.5 percentiles; "

FIGURES = {
    "psnr": Figure("PSNR, volume (dB)", True, _UNIT + "over the whole volume", _PAPER),
    "mse": Figure("MSE, volume", False, _UNIT + "over the whole volume", _PAPER),
    "mae": Figure("MAE, volume", False, _UNIT + "over the whole volume", _PAPER),
    "ssim": Figure(
        "SSIM, volume", True, _UNIT + "Gaussian window of 1.5 voxels, mean but for a rim of 5 voxels", _PAPER
    ),
    "psnr_brain": Figure("PSNR, brain (dB)", True, _UNIT + "over the brain alone"),
    "ssim_brain": Figure("SSIM, brain", True, _UNIT + "mean over the brain alone"),
    "brasyn_2023_ssim": Figure(
        "BraSyn 2023 SSIM",
        True,
        "raw intensities, range the larger span of the two images, mean over the whole volume",
        _BRASYN_2023,
    ),
    "brasyn_2024_ssim_tumour": Figure(
        "BraSyn 2024 SSIM, tumour", True, _BRASYN_UNIT + "0 outside the tumour, mean over it", _BRASYN_2024
    ),
    "brasyn_2024_ssim_healthy": Figure(
        "BraSyn 2024 SSIM, healthy",
        True,
        _BRASYN_UNIT + "0 in the tumour, mean over all else, air included",
        _BRASYN_2024,
    ),
    "brasyn_2025_mse_tumour": Figure(
        "BraSyn 2025 MSE, tumour", False, _BRASYN_UNIT + "mean over the tumour", _BRASYN_2025
    ),
    "brasyn_2025_mse_healthy": Figure(
        "BraSyn 2025 MSE, healthy", False, _BRASYN_UNIT + "mean over the brain without the tumour", _BRASYN_2025
    ),
}
for _region, _name in REGIONS.items():
    FIGURES |= {
        f"dice_{_region}": Figure(
            f"Dice, {_name}",
            True,
            "of the segmentations of the true case with this image in place of its own, and as it is; 1 if both are "
            "empty",
        ),
        f"hd95_{_region}": Figure(
            f"HD95, {_name} (mm)",
            False,
            "the larger of the two directed 95th percentiles of surface distances; 0 if both are empty, the volume's "
            "diagonal if one is",
            "the challenge's lesion-wise scorer has a fixed penalty of 374 mm and another way of counting surfaces",
        ),
        f"lesions_true_{_region}": Figure(
            f"lesions, {_name}, true case", True, "26-connected components found in the true case"
        ),
        f"lesions_missed_{_region}": Figure(
            f"lesions, {_name}, missed", False, "of those, how many do not touch one in the completed case"
        ),
        f"lesions_added_{_region}": Figure(
            f"lesions, {_name}, added", False, "components in the completed case that touch none in the true case"
        ),
    }


@dataclass(frozen=True)
class Pair:
    """A synthesised image and what it is held against, not read yet.

    Attributes:
        truth: the true image; None if there is none, and then `problem` says why.
        contrasts: the case's other true images, modality -> file.
        seg: the reference segmentation, if one was asked for.
        problem: why the pair cannot be scored, found while looking.
    """

    case: str
    modality: str
    prediction: Path
    truth: Path | None = None
    contrasts: Mapping[str, Path] = field(default_factory=dict)
    seg: Path | None = None
    problem: str = ""


@dataclass(frozen=True)
class Score:
    """The figures of one image.

    Attributes:
        modality: empty where there is no synthesised image.
        figures: name -> value; a figure that has no value for this image is left out and `notes` says why.
        brain: what the brain mask comes from.
        reason: why there is no score.
    """

    case: str
    modality: str
    figures: dict[str, float] = field(default_factory=dict)
    brain: str = ""
    notes: tuple[str, ...] = ()
    reason: str = ""

    @property
    def line(self) -> str:
        """What happened, for the log."""
        name = f"{self.case}: {self.modality}" if self.modality else self.case
        if self.reason:
            return f"{name} FAILED: {self.reason}"
        notes = "".join(f"\n    note: {note}" for note in self.notes)
        return f"{name} PSNR {self.figures['psnr']:.2f} dB, SSIM {self.figures['ssim']:.4f}{notes}"


def find_pairs(predictions: Path, truth: Path, seg: Path | None = None) -> list[Pair]:
    """Pair the images of a flat folder with the true ones by their names, sorted; no image is opened.

    A case folder in `truth` of which no image was synthesised is a pair with a problem too: a mean over fewer
    cases than were asked for would pass unnoticed.

    Args:
        predictions: flat folder of <case>-<modality>.nii.gz, as `cwdm infer` writes it.
        truth: folder of case folders, or flat like `predictions`.
        seg: folder with <case>-seg.nii.gz, flat or in case folders.

    Raises:
        InputError: a folder is missing or cannot be read, or no image is found.
    """
    found = [split for path in _files(predictions) if (split := _split(path))]
    if not found:
        raise InputError(
            f"no synthesised image in {predictions}; expected files such as {output_name('<case>', 'one of')} "
            f"{', '.join(MODALITIES)}, as 'cwdm infer' writes them"
        )
    _files(truth)
    if seg:
        _files(seg)
    try:
        folders = {folder.name: folder for folder in find_cases(truth)}
    except InputError:  # flat
        folders = {}
    pairs = [_pair(case, modality, path, truth, folders.get(case), seg) for case, modality, path in found]
    missed = sorted(folders.keys() - {pair.case for pair in pairs})
    pairs += [Pair(name, "", predictions, problem=f"no synthesised image of it in {predictions}") for name in missed]
    return sorted(pairs, key=lambda pair: (pair.case, pair.modality))


def score_pair(pair: Pair, segmenter: Segmenter | None = None) -> Score:
    """All figures of one synthesised image.

    Raises:
        CaseError: a file is missing or damaged, sizes or grids differ, or an image has nothing to compare.
        SettingsError: the segmenter cannot be run at all.
    """
    if pair.truth is None:
        raise CaseError(pair.case, pair.problem)
    try:
        images = _Images.read(pair)
        figures = {**_paper_figures(images), **_brasyn_figures(images)}
        notes = tuple(images.notes)
        if segmenter:
            files = {**pair.contrasts, pair.modality: pair.truth}
            figures |= segment_pair(segmenter, pair.case, files, pair.modality, pair.prediction)
    except InputError as error:
        raise CaseError(pair.case, str(error)) from error
    return Score(pair.case, pair.modality, figures, "other contrasts" if pair.contrasts else "true image", notes)


def score_pairs(
    pairs: Sequence[Pair],
    segmenter: Segmenter | None = None,
    workers: int | None = None,
    on_score: Callable[[Score], None] = lambda score: None,
) -> list[Score]:
    """The scores of all pairs, in their order; one that cannot be scored carries its reason.

    Args:
        workers: pairs at a time; None for one a processor, MOST_WORKERS at most. Memory grows with it.
        on_score: called after each pair, as they finish.

    Raises:
        SettingsError: the segmenter cannot be run at all.
    """
    workers = workers or min(_processors(), MOST_WORKERS)
    segmenter = one_at_a_time(segmenter) if segmenter else None
    scores: dict[int, Score] = {}
    # Threads: reading, filtering and most arithmetic let go of the interpreter, and nothing need be sent to them.
    with ThreadPoolExecutor(workers, "score") as pool:
        running = {pool.submit(_score_or_reason, pair, segmenter): index for index, pair in enumerate(pairs)}
        try:
            for done in as_completed(running):
                score = scores[running[done]] = done.result()
                on_score(score)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [scores[index] for index in range(len(pairs))]


Summary = dict[str, dict[str, Any]]


def summarise(scores: Iterable[Score]) -> Summary:
    """Figure -> number of images, mean, standard deviation (n − 1), median, worst value and its case.

    An infinite value (PSNR of equal images) makes the mean infinite; the deviation is None then, and for one image.
    """
    scored = [score for score in scores if not score.reason]
    summary: Summary = {}
    for name, figure in FIGURES.items():
        values = [(score.figures[name], score) for score in scored if name in score.figures]
        if not values:
            continue
        numbers = [value for value, _ in values]
        worst, of = (min if figure.higher_is_better else max)(values, key=lambda pair: pair[0])
        spread = statistics.stdev(numbers) if len(numbers) > 1 and np.isfinite(numbers).all() else None
        summary[name] = {
            "images": len(numbers),
            "mean": statistics.fmean(numbers),
            "sd": spread,
            "median": statistics.median(numbers),
            "worst": worst,
            "worst_case": f"{of.case}-{of.modality}",
        }
    return summary


def summaries(scores: Sequence[Score]) -> dict[str, Summary]:
    """`summarise` for all images together, and for each modality if there are several."""
    modalities = sorted({score.modality for score in scores if not score.reason})
    groups = {"all": summarise(scores)}
    if len(modalities) > 1:
        groups |= {name: summarise(score for score in scores if score.modality == name) for name in modalities}
    return groups


def tables(scores: Sequence[Score]) -> list[Table]:
    """The summaries as tables for the terminal; below the last what the brain mask is and which rules are open."""
    groups = summaries(scores)
    doubts = dict.fromkeys(FIGURES[name].doubt for name in groups["all"] if FIGURES[name].doubt)
    marks = dict(zip(doubts, string.ascii_lowercase, strict=False))
    drawn = [_table(name, summary, marks) for name, summary in groups.items()]
    brains = sorted({score.brain for score in scores if score.brain})
    legend = [f"Brain: nonzero voxels of the {' or '.join(brains)}."] if brains else []
    legend += [f"({marks[doubt]}) {doubt}." for doubt in doubts]
    drawn[-1].caption = "\n".join(legend)
    return drawn


def write_evaluation(out: Path, scores: Sequence[Score], record: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write OUT/evaluation.csv, a line an image, and OUT/evaluation.json, with the summaries and what the figures mean.

    Raises:
        OutputError: the folder cannot be written.
    """
    check_writable(out)
    used = [name for name in FIGURES if any(name in score.figures for score in scores)]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "modality", *used, "brain", "notes", "reason"])
    for score in scores:
        row = [repr(score.figures[name]) if name in score.figures else "" for name in used]
        writer.writerow([score.case, score.modality, *row, score.brain, "; ".join(score.notes), score.reason])
    table, report = out / "evaluation.csv", out / "evaluation.json"
    contents = text.getvalue().encode(errors="backslashreplace")  # names of files can be any bytes
    write_atomically(table, lambda file: file.write(contents))
    write_json(
        report,
        {
            "program": f"cwdm {__version__}",
            **record,
            "figures": {name: _explanation(FIGURES[name]) for name in used},
            "summary": _finite(summaries(scores)),
            "images": [_finite(_entry(score)) for score in scores],
        },
    )
    return table, report


# Pairing


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except FileNotFoundError as error:
        raise InputError(f"the folder {folder} does not exist; check the path") from error
    except NotADirectoryError as error:
        raise InputError(f"{folder} is not a folder; give the folder of images") from error
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be read: {error.strerror}") from error


def _split(path: Path) -> tuple[str, str, Path] | None:
    """Case, modality and file, from its name."""
    for modality in MODALITIES:
        ending = output_name("", modality)
        if path.name.endswith(ending) and len(path.name) > len(ending):
            return path.name.removesuffix(ending), modality, path
    return None


def _pair(case: str, modality: str, path: Path, truth: Path, folder: CaseFolder | None, seg: Path | None) -> Pair:
    mask, problem = None, ""
    if seg:
        mask = _beside_or_inside(seg, case, "seg")
        problem = "" if mask else f"expected its segmentation {output_name(case, 'seg')} in {seg}, found none; add it"
    if folder is None:
        image = truth / output_name(case, modality)
        if not image.exists():
            problem = f"expected its true image {image.name} or a case folder {case} in {truth}, found neither"
        return Pair(case, modality, path, None if problem else image, {}, mask, problem)
    if folder.problem or modality not in folder.files:
        problem = folder.problem or f"expected the true {modality} in {folder.folder}, found none; add it"
    contrasts = {name: file for name, file in folder.files.items() if name != modality}
    return Pair(case, modality, path, None if problem else folder.files[modality], contrasts, mask, problem)


def _beside_or_inside(folder: Path, case: str, ending: str) -> Path | None:
    name = output_name(case, ending)
    places = (folder / name, folder / case / name)
    return next((place for place in places if place.exists()), None)


# Scoring


@dataclass
class _Images:
    """What one image is scored with, read and checked; scaled versions are made when first needed."""

    case: str
    prediction: Volume
    truth: Volume
    brain: metrics.Mask
    tumour: metrics.Mask | None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, pair: Pair) -> "_Images":
        assert pair.truth is not None
        truth, affine, oriented = read_grid(pair.truth)
        prediction = _read_like(pair, pair.prediction, truth, affine, oriented)
        for path, volume in ((pair.prediction, prediction), (pair.truth, truth)):
            if volume.min() == volume.max():
                raise CaseError(pair.case, f"{path}: every voxel is {volume.flat[0]:g}; there is nothing to compare")
        contrasts = (_read_like(pair, path, truth, affine, oriented) for path in pair.contrasts.values())
        brain = brain_mask(contrasts) if pair.contrasts else truth != 0
        tumour = None
        if pair.seg:
            tumour = labels_of(_read_like(pair, pair.seg, truth, affine, oriented), str(pair.seg)) > 0
        return cls(pair.case, prediction, truth, brain, tumour)

    @cached_property
    def brasyn_units(self) -> tuple[Volume, Volume]:
        return (
            self.scaled("synthesised", self.prediction, metrics.brasyn_unit),
            self.scaled("true", self.truth, metrics.brasyn_unit),
        )

    def scaled(self, which: str, volume: Volume, scale: Callable[[Volume], Volume]) -> Volume:
        """A volume in [0, 1]; raises CaseError if its percentiles are equal."""
        try:
            return scale(volume)
        except ValueError as error:
            raise CaseError(self.case, f"the {which} image cannot be scaled: {error}") from error


def _read_like(pair: Pair, path: Path, truth: Volume, affine: Affine, oriented: bool) -> Volume:
    volume, own, has_orientation = read_grid(path)
    if not (oriented and has_orientation):
        own = affine  # one of them is a guess: only the shapes can be compared
    true = "the true image"
    check_same_grid(pair.case, true, {true: truth, path.name: volume}, {true: affine, path.name: own})
    return volume


def _paper_figures(images: _Images) -> dict[str, float]:
    prediction = images.scaled("synthesised", images.prediction, lambda volume: normalise(volume)[0])
    truth = images.scaled("true", images.truth, lambda volume: normalise(volume)[0])
    prediction[~images.brain] = truth[~images.brain] = 0
    everywhere = np.ones(truth.shape, np.bool_)
    try:
        return {
            "psnr": metrics.psnr(prediction, truth, everywhere),
            "mse": metrics.mse(prediction, truth, everywhere),
            "mae": metrics.mae(prediction, truth, everywhere),
            "ssim": metrics.ssim(prediction, truth, metrics.interior(truth.shape)),
            "psnr_brain": metrics.psnr(prediction, truth, images.brain),
            "ssim_brain": metrics.ssim(prediction, truth, images.brain),
        }
    except ValueError as error:
        raise CaseError(images.case, f"cannot be scored: {error}") from error


def _brasyn_figures(images: _Images) -> dict[str, float]:
    try:
        prediction, truth = images.prediction, images.truth
        everywhere = np.ones(truth.shape, np.bool_)
        span = metrics.value_range((prediction, truth))
        figures = {"brasyn_2023_ssim": metrics.ssim(prediction, truth, everywhere, span)}
        if images.tumour is None:
            return figures
        return figures | _region_figures(images, images.tumour)
    except ValueError as error:
        raise CaseError(images.case, f"cannot be scored by the challenge's rules: {error}") from error


def _region_figures(images: _Images, tumour: metrics.Mask) -> dict[str, float]:
    pair = images.brasyn_units
    healthy = images.brain & ~tumour
    figures: dict[str, float] = {}
    if not tumour.any():
        images.notes.append("the segmentation holds no tumour, so the figures of the tumour have no value")
    elif metrics.value_range(volume * tumour for volume in pair) == 0:
        images.notes.append("both images are 0 all over the tumour, so its SSIM has no value")
        figures["brasyn_2025_mse_tumour"] = metrics.mse(*pair, tumour)
    else:
        figures["brasyn_2024_ssim_tumour"] = metrics.brasyn_ssim(*pair, tumour)
        figures["brasyn_2025_mse_tumour"] = metrics.mse(*pair, tumour)
    if not healthy.any():
        images.notes.append("the segmentation covers the whole brain, so the figures of healthy tissue have no value")
        return figures
    figures["brasyn_2024_ssim_healthy"] = metrics.brasyn_ssim(*pair, ~tumour)
    figures["brasyn_2025_mse_healthy"] = metrics.mse(*pair, healthy)
    return figures


def _score_or_reason(pair: Pair, segmenter: Segmenter | None) -> Score:
    try:
        return score_pair(pair, segmenter)
    except (OutputError, SettingsError):
        raise
    except CaseError as error:
        return Score(pair.case, pair.modality, reason=error.reason)
    except CwdmError as error:
        return Score(pair.case, pair.modality, reason=str(error))
    except MemoryError:
        return Score(pair.case, pair.modality, reason="not enough memory; give fewer --workers")
    except Exception as error:  # whatever it is, it must not take the other images down
        return Score(pair.case, pair.modality, reason=f"unexpected {type(error).__name__}: {error}")


def _processors() -> int:
    """Those that this process may use, which in a container are fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


# Showing


def _table(name: str, summary: Summary, marks: Mapping[str, str]) -> Table:
    images = max((row["images"] for row in summary.values()), default=0)
    table = Table(title=f"{name}, n = {images}", caption_justify="left")
    for column in ("figure", "mean", "sd", "median", "worst", "worst case"):
        table.add_column(column, justify="left" if column in ("figure", "worst case") else "right", overflow="fold")
    for figure, row in summary.items():
        explanation = FIGURES[figure]
        mark = f" ({marks[explanation.doubt]})" if explanation.doubt else ""
        count = f", n = {row['images']}" if row["images"] < images else ""
        numbers = ("" if row[key] is None else f"{row[key]:.4g}" for key in ("mean", "sd", "median", "worst"))
        table.add_row(explanation.title + mark + count, *numbers, _printable(row["worst_case"]))
    return table


def _printable(text: str) -> str:
    """A folder's name may hold anything, even sequences that would take over the terminal, or rich's markup."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text).replace("[", "\\[")


def _explanation(figure: Figure) -> dict[str, Any]:
    return {
        "title": figure.title,
        "rule": figure.rule,
        "not_confirmed": figure.doubt or None,
        "worst": "lowest" if figure.higher_is_better else "highest",
    }


def _entry(score: Score) -> dict[str, Any]:
    return {
        "case": score.case,
        "modality": score.modality,
        "figures": score.figures,
        "brain": score.brain,
        "notes": list(score.notes),
        "reason": score.reason,
    }


def _finite(content: Any) -> Any:
    """The same with infinite numbers as text, since JSON has none."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return str(content) if isinstance(content, float) and not np.isfinite(content) else content
