"""Skull and scalp around a phantom's brain, so that it looks as it does before anything is stripped.

Layers at fixed distances from a smooth hull of the brain, with signals as of fluid, bone, marrow, muscle and fat.
Air is noise, as scanners give it.
"""

from dataclasses import replace

import numpy as np
from scipy import ndimage

from cwdm.arrays import Volume
from cwdm.phantoms.patients import Phantom

LAYERS_MM = {"csf": 2.5, "bone": 5.0, "marrow": 8.0, "cortex": 10.0, "muscle": 12.0, "fat": 17.0}
"""Layer -> distance from the brain's hull where it ends; bone on both sides of the marrow."""

SIGNALS = {
    "t1n": {"csf": 0.15, "bone": 0.04, "marrow": 0.7, "cortex": 0.04, "muscle": 0.4, "fat": 1.3},
    "t1c": {"csf": 0.15, "bone": 0.04, "marrow": 0.7, "cortex": 0.04, "muscle": 0.5, "fat": 1.3},
    "t2w": {"csf": 1.6, "bone": 0.04, "marrow": 0.5, "cortex": 0.04, "muscle": 0.3, "fat": 0.9},
    "t2f": {"csf": 0.1, "bone": 0.04, "marrow": 0.5, "cortex": 0.04, "muscle": 0.4, "fat": 0.9},
}
"""Modality -> layer -> signal, as a share of the brain's median."""

_HULL_MM = 12.0
_NOISE = 0.015


def add_skull(phantom: Phantom, seed: int = 0) -> Phantom:
    """The same patient with skull and scalp, and noise around.

    What of the head does not fit into the array is cut off, as it is below the brain.
    """
    spacing_mm = float(np.linalg.norm(phantom.affine[:3, 0]))
    brain = phantom.volumes["t1n"] > 0
    outside_mm = _distance_mm(brain, spacing_mm)
    rng = np.random.default_rng(seed)
    volumes = {}
    for modality, volume in phantom.volumes.items():
        scale = float(np.median(volume[brain]))
        around = _layers(outside_mm, SIGNALS[modality]) * scale
        head = np.where(brain, volume, around)
        noise = _NOISE * scale * rng.standard_normal((2, *head.shape), np.float32)
        magnitude = np.hypot(head + noise[0] * ~brain, noise[1] * ~brain)
        volumes[modality] = np.clip(np.rint(magnitude), 0, 32767).astype(np.int16)
    return replace(phantom, volumes=volumes)


def _distance_mm(brain: np.ndarray, spacing_mm: float) -> Volume:
    """Distance from the brain, of which gaps and sulci are closed first; 0 in it."""
    padded = np.pad(brain, (margin := int(np.ceil(_HULL_MM / spacing_mm)) + 1))
    near = ndimage.distance_transform_edt(~padded, sampling=spacing_mm) < _HULL_MM
    hull = ndimage.distance_transform_edt(near, sampling=spacing_mm) > _HULL_MM
    inner = tuple(slice(margin, -margin) for _ in range(3))
    distance: Volume = ndimage.distance_transform_edt(~(hull | padded), sampling=spacing_mm)[inner].astype(np.float32)
    return distance


def _layers(outside_mm: Volume, signals: dict[str, float]) -> Volume:
    """Signal of the layers by distance; 0 beyond the last one."""
    ends = np.array(list(LAYERS_MM.values()))
    values = np.array([signals[layer] for layer in LAYERS_MM] + [0.0], np.float32)
    values_at: Volume = values[np.searchsorted(ends, outside_mm, side="right")]
    return values_at
