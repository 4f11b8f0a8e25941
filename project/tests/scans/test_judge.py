"""A wrong registration does not pass in silence."""

from collections.abc import Callable

import numpy as np
import pytest
from scans.conftest import Patient, make_patient, turn

from cwdm.scans import Aligned, Head, align, judge
from cwdm.scans.align import compose
from cwdm.scans.itk import Matrix
from cwdm.scans.register import about, centre_of


def changed(aligned: Aligned, matrix: Matrix) -> Aligned:
    """The same with t2f somewhere else."""
    matrices = {**aligned.matrices, "t2f": aligned.matrices["t2f"] @ matrix}
    return compose(aligned.space, aligned.reference, aligned.heads, matrices, aligned.brains, aligned.registrations)


def mirrored(head: Head) -> Head:
    return Head(head.image._replace(volume=head.image.volume[::-1]), head.mask[::-1])


def with_t2f(patient: Patient, other: Head) -> Aligned:
    return align({"t1n": patient.heads["t1n"], "t2f": other}, "native", reference="t1n")


@pytest.fixture(scope="module")
def pair(patient: Patient) -> Aligned:
    return with_t2f(patient, patient.heads["t2f"])


def test_a_sound_study_passes(pair: Aligned) -> None:
    found = judge(pair)
    assert found.verdict == "ok", found.reasons
    assert not found.reasons
    assert found.metrics["sharpness_t2f"] > 0.2


@pytest.mark.parametrize(("axis", "degrees"), [(0, 90), (2, 180)])
def test_turned_images_are_rejected(pair: Aligned, axis: int, degrees: float) -> None:
    matrix = about(turn(axis, degrees), centre_of(pair.brains["t1n"].mask))
    found = judge(changed(pair, matrix))
    assert found.verdict == "reject"
    assert any("turned" in reason for reason in found.reasons)


def test_a_shifted_image_is_not_passed(pair: Aligned) -> None:
    matrix = np.eye(4)
    matrix[0, 3] = 10
    assert judge(changed(pair, matrix)).verdict != "ok"


def test_a_mirrored_image_is_rejected(patient: Patient) -> None:
    found = judge(with_t2f(patient, mirrored(patient.heads["t2f"])))
    assert found.verdict == "reject"
    assert any("mirrored" in reason for reason in found.reasons)


def other_patient(patient: Patient) -> Head:
    return make_patient(12).heads["t2f"]


def lower_half(patient: Patient) -> Head:
    image, mask = patient.heads["t2f"]
    half = mask.shape[2] // 2
    return Head(image._replace(volume=image.volume[:, :, :half]), mask[:, :, :half])


def half_a_brain(patient: Patient) -> Head:
    image, mask = patient.heads["t2f"]
    return Head(image, mask & (np.arange(mask.shape[0])[:, None, None] < mask.shape[0] // 2))


@pytest.mark.parametrize("plant", [other_patient, lower_half, half_a_brain])
def test_images_that_do_not_belong_are_not_passed(patient: Patient, plant: Callable[[Patient], Head]) -> None:
    found = judge(with_t2f(patient, plant(patient)))
    assert found.verdict != "ok"
    assert any("t2f" in reason for reason in found.reasons)
