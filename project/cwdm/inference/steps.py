"""The way of a case from its files to an image: plain functions between values that cannot change.

read_case ─► prepare ─► draw ─► postprocess, which judges on the way ─► save
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cwdm.arrays import Mask, Volume
from cwdm.errors import CaseError
from cwdm.images import (
    MODALITIES,
    ORIENTATION,
    Case,
    ClipRange,
    Intensities,
    Orientation,
    Window,
    as_published,
    brain_mask,
    choose_window,
    clip_range,
    denormalise,
    foreground,
    normalise,
    tight_window,
    with_tail,
    write_volume,
)
from cwdm.inference.outcome import Quality
from cwdm.inference.quality import assess
from cwdm.pipeline import Callback, Pipeline
from cwdm.settings import OutputSettings, Settings


@dataclass(frozen=True)
class PreparedCase:
    """A case ready for the network, with what it takes to come back.

    Attributes:
        names: the modalities along N.
        unit: conditions (1, N, X, Y, Z) in [0, 1], inside the window, float32 on the CPU; zeros where one is not there.
        mask: brain of the conditions (X, Y, Z), of the whole volume in the orientation of the window.
        orientation: from the files to the window.
        clip_range: of the most similar modality as published, whose intensities the result will have.
        intensities: what of an image became 0 and 1.
    """

    case: Case
    names: tuple[str, ...]
    unit: Tensor
    mask: Mask
    window: Window
    orientation: Orientation
    clip_range: ClipRange
    warnings: tuple[str, ...]
    intensities: Intensities = "published"


@dataclass(frozen=True)
class Samples:
    """What the network made of a case, inside the window and in [0, 1], float32 on the CPU.

    Attributes:
        mean: over the samples, (X, Y, Z).
        std: standard deviation over them, (X, Y, Z); None for a single sample. A network of one pass predicts both.
        seconds: what it took.
        predicted: whether it was one pass.
    """

    mean: Tensor
    std: Tensor | None
    seconds: float
    predicted: bool = False


@dataclass(frozen=True)
class Synthesis:
    """A synthesised volume.

    Attributes:
        volume: (X, Y, Z) float32 in the order of the case's files; scanner-like numbers, or [0, 1] if the
            settings ask for `unit` intensities.
        std: standard deviation over the samples, or the predicted one, in the same numbers; None for a single sample.
        native: whether the numbers are scanner-like.
        quality: what the automatic check says.
        seconds: time spent sampling.
        made_with: short checksums of weights and settings, for the header.
        predicted: whether one pass predicted the standard deviation.
    """

    case: Case
    volume: Volume
    std: Volume | None
    native: bool
    quality: Quality
    warnings: tuple[str, ...]
    seconds: float
    made_with: str = ""
    predicted: bool = False

    def save(self, path: Path | str) -> None:
        """Write the volume as .nii.gz with the geometry of the case, whole or not at all.

        Raises:
            OutputError: the file cannot be written.
        """
        write_volume(Path(path), self.volume, self.case, self.native, self.made_with)


def prepare(case: Case, pipeline: Pipeline, settings: Settings) -> PreparedCase:
    """Bring a case into the network's orientation, window and range.

    Raises:
        CaseError: a modality is constant between its percentiles, the brain is too large, or more modalities are
            missing than the network was trained for.
    """
    checkpoint, missing = pipeline.checkpoint, len(MODALITIES) - len(case.volumes)
    if missing > checkpoint.record.most_missing:
        raise CaseError(
            case.name,
            f"{missing} modalities are missing, the weights were trained for {checkpoint.record.most_missing}",
        )
    turned = settings.output.orient and case.has_orientation
    orientation = Orientation.to(ORIENTATION, case.affine) if turned else Orientation.identity()
    mask = orientation.apply(brain_mask(case.volumes.values()))
    window, window_warnings = _window(case, mask, pipeline)
    names = MODALITIES if checkpoint.model.config.targets else tuple(case.volumes)
    units, ranges = np.zeros((1, len(names), *window.size), np.float32), {}
    intensities = checkpoint.record.intensities
    for i, name in enumerate(names):
        if name in case.volumes:
            try:
                unit, ranges[name] = normalise(case.volumes[name], intensities)
                if intensities != "published" and name == case.nearest:
                    ranges[name] = clip_range(case.volumes[name])
            except ValueError as error:
                raise CaseError(case.name, f"{name}: {error}") from error
            units[0, i] = window.crop(orientation.apply(unit))
    warnings = (*case.warnings, *window_warnings, *checkpoint.warnings)
    if orientation != Orientation.identity():
        warnings = (*warnings, f"stored in another orientation; brought to {ORIENTATION} and back")
    tensor, nearest = torch.from_numpy(units), ranges[case.nearest]
    return PreparedCase(case, names, tensor, mask, window, orientation, nearest, warnings, intensities)


def _window(case: Case, mask: Mask, pipeline: Pipeline) -> tuple[Window, tuple[str, ...]]:
    """The window that the network was trained on, and what is unusual about it."""
    trained, multiple = pipeline.checkpoint.record.window, 2 * pipeline.checkpoint.model.config.size_multiple
    try:
        if trained == "brain":
            return tight_window(mask, multiple), ()
        if trained == "published":  # 32 is that network's multiple, and smaller ones keep it
            return choose_window(mask, max(32, multiple))
        return choose_window(mask, multiple, trained)
    except ValueError as error:
        raise CaseError(case.name, str(error)) from error


def draw(prepared: PreparedCase, pipeline: Pipeline, settings: Settings, callback: Callback | None = None) -> Samples:
    """Draw the settings' number of samples; sample i is what the seed + i alone would give.

    On a GPU several are drawn at once where its memory allows, which may round differently from one alone. Weights of
    one pass give mean and standard deviation at once.
    """
    if pipeline.checkpoint.record.one_pass:
        return _predict(prepared, pipeline, callback)
    start, seeds = time.perf_counter(), range(settings.seed, settings.seed + settings.samples)
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in pipeline.sample_batches(pipeline.encode(prepared.unit), seeds=seeds, callback=callback):
        for sample in pipeline.decode(batch)[:, 0].cpu():
            # Welford (1962): mean and standard deviation without keeping the samples.
            count += 1
            difference = sample - mean
            mean = mean + difference / count
            squares = squares + difference * (sample - mean)
    std = (squares / (count - 1)).sqrt() if count > 1 else None
    return Samples(mean, std, time.perf_counter() - start)


def _predict(prepared: PreparedCase, pipeline: Pipeline, callback: Callback | None) -> Samples:
    start, given = time.perf_counter(), [name in prepared.case.volumes for name in prepared.names]
    mean, std = pipeline.predict(pipeline.encode(prepared.unit), given)
    if callback:
        callback(1, 1, pipeline.encode(mean))
    return Samples(mean[0, 0].cpu(), std[0, 0].cpu(), time.perf_counter() - start, predicted=True)


def postprocess(prepared: PreparedCase, samples: Samples, output: OutputSettings, made_with: str = "") -> Synthesis:
    """Judge the samples, and bring them back to the grid, orientation and intensities of the case.

    Raises:
        CaseError: nothing but background came out.
    """
    case, native = prepared.case, output.intensity == "native"
    unit = _as_published(samples.mean, prepared)
    keep = foreground(unit, output.background, prepared.mask, output.threshold)
    low, high = prepared.clip_range if native else (0.0, 1.0)
    unit_std = None if samples.std is None else np.where(keep, _as_published(samples.std, prepared), np.float32(0))
    unit = np.where(keep, unit, np.float32(0))
    shown = unit
    if prepared.intensities == "brain":
        shown = with_tail(unit, unit_std) if native else unit.clip(0, 1)
    volume = np.where(keep, denormalise(shown, ClipRange(low, high)), np.float32(0))
    if not volume.any():
        raise CaseError(case.name, f"the synthesised {case.target} is empty; check the weights")
    std = None if unit_std is None else _as_stored(unit_std * np.float32(high - low), prepared)
    quality = judge(prepared, unit, unit_std, samples.predicted)
    stored, warnings = _as_stored(volume, prepared), prepared.warnings
    return Synthesis(case, stored, std, native, quality, warnings, samples.seconds, made_with, samples.predicted)


def _as_published(unit: Tensor, prepared: PreparedCase) -> Volume:
    """What the network made, on the whole volume, in the units of an image scaled as published."""
    return prepared.window.restore(as_published(unit.numpy(), prepared.case.target, prepared.intensities))


def _as_stored(volume: Volume, prepared: PreparedCase) -> Volume:
    return np.ascontiguousarray(prepared.orientation.invert(volume))


def judge(prepared: PreparedCase, unit: Volume, std: Volume | None, predicted: bool = False) -> Quality:
    """The check of a result (X, Y, Z) in [0, 1] on the whole volume, in the orientation of the window."""
    case = prepared.case
    # Only where the settings leave volumes as they are stored may the window lie otherwise than the check expects.
    stored = case.has_orientation and prepared.orientation == Orientation.identity()
    to_lps = Orientation.to(ORIENTATION, case.affine) if stored else Orientation.identity()
    conditions = {
        name: to_lps.apply(prepared.window.restore(as_published(inside.numpy(), name, prepared.intensities)))
        for name, inside in zip(prepared.names, prepared.unit[0], strict=True)
        if name in case.volumes
    }
    return assess(
        to_lps.apply(unit),
        conditions,
        to_lps.apply(prepared.mask),
        case.target,
        None if std is None else to_lps.apply(std),
        predicted,
    )
