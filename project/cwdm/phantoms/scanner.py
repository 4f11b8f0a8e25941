"""Physics-based synthetic patients: a folded brain with a glioma, in four contrasts, on demand.

A patient is made in three steps. *Anatomy* (`anatomy.py`): layers of tissue, the same for the same seed at any
resolution. *Physics*: the layers become signals through the spin-echo and inversion-recovery equations, all
contrasts from the same T1, T2 and proton density, each of which varies by itself within a tissue. *Scanner*, for each
modality by itself: coil bias, voxels and slices, Rician noise, a registration that is a little off, intensity scale.
`benchmarks/phantoms.py` holds the result against patients.

Sources: M. A. Bernstein, K. F. King, X. J. Zhou, Handbook of MRI Pulse Sequences, 2004 (signal equations);
G. J. Stanisz et al., Magn Reson Med 54:507, 2005, and J. P. Wansapura et al., J Magn Reson Imaging 9:531,
1999 (relaxation at 3 T); J. V. Hajnal et al., J Comput Assist Tomogr 16:841, 1992 (FLAIR); H. Gudbjartsson,
S. Patz, Magn Reson Med 34:910, 1995 (Rician noise).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cwdm.files import output_errors
from cwdm.images import MODALITIES, output_name, write_nifti
from cwdm.phantoms.anatomy import (
    Anatomy,
    AnatomyVariation,
    Floats,
    Grid,
    Interpolation,
    Range,
    Shape,
    box_average,
    linear,
    make_anatomy,
    smooth_noise,
)

GD_R1 = 4.5  # relaxivity of gadolinium chelates at 3 T, 1 / (mM s)


@dataclass(frozen=True)
class Phantom:
    """One synthetic patient.

    Attributes:
        volumes: t1n, t1c, t2w and t2f, each int16 (X, Y, Z), 0 outside one common brain mask.
        seg: uint8 (X, Y, Z): 1 necrotic core, 2 oedema, 3 enhancing tumour, 0 elsewhere.
        affine: (4, 4) float64, voxel indices to RAS millimetres; the array is stored LPS.
    """

    volumes: dict[str, NDArray[np.int16]]
    seg: NDArray[np.uint8]
    affine: NDArray[np.float64]


@dataclass(frozen=True)
class Variation(AnatomyVariation):
    """How far patients and scanners differ; each range is sampled uniformly once a patient or a modality.

    `tissue`, `bias` and `noise` are relative, `patchiness` multiplies that of the tissues, `maximum` is the brightest
    voxel, `misregistration_mm` how far a modality lies from where it should, as a standard deviation along each axis;
    `thick_slice` (of `slice_mm`), `inversion_prepared_t1` and `outlier` (a few voxels up to 5 times as bright as
    the rest) are the probabilities that a modality has that feature.
    """

    tissue: float = 0.05
    patchiness: Range = (0.5, 1.5)
    bias: Range = (0.05, 0.28)
    noise: Range = (0.008, 0.04)
    misregistration_mm: Range = (0.0, 0.7)
    thick_slice: float = 0.5
    slice_mm: Range = (2.0, 5.0)
    inversion_prepared_t1: float = 0.5
    maximum: Range = (800.0, 3000.0)
    outlier: float = 0.2


WIDE = Variation(
    head_scale=(0.85, 1.08),
    rotation_deg=10.0,
    shift_mm=6.0,
    warp_mm=3.5,
    gyral_wavelength_mm=(11.5, 20.0),
    sulcal_width_mm=(0.0, 1.4),
    cortex_mm=(1.8, 4.0),
    ventricle_mm=(-2.0, 6.0),
    tumour_radius_mm=(4.0, 30.0),
    oedema_reach_mm=(3.0, 35.0),
    tissue=0.12,
    patchiness=(0.3, 3.0),
    bias=(0.0, 0.4),
    noise=(0.003, 0.06),
    misregistration_mm=(0.0, 1.2),
    outlier=0.3,
)
"""Wider than patients differ, to train networks that must also cope with what no phantom shows; after Billot et al.,
SynthSeg, Med Image Anal 86:102789, 2023."""


@dataclass(frozen=True)
class Tissue:
    """Relaxation times at 3 T in ms, proton density relative to water, gadolinium taken up in mM.

    Grey and white matter are shorter in T1 and closer in T2 than Stanisz found, so that the contrasts come out
    as in clinical fast spin echoes; values of lesions, vessels and nuclei are plausible choices, not measurements.
    `patchiness` is the relative standard deviation of T1 and, independently, of T2 inside the tissue.
    """

    t1: float
    t2: float
    pd: float
    gd: float = 0.0
    patchiness: float = 0.05


TISSUES = {
    "csf": Tissue(4200, 1500, 1.0, 0.0, 0.02),
    "grey": Tissue(1400, 89, 0.81, 0.02),
    "white": Tissue(880, 72, 0.71, 0.01),
    "thalamus": Tissue(1200, 77, 0.77, 0.02),
    "striatum": Tissue(1330, 80, 0.80, 0.02),
    "pallidum": Tissue(1000, 58, 0.74, 0.02),
    "cerebellar": Tissue(1350, 88, 0.80, 0.02),
    "brainstem": Tissue(1000, 77, 0.74, 0.01),
    "vessel": Tissue(1800, 50, 0.65, 1.5, 0.15),
    "dura": Tissue(1300, 45, 0.65, 0.8, 0.15),
    "choroid": Tissue(1900, 160, 0.9, 0.7, 0.1),
    "gliosis": Tissue(1300, 120, 0.8, 0.01, 0.08),
    "oedema": Tissue(1650, 150, 0.87, 0.01, 0.08),
    "enhancing": Tissue(1500, 125, 0.85, 0.3, 0.15),
    "necrosis": Tissue(2400, 260, 0.93, 0.03, 0.2),
}


@dataclass(frozen=True)
class Timing:
    """Timing of a spin-echo sequence in ms; with an inversion time it is inversion recovery."""

    tr: float
    te: float
    ti: float | None = None

    def signal(self, pd: Floats | np.float32, t1: Floats, t2: Floats) -> Floats:
        """Signed signal of a tissue with this proton density, T1 and T2 (ms)."""
        if self.ti is None:
            return spin_echo(pd, t1, t2, self.tr, self.te)
        return inversion_recovery(pd, t1, t2, self.tr, self.te, self.ti)


# Physics


def spin_echo(pd: Floats | np.float32, t1: Floats, t2: Floats, tr: float, te: float) -> Floats:
    """Signal of a spin echo, PD (1 - exp(-TR/T1)) exp(-TE/T2); times in ms. Bernstein et al., 2004."""
    return pd * (1 - np.exp(-tr / t1)) * np.exp(-te / t2)


def inversion_recovery(pd: Floats | np.float32, t1: Floats, t2: Floats, tr: float, te: float, ti: float) -> Floats:
    """Signed signal PD (1 - 2 exp(-TI/T1) + exp(-TR/T1)) exp(-TE/T2); times in ms. Bernstein et al., 2004."""
    return pd * (1 - 2 * np.exp(-ti / t1) + np.exp(-tr / t1)) * np.exp(-te / t2)


def nulling_time(t1: float, tr: float) -> float:
    """Inversion time in ms at which `inversion_recovery` of a tissue with this T1 is 0. Hajnal et al., 1992."""
    return float(t1 * np.log(2 / (1 + np.exp(-tr / t1))))


def shortened_t1(t1: Floats, gadolinium_mM: Floats | float) -> Floats:
    """T1 in ms with gadolinium on board: 1/T1 = 1/T10 + r1 C. Bernstein et al., 2004."""
    return t1 / (1 + t1 * np.float32(GD_R1 / 1000) * gadolinium_mM)


# Scanner


def _protocol(rng: np.random.Generator, variation: Variation) -> dict[str, Timing]:
    """Sequence timings of the four contrasts; T1 weighting by spin echo or, as in MPRAGE, by inversion."""

    def t1_weighted() -> Timing:
        if rng.random() < variation.inversion_prepared_t1:
            return Timing(rng.uniform(1900, 2300), rng.uniform(2.5, 5), rng.uniform(850, 1050))
        return Timing(rng.uniform(450, 900), rng.uniform(8, 17))

    tr = rng.uniform(8000, 10000)
    return {
        "t1n": t1_weighted(),
        "t1c": t1_weighted(),
        "t2w": Timing(rng.uniform(4500, 8000), rng.uniform(85, 120)),
        "t2f": Timing(tr, rng.uniform(95, 130), nulling_time(TISSUES["csf"].t1, tr) * rng.uniform(0.97, 1.01)),
    }


def _tissue_factors(rng: np.random.Generator, variation: Variation) -> dict[str, list[float]]:
    """What this patient's T1, T2, proton density and gadolinium are multiplied by, for each tissue.

    Most of it is common to all tissues (age, field strength), so that their order stays.
    """
    common = rng.standard_normal(4)
    factors = {}
    for name, tissue in TISSUES.items():
        deviation = 0.92 * common + 0.4 * rng.standard_normal(4)
        spread = max(variation.tissue, tissue.patchiness) * np.array([1, 0.6, 0.3, 2])
        factors[name] = np.exp(spread * deviation).tolist()
    return factors


def _signals(rng: np.random.Generator, anatomy: Anatomy, variation: Variation) -> dict[str, Floats]:
    """Noise-free signed signal of every contrast over `grid.near`: the fraction-weighted sum of the tissues'."""
    grid = anatomy.grid
    protocol = _protocol(rng, variation)
    factors = _tissue_factors(rng, variation)
    patchiness = rng.uniform(*variation.patchiness)

    def patches() -> Floats:
        coarse, middle, fine = (smooth_noise(rng, mm) for mm in (25.0, 12.0, 6.0))
        return grid.sample(np.float32(patchiness) * (0.75 * coarse + 0.5 * middle + 0.4 * fine))

    t1_map, t2_map, pd_map, gd_map = (patches() for _ in range(4))
    signals = {modality: np.zeros(len(grid.near), np.float32) for modality in MODALITIES}
    for layer in anatomy.layers:
        tissue, f, at = TISSUES[layer.tissue], factors[layer.tissue], layer.index
        t1 = np.float32(tissue.t1 * f[0]) * np.exp(np.float32(tissue.patchiness) * t1_map[at])
        t2 = np.float32(tissue.t2 * f[1]) * np.exp(np.float32(tissue.patchiness) * t2_map[at])
        pd = np.float32(tissue.pd * min(f[2], 1 / tissue.pd)) * np.exp(np.float32(0.4 * tissue.patchiness) * pd_map[at])
        gadolinium_mM = np.float32(tissue.gd * f[3]) * np.exp(np.float32(3 * tissue.patchiness) * gd_map[at])
        enhanced = shortened_t1(t1, gadolinium_mM)
        for modality, timing in protocol.items():
            signal = timing.signal(pd, enhanced if modality == "t1c" else t1, t2)
            signals[modality][at] += layer.fraction * (signal - signals[modality][at])
    return signals


