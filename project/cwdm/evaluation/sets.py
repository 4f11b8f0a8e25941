"""Metrics of generated volumes as a set: Fréchet distance to real ones (FID), and diversity (MS-SSIM).

As WDM reports them (arXiv:2402.19043): FID over the 2048 features of MedicalNet's ResNet-50, trained on 23 data sets,
and the mean MS-SSIM over pairs of generated volumes, lower being more diverse.
"""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from nibabel import orientations
from torch import Tensor, nn

from cwdm.arrays import Volume, block_means
from cwdm.device import choose_device
from cwdm.errors import InputError, SettingsError
from cwdm.evaluation.medicalnet import FEATURES, features_of, load_medicalnet
from cwdm.images import Orientation, find_cases, list_folder, normalise, read_grid
from cwdm.precision import exact_float32

FEWEST = 2
"""Below this a set has no covariance."""

ENOUGH = FEATURES + 1
"""Below this a covariance of the features cannot have full rank, and the distance is too large by what it lacks."""

_BIASED = (
    f"fewer than {ENOUGH} volumes in a set: its covariance of {FEATURES} features is not of full rank and the "
    "distance is biased upwards; compare it only with distances between sets of the same sizes"
)
_MS_SSIM_KERNEL = 7
_MOST_POOLING = 4
_OVERSHOOT = 0.5  # of the network's output; intensities of scanners and CT go far beyond it


@dataclass(frozen=True)
class GenerationScore:
    """Metrics of a set of generated volumes; None for what was not asked for or has no value.

    Attributes:
        generated, real: how many volumes were used.
        pairs: how many pairs `ms_ssim` is the mean of.
        notes: what to know before these numbers are compared with others.
        failed: file -> why it could not be used; such files are in no metric.
    """

    generated: int
    real: int
    fid: float | None
    ms_ssim: float | None
    ms_ssim_sd: float | None
    pairs: int
    notes: tuple[str, ...]
    failed: dict[str, str]


def evaluate_generated(
    generated: Path,
    real: Path,
    weights: Path | None = None,
    modality: str = "t1n",
    most_pairs: int = 200,
    seed: int = 0,
    on_step: Callable[[str], None] = lambda line: None,
) -> GenerationScore:
    """Compare a folder of generated volumes with one of real ones.

    Volumes are brought to the voxel order of the first real one. Those in [0, 1] are taken as they are, others scaled
    to it by their own percentiles (see `to_unit`). Those of another size than the first generated one are padded with
    zeros to a multiple of it and averaged down.

    Args:
        generated: flat folder of .nii.gz, as `cwdm sample` writes it.
        real: the same, or a folder of case folders.
        weights: MedicalNet's resnet_50_23dataset.pth; without it there is no FID.
        modality: which images of case folders are taken.
        most_pairs: if there are more pairs, that many are drawn.
        seed: of that draw.
        on_step: told what has been done.

    Raises:
        InputError: a folder is missing, holds no image, or fewer than two of its volumes can be used.
        WeightsError: the weights are not those of that network.
        SettingsError: MONAI, which computes MS-SSIM, is not installed.
    """
    made, true = image_files(generated, modality), image_files(real, modality)
    network = load_medicalnet(weights) if weights else None
    failed: dict[str, str] = {}
    grid = _Grid.of(made, true, failed)
    used, features = _usable(generated, made, grid, network, failed, on_step)
    used_real, features_real = _usable(real, true, grid, network, failed, on_step)
    notes = ["no FID without --features, the file resnet_50_23dataset.pth of MedicalNet"]
    fid = None
    if network:
        fid = frechet_distance(np.stack(features), np.stack(features_real))
        notes = [_BIASED] if min(len(used), len(used_real)) < ENOUGH else []
    pairs, every = draw_pairs(len(used), most_pairs, seed), math.comb(len(used), 2)
    values: list[float] = []
    if min(grid.shape) < (fewest := 16 * _MS_SSIM_KERNEL):  # of four halvings
        found = "×".join(map(str, grid.shape))
        notes.append(f"no MS-SSIM: it needs {fewest} voxels along each axis, found {found}")
    else:
        values = _ms_ssim_of_pairs(used, pairs, grid, on_step)
        notes += [f"MS-SSIM over {len(pairs)} of {every} pairs, drawn with seed {seed}"] if len(pairs) < every else []
    mean = float(np.mean(values)) if values else None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return GenerationScore(len(used), len(used_real), fid, mean, std, len(values), tuple(notes), failed)


