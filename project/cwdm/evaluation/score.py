"""The score of one synthesised image against the true one."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter

from cwdm.arrays import Mask, Volume
from cwdm.errors import CaseError, InputError
from cwdm.evaluation.labels import SCHEMES, TODAY, Labels, Scheme, label_doubt, labels_of
from cwdm.evaluation.overlap import compare_with_reference, compare_with_true_case
from cwdm.evaluation.pairs import Pair
from cwdm.evaluation.segmenters import Segmenter, segment_pair
from cwdm.images import Image, brain_mask, in_order_of, normalise, output_name, read_grid, write_nifti
from cwdm.metrics import brasyn_ssim, brasyn_unit, interior, mae, mse, psnr, ssim, value_range
from cwdm.progress import with_notes
from cwdm.temporary import temporary_folder

SYNTHESISED = "synthesised"
"""Stands for the modality of a synthesised image, where the true one has that name."""


@dataclass(frozen=True)
class Score:
    """The metrics of one image.

    Attributes:
        modality: empty where there is no synthesised image, and for those of other kinds.
        metrics: name -> value; one that has no value for this image is left out and `notes` says why. Files call
            them figures.
        brain: what the brain mask comes from.
        reason: why there is no score.
    """

    case: str
    modality: str
    metrics: Annotated[dict[str, float], Field(alias="figures")] = field(default_factory=dict)
    brain: str = ""
    notes: tuple[str, ...] = ()
    reason: str = ""

    @property
    def name(self) -> str:
        """The name of the image."""
        return f"{self.case}-{self.modality}" if self.modality else self.case

    def record(self) -> dict[str, Any]:
        """The score as files hold it."""
        record: dict[str, Any] = _RECORD.dump_python(self, by_alias=True)
        return record

    @staticmethod
    def of_record(record: object) -> "Score":
        """The score that a file holds; raises ValidationError."""
        return _RECORD.validate_python(record)

    @property
    def line(self) -> str:
        """What happened, for the log."""
        name = f"{self.case}: {self.modality}" if self.modality else self.case
        if self.reason:
            return with_notes(f"{name} FAILED: {self.reason}")
        if "target_mae" in self.metrics:
            found = f"MAE {self.metrics['target_mae']:.4g}, PSNR {self.metrics['target_psnr']:.2f} dB"
        else:
            found = f"PSNR {self.metrics['psnr']:.2f} dB, SSIM {self.metrics['ssim']:.4f}"
        return with_notes(f"{name} {found}", *(f"note: {note}" for note in self.notes))


_RECORD = TypeAdapter(Score)

Scorer = Callable[[Pair], Score]
"""Makes a score of a pair; raises CaseError where it cannot."""


def score_pair(pair: Pair, segmenter: Segmenter | None = None, scheme: Scheme = SCHEMES[TODAY]) -> Score:
    """All metrics of one synthesised image.

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
        metrics = {**_paper_metrics(images), **_brasyn_metrics(images)}
        if segmenter:
            metrics |= _segmented_metrics(images, pair, segmenter, scheme)
    except InputError as error:
        raise CaseError(pair.case, str(error)) from error
    brain = "other contrasts" if pair.others else "true image"
    return Score(pair.case, pair.modality, metrics, brain, tuple(images.notes))


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
    brain: Mask
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
        others = (read(path, modality) for modality, path in pair.others.items())
        brain = brain_mask(others) if pair.others else grid.volume != 0
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
        return (self.scaled("synthesised", self.prediction, brasyn_unit), self.scaled("true", self.truth, brasyn_unit))

    def scaled(self, which: str, volume: Volume, scale: Callable[[Volume], Volume]) -> Volume:
        """A volume in [0, 1]; raises CaseError if its percentiles are equal."""
        try:
            return scale(volume)
        except ValueError as error:
            raise CaseError(self.case, f"the {which} image cannot be scaled: {error}") from error


