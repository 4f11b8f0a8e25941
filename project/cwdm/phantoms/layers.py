"""Distances become fractions of voxels, painted tissue over tissue."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cwdm.phantoms.brain import deep_grey, pial_distance
from cwdm.phantoms.grids import Floats
from cwdm.phantoms.shapes import excess_length, sheet

Inside = Callable[..., Floats]  # fraction of a voxel that lies inside: distance, then the width of the border
NECROSIS, OEDEMA, ENHANCING = 1, 2, 3


@dataclass(frozen=True)
class Layer:
    """A tissue laid over what is already there: `fraction` of the voxels `index` of `Grid.near` becomes `tissue`.

    The names of the tissues are those of `physics.TISSUES`.
    """

    tissue: str
    index: NDArray[np.intp]
    fraction: Floats


def paint(at: Mapping[str, Floats], spacing_mm: float) -> tuple[list[Layer], NDArray[np.uint8]]:
    """Tissues from the bottom up, each over the ones before, and the tumour labels, given the fields at voxels."""

    def inside(distance: Floats, width: float = spacing_mm) -> Floats:
        return np.clip(0.5 - distance / width, 0, 1)

    pial = pial_distance(at)
    white = inside(at["cortex"] - pial, spacing_mm + 0.6)
    blocked = np.maximum(inside(at["lateral"]), inside(at["third"]))
    tumour = inside(at["tumour"], spacing_mm + 0.5) * (1 - blocked)
    core = inside(at["tumour"] + np.maximum(at["rim"], 0), spacing_mm + 0.5)
    below = inside(np.minimum(at["stem"], at["cerebellum"]), 3.0)
    tracts = white * (1 - blocked) * (1 - 0.85 * inside(deep_grey(at), 2.5)) * (1 - below)
    oedema = 0.85 * inside(at["oedema"], 4.0) * tracts
    gliosis = 0.5 * inside(at["lateral"] - at["gliosis"], 3.0) * tracts
    layers = [  # widths above the spacing: borders that are blurred in the brain itself
        _layer("csf", np.ones_like(pial)),
        _layer("grey", inside(-pial)),
        _layer("white", white),
        _layer("white", 0.9 * inside(at["callosum"])),
        _layer("csf", inside(at["cistern"])),
        _layer("csf", inside(at["lateral"])),
        _layer("csf", inside(at["third"])),
        _layer("thalamus", 0.8 * inside(at["thalamus"], 2.5)),
        _layer("striatum", inside(at["striatum"], 1.5)),
        _layer("pallidum", 0.9 * inside(at["pallidum"], 2.0)),
        _layer("grey", 0.9 * inside(at["hippocampus"], 1.5)),
        _layer("csf", inside(at["stem"] - at["ambient"])),
        *_cerebellum(at, inside, spacing_mm),
        _layer("brainstem", inside(at["stem"])),
        _layer("csf", inside(at["fourth"])),
        *_vessels(at, inside, np.flatnonzero(pial < 1 + spacing_mm), pial),
        _layer("choroid", 0.8 * inside(at["choroid"]) * inside(at["lateral"])),
        _layer("vessel", 0.9 * inside(at["sinus"])),
        _layer("gliosis", gliosis),
        _layer("oedema", oedema),
        _layer("enhancing", tumour),
        _layer("necrosis", tumour * core),
    ]
    seg = np.zeros(pial.shape, np.uint8)
    seg[oedema > 0.35] = OEDEMA
    seg[tumour > 0.5] = ENHANCING
    seg[(tumour > 0.5) & (core > 0.5)] = NECROSIS
    return layers, seg


def _layer(tissue: str, fraction: Floats, among: NDArray[np.intp] | None = None) -> Layer:
    """A layer where there is any of it; `fraction` is given at all voxels, or at those that are `among` them."""
    some = np.flatnonzero(fraction > 0.01)
    return Layer(tissue, some if among is None else among[some], fraction[some])


def _cerebellum(at: Mapping[str, Floats], inside: Inside, spacing_mm: float) -> list[Layer]:
    """Lobules parted by fissures and lined with leaves too fine to see apart, on branches of white matter."""
    here = np.flatnonzero(at["cerebellum"] < spacing_mm)
    distance, angle = at["cerebellum"][here], at["folia"][here]
    lobule, leaf = abs(np.sin(5 * angle)), abs(np.sin(16 * angle))  # 0 in a fissure, 1 between two
    cerebellum = inside(distance)
    fissure = inside(lobule - 0.12 * np.exp(distance / 9), 0.25) * inside(-distance - 17, 5.0)
    crack = inside(leaf - 0.1, 0.7) * inside(-distance - 5, 4.0)
    branch = inside(11 + distance + 9 * (1 - lobule) - 20 * np.maximum(lobule - 0.8, 0), 4.0)
    return [
        _layer("cerebellar", cerebellum, here),
        _layer("white", 0.95 * cerebellum * branch, here),
        _layer("csf", cerebellum * np.maximum(0.7 * fissure, 0.3 * crack), here),
    ]


def _vessels(at: Mapping[str, Floats], inside: Inside, here: NDArray[np.intp], pial: Floats) -> list[Layer]:
    """Vessels in sulci, in fissures and on the surface, and what is left of the dura, at the voxels `here`."""

    def of(name: str) -> Floats:
        return at[name][here]

    sheets = [abs(of("sulcus")), sheet(of("mid"), of("mid_edge")), sheet(of("sylvian"), of("sylvian_edge"))]
    tube = np.hypot(np.minimum.reduce([*sheets, abs(of("depth"))]), 6 * of("vessel"))
    falx = sheet(of("mid"), of("mid_edge") + 8)
    tentorium = sheet(of("cerebellum") - 1, excess_length(of("depth") - 2, 3 - of("stem")))
    dura = inside(np.minimum(falx, tentorium) - 0.35) * inside(-0.5 - of("dura"), 1.0)
    rind = inside(-0.6 - of("brain")) * inside(0.6 - of("dura"), 1.0)
    return [
        _layer("dura", 0.8 * np.maximum(dura, 0.7 * rind), here),
        _layer("vessel", 0.9 * inside(tube - of("vessel_radius")) * inside(pial[here] - 1), here),
    ]
