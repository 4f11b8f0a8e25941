"""Volumes, movements and their files between NumPy and SimpleITK."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from cwdm.scans import itk

AFFINE = np.array([[-0.9, 0.0, 0.4, 10.0], [0.0, 2.0, 0.0, -30.0], [0.3, 0.0, 1.2, 5.0], [0.0, 0.0, 0.0, 1.0]])
VOLUME = np.random.default_rng(3).random((5, 7, 4), np.float32)


def movement() -> itk.Matrix:
    matrix = np.eye(4)
    angle = np.radians(20)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[:3, 3] = 3, -4, 5
    return matrix


def test_a_voxel_keeps_its_value_and_place() -> None:
    image = itk.to_itk(VOLUME, AFFINE)
    ras = AFFINE @ [4, 6, 1, 1]
    np.testing.assert_allclose(image.TransformIndexToPhysicalPoint((4, 6, 1)), [-ras[0], -ras[1], ras[2]], atol=1e-5)
    assert image[4, 6, 1] == pytest.approx(VOLUME[4, 6, 1])
    np.testing.assert_array_equal(itk.to_volume(image), VOLUME)


def test_tilted_gantries_are_refused() -> None:
    sheared = AFFINE.copy()
    sheared[1, 2] += 0.3
    with pytest.raises(itk.ShearError, match="gantry tilt"):
        itk.to_itk(VOLUME, sheared)


def test_resampling_follows_the_movement_as_simpleitk_does() -> None:
    moving = itk.to_itk(VOLUME, AFFINE)
    onto = np.diag([-1.0, -1.0, 1.0, 1.0])
    expected = sitk.Resample(moving, itk.grid((9, 8, 6), onto), itk.to_transform(movement()), sitk.sitkBSpline, 0.0)
    found = itk.resample(VOLUME, AFFINE, (9, 8, 6), onto, movement())
    np.testing.assert_allclose(found, np.clip(itk.to_volume(expected), 0, VOLUME.max()), atol=1e-6)


def test_movements_survive_itk_files(tmp_path: Path) -> None:
    itk.write_transform(tmp_path / "there.txt", movement())
    np.testing.assert_allclose(itk.read_transform(tmp_path / "there.txt"), movement(), atol=1e-12)
    point = sitk.ReadTransform(str(tmp_path / "there.txt")).TransformPoint((7.0, 8.0, 9.0))
    np.testing.assert_allclose(point, (movement() @ [7, 8, 9, 1])[:3], atol=1e-9)