def frechet_distance(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> float:
    """Fréchet distance between the normal distributions fitted to two sets of features (N, F) and (M, F).

    |μa − μb|² + Tr(Σa + Σb − 2 (Σa Σb)^½) (Heusel et al., arXiv:1706.08500, equation 6), in float64. With the centred
    features A and B, Σa = AᵀA / (N − 1) and Σb likewise, the trace of the root is the sum of the singular values of
    A Bᵀ / √((N − 1)(M − 1)): the eigenvalues of ΣaΣb are their squares. So no root of a matrix is taken, and sets
    smaller than the number of features, whose covariances are singular, need no correction.

    Raises:
        ValueError: fewer than two samples, different numbers of features, or values that are not finite.
    """
    x, y = torch.as_tensor(np.asarray(a, np.float64)), torch.as_tensor(np.asarray(b, np.float64))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"expected features (N, F) and (M, F), found {tuple(x.shape)} and {tuple(y.shape)}")
    if min(len(x), len(y)) < FEWEST:
        raise ValueError(f"expected at least {FEWEST} samples of each set, found {len(x)} and {len(y)}")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("the features hold NaN or infinity")
    centred_x, centred_y = (_centred(samples) for samples in (x, y))
    shift = (x.mean(0) - y.mean(0)).square().sum()
    root = torch.linalg.svdvals(centred_x @ centred_y.T).sum()
    distance = shift + centred_x.square().sum() + centred_y.square().sum() - 2 * root
    return max(float(distance), 0.0)  # rounding can take the distance of equal sets below it


def _centred(samples: Tensor) -> Tensor:
    """Rows whose products are the covariance; no more of them than there are features."""
    rows = (samples - samples.mean(0)) / math.sqrt(len(samples) - 1)
    return torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows


def ms_ssim(a: Volume, b: Volume) -> float:
    """Multi-scale SSIM (Wang et al., 2003) of volumes (X, Y, Z) in [0, 1]: five scales, Gaussian window of 7 voxels.

    MONAI's, with the settings of WDM's evaluation.

    Raises:
        ValueError: the volumes are smaller than 112 voxels along an axis, or differ in size.
        SettingsError: MONAI is not installed.
    """
    try:
        from monai.metrics.regression import compute_ms_ssim
    except ModuleNotFoundError as error:
        raise SettingsError(f"{error.name} is missing; pip install 'cwdm[eval]' brings what MS-SSIM needs") from error
    if a.shape != b.shape:
        raise ValueError(f"expected volumes of one shape, found {a.shape} and {b.shape}")
    x, y = (torch.from_numpy(np.ascontiguousarray(volume, np.float32))[None, None].to(_device()) for volume in (a, b))
    with torch.inference_mode(), exact_float32():
        return float(compute_ms_ssim(x, y, spatial_dims=3, data_range=1.0, kernel_size=_MS_SSIM_KERNEL))


def draw_pairs(count: int, most: int, seed: int) -> list[tuple[int, int]]:
    """All pairs i < j of `count` things, or `most` of them drawn without replacement, in order."""
    every = math.comb(count, 2)
    if every <= most:
        return list(itertools.combinations(range(count), 2))
    chosen: set[tuple[int, int]] = set()
    draw = random.Random(seed)
    while len(chosen) < most:
        i, j = sorted(draw.sample(range(count), 2))
        chosen.add((i, j))
    return sorted(chosen)


