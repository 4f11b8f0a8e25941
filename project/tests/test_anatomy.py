import numpy as np
import pytest
from numpy.typing import NDArray

from cwdm.anatomy import ENHANCING, NECROSIS, OEDEMA, Anatomy, AnatomyVariation, make_anatomy
from cwdm.phantom import TISSUES

SHAPE, SPACING_MM = (96, 80, 66), 2.5


def patient(seed: int, head_scale: float) -> Anatomy:
    variation = AnatomyVariation(head_scale=(head_scale, head_scale))
    return make_anatomy(np.random.default_rng(seed), SHAPE, SPACING_MM, variation)


@pytest.fixture(scope="module")
def patients() -> list[Anatomy]:
    """Two patients with heads of one size."""
    return [patient(1, head_scale=1.0), patient(4, head_scale=1.0)]


def middle(voxels: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.argwhere(voxels).mean(0)


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
