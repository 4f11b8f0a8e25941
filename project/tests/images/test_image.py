"""Volumes on one grid, however their voxels are stored."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from small_case import AFFINE, NAME, SHAPE, make_case, read, save

from cwdm.errors import CaseError
from cwdm.images.image import Image, in_order_of


def test_small_differences_of_affines_are_fine(tmp_path: Path) -> None:
    folder = make_case(tmp_path)
    shift = np.zeros((4, 4))
    shift[:3, 3] = 1e-3
    save(folder / f"{NAME}-t2w.nii.gz", affine=AFFINE + shift, qform_code=2, sform_code=4)
    save(folder / f"{NAME}-t2f.nii.gz", affine=np.where(AFFINE == 0, -0.0, AFFINE), qform_code=1, sform_code=0)
    np.testing.assert_allclose(read(folder).affine, AFFINE)


@given(st.permutations([0, 1, 2]), st.tuples(*[st.sampled_from([-1, 1])] * 3), st.integers(0, 2**31), st.booleans())
def test_the_order_of_another_image_however_it_lies(
    axes: list[int], flips: tuple[int, int, int], seed: int, diagonal: bool
) -> None:
    turned = Rotation.from_euler("z", 45, degrees=True) if diagonal else Rotation.random(random_state=seed)
    affine = np.eye(4)
    affine[:3, :3] = turned.as_matrix() @ np.diag([0.9, 1.0, 1.3])
    affine[:3, 3] = 4, -2, 7
    volume = np.random.RandomState(seed).random_sample(SHAPE).astype(np.float32)
    steps = tuple(slice(None, None, flip) for flip in flips)
    other, places = np.eye(4)[:, [*axes, 3]], np.eye(4)
    for axis, flip in enumerate(flips):
        if flip < 0:
            places[axis, axis], places[axis, 3] = -1, SHAPE[axes[axis]] - 1
    stored = Image(volume.transpose(axes)[steps], affine @ other @ places, True)
    like = Image(volume, affine + 1e-7, True)
    assert np.array_equal(in_order_of(like, stored, "case", ("one", "other")), volume)
    guessed = stored._replace(oriented=False)
    if stored.volume.shape == SHAPE:  # without an orientation it is taken as stored alike
        assert np.array_equal(in_order_of(like, guessed, "case", ("one", "other")), stored.volume)
    else:
        with pytest.raises(CaseError, match="expected volumes of one shape"):
            in_order_of(like, guessed, "case", ("one", "other"))
