"""The figures of a synthesised image against the true one, for folders of them."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from cwdm import metrics
from cwdm.errors import CaseError, CwdmError, InputError, OutputError, SettingsError
from cwdm.evaluation.segmenters import (
    SCHEMES,
    TODAY,
    Labels,
    Scheme,
    Segmenter,
    compare_with_reference,
    compare_with_true_case,
    label_doubt,
    labels_of,
    segment_pair,
)
from cwdm.images import (
    MODALITIES,
    CaseFolder,
    Image,
    Volume,
    brain_mask,
    find_cases,
    in_order_of,
    list_folder,
    normalise,
    output_name,
    read_grid,
    write_nifti,
)

MOST_WORKERS = 8
"""A pair of full-size volumes takes 0.75 GB; more workers than this hardly help, since the disk is shared."""


SYNTHESISED = "synthesised"
"""Stands for the modality of a synthesised image, where the true one has that name."""


@dataclass(frozen=True)
class Pair:
    """A synthesised image and what it is held against, not read yet.

    Attributes:
        modality: empty for images of other kinds than the four contrasts.
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
        modality: empty where there is no synthesised image, and for those of other kinds.
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
    def name(self) -> str:
        """Of the image."""
        return f"{self.case}-{self.modality}" if self.modality else self.case

    @property
    def line(self) -> str:
        """What happened, for the log."""
        name = f"{self.case}: {self.modality}" if self.modality else self.case
        if self.reason:
            return f"{name} FAILED: {self.reason}"
        notes = "".join(f"\n    note: {note}" for note in self.notes)
        if "target_mae" in self.figures:
            return f"{name} MAE {self.figures['target_mae']:.4g}, PSNR {self.figures['target_psnr']:.2f} dB{notes}"
        return f"{name} PSNR {self.figures['psnr']:.2f} dB, SSIM {self.figures['ssim']:.4f}{notes}"


Scorer = Callable[[Pair], Score]
"""Makes a score of a pair; raises CaseError where it cannot."""


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
            f"{', '.join(MODALITIES)}, as 'cwdm infer' writes them; for images of 'cwdm translate', say which file "
            "of a case is the true one, such as --truth-file '{case}/ct.nii.gz'"
        )
    _files(truth)
    if seg:
        _files(seg)
    try:
        folders = {folder.name: folder for folder in find_cases(truth, flat=False) if folder.files}
    except InputError:  # flat
        folders = {}
    pairs = [_pair(case, modality, path, truth, folders.get(case), seg) for case, modality, path in found]
    missed = sorted(folders.keys() - {pair.case for pair in pairs})
    pairs += [Pair(name, "", predictions, problem=f"no synthesised image of it in {predictions}") for name in missed]
    return sorted(pairs, key=lambda pair: (pair.case, pair.modality))


def score_pair(pair: Pair, segmenter: Segmenter | None = None, scheme: Scheme = SCHEMES[TODAY]) -> Score:
    """All figures of one synthesised image.

    Args:
        segmenter: must bear to be called in several threads; see `one_at_a_time`.
        scheme: what the labels of the reference segmentation and of the segmenter's mean.

    Raises:
        CaseError: a file is missing or damaged, sizes or grids differ, or an image has nothing to compare.
        SettingsError: the segmenter cannot be run at all.
    """
    if pair.truth is None:
        raise CaseError(pair.case, pair.problem)
    try:
        images = _Images.read(pair, scheme)
        figures = {**_paper_figures(images), **_brasyn_figures(images)}
        if segmenter:
            figures |= _segmented_figures(images, pair, segmenter, scheme)
    except InputError as error:
        raise CaseError(pair.case, str(error)) from error
    brain = "other contrasts" if pair.contrasts else "true image"
    return Score(pair.case, pair.modality, figures, brain, tuple(images.notes))


def score_pairs(
    pairs: Sequence[Pair],
    score: Scorer = score_pair,
    workers: int | None = None,
    on_score: Callable[[Score], None] = lambda score: None,
) -> list[Score]:
    """The scores of all pairs, in their order; one that cannot be scored carries its reason.

    Args:
        score: makes a score, in several threads; see `score_cache` for one that keeps them.
        workers: pairs at a time; None for one a processor, MOST_WORKERS at most. Memory grows with it.
        on_score: called after each pair, as they finish.

    Raises:
        SettingsError: the segmenter cannot be run at all.
    """
    workers = workers or min(_processors(), MOST_WORKERS)
    scores: dict[int, Score] = {}
    # Threads: reading, filtering and most arithmetic let go of the interpreter, and nothing need be sent to them.
    with ThreadPoolExecutor(workers, "score") as pool:
        running = {pool.submit(_score_or_reason, pair, score): index for index, pair in enumerate(pairs)}
        try:
            for done in as_completed(running):
                scored = scores[running[done]] = done.result()
                on_score(scored)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [scores[index] for index in range(len(pairs))]


# Pairing


