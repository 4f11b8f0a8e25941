"""The signal of tissues: relaxation times, the spin-echo and inversion-recovery equations, and contrast agent.

Sources: M. A. Bernstein, K. F. King, X. J. Zhou, Handbook of MRI Pulse Sequences, 2004 (signal equations);
G. J. Stanisz et al., Magn Reson Med 54:507, 2005, and J. P. Wansapura et al., J Magn Reson Imaging 9:531,
1999 (relaxation at 3 T); J. V. Hajnal et al., J Comput Assist Tomogr 16:841, 1992 (FLAIR).
"""

from dataclasses import dataclass

import numpy as np

from cwdm.phantoms.grids import Floats

GD_R1 = 4.5  # relaxivity of gadolinium chelates at 3 T, 1 / (mM s)


@dataclass(frozen=True)
class Tissue:
    """Relaxation times at 3 T in ms, proton density relative to water, gadolinium taken up in mM.

    Grey and white matter are shorter in T1 and closer in T2 than Stanisz found, so that the images come out
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
