"""Figures of merit of generated volumes as a set: Fréchet distance to real ones (FID), and diversity (MS-SSIM).

As WDM reports them (arXiv:2402.19043): FID over the 2048 features of MedicalNet's ResNet-50, trained on 23 data sets
(Chen et al., arXiv:1904.00625), and the mean MS-SSIM over pairs of generated volumes, lower being more diverse.
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

from cwdm.device import choose_device
from cwdm.errors import InputError, SettingsError, WeightsError
from cwdm.images import Orientation, Volume, block_means, find_cases, normalise, read_grid
from cwdm.precision import exact_float32

FEATURES = 2048

FEWEST = 2
"""Below this a set has no covariance."""

ENOUGH = FEATURES + 1
"""Below this a covariance of the features cannot have full rank, and the distance is too large by what it lacks."""

_MS_SSIM_KERNEL = 7
_MOST_POOLING = 4
_OVERSHOOT = 0.5  # of the network's output; intensities of scanners and CT go far beyond it


@dataclass(frozen=True)
class GenerationScore:
    """Figures of a set of generated volumes; None for what was not asked for or has no value.

    Attributes:
        generated, real: how many volumes were used.
        pairs: how many pairs `ms_ssim` is the mean of.
        notes: what to know before these numbers are compared with others.
        failed: file -> why it could not be used; such files are in no figure.
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
    order = _first_order(true)
    shape = _first_shape(made, order, failed)
    sets = [_usable(files, order, shape, network, failed, on_step) for files in (made, true)]
    for folder, (used, _) in zip((generated, real), sets, strict=True):
        if len(used) < FEWEST:
            raise InputError(
                f"{folder}: expected at least {FEWEST} usable volumes, found {len(used)}; {_first(failed)}"
            )
    (used_made, features_made), (used_true, features_true) = sets
    notes = []
    if network and min(len(used_made), len(used_true)) < ENOUGH:
        notes.append(
            f"fewer than {ENOUGH} volumes in a set: its covariance of {FEATURES} features is not of full rank and the "
            "distance is biased upwards; compare it only with distances between sets of the same sizes"
        )
    fid = frechet_distance(np.stack(features_made), np.stack(features_true)) if network else None
    if not network:
        notes.append("no FID without --features, the file resnet_50_23dataset.pth of MedicalNet")
    pairs = draw_pairs(len(used_made), most_pairs, seed)
    if fewest := _too_small_for_ms_ssim(shape):
        return GenerationScore(len(used_made), len(used_true), fid, None, None, 0, (*notes, fewest), failed)
    values = _ms_ssim_of_pairs(used_made, pairs, order, shape, on_step)
    every = math.comb(len(used_made), 2)
    if len(pairs) < every:
        notes.append(f"MS-SSIM over {len(pairs)} of {every} pairs, drawn with seed {seed}")
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    mean = float(np.mean(values))
    return GenerationScore(len(used_made), len(used_true), fid, mean, spread, len(pairs), tuple(notes), failed)


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


# Files


