"""How far synthetic patients and their scanners differ."""

from dataclasses import dataclass

Range = tuple[float, float]


@dataclass(frozen=True)
class Variation:
    """How far patients and scanners differ; each range is sampled uniformly once a patient or a modality.

    `ventricle_mm` is what the ventricles grow by; `tissue`, `bias` and `noise` are relative, `patchiness` multiplies
    that of the tissues, `maximum` is the brightest voxel, `misregistration_mm` how far a modality lies from where it
    should, as a standard deviation along each axis; `thick_slice` (of `slice_mm`), `inversion_prepared_t1` and
    `outlier` (a few voxels up to 5 times as bright as the rest) are the probabilities that a modality has that feature.
    """

    head_scale: Range = (0.9, 1.02)
    rotation_deg: float = 4.0
    shift_mm: float = 2.0
    warp_mm: float = 2.0
    gyral_wavelength_mm: Range = (14.0, 18.0)
    sulcal_width_mm: Range = (0.0, 0.4)
    cortex_mm: Range = (2.4, 3.3)
    ventricle_mm: Range = (-1.0, 3.0)
    tumour_radius_mm: Range = (10.0, 24.0)
    oedema_reach_mm: Range = (8.0, 25.0)
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
