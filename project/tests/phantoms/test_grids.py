import numpy as np
import pytest

from cwdm.phantoms.grids import Interpolation, box_average, linear, smooth_field


def test_a_slice_is_the_mean_of_what_it_holds() -> None:
    volume = np.random.default_rng(3).random((6, 4, 12), np.float32)
    same = [np.eye(length, dtype=np.float32) for length in (6, 4)]
    voxels = np.arange(12, dtype=np.float32) * 2 - 7  # mm
    slices = voxels.reshape(4, 3).mean(1)
    thick = Interpolation(*same, box_average(slices, 6.0, voxels, 2.0))(volume)
    np.testing.assert_allclose(thick, volume.reshape(6, 4, 4, 3).mean(-1), rtol=1e-5)
    back = Interpolation(*same, linear(slices, slices))(thick)
    np.testing.assert_array_equal(back, thick)


def test_fields_have_the_variance_that_they_claim_and_no_detail() -> None:
    rng = np.random.default_rng(5)
    fields = np.stack([smooth_field((20, 23, 17), (1.0, 1.5, 2.0), 50.0, rng) for _ in range(300)])
    assert fields.std() == pytest.approx(1, rel=0.1)
    assert abs(np.diff(fields, axis=1)).max() < 0.2
