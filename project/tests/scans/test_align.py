"""Contrasts in one space, and results back on the grids that they came from."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scans.conftest import Patient

from cwdm.errors import CaseError
from cwdm.scans import Aligned, Head, align, best_resolved, bring_back, write_transforms
from cwdm.scans.itk import RAS_LPS


def test_contrasts_lie_over_each_other(patient: Patient, aligned: Aligned) -> None:
    truth = patient.heads["t1n"]
    assert aligned.space.shape == truth.image.volume.shape
    assert np.mean(aligned.brain == truth.mask) > 0.99
    np.testing.assert_allclose(
        aligned.volume("t1n")[aligned.brain], truth.image.volume[aligned.brain], rtol=1e-3, atol=1e-3
    )
    assert not aligned.volume("t2w")[~aligned.brain].any()


def test_the_atlas_puts_a_brain_where_brats_has_it(patient: Patient) -> None:
    aligned = align({"t1n": patient.heads["t1n"]}, "sri24")
    assert aligned.space.shape == (240, 240, 155)
    atlas = aligned.space.atlas
    assert atlas is not None
    assert aligned.registrations["t1n"].overlap > 0.85
    centre = np.argwhere(aligned.brain).mean(axis=0)
    np.testing.assert_allclose(centre, [119, 133, 70], atol=12)


def test_a_volume_comes_back_onto_the_grid_of_an_image(patient: Patient, aligned: Aligned) -> None:
    image, mask = patient.heads["t2f"]
    returned = bring_back(aligned.volume("t2f"), aligned, "t2f")
    assert returned.volume.shape == image.volume.shape
    np.testing.assert_array_equal(returned.affine, image.affine)
    inside = mask & (returned.volume != 0)
    assert np.count_nonzero(inside) > 0.9 * np.count_nonzero(mask)
    assert np.corrcoef(returned.volume[inside], image.volume[inside])[0, 1] > 0.95


def test_nothing_comes_back_where_an_input_does_not_reach(patient: Patient) -> None:
    image, mask = patient.heads["t2f"]
    cut = Head(image._replace(volume=image.volume[:, :, :-14]), mask[:, :, :-14])
    aligned = align({**patient.heads, "t2f": cut}, "native")
    returned = bring_back(aligned.volume("t1n"), aligned, "t1n").volume
    top = np.flatnonzero(patient.heads["t1n"].mask.any(axis=(0, 1)))[-1]
    assert aligned.brain[:, :, top - 2].any()
    assert not returned[:, :, top - 2].any()
    assert returned[:, :, top // 2].any()


def test_points_return_through_the_files(patient: Patient, aligned: Aligned, tmp_path: Path) -> None:
    paths = {path.name: path for path in write_transforms(aligned, tmp_path / "transforms", "case")}
    there, again = (
        sitk.ReadTransform(str(paths[f"case_from-{first}_to-{second}.txt"]))
        for first, second in (("t2w", "native"), ("native", "t2w"))
    )
    image, mask = patient.heads["t2w"]
    for index in np.argwhere(mask)[::2000]:
        point = (RAS_LPS @ image.affine @ [*index, 1])[:3]
        np.testing.assert_allclose(again.TransformPoint(there.TransformPoint(point.tolist())), point, atol=1e-6)
        np.testing.assert_allclose(
            there.TransformPoint(point.tolist()), (np.linalg.inv(aligned.matrices["t2w"]) @ [*point, 1])[:3], atol=1e-6
        )


def test_the_reference_is_the_best_resolved_that_shows_the_whole_brain(patient: Patient) -> None:
    assert best_resolved(patient.heads) == "t1n"
    image, mask = patient.heads["t1n"]
    slab = mask.copy()
    slab[:, :, 22:] = False
    assert best_resolved({**patient.heads, "t1n": Head(image, slab)}) == "t2f"


def test_what_cannot_be_registered_is_named(patient: Patient) -> None:
    image, mask = patient.heads["t2w"]
    with pytest.raises(CaseError, match=r"t2w.*does not say how the head lies"):
        align({**patient.heads, "t2w": Head(image._replace(oriented=False), mask)}, "native")
    with pytest.raises(CaseError, match=r"t2w.*mask is empty"):
        align({**patient.heads, "t2w": Head(image, np.zeros_like(mask))}, "native")
    with pytest.raises(CaseError, match="no image"):
        align({}, "native")
    with pytest.raises(CaseError, match="t1c, which is not there"):
        align(patient.heads, "native", reference="t1c")
