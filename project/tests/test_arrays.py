"""Boxes and block means, one voxel after the other."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cwdm.arrays import block_means, bounding_box

shapes = st.tuples(*[st.integers(1, 9)] * 3)


@given(hnp.arrays(np.bool_, shapes, elements=st.booleans(), fill=st.just(False)), st.integers(0, 3))
def test_the_box_around_a_mask(mask: np.ndarray, margin: int) -> None:
    box = bounding_box(mask, margin)
    if not mask.any():
        assert mask[box].size == 0
        return
    low, high = np.argwhere(mask).min(0), np.argwhere(mask).max(0)
    assert [axis.start for axis in box] == np.maximum(low - margin, 0).tolist()
    assert [axis.stop for axis in box] == np.minimum(high + 1 + margin, mask.shape).tolist()


def test_means_of_cubes_one_by_one() -> None:
    volume = np.random.RandomState(0).randint(-9, 99, (2, 7, 6, 9)).astype(np.int16)
    means = block_means(volume, 3)
    assert (means.shape, means.dtype) == ((2, 2, 2, 3), np.float32)
    for c, x, y, z in np.ndindex(means.shape):
        cube = volume[c, 3 * x : 3 * x + 3, 3 * y : 3 * y + 3, 3 * z : 3 * z + 3]
        assert means[c, x, y, z] == pytest.approx(cube.mean(), abs=1e-5)
    assert np.array_equal(block_means(volume, 1), volume)
