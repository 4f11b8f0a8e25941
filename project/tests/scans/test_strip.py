"""Brain masks: given, recognised, or by HD-BET."""

import numpy as np
import pytest
import torch
from scans.conftest import Patient
from support import SHARED

from cwdm.errors import CaseError
from cwdm.images import Image, read_grid
from cwdm.scans import strip
from cwdm.scans.itk import read_transform, resample_mask
from cwdm.scans.strip import stripped_already

CPU = torch.device("cpu")
SCANS = SHARED / "scans"


def noisy(patient: Patient) -> Image:
    """A head in air as scanners show it: noise everywhere."""
    image = patient.heads["t1n"].image
    noise = np.abs(np.random.default_rng(5).normal(0, 20, image.volume.shape)).astype(np.float32)
    return image._replace(volume=image.volume + noise)


def test_a_given_mask_is_taken_in_any_voxel_order(patient: Patient) -> None:
    image, mask = patient.heads["t1n"]
    other = image.affine.copy()
    other[:3, 3] += other[:3, 0] * (mask.shape[0] - 1)
    other[:3, 0] *= -1
    found = strip(noisy(patient), CPU, Image(mask[::-1].astype(np.float32), other, True))
    assert found.how == "given"
    np.testing.assert_array_equal(found.mask, mask)


def test_masks_that_are_empty_or_elsewhere_are_refused(patient: Patient) -> None:
    image, mask = patient.heads["t1n"]
    with pytest.raises(CaseError, match="mask is empty"):
        strip(image, CPU, image._replace(volume=np.zeros_like(image.volume)))
    elsewhere = image.affine.copy()
    elsewhere[0, 3] += 50
    with pytest.raises(CaseError, match="brain mask"):
        strip(image, CPU, Image(mask.astype(np.float32), elsewhere, True))


@pytest.mark.parametrize("background", [0.0, -7.0])
def test_stripped_images_are_recognised(patient: Patient, background: float) -> None:
    image, mask = patient.heads["t2w"]
    found = stripped_already(image._replace(volume=np.where(mask, image.volume, np.float32(background))))
    assert found is not None
    assert np.mean(found == mask) > 0.999


def test_heads_in_air_are_not_taken_for_stripped(patient: Patient) -> None:
    assert stripped_already(noisy(patient)) is None


def test_heads_in_blank_air_are_not_taken_for_stripped(patient: Patient) -> None:
    image, mask = patient.heads["t1n"]
    head = np.zeros(mask.shape, np.float32)
    head[4:-4, 4:-4, :-3] = 30
    head[mask] = 0  # as the skull and the air of sinuses within a scalp
    assert stripped_already(image._replace(volume=head)) is None


needs_scans = pytest.mark.skipif(
    not SCANS.is_dir(), reason="real scans stand beside the repository in development only"
)


@needs_scans
@pytest.mark.parametrize("study", ["MSL-01-1", "MSL-12-2"])
def test_real_heads_are_not_taken_for_stripped(study: str) -> None:
    for name in ("FLAIR", "T1W", "T2W"):
        assert stripped_already(read_grid(SCANS / study / f"{name}.nii.gz")) is None


@needs_scans
def test_a_real_stripped_image_is_recognised() -> None:
    folder = SCANS / "TCGA-DU-7294-stripped"
    found = stripped_already(read_grid(folder / "fla.nii.gz"))
    truth = read_grid(folder / "mask_fla.nii.gz").volume > 0
    assert found is not None
    assert 2 * np.count_nonzero(found & truth) / (np.count_nonzero(found) + np.count_nonzero(truth)) > 0.99


@pytest.mark.full
@needs_scans
def test_hd_bet_finds_a_real_brain_in_any_voxel_order() -> None:
    folder = SCANS / "MSL-01-1"
    flair, common = read_grid(folder / "FLAIR.nii.gz"), read_grid(folder / "common_brainmask.nii.gz")
    to_common = np.linalg.inv(read_transform(folder / "FLAIR_to_common.txt"))
    truth = resample_mask(common.volume > 0, common.affine, flair.volume.shape, flair.affine, to_common)
    turned = flair.volume.transpose(2, 0, 1), flair.affine[:, [2, 0, 1, 3]]
    found = strip(Image(*turned, True), CPU)
    assert found.how == "HD-BET"
    mask = found.mask.transpose(1, 2, 0)
    assert 2 * np.count_nonzero(mask & truth) / (np.count_nonzero(mask) + np.count_nonzero(truth)) > 0.95
