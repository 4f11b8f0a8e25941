"""Whole volumes out of noise: unconditional sampling with WDM's networks."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cwdm import __version__
from cwdm.errors import SettingsError, WeightsError
from cwdm.files import check_writable, remove_stale, write_json
from cwdm.images import MOST_WINDOW_VOXELS, write_nifti
from cwdm.pipeline import Pipeline
from cwdm.runner import run_each
from cwdm.settings import Settings

Size = tuple[int, int, int]

PUBLISHED_GRIDS: dict[int, tuple[Size, float]] = {5: ((128, 128, 128), 2.0), 6: ((256, 256, 256), 1.0)}
"""Levels of WDM's networks -> voxels of their volumes and their edge in mm: both are 256 mm long."""


class Generator:
    """Draws volumes from an unconditional network.

    Args:
        weights: the file.
        settings: seed, precision, noise and sampler are used; see `cwdm.settings.Settings`.
        size: voxels of a volume; None for what the network was trained on.
        device: see `cwdm.device.choose_device`.

    Raises:
        WeightsError: not usable, or a network that needs conditions.
        SettingsError: a size that the network cannot make, or no GPU where one was demanded.
    """

    def __init__(
        self,
        weights: Path,
        settings: Settings | None = None,
        size: Size | None = None,
        device: str = "auto",
    ) -> None:
        self.settings = settings or Settings()
        self.pipeline = Pipeline.load(weights, settings=self.settings, device=device)
        config = self.pipeline.checkpoint.model.config
        if config.in_channels != config.out_channels:
            raise WeightsError(
                f"{weights}: a network that needs conditions; 'cwdm infer' or, for other images than those of BraTS, "
                "'cwdm translate' synthesises with it"
            )
        record = self.pipeline.checkpoint.record
        told_size, self.spacing_mm = trained_grid(record.trained_on, len(config.channel_mult))
        mm = [self.spacing_mm if direction in "RAS" else -self.spacing_mm for direction in record.orientation]
        self.affine = np.diag([*mm, 1.0])
        self.size = size or told_size
        check_size(self.pipeline, self.size)

    def describe(self) -> dict[str, Any]:
        """What decides the samples."""
        return {
            **describe_volumes(self.pipeline, self.settings),
            "size": list(self.size),
            "affine": self.affine.tolist(),
        }

    def __call__(self, number: int, on_step: Callable[[], None] = lambda: None) -> npt.NDArray[np.float32]:
        """Volume (X, Y, Z) in [0, 1]; sample `number` depends on the settings' seed + number alone."""
        made = self.pipeline.sample(None, self.size, [self.settings.seed + number], lambda *_: on_step())
        volume: npt.NDArray[np.float32] = self.pipeline.decode(made)[0, 0].cpu().numpy()
        return volume


def check_size(pipeline: Pipeline, size: Sequence[int]) -> None:
    """Raises SettingsError if the network cannot make volumes of so many voxels."""
    multiple = 2 * pipeline.checkpoint.model.config.size_multiple
    if any(n < multiple or n % multiple for n in size) or math.prod(size) > MOST_WINDOW_VOXELS:
        raise SettingsError(
            f"a size of {tuple(size)}: each must be a multiple of {multiple} for this network, "
            f"at most {MOST_WINDOW_VOXELS:,} voxels in all"
        )


def describe_volumes(pipeline: Pipeline, settings: Settings) -> dict[str, Any]:
    """What decides the volumes of a folder, for the record beside them."""
    told = pipeline.describe()
    return {
        "weights_sha256": pipeline.checkpoint.sha256,
        "notice": pipeline.checkpoint.record.notice,
        "sampler": told["sampler"],
        "timesteps": told["timesteps"],
        "seed": settings.seed,
        "precision": told["precision"],
        **({"noise": settings.noise} if settings.noise != "cpu" else {}),
    }


def trained_grid(data: Mapping[str, Any], levels: int) -> tuple[Size, float]:
    """Voxels and their edge in mm of the volumes that a network was trained on; if it does not say, as published."""
    try:
        edge = int(data["downsample"])
        x, y, z = (int(n) // edge for n in data["window"])
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return PUBLISHED_GRIDS[min(max(levels, 5), 6)]
    return (x, y, z), float(edge)


def write_samples(
    generator: Generator, count: int, out: Path, on_sample: Callable[[Path, bool], None] = lambda path, new: None
) -> list[Path]:
    """Write sample-00000.nii.gz and on, each whole or not at all; those that are there already stay.

    `samples.json` beside them says what they were made with.

    Raises:
        OutputError: the folder cannot be written.
        SettingsError: the samples in the folder were made with other weights or settings.
    """
    check_writable(out)
    remove_stale(out)
    check_same_origin(out / "samples.json", generator.describe())
    paths = {out / f"sample-{number:05d}.nii.gz": number for number in range(count)}

    def write(path: Path) -> None:
        write_nifti(path, generator(paths[path]), generator.affine, f"generated by cwdm {__version__}, no patient")

    run_each(
        paths,
        write,
        name=str,
        is_finished=Path.exists,
        on_outcome=lambda outcome: on_sample(Path(outcome.name), outcome.status == "written"),
    )
    return list(paths)


def check_same_origin(path: Path, description: dict[str, Any]) -> None:
    """Write what the volumes of a folder are made with, or compare with what is written there.

    Raises:
        SettingsError: it is something else.
    """
    if not path.exists():
        write_json(path, description)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read ({error}); choose another folder") from error
    if not isinstance(found, dict):
        raise SettingsError(f"{path} is not a record of ours; choose another folder")
    changed = [key for key, value in description.items() if found.get(key) != value]
    if changed:
        raise SettingsError(f"the volumes in {path.parent} have another {', '.join(changed)}; choose another folder")