def _files(folder: Path) -> list[Path]:
    return [path for path in list_folder(folder, "images") if not path.name.startswith(".")]


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
    """What one image is scored with, read and checked; scaled versions are made when first needed.

    Attributes:
        grid: the true image, in whose voxel order all others are.
        labels: the reference segmentation, if there is one.
        turned: images whose files are in another voxel order, by modality.
        notes: grows with what is found.
    """

    case: str
    grid: Image
    prediction: Volume
    brain: metrics.Mask
    labels: Labels | None = None
    turned: dict[str, Volume] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, pair: Pair, scheme: Scheme) -> "_Images":
        assert pair.truth is not None
        grid = read_grid(pair.truth)
        turned: dict[str, Volume] = {}

        def read(path: Path, modality: str = "") -> Volume:
            image = read_grid(path)
            volume = in_order_of(grid, image, pair.case, ("the true image", path.name))
            if modality and volume.strides != image.volume.strides:
                turned[modality] = volume
            return volume

        prediction = read(pair.prediction, SYNTHESISED)
        for path, volume in ((pair.prediction, prediction), (pair.truth, grid.volume)):
            if volume.min() == volume.max():
                raise CaseError(pair.case, f"{path}: every voxel is {volume.flat[0]:g}; there is nothing to compare")
        contrasts = (read(path, modality) for modality, path in pair.contrasts.items())
        brain = brain_mask(contrasts) if pair.contrasts else grid.volume != 0
        images = cls(pair.case, grid, prediction, brain, turned=turned)
        if pair.seg:
            images.labels = labels_of(read(pair.seg), str(pair.seg), scheme)
            images.note(label_doubt(images.labels, pair.seg.name, scheme))
        return images

    @property
    def truth(self) -> Volume:
        return self.grid.volume

    def note(self, text: str) -> None:
        """Add a note that is not there yet, if it says anything."""
        if text and text not in self.notes:
            self.notes.append(text)

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
        span = metrics.value_range((prediction, truth))
        figures = {"brasyn_2023_ssim": metrics.ssim(prediction, truth, metrics.interior(truth.shape), span)}
        if images.labels is None:
            return figures
        return figures | _region_figures(images, images.labels > 0)
    except ValueError as error:
        raise CaseError(images.case, f"cannot be scored by the challenge's rules: {error}") from error


def _region_figures(images: _Images, tumour: metrics.Mask) -> dict[str, float]:
    pair = images.brasyn_units
    healthy = images.brain & ~tumour
    figures: dict[str, float] = {}
    if not tumour.any():
        images.note("the segmentation holds no tumour, so the figures of the tumour have no value")
    elif metrics.value_range(volume * tumour for volume in pair) == 0:
        images.note("both images are 0 all over the tumour, so its SSIM has no value")
        figures["brasyn_2025_mse_tumour"] = metrics.mse(*pair, tumour)
    else:
        figures["brasyn_2024_ssim_tumour"] = metrics.brasyn_ssim(*pair, tumour)
        figures["brasyn_2025_mse_tumour"] = metrics.mse(*pair, tumour)
    if not healthy.any():
        images.note("the segmentation covers the whole brain, so the figures of healthy tissue have no value")
        return figures
    figures["brasyn_2024_ssim_healthy"] = metrics.brasyn_ssim(*pair, ~tumour)
    figures["brasyn_2025_mse_healthy"] = metrics.mse(*pair, healthy)
    return figures


def _segmented_figures(images: _Images, pair: Pair, segmenter: Segmenter, scheme: Scheme) -> dict[str, float]:
    assert pair.truth is not None
    with _in_one_order(images, {**pair.contrasts, SYNTHESISED: pair.prediction}) as files:
        true = {**files, pair.modality: pair.truth}
        synthesised = true.pop(SYNTHESISED)
        segmented = segment_pair(segmenter, pair.case, true, pair.modality, synthesised, scheme)
    images.note(label_doubt(segmented.true.volume, "the segmenter", scheme))
    figures = compare_with_true_case(segmented, scheme)
    if images.labels is None:
        return figures
    try:
        names = "the true image", "the segmenter's"
        completed = in_order_of(images.grid, segmented.completed, pair.case, names)
    except CaseError as error:
        images.note(f"no figures against the reference segmentation: {error.reason}")
        return figures
    spacing_mm = np.linalg.norm(images.grid.affine[:3, :3], axis=0)
    return figures | compare_with_reference(completed, images.labels, spacing_mm, scheme)


@contextmanager
def _in_one_order(images: _Images, files: Mapping[str, Path]) -> Iterator[dict[str, Path]]:
    """The same files, but for copies of those that are in another voxel order than the true image.

    Args:
        files: modality -> file, and SYNTHESISED -> the synthesised image.
    """
    with tempfile.TemporaryDirectory(prefix="cwdm-") as folder:
        ordered = dict(files)
        for modality, volume in images.turned.items():
            ordered[modality] = Path(folder) / output_name(images.case, modality)
            write_nifti(ordered[modality], volume, images.grid.affine)
        yield ordered


def _score_or_reason(pair: Pair, score: Scorer) -> Score:
    try:
        return score(pair)
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
