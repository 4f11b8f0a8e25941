"""One case in, one volume out."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cwdm.checkpoint import ANY, Checkpoint
from cwdm.device import choose_device, device_name
from cwdm.errors import CaseError, WeightsError
from cwdm.images import (
    MODALITIES,
    ORIENTATION,
    Case,
    CaseFolder,
    ClipRange,
    Orientation,
    Window,
    brain_mask,
    case_folder,
    choose_window,
    denormalise,
    foreground,
    normalise,
    read_case,
    tight_window,
    write_volume,
)
from cwdm.inference.provenance import provenance
from cwdm.inference.quality import Quality, assess
from cwdm.pipeline import Pipeline
from cwdm.precision import choose_dtype
from cwdm.samplers import Sampler
from cwdm.settings import Settings
from cwdm.weights import find, folder_of, load_for, modality_of

Volume = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prepared:
    """A case ready for the network, with what it takes to come back.

    Attributes:
        unit: conditions (1, 3, X, Y, Z) in [0, 1], inside the window, float32 on the CPU; for a network that makes
            any contrast (1, 4, X, Y, Z), with zeros in place of those that are not there.
        mask: brain of the conditions (X, Y, Z), in the order of the file.
        clip_range: of the nearest contrast, whose intensities the result will have.
    """

    case: Case
    unit: Tensor
    mask: npt.NDArray[np.bool_]
    window: Window
    orientation: Orientation
    clip_range: ClipRange
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Synthesis:
    """A synthesised volume.

    Attributes:
        volume: (X, Y, Z) float32 in the order of the case's files; scanner-like numbers, or [0, 1] if the
            settings ask for `unit` intensities.
        spread: standard deviation over the samples, in the same numbers; None for a single sample.
        native: whether the numbers are scanner-like.
        quality: what the automatic check says.
        seconds: time spent sampling.
        made_with: short checksums of weights and settings, for the header.
    """

    case: Case
    volume: Volume
    spread: Volume | None
    native: bool
    quality: Quality
    warnings: tuple[str, ...]
    seconds: float
    made_with: str = ""

    def save(self, path: Path | str) -> None:
        """Write the volume as .nii.gz with the geometry of the case, whole or not at all.

        Raises:
            OutputError: the file cannot be written.
        """
        write_volume(Path(path), self.volume, self.case, self.native, self.made_with)


@dataclass(frozen=True)
class Samples:
    """What the network made of a case, inside the window and in [0, 1], float32 on the CPU.

    Attributes:
        mean: over the samples, (X, Y, Z).
        spread: standard deviation over them, (X, Y, Z); None for a single sample.
        seconds: what it took.
    """

    mean: Tensor
    spread: Tensor | None
    seconds: float


class Synthesizer:
    """Synthesises the missing contrast of a case.

    >>> synthesizer = Synthesizer("weights/")                       # doctest: +SKIP
    >>> result = synthesizer("input/BraTS-GLI-00001-000")           # doctest: +SKIP
    >>> result.volume.shape                                         # doctest: +SKIP
    (240, 240, 155)

    Args:
        weights: folder or file, or "bundled" for the small ones that come with cwdm; None for `$CWDM_WEIGHTS` or
            what `cwdm weights download` fetched.
        settings: see `cwdm.settings.Settings`.
        device: "cuda" or "cuda:1" demands a GPU, "auto" takes one if there is one; see `cwdm.device.choose_device`.
        sampler: a function like those of `cwdm.samplers`, in place of the one that settings or weights name.

    An instance is for one thread at a time; a `pipeline` of it is for any number.

    Raises:
        SettingsError: no such device, or no GPU where one was demanded.
        WeightsError: the weights' folder does not exist.
    """

    def __init__(
        self,
        weights: Path | str | None = None,
        settings: Settings | None = None,
        device: str = "auto",
        sampler: Sampler | None = None,
    ) -> None:
        self.weights = folder_of(weights)
        if not os.path.exists(self.weights):  # noqa: PTH110  # Path.exists raises where a folder may not be entered
            raise WeightsError(
                f"no weights at {self.weights}; 'cwdm weights download FOLDER' fetches the published ones, "
                "--weights bundled takes the small ones that come with cwdm"
            )
        self.sampler = sampler
        self.settings = settings or Settings()
        self.device = choose_device(device)
        self.dtype = choose_dtype(self.settings.precision, self.device)
        self._taken_for: dict[Path, str] = {}
        self._pipeline: Pipeline | None = None
        self._modality = ""

    def __call__(
        self, case: CaseFolder | Path | str, on_step: Callable[[], None] = lambda: None, target: str = ""
    ) -> Synthesis:
        """Read a case folder and synthesise what is missing.

        Args:
            on_step: called after every network evaluation.
            target: which modality, where several are missing.

        Raises:
            CaseError: the case cannot be used.
            WeightsError: there are no usable weights for the missing contrast.
        """
        folder = case if isinstance(case, CaseFolder) else case_folder(Path(case))
        prepared = self.prepare(read_case(replace(folder, chosen=target) if target else folder))
        return self.finish(prepared, self.sample(prepared, on_step))

    def load(self, modality: str) -> Checkpoint:
        """The checkpoint that synthesises `modality`, ready on the device; only the last one stays in memory."""
        return self.pipeline(modality).checkpoint

    def pipeline(self, modality: str) -> Pipeline:
        """What samples `modality`; only the last one stays in memory."""
        if self._pipeline is None or self._modality != modality:
            checkpoint = self._for_any(modality) or self._fresh(modality)
            self._pipeline = Pipeline.of(checkpoint, self.settings, self.device, modality, self.sampler)
            self._modality = modality
        return self._pipeline

    def _for_any(self, modality: str) -> Checkpoint | None:
        """The loaded checkpoint if its file is also the one for another contrast."""
        loaded = self._pipeline.checkpoint if self._pipeline else None
        self._pipeline = None  # frees its memory before the next one comes
        same = loaded and loaded.record.modality == ANY and find(self.weights, modality) == loaded.path
        return loaded if same else None

    def _fresh(self, modality: str) -> Checkpoint:
        checkpoint = load_for(self.weights, modality)
        self._check_not_shared(modality, checkpoint)
        return checkpoint

    def _check_not_shared(self, modality: str, checkpoint: Checkpoint) -> None:
        """Weights that do not say what they synthesise are believed once, not for one contrast after the other."""
        if checkpoint.record.modality or modality_of(checkpoint.path):
            return
        other = self._taken_for.setdefault(checkpoint.path, modality)
        if other != modality:
            raise WeightsError(
                f"{checkpoint.path} does not say which contrast it synthesises and was taken for {other} in this run, "
                f"so not for {modality}; put it into a folder named {other}"
            )

    def summary(self) -> str:
        """One line about how cases will be computed."""
        sampler = self.settings.sampler
        steps = len(sampler.timesteps) if sampler.timesteps else sampler.steps
        where = device_name(self.device) if self.device.type == "cuda" else "the CPU"
        how = f"{sampler.name or 'recommended sampler'}, {steps or 'recommended'} steps"
        return f"{how}, {str(self.dtype).removeprefix('torch.')} on {where}, weights {self.weights}"

    def evaluations(self, modality: str) -> int:
        """How often the network runs for one case."""
        return len(self.pipeline(modality).timesteps) * self.settings.samples

    def describe(self, modality: str) -> dict[str, Any]:
        """What decides the result beside the case itself, for the record."""
        pipeline = self.pipeline(modality)
        checkpoint = pipeline.checkpoint
        return {
            "weights": {"file": str(checkpoint.path), "sha256": checkpoint.sha256},
            "weights_record": checkpoint.record.model_dump(mode="json"),
            **pipeline.describe(),
            "settings": self.settings.model_dump(mode="json"),
        }

    def prepare(self, case: Case) -> Prepared:
        """Bring a case into the network's orientation, window and range.

        Raises:
            CaseError: a contrast is constant between its percentiles, the brain is too large, or more contrasts are
                missing than the network was trained for.
            WeightsError: there are no usable weights for the missing contrast.
        """
        checkpoint = self.load(case.target)
        missing = len(MODALITIES) - len(case.volumes)
        if missing > checkpoint.record.most_missing:
            raise CaseError(
                case.name,
                f"{missing} modalities are missing, the weights were trained for {checkpoint.record.most_missing}",
            )
        orient = self.settings.output.orient and case.has_orientation
        orientation = Orientation.to(ORIENTATION, case.affine) if orient else Orientation.identity()
        mask = brain_mask(list(case.volumes.values()))
        multiple = 2 * checkpoint.model.config.size_multiple
        window_warnings: tuple[str, ...] = ()
        try:
            if checkpoint.record.window == "brain":
                window = tight_window(orientation.apply(mask), multiple)
            elif checkpoint.record.window == "published":  # 32 is that network's multiple, and smaller ones keep it
                window, window_warnings = choose_window(orientation.apply(mask), max(32, multiple))
            else:
                window, window_warnings = choose_window(orientation.apply(mask), multiple, checkpoint.record.window)
        except ValueError as error:
            raise CaseError(case.name, str(error)) from error
        units, clip_ranges = [], {}
        for modality in MODALITIES if checkpoint.model.config.targets else case.volumes:
            if modality not in case.volumes:
                units.append(np.zeros(window.size, np.float32))
                continue
            volume = case.volumes[modality]
            try:
                unit, clip_ranges[modality] = normalise(volume)
            except ValueError as error:
                raise CaseError(case.name, f"{modality}: {error}") from error
            units.append(window.crop(orientation.apply(unit)))
        warnings = (*case.warnings, *window_warnings, *checkpoint.warnings)
        if orientation != Orientation.identity():
            warnings = (*warnings, f"stored in another orientation; brought to {ORIENTATION} and back")
        return Prepared(
            case=case,
            unit=torch.from_numpy(np.stack(units))[None],
            mask=mask,
            window=window,
            orientation=orientation,
            clip_range=clip_ranges[case.nearest],
            warnings=warnings,
        )

    def sample(self, prepared: Prepared, on_step: Callable[[], None] = lambda: None) -> Samples:
        """Draw the settings' number of samples; sample i is what the seed + i alone would give.

        On a GPU several are drawn at once where its memory allows, which may round differently from one alone.
        """

        def tell(step: int, total: int, x0: Tensor) -> None:
            for _ in range(len(x0)):
                on_step()

        start = time.perf_counter()
        pipeline = self.pipeline(prepared.case.target)
        seeds = [self.settings.seed + i for i in range(self.settings.samples)]
        count, mean, squares = 0, torch.zeros(()), torch.zeros(())
        for batch in pipeline.sample_batches(pipeline.encode(prepared.unit), seeds=seeds, callback=tell):
            for sample in pipeline.decode(batch)[:, 0].cpu():
                # Welford (1962): mean and spread without keeping the samples.
                count += 1
                difference = sample - mean
                mean = mean + difference / count
                squares = squares + difference * (sample - mean)
        spread = (squares / (count - 1)).sqrt() if count > 1 else None
        return Samples(mean, spread, time.perf_counter() - start)

    def finish(self, prepared: Prepared, samples: Samples) -> Synthesis:
        """Bring the samples back to the grid, orientation and intensities of the case.

        Raises:
            CaseError: nothing but background came out.
        """
        output = self.settings.output
        native = output.intensity == "native"
        unit = self._restore(prepared, samples.mean)
        keep = foreground(unit, output.background, prepared.mask, output.threshold)
        low, high = prepared.clip_range if native else (0.0, 1.0)
        volume = np.where(keep, denormalise(unit, ClipRange(low, high)), np.float32(0))
        if not volume.any():
            raise CaseError(prepared.case.name, f"the synthesised {prepared.case.target} is empty; check the weights")
        unit_spread = spread = None
        if samples.spread is not None:
            unit_spread = np.where(keep, self._restore(prepared, samples.spread), np.float32(0))
            spread = unit_spread * np.float32(high - low)
        quality = self._quality(prepared, np.where(keep, unit, np.float32(0)), unit_spread)
        made_with = str(provenance(self.describe(prepared.case.target)))
        return Synthesis(prepared.case, volume, spread, native, quality, prepared.warnings, samples.seconds, made_with)

    def _quality(self, prepared: Prepared, unit: Volume, spread: Volume | None) -> Quality:
        """The check of a result in the order of the file, which it sees as stored LPS."""
        case = prepared.case
        known = case.has_orientation
        lps = Orientation.to(ORIENTATION, case.affine) if known else Orientation.identity()
        names = MODALITIES if prepared.unit.shape[1] == len(MODALITIES) else tuple(case.volumes)
        conditions = {
            name: lps.apply(self._restore(prepared, inside))
            for name, inside in zip(names, prepared.unit[0], strict=True)
            if name in case.volumes
        }
        turned_spread = None if spread is None else lps.apply(spread)
        return assess(lps.apply(unit), conditions, lps.apply(prepared.mask), case.target, turned_spread)

    @staticmethod
    def _restore(prepared: Prepared, inside: Tensor) -> Volume:
        return prepared.orientation.invert(prepared.window.restore(inside.numpy()))