def _scan(rng: np.random.Generator, signal: Floats, anatomy: Anatomy, variation: Variation) -> NDArray[np.int16]:
    """One contrast as the scanner and the BraTS preparation would give it, int16 over the whole array."""
    grid, mask = anatomy.grid, anatomy.mask
    coil = np.exp(np.float32(rng.uniform(*variation.bias)) * smooth_noise(rng, float(rng.choice((35, 50, 70)))))
    acquire, register = _acquisition(rng, grid, variation)
    acquired = acquire(grid.volume(signal * grid.sample(coil)))
    level = np.float32(rng.uniform(*variation.noise) * np.percentile(abs(acquired[acquired != 0][::16]), 95))
    real, imaginary = level * rng.standard_normal((2, *acquired.shape), np.float32)
    volume = register(np.hypot(acquired + real, imaginary))
    volume *= mask
    volume *= np.float32(np.exp(rng.uniform(*np.log(variation.maximum))) / volume.max())
    if rng.random() < variation.outlier:
        brightest = np.unravel_index(volume.argmax(), volume.shape)
        volume[tuple(slice(max(k - 1, 0), k + 2) for k in brightest)] *= np.float32(rng.uniform(1.5, 5))
    return grid.embed(np.clip(np.rint(volume), mask, 32767).astype(np.int16))  # nowhere 0 inside the mask