def onto_grid(volume: Volume, shape: tuple[int, ...]) -> Volume:
    """Pad with zeros on both sides to the smallest whole multiple of `shape`, and average down to it.

    A BraTS volume of 240×240×155 becomes 256³ or 128³ exactly as WDM prepares it.

    Raises:
        ValueError: the volume is larger than 4 times the shape.
    """
    if volume.shape == shape:
        return volume
    factor = max(math.ceil(have / want) for have, want in zip(volume.shape, shape, strict=True))
    if factor > _MOST_POOLING:
        raise ValueError(f"expected at most {_MOST_POOLING} times the generated {shape}, found {volume.shape}")
    gaps = [factor * want - have for have, want in zip(volume.shape, shape, strict=True)]
    return block_means(np.pad(volume, [(gap // 2, gap - gap // 2) for gap in gaps]), factor)


def to_unit(volume: Volume) -> Volume:
    """Clip a volume that is in [0, 1] but for overshoot; scale any other by its 0.1 and 99.9 percentiles.

    So WDM treats them: generated volumes and prepared CT as they are, MR by its percentiles.

    Raises:
        ValueError: the volume is constant, or nearly.
    """
    low, high = float(volume.min()), float(volume.max())
    if low == high:
        raise ValueError(f"every voxel is {low:g}; there is nothing to compare")
    if low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT:
        return np.clip(volume, 0, 1)
    return normalise(volume)[0]


def image_files(folder: Path, modality: str) -> list[Path]:
    """The .nii.gz and .nii of a flat folder, or the images of one modality in a folder of case folders, sorted.

    Raises:
        InputError: the folder is missing or holds neither.
    """
    entries = [path for path in list_folder(folder, "volumes") if not path.name.startswith(".")]
    if flat := [path for path in entries if path.name.endswith((".nii.gz", ".nii"))]:
        return flat
    files = [case.files[modality] for case in find_cases(folder) if modality in case.files]
    if not files:
        raise InputError(f"no {modality} in the case folders of {folder}; give --modality")
    return files


@dataclass(frozen=True)
class _Grid:
    """The voxel order and size that volumes are compared in.

    Attributes:
        order: such as "LPS"; empty if the real volumes do not say how they lie.
    """

    order: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, generated: Sequence[Path], real: Sequence[Path], failed: dict[str, str]) -> "_Grid":
        """The order of the first real volume that can be read, and the size of the first generated one."""
        order = ""
        for path in real:
            with suppress(InputError):
                _, affine, oriented = read_grid(path)
                order = "".join(orientations.aff2axcodes(affine)) if oriented else ""
                break
        for path in generated:
            try:
                return cls(order, _in_order(path, order).shape)
            except InputError as error:
                failed[str(path)] = str(error)
        raise InputError(f"no generated volume can be read; {_first(failed)}")

    def read(self, path: Path) -> Volume:
        """A volume in [0, 1] and on the grid."""
        volume = _in_order(path, self.order)
        try:
            return onto_grid(to_unit(volume), self.shape)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error


def _in_order(path: Path, order: str) -> Volume:
    """A volume in the voxel order of the real ones; as it is stored where it or they do not say how they lie."""
    volume, affine, oriented = read_grid(path)
    return Orientation.to(order, affine).apply(volume) if oriented and order else volume


def _usable(
    folder: Path,
    files: Sequence[Path],
    grid: _Grid,
    network: nn.Module | None,
    failed: dict[str, str],
    on_step: Callable[[str], None],
) -> tuple[list[Path], list[npt.NDArray[np.float32]]]:
    """The files that can be read, and their features if there is a network; raises InputError for too few."""
    used, features = [], []
    for number, path in enumerate(files, 1):
        try:
            volume = grid.read(path)
        except InputError as error:
            failed[str(path)] = str(error)
            on_step(f"[{number}/{len(files)}] FAILED: {error}")
            continue
        used.append(path)
        if network:
            features.append(features_of(network, volume))
        on_step(f"[{number}/{len(files)}] {path.name}")
    if len(used) < FEWEST:
        raise InputError(f"{folder}: expected at least {FEWEST} usable volumes, found {len(used)}; {_first(failed)}")
    return used, features


def _first(failed: dict[str, str]) -> str:
    return next(iter(failed.values()), "add more")


def _ms_ssim_of_pairs(
    files: Sequence[Path], pairs: Sequence[tuple[int, int]], grid: _Grid, on_step: Callable[[str], None]
) -> list[float]:
    @lru_cache(maxsize=4)  # the pairs come in order, so the first of a pair mostly stays
    def volume(index: int) -> Volume:
        return grid.read(files[index])

    values = []
    for number, (i, j) in enumerate(pairs, 1):
        values.append(ms_ssim(volume(i), volume(j)))
        on_step(f"[{number}/{len(pairs)}] MS-SSIM of {files[i].name} and {files[j].name}: {values[-1]:.4f}")
    return values


_device = cache(choose_device)