def _paper_metrics(images: _Images) -> dict[str, float]:
    prediction = images.scaled("synthesised", images.prediction, lambda volume: normalise(volume)[0])
    truth = images.scaled("true", images.truth, lambda volume: normalise(volume)[0])
    prediction[~images.brain] = truth[~images.brain] = 0
    everywhere = np.ones(truth.shape, np.bool_)
    try:
        return {
            "psnr": psnr(prediction, truth, everywhere),
            "mse": mse(prediction, truth, everywhere),
            "mae": mae(prediction, truth, everywhere),
            "ssim": ssim(prediction, truth, interior(truth.shape)),
            "psnr_brain": psnr(prediction, truth, images.brain),
            "ssim_brain": ssim(prediction, truth, images.brain),
        }
    except ValueError as error:
        raise CaseError(images.case, f"cannot be scored: {error}") from error


def _brasyn_metrics(images: _Images) -> dict[str, float]:
    try:
        prediction, truth = images.prediction, images.truth
        span = value_range((prediction, truth))
        metrics = {"brasyn_2023_ssim": ssim(prediction, truth, interior(truth.shape), span)}
        if images.labels is None:
            return metrics
        return metrics | _region_metrics(images, images.labels > 0)
    except ValueError as error:
        raise CaseError(images.case, f"cannot be scored by the challenge's rules: {error}") from error


def _region_metrics(images: _Images, tumour: Mask) -> dict[str, float]:
    pair = images.brasyn_units
    healthy = images.brain & ~tumour
    metrics: dict[str, float] = {}
    if not tumour.any():
        images.note("the segmentation holds no tumour, so the metrics of the tumour have no value")
    elif value_range(volume * tumour for volume in pair) == 0:
        images.note("both images are 0 all over the tumour, so its SSIM has no value")
        metrics["brasyn_2025_mse_tumour"] = mse(*pair, tumour)
    else:
        metrics["brasyn_2024_ssim_tumour"] = brasyn_ssim(*pair, tumour)
        metrics["brasyn_2025_mse_tumour"] = mse(*pair, tumour)
    if not healthy.any():
        images.note("the segmentation covers the whole brain, so the metrics of healthy tissue have no value")
        return metrics
    metrics["brasyn_2024_ssim_healthy"] = brasyn_ssim(*pair, ~tumour)
    metrics["brasyn_2025_mse_healthy"] = mse(*pair, healthy)
    return metrics


def _segmented_metrics(images: _Images, pair: Pair, segmenter: Segmenter, scheme: Scheme) -> dict[str, float]:
    assert pair.truth is not None
    with _in_one_order(images, {**pair.others, SYNTHESISED: pair.prediction}) as files:
        true = {**files, pair.modality: pair.truth}
        synthesised = true.pop(SYNTHESISED)
        by_true, by_completed = segment_pair(segmenter, pair.case, true, pair.modality, synthesised, scheme)
    images.note(label_doubt(by_true.volume, "the segmenter", scheme))
    spacing_mm = np.linalg.norm(by_true.affine[:3, :3], axis=0)
    metrics = compare_with_true_case(by_completed.volume, by_true.volume, spacing_mm, scheme)
    if images.labels is None:
        return metrics
    try:
        names = "the true image", "the segmenter's"
        completed = in_order_of(images.grid, by_completed, pair.case, names)
    except CaseError as error:
        images.note(f"no metrics against the reference segmentation: {error.reason}")
        return metrics
    spacing_mm = np.linalg.norm(images.grid.affine[:3, :3], axis=0)
    return metrics | compare_with_reference(completed, images.labels, spacing_mm, scheme)


@contextmanager
def _in_one_order(images: _Images, files: Mapping[str, Path]) -> Iterator[dict[str, Path]]:
    """The same files, but for copies of those that are in another voxel order than the true image.

    Args:
        files: modality -> file, and SYNTHESISED -> the synthesised image.
    """
    with temporary_folder() as folder:
        ordered = dict(files)
        for modality, volume in images.turned.items():
            ordered[modality] = folder / output_name(images.case, modality)
            write_nifti(ordered[modality], volume, images.grid.affine)
        yield ordered
