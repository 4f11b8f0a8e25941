"""The scanner: sequence timings, signals of the layers, coil bias, voxels and slices, Rician noise, registration.

All modalities come from the same T1, T2 and proton density, each of which varies by itself within a tissue; each is
scanned by itself.
"""

import numpy as np
from numpy.typing import NDArray

from cwdm.images import MODALITIES
from cwdm.phantoms.anatomy import Anatomy
from cwdm.phantoms.grids import Floats, Grid, Interpolation, box_average, linear, smooth_noise
from cwdm.phantoms.physics import TISSUES, Timing, nulling_time, shortened_t1
from cwdm.phantoms.variation import Variation


def draw_protocol(rng: np.random.Generator, variation: Variation) -> dict[str, Timing]:
    """Sequence timings of the four modalities; T1 weighting by spin echo or, as in MPRAGE, by inversion."""

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


def draw_tissue_factors(rng: np.random.Generator, variation: Variation) -> dict[str, list[float]]:
    """What this patient's T1, T2, proton density and gadolinium are multiplied by, for each tissue.

    Most of it is common to all tissues (age, field strength), so that their order stays.
    """
    common = rng.standard_normal(4)
    factors = {}
    for name, tissue in TISSUES.items():
        deviation = 0.92 * common + 0.4 * rng.standard_normal(4)
        std = max(variation.tissue, tissue.patchiness) * np.array([1, 0.6, 0.3, 2])
        factors[name] = np.exp(std * deviation).tolist()
    return factors


def signals_of(rng: np.random.Generator, anatomy: Anatomy, variation: Variation) -> dict[str, Floats]:
    """Noise-free signed signal of every modality over `grid.near`: the fraction-weighted sum of the tissues'."""
    grid = anatomy.grid
    protocol = draw_protocol(rng, variation)
    factors = draw_tissue_factors(rng, variation)
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


def scan(rng: np.random.Generator, signal: Floats, anatomy: Anatomy, variation: Variation) -> NDArray[np.int16]:
    """One modality as the scanner and the BraTS preparation would give it, int16 over the whole array."""
    grid, mask = anatomy.grid, anatomy.mask
    coil = np.exp(np.float32(rng.uniform(*variation.bias)) * smooth_noise(rng, float(rng.choice((35, 50, 70)))))
    acquire, register = _acquisition(rng, grid, variation)
    acquired = acquire(grid.volume(signal * grid.sample(coil)))
    level = float(rng.uniform(*variation.noise) * np.percentile(abs(acquired[acquired != 0][::16]), 95))
    volume = register(noisy(acquired, level, rng))
    volume *= mask
    volume *= np.float32(np.exp(rng.uniform(*np.log(variation.maximum))) / volume.max())
    if rng.random() < variation.outlier:
        brightest = np.unravel_index(volume.argmax(), volume.shape)
        volume[tuple(slice(max(k - 1, 0), k + 2) for k in brightest)] *= np.float32(rng.uniform(1.5, 5))
    return grid.embed(np.clip(np.rint(volume), mask, 32767).astype(np.int16))  # nowhere 0 inside the mask


def noisy(volume: Floats, level: float, rng: np.random.Generator) -> Floats:
    """The magnitude (X, Y, Z) of an image with Gaussian noise of this standard deviation in both channels.

    Source: H. Gudbjartsson, S. Patz, Magn Reson Med 34:910, 1995 (Rician noise).
    """
    if not level:
        return volume
    real, imaginary = np.float32(level) * rng.standard_normal((2, *volume.shape), np.float32)
    magnitude: Floats = np.hypot(volume + real, imaginary)
    return magnitude


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
