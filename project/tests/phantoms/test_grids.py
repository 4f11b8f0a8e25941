import numpy as np

from cwdm.phantoms.grids import Interpolation, box_average, linear


def test_a_slice_is_the_mean_of_what_it_holds() -> None:
    volume = np.random.default_rng(3).random((6, 4, 12), np.float32)
    same = [np.eye(length, dtype=np.float32) for length in (6, 4)]
    voxels = np.arange(12, dtype=np.float32) * 2 - 7  # mm
    slices = voxels.reshape(4, 3).mean(1)
    thick = Interpolation(*same, box_average(slices, 6.0, voxels, 2.0))(volume)
    np.testing.assert_allclose(thick, volume.reshape(6, 4, 4, 3).mean(-1), rtol=1e-5)
    back = Interpolation(*same, linear(slices, slices))(thick)
    np.testing.assert_array_equal(back, thick)
