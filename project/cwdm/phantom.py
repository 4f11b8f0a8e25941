"""Physics-based synthetic patients: a folded brain with a glioma, in four contrasts, on demand.

A patient is made in three steps. *Anatomy*: signed distances in millimetres to every structure, computed on a
fixed 2 mm lattice in AC-centred coordinates (x left, y anterior, z superior) and interpolated to the voxels,
so the same seed is the same brain at any resolution. *Physics*: the layers of tissue become signals through the
spin-echo and inversion-recovery equations, all contrasts from the same T1, T2 and proton density. *Scanner*:
resolution, coil bias, Rician noise, intensity scale.

Sources: M. A. Bernstein, K. F. King, X. J. Zhou, Handbook of MRI Pulse Sequences, 2004 (signal equations);
G. J. Stanisz et al., Magn Reson Med 54:507, 2005 (T1 and T2 at 3 T); J. P. Wansapura et al., J Magn Reson
Imaging 9:531, 1999 (deep grey matter at 3 T); J. V. Hajnal et al., J Comput Assist Tomogr 16:841, 1992
(FLAIR); H. Gudbjartsson, S. Patz, Magn Reson Med 34:910, 1995 (Rician noise).
"""

import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from cwdm.files import write_atomically

Floats = NDArray[np.float32]
Range = tuple[float, float]
Axes = tuple[Floats, Floats, Floats]

MODALITIES = ("t1n", "t1c", "t2w", "t2f")
NECROSIS, OEDEMA, ENHANCING = 1, 2, 3
GD_R1 = 4.5  # relaxivity of gadolinium chelates at 3 T, 1 / (mM s)

LATTICE_MM = 2.0
LATTICE_LIMITS_MM = ((-84, 84), (-116, 84), (-74, 88))
AC_FROM_CENTRE_MM = (0.0, 14.0, -7.0)  # anterior commissure from the centre of the array, where SRI24 has it


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
class Variation:
    """How far patients and scanners differ; each range is sampled uniformly once a patient or a contrast."""

    head_scale: Range = (0.88, 1.0)
    rotation_deg: float = 4.0
    shift_mm: float = 2.0
    warp_mm: float = 2.0
    gyral_wavelength_mm: Range = (24.0, 30.0)
    sulcal_width_mm: Range = (0.4, 1.2)
    cortex_mm: Range = (2.4, 3.2)
    ventricle_mm: Range = (-1.0, 3.0)
    tumour_radius_mm: Range = (10.0, 24.0)
    oedema_reach_mm: Range = (8.0, 30.0)
    tissue: float = 0.05
    bias: Range = (0.03, 0.12)
    noise: Range = (0.008, 0.03)
    thick_slice: float = 0.35
    inversion_prepared_t1: float = 0.5
    maximum: Range = (800.0, 3000.0)
    outlier: float = 0.2


@dataclass(frozen=True)
class Tissue:
    """Relaxation times at 3 T in ms, proton density relative to water, gadolinium taken up in mM.

    `patchiness` is the relative standard deviation of T1 and T2 inside the tissue.
    """

    t1: float
    t2: float
    pd: float
    gd: float = 0.0
    patchiness: float = 0.03


TISSUES = {
    "csf": Tissue(4200, 1500, 1.0, 0.0, 0.02),
    "grey": Tissue(1450, 90, 0.81, 0.02),
    "white": Tissue(900, 74, 0.71, 0.01),
    "thalamus": Tissue(1200, 77, 0.77, 0.02),
    "striatum": Tissue(1330, 80, 0.80, 0.02),
    "pallidum": Tissue(1000, 58, 0.74, 0.02),
    "cerebellar": Tissue(1350, 88, 0.80, 0.02),
    "brainstem": Tissue(1000, 77, 0.74, 0.01),
    "vessel": Tissue(1800, 40, 0.55, 1.5, 0.1),
    "choroid": Tissue(1900, 160, 0.9, 0.7, 0.1),
    "oedema": Tissue(1650, 150, 0.87, 0.01, 0.08),
    "enhancing": Tissue(1500, 125, 0.85, 0.5, 0.15),
    "necrosis": Tissue(2400, 260, 0.93, 0.03, 0.2),
}


@dataclass(frozen=True)
class Sequence3T:
    """Timing of a spin-echo sequence in ms; with an inversion time it is inversion recovery."""

    tr: float
    te: float
    ti: float | None = None


@dataclass(frozen=True)
class Layer:
    """A tissue laid over what is already there: `fraction` of the voxels `index` becomes `tissue`."""

    tissue: str
    index: NDArray[np.intp]
    fraction: Floats


# Physics ------------------------------------------------------------------------------------------------


def spin_echo(pd: Floats, t1: Floats, t2: Floats, tr: float, te: float) -> Floats:
    """Signal of a spin echo, PD (1 - exp(-TR/T1)) exp(-TE/T2); times in ms. Bernstein et al., 2004."""
    return pd * (1 - np.exp(-tr / t1)) * np.exp(-te / t2)


def inversion_recovery(pd: Floats, t1: Floats, t2: Floats, tr: float, te: float, ti: float) -> Floats:
    """Signed signal PD (1 - 2 exp(-TI/T1) + exp(-TR/T1)) exp(-TE/T2); times in ms. Bernstein et al., 2004."""
    return pd * (1 - 2 * np.exp(-ti / t1) + np.exp(-tr / t1)) * np.exp(-te / t2)


def nulling_time(t1: float, tr: float) -> float:
    """Inversion time in ms at which `inversion_recovery` of a tissue with this T1 is 0. Hajnal et al., 1992."""
    return float(t1 * np.log(2 / (1 + np.exp(-tr / t1))))


def shortened_t1(t1: Floats, gadolinium_mM: Floats | float) -> Floats:  # noqa: N803
    """T1 in ms with gadolinium on board: 1/T1 = 1/T10 + r1 C. Bernstein et al., 2004."""
    return 1 / (1 / t1 + GD_R1 / 1000 * gadolinium_mM)
