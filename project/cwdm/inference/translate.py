"""Images of one kind out of others, such as CT out of MR, by networks trained on files that their settings describe."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import ValidationError

from cwdm import __version__
from cwdm.arrays import Affine, Volume
from cwdm.errors import CaseError, OutputError, WeightsError
from cwdm.files import check_apart, check_writable, remove_stale
from cwdm.images import (
    LONGEST_NAME,
    MARK,
    MOST_WINDOW_VOXELS,
    Grid,
    PairSettings,
    Subject,
    centre,
    centred_start,
    decode,
    is_made,
    list_subjects,
    write_nifti,
)
from cwdm.inference.generate import check_same_origin, check_size, describe_volumes
from cwdm.pipeline import Pipeline
from cwdm.runner import Outcome, run_each
from cwdm.settings import Settings

RECORD = "translations.json"
MOST_VOXELS = 8 * MOST_WINDOW_VOXELS
"""Of a window before its voxels are averaged; weights that nobody checked say what it is."""


class Translation(NamedTuple):
    """An image that was made.

    Attributes:
        volume: (X, Y, Z) float32.
        affine: (4, 4), voxel indices to mm.
        oriented: False where the images given do not say how they lie in space; then this one does not either.
    """

    volume: Volume
    affine: Affine
    oriented: bool


class Translator:
    """Makes the target image of a case from the images that its network was trained to make it from.

    Args:
        weights: the file that `cwdm train` with `layout: files` wrote; it says which images the network needs.
        settings: seed, precision, noise and sampler are used; see `cwdm.settings.Settings`.
        device: see `cwdm.device.choose_device`.

    Raises:
        WeightsError: not usable, or trained on something else.
        SettingsError: no GPU where one was demanded.
    """

    def __init__(self, weights: Path, settings: Settings | None = None, device: str = "auto") -> None:
        self.settings = settings or Settings()
        self.pipeline = Pipeline.load(weights, settings=self.settings, device=device)
        trained = self.pipeline.checkpoint.record.trained_on
        try:
            data = PairSettings.model_validate(trained)
        except ValidationError as error:
            raise WeightsError(f"{weights}: does not say what it was trained on") from error
        if data.layout != "files" or not data.images or not data.images[1:] or not isinstance(data.window, list):
            raise WeightsError(f"{weights}: was not trained on pairs of images; try 'cwdm infer' or 'cwdm sample'")
        sizes = [divmod(n, data.downsample) for n in data.window]
        check_size(self.pipeline, [n for n, _ in sizes])
        channels = sum(image.channels for image in data.images)
        expected, found = 8 * channels, self.pipeline.checkpoint.model.config.in_channels
        if expected != found or any(rest for _, rest in sizes) or math.prod(data.window) > MOST_VOXELS:
            raise WeightsError(f"{weights}: its network of {found} inputs does not fit what it says of its images")
        self.target, *self.given = data.images
        self.downsample, self.window = data.downsample, data.window

    def find(self, folder: Path) -> list[Subject]:
        """The cases of a folder that have the first of the images needed, sorted by name.

        Raises:
            InputError: there is none.
        """
        return list_subjects(folder, self.given)

    def __call__(self, subject: Subject, on_step: Callable[[], None] = lambda: None) -> Translation:
        """The target image on the grid of the first image given, or on cubes of its voxels if trained on such.

        Its numbers are those of the target's `intensity` range, or [0, 1] where that was by percentiles.

        Raises:
            CaseError: an image is missing or damaged, or the images lie on different grids.
        """
        volumes = decode(subject, self.given, self.window, self.downsample)
        unit, grid = volumes.unit(), volumes.files[0].grid
        condition = self.pipeline.encode(torch.from_numpy(unit)[None])
        coefficients = self.pipeline.sample(condition, seeds=[self.settings.seed], callback=lambda *_: on_step())
        made: Volume = self.pipeline.decode(coefficients)[0, 0].cpu().numpy()
        first, last = self.target.intensity if isinstance(self.target.intensity, list) else (0.0, 1.0)
        return self._on_grid(made * np.float32(last - first), grid, np.float32(first))

    def _on_grid(self, volume: Volume, grid: Grid, offset: np.float32) -> Translation:
        """The window's volume, stored LPS, in the order and size of a file; `offset` is added, and fills the rest."""
        orientation, n, starts = grid.orientation, self.downsample, []
        for axis, old_axis in enumerate(orientation.axes):
            have = grid.shape[old_axis]
            small = have // n
            cut, padded = centred_start(have, self.window[axis]), centred_start(small, volume.shape[axis])
            volume = centre(volume, axis, small)
            start = cut - padded * n + (n - 1) / 2
            starts.append(have - 1 - start - (small - 1) * n if orientation.flips[axis] else start)
        scaled = np.diag([n, n, n, 1.0])
        scaled[list(orientation.axes), 3] = starts
        made = np.ascontiguousarray(orientation.invert(volume) + offset)
        return Translation(made, grid.affine @ scaled, grid.oriented)


def translate(
    translator: Translator,
    folder: Path,
    output: Path,
    on_case: Callable[[str], None] = lambda line: None,
    expect: Callable[[int], None] = lambda total: None,
) -> list[Outcome]:
    """Write OUTPUT/<case>.nii.gz for every case of a folder; a bad case is told and passed over, a finished one stays.

    `translations.json` beside the images says what they were made with, and that they are synthesised.

    Args:
        on_case: what became of a case, in words.
        expect: told how many there are.

    Raises:
        InputError: no case has the images needed.
        OutputError: the folder cannot be written or is full.
        SettingsError: the images in the folder were made with other weights or settings.
    """
    subjects = translator.find(folder)
    check_apart(output, folder)
    check_writable(output)
    remove_stale(output)
    check_same_origin(
        output / RECORD, {"synthesised": True, **describe_volumes(translator.pipeline, translator.settings)}
    )
    expect(len(subjects))
    return run_each(
        subjects,
        lambda subject: _write_one(translator, subject, output / f"{subject.name}.nii.gz"),
        name=lambda subject: subject.name,
        is_finished=lambda subject: is_made(output / f"{subject.name}.nii.gz", MARK),
        on_outcome=lambda outcome: on_case(outcome.line),
    )


def _write_one(translator: Translator, subject: Subject, path: Path) -> None:
    try:
        made = translator(subject)
        description = f"{MARK} {__version__}, no acquisition"
        write_nifti(path, made.volume, made.affine, description, made.oriented)
    except OutputError as error:
        if len(os.fsencode(path.name)) <= LONGEST_NAME:
            raise  # the next case would meet it too
        raise CaseError(subject.name, str(error)) from error
    except CaseError:
        raise
    except Exception as error:  # whatever it is, it must not take the other cases down
        raise CaseError(subject.name, str(error) or type(error).__name__) from error
