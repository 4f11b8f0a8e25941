import numpy as np
import pytest
from numpy.typing import NDArray

from cwdm.phantoms.anatomy import Anatomy, make_anatomy
from cwdm.phantoms.layers import ENHANCING, NECROSIS, OEDEMA
from cwdm.phantoms.physics import TISSUES
from cwdm.phantoms.variation import Variation

SHAPE, SPACING_MM = (96, 80, 66), 2.5
LESIONS = ("gliosis", "oedema", "enhancing", "necrosis")


def patient(seed: int, head_scale: float) -> Anatomy:
    variation = Variation(head_scale=(head_scale, head_scale))
    return make_anatomy(np.random.default_rng(seed), SHAPE, SPACING_MM, variation)


@pytest.fixture(scope="module")
def patients() -> list[Anatomy]:
    """Two patients with heads of one size."""
    return [patient(1, head_scale=1.0), patient(4, head_scale=1.0)]


def middle(voxels: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.argwhere(voxels).mean(0)


def healthy(anatomy: Anatomy, *tissues: str) -> NDArray[np.float64]:
    """Fraction of each voxel that is one of the tissues, as it was before the lesions."""
    fraction = np.zeros(len(anatomy.grid.near))
    for layer in anatomy.layers:
        if layer.tissue not in LESIONS:
            fraction[layer.index] *= 1 - layer.fraction
            if layer.tissue in tissues:
                fraction[layer.index] += layer.fraction
    return anatomy.grid.volume(fraction)


def test_the_tumour_is_a_core_in_a_rim_in_oedema(patients: list[Anatomy]) -> None:
    for seg in (anatomy.seg for anatomy in patients):
        assert seg.dtype == np.uint8
        assert set(np.unique(seg)) == {0, NECROSIS, OEDEMA, ENHANCING}
        np.testing.assert_allclose(middle(seg == NECROSIS), middle(seg == ENHANCING), atol=4)  # voxels
        core, tumour, whole = (
            np.argwhere(np.isin(seg, labels))
            for labels in ([NECROSIS], [NECROSIS, ENHANCING], [NECROSIS, ENHANCING, OEDEMA])
        )
        assert (tumour.min(0) <= core.min(0)).all()
        assert (tumour.max(0) >= core.max(0)).all()
        assert (np.ptp(whole, axis=0) > np.ptp(tumour, axis=0)).any()


def test_every_voxel_has_tissue_and_every_tissue_has_voxels(patients: list[Anatomy]) -> None:
    for anatomy in patients:
        bottom, *_ = anatomy.layers
        np.testing.assert_array_equal(bottom.index, np.arange(len(anatomy.grid.near)))
        assert (bottom.fraction == 1).all()
        assert all(((layer.fraction > 0) & (layer.fraction <= 1)).all() for layer in anatomy.layers)
        assert {layer.tissue for layer in anatomy.layers if len(layer.index)} == set(TISSUES)


def test_tumours_lie_in_brains_in_the_array(patients: list[Anatomy]) -> None:
    for anatomy in patients:
        assert not anatomy.seg[~anatomy.mask].any()
        brain = anatomy.grid.embed(anatomy.mask)
        assert brain.shape == SHAPE
        assert brain.sum() == anatomy.mask.sum()


def test_heads_grow_with_their_scale(patients: list[Anatomy]) -> None:
    small = patient(1, head_scale=0.85)
    assert small.mask.sum() / patients[0].mask.sum() == pytest.approx(0.85**3, rel=0.05)


def test_there_is_about_as_much_cortex_as_white_matter(patients: list[Anatomy]) -> None:
    for anatomy in [*patients, patient(5, head_scale=1.0), patient(6, head_scale=1.0)]:
        grey, white = (healthy(anatomy, tissue)[anatomy.mask].sum() for tissue in ("grey", "white"))
        assert 0.8 < grey / white < 1.3


@pytest.mark.parametrize("seed", [1, 4])
def test_oedema_runs_along_white_matter_and_spares_nuclei_and_brainstem(seed: int) -> None:
    wide = Variation(tumour_radius_mm=(20, 20), oedema_reach_mm=(25, 25))
    anatomy = make_anatomy(np.random.default_rng([8, seed]), SHAPE, SPACING_MM, wide)
    deep = healthy(anatomy, "thalamus", "striatum", "pallidum", "brainstem", "cerebellar") > 0.7
    oedema = anatomy.seg == OEDEMA
    assert oedema.sum() * SPACING_MM**3 > 50_000  # mm3: it reaches far
    assert (oedema & deep).sum() < 0.01 * oedema.sum()
    assert (healthy(anatomy, "white") > 0.5)[oedema].mean() > 0.9