def _acquisition(rng: np.random.Generator, grid: Grid, variation: Variation) -> tuple[Interpolation, Interpolation]:
    """From the head to the voxels of a scanner, often thick slices, and back by a registration that is a little off."""
    voxel_mm = np.repeat(rng.uniform(0.9, 1.4, 2), (2, 1))
    if rng.random() < variation.thick_slice:
        voxel_mm[2] = rng.uniform(*variation.slice_mm)
    voxel_mm = np.roll(voxel_mm, rng.choice(3, p=(0.7, 0.15, 0.15)))  # slices along z, x or y
    std_mm = rng.uniform(*variation.misregistration_mm)
    offsets, stretches = std_mm * rng.standard_normal(3), 1 + std_mm / 150 * rng.standard_normal(3)
    forth, back = [], []
    for axis, (size_mm, phase) in enumerate(zip(voxel_mm, rng.random(3), strict=True)):
        positions = centres = grid.axis_mm(axis)
        if size_mm > grid.spacing_mm:  # else the grid's own voxels are as fine as the scanner's need to be
            numbers = np.arange(positions.min() // size_mm - 1, positions.max() // size_mm + 3)
            centres = ((numbers + phase) * size_mm).astype(np.float32)
        forth.append(box_average(centres, max(float(size_mm), grid.spacing_mm), positions, grid.spacing_mm))
        found = (stretches[axis] * positions + offsets[axis]).astype(np.float32)
        back.append(linear(np.clip(found, centres.min(), centres.max()), centres))
    return Interpolation(*forth), Interpolation(*back)


def make_phantom(
    seed: int | Sequence[int],
    shape: Shape = (240, 240, 155),
    spacing_mm: float = 1.0,
    variation: Variation | None = None,
) -> Phantom:
    """Make the patient that belongs to a seed.

    Args:
        seed: of numpy's generator; the same seed gives the same voxels.
        shape: (X, Y, Z) in voxels; the brain needs about 150 x 200 x 150 mm.
        spacing_mm: edge of the cubic voxels; with another spacing the same patient appears at that resolution.
        variation: how far patients and scanners differ; None: as `Variation()`.
    """
    variation = variation or Variation()
    anatomy_rng, signal_rng, *scan_rngs = np.random.default_rng(seed).spawn(2 + len(MODALITIES))
    anatomy = make_anatomy(anatomy_rng, shape, spacing_mm, variation)
    signals = _signals(signal_rng, anatomy, variation)
    with ThreadPoolExecutor(2) as pool:
        scans = pool.map(partial(_scan, anatomy=anatomy, variation=variation), scan_rngs, signals.values())
        volumes = dict(zip(signals, scans, strict=True))
    affine = np.diag([-spacing_mm, -spacing_mm, spacing_mm, 1.0])
    affine[1, 3] = (shape[1] - 1) * spacing_mm
    return Phantom(volumes, anatomy.grid.embed(anatomy.seg), affine)


# Files


def write_phantom(phantom: Phantom, folder: Path, name: str) -> Path:
    """Write <folder>/<name>/<name>-<modality>.nii.gz and <name>-seg.nii.gz; returns the case's folder.

    Raises:
        OutputError: the folder cannot be written to.
    """
    case = folder / name
    with output_errors(folder):
        case.mkdir(parents=True, exist_ok=True)
    volumes: dict[str, NDArray[Any]] = {**phantom.volumes, "seg": phantom.seg}
    for suffix, volume in volumes.items():
        write_nifti(case / output_name(name, suffix), volume, phantom.affine)
    return case


def write_phantoms(
    out: Path,
    cases: int,
    seed: int,
    shape: Shape = (240, 240, 155),
    spacing_mm: float = 1.0,
    variation: Variation | None = None,
    on_case: Callable[[str], None] = lambda name: None,
    first: int = 0,
) -> list[Path]:
    """Write cases BraTS-PHANTOM-00000-000 and on; returns their folders. Finished cases are left as they are.

    Case number i, from `first` on, depends on (seed, i) alone. `on_case` is called with a case's name once it is there.

    Raises:
        OutputError: the folder cannot be written to.
    """
    folders = []
    for number in range(first, first + cases):
        name = f"BraTS-PHANTOM-{number:05d}-000"
        folder = out / name
        if not all((folder / output_name(name, suffix)).exists() for suffix in (*MODALITIES, "seg")):
            write_phantom(make_phantom([seed, number], shape, spacing_mm, variation), out, name)
        folders.append(folder)
        on_case(name)
    return folders