def image_files(folder: Path, modality: str) -> list[Path]:
    """The .nii.gz and .nii of a flat folder, or the images of one modality in a folder of case folders, sorted.

    Raises:
        InputError: the folder is missing or holds neither.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be read: {error.strerror}; check the path") from error
    flat = [path for path in entries if path.name.endswith((".nii.gz", ".nii")) and not path.name.startswith(".")]
    if flat:
        return flat
    files = [case.files[modality] for case in find_cases(folder) if modality in case.files]
    if not files:
        raise InputError(f"no {modality} in the case folders of {folder}; give --modality")
    return files


def _first_order(files: Sequence[Path]) -> str:
    """Voxel order of the first volume that can be read; empty if it does not say how it lies."""
    for path in files:
        with suppress(InputError):
            _, affine, oriented = read_grid(path)
            return "".join(orientations.aff2axcodes(affine)) if oriented else ""
    return ""


def _in_order(path: Path, order: str) -> Volume:
    """A volume in the voxel order of the real ones; as it is stored where it or they do not say how they lie."""
    volume, affine, oriented = read_grid(path)
    return Orientation.to(order, affine).apply(volume) if oriented and order else volume


def _read(path: Path, order: str, shape: tuple[int, ...]) -> Volume:
    """In [0, 1] and on the grid."""
    volume = _in_order(path, order)
    try:
        return onto_grid(to_unit(volume), shape)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def _first_shape(files: Sequence[Path], order: str, failed: dict[str, str]) -> tuple[int, ...]:
    for path in files:
        try:
            return _in_order(path, order).shape
        except InputError as error:
            failed[str(path)] = str(error)
    raise InputError(f"no generated volume can be read; {_first(failed)}")


def _usable(
    files: Sequence[Path],
    order: str,
    shape: tuple[int, ...],
    network: nn.Module | None,
    failed: dict[str, str],
    on_step: Callable[[str], None],
) -> tuple[list[Path], list[npt.NDArray[np.float32]]]:
    """The files that can be read, and their features if there is a network."""
    used, features = [], []
    for number, path in enumerate(files, 1):
        try:
            volume = _read(path, order, shape)
        except InputError as error:
            failed[str(path)] = str(error)
            on_step(f"[{number}/{len(files)}] FAILED: {error}")
            continue
        used.append(path)
        if network:
            features.append(features_of(network, volume))
        on_step(f"[{number}/{len(files)}] {path.name}")
    return used, features


def _first(failed: dict[str, str]) -> str:
    return next(iter(failed.values()), "add more")


def _too_small_for_ms_ssim(shape: tuple[int, ...]) -> str:
    fewest = 16 * _MS_SSIM_KERNEL  # of four halvings
    found = "×".join(map(str, shape))
    return f"no MS-SSIM: it needs {fewest} voxels along each axis, found {found}" if min(shape) < fewest else ""


def _ms_ssim_of_pairs(
    files: Sequence[Path],
    pairs: Sequence[tuple[int, int]],
    order: str,
    shape: tuple[int, ...],
    on_step: Callable[[str], None],
) -> list[float]:
    @lru_cache(maxsize=4)  # the pairs come in order, so the first of a pair mostly stays
    def volume(index: int) -> Volume:
        return _read(files[index], order, shape)

    values = []
    for number, (i, j) in enumerate(pairs, 1):
        values.append(ms_ssim(volume(i), volume(j)))
        on_step(f"[{number}/{len(pairs)}] MS-SSIM of {files[i].name} and {files[j].name}: {values[-1]:.4f}")
    return values


def _centred(samples: Tensor) -> Tensor:
    """Rows whose products are the covariance; no more of them than there are features."""
    rows = (samples - samples.mean(0)) / math.sqrt(len(samples) - 1)
    return torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows


# The network


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, width, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3 = nn.Conv3d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(4 * width)
        self.downsample = None
        if stride != 1 or channels != 4 * width:
            shortcut = nn.Conv3d(channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm3d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x) if self.downsample else x
        x = self.bn1(self.conv1(x)).relu_()
        x = self.bn2(self.conv2(x)).relu_()
        return (self.bn3(self.conv3(x)) + shortcut).relu_()


class MedicalNet(nn.Module):
    """ResNet-50 in 3D whose last two stages dilate instead of striding: (B, 1, X, Y, Z) -> (B, 2048).

    Module names are those of the published weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(1, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        self.maxpool = nn.MaxPool3d(3, stride=2, padding=1)
        self.layer1 = self._stage(64, 64, blocks=3)
        self.layer2 = self._stage(256, 128, blocks=4, stride=2)
        self.layer3 = self._stage(512, 256, blocks=6, dilation=2)
        self.layer4 = self._stage(1024, 512, blocks=3, dilation=4)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, 2048) of volumes (B, 1, X, Y, Z) in [0, 1]."""
        x = self.maxpool(self.bn1(self.conv1(x)).relu_())
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(2, 3, 4))

    @staticmethod
    def _stage(channels: int, width: int, blocks: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
        first = _Bottleneck(channels, width, stride, dilation)
        return nn.Sequential(first, *(_Bottleneck(4 * width, width, 1, dilation) for _ in range(blocks - 1)))


def load_medicalnet(path: Path) -> MedicalNet:
    """MedicalNet's ResNet-50 from resnet_50_23dataset.pth, read as tensors only; on the GPU if there is one.

    Raises:
        WeightsError: the file cannot be read, asks to run code, or holds other tensors.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # whatever a damaged or hostile file makes of the reader
        raise WeightsError(f"{path}: cannot be read as weights ({' '.join(str(error).split())[:200]})") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: expected a dictionary of tensors, as in resnet_50_23dataset.pth of MedicalNet")
    network = MedicalNet()
    try:
        wrong = network.load_state_dict(
            {name.removeprefix("module."): value for name, value in state.items()}, strict=False
        )
    except RuntimeError as error:
        raise WeightsError(f"{path}: not MedicalNet's ResNet-50 ({' '.join(str(error).split())[:200]})") from error
    # Counters of batches, which play no part here, are missing from files that old versions of PyTorch wrote.
    missing = [name for name in wrong.missing_keys if not name.endswith("num_batches_tracked")]
    if missing or wrong.unexpected_keys:
        raise WeightsError(
            f"{path}: not MedicalNet's ResNet-50; {len(missing)} tensors missing ({', '.join(missing[:3])}), "
            f"{len(wrong.unexpected_keys)} left over ({', '.join(wrong.unexpected_keys[:3])})"
        )
    return network.to(_device()).eval()


def features_of(network: nn.Module, volume: Volume) -> npt.NDArray[np.float32]:
    """Features (2048,) of a volume (X, Y, Z) in [0, 1]."""
    device = next(network.parameters()).device
    x = torch.from_numpy(np.ascontiguousarray(volume))[None, None].to(device)
    with torch.inference_mode(), exact_float32():
        features: npt.NDArray[np.float32] = network(x)[0].cpu().numpy()
    return features


@cache
def _device() -> torch.device:
    return choose_device()


def _is_zip(path: Path) -> bool:
    """Whether PyTorch can map the file: those before version 1.6 are plain pickles."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
