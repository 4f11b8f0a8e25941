import numpy as np
import pytest
from scipy import ndimage

from cwdm.phantoms import add_skull, make_phantom
from cwdm.phantoms.patients import Phantom
from cwdm.phantoms.skull import LAYERS_MM


@pytest.fixture(scope="module")
def bare() -> Phantom:
    return make_phantom(3, (48, 58, 46), 4.0)


def test_brain_stays_and_layers_lie_around_it(bare: Phantom) -> None:
    head = add_skull(bare)
    brain = bare.volumes["t1n"] > 0
    away_mm = ndimage.distance_transform_edt(~brain, sampling=4.0)
    for modality, volume in bare.volumes.items():
        np.testing.assert_array_equal(head.volumes[modality][brain], volume[brain])
    t1 = head.volumes["t1n"] / np.median(bare.volumes["t1n"][brain])
    scalp = t1 > 1.2  # fat
    outside = away_mm > LAYERS_MM["fat"] + 1
    assert (t1[outside] < 0.15).all()  # air
    assert t1[outside].std() > 0
    assert (away_mm[scalp & ~brain] > 4).all()
    skull = (away_mm > 3) & (away_mm < 5)
    assert np.median(t1[skull]) < 0.3


def test_same_seed_same_voxels(bare: Phantom) -> None:
    first, second, other = add_skull(bare, 1), add_skull(bare, 1), add_skull(bare, 2)
    np.testing.assert_array_equal(first.volumes["t2f"], second.volumes["t2f"])
    assert (first.volumes["t2f"] != other.volumes["t2f"]).any()
