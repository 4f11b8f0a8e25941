"""Rigid registration finds known movements, and the same ones each time."""

import numpy as np
import pytest
import SimpleITK as sitk
from scans.conftest import Patient

from cwdm.scans import Aligned
from cwdm.scans.itk import RAS_LPS, Matrix
from cwdm.scans.register import Brain, coarser, prepare, quarter_turns, register


def distance_mm(found: Matrix, true: Matrix, patient: Patient) -> float:
    image, mask = patient.heads["t1n"]
    points = RAS_LPS @ image.affine @ np.c_[np.argwhere(mask), np.ones(mask.sum())].T
    return float(np.linalg.norm(((found - true) @ points)[:3], axis=0).mean())


@pytest.mark.parametrize("modality", ["t2w", "t2f"])
def test_known_movements_are_found(patient: Patient, aligned: Aligned, modality: str) -> None:
    assert aligned.reference == "t1n"
    assert distance_mm(np.eye(4), patient.movements[modality], patient) > 5
    assert distance_mm(aligned.matrices[modality], patient.movements[modality], patient) < 0.5
    found = aligned.registrations[modality]
    assert found.information > found.before
    assert found.overlap > 0.95


def test_a_head_on_its_side_is_found(patient: Patient) -> None:
    image, mask = patient.heads["t2f"]
    side = np.eye(4)
    side[:3, :3] = quarter_turns()[3]
    lying = image._replace(affine=RAS_LPS @ side @ RAS_LPS @ image.affine)
    found = register(prepare(*patient.heads["t1n"]), prepare(lying, mask))
    assert distance_mm(found.matrix, side @ patient.movements["t2f"], patient) < 0.5


def test_the_result_hardly_depends_on_the_number_of_threads(patient: Patient) -> None:
    fixed, moving = (prepare(*patient.heads[modality]) for modality in ("t1n", "t2f"))
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    found = []
    try:
        for threads in (1, 3):
            sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
            found.append(register(fixed, moving, (4.0,)).matrix)
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)
    assert distance_mm(found[0], found[1], patient) < 0.02


def test_there_are_23_quarter_turns() -> None:
    turns = quarter_turns()
    assert len({turn.tobytes() for turn in turns}) == 23
    assert all(np.linalg.det(turn) == 1 for turn in turns)


@pytest.mark.parametrize("off", [-1e-7, 0.0, 1e-7])
@pytest.mark.parametrize(
    ("edge_mm", "level_mm", "expected"),
    [(0.8, 2.0, 3), (4.0, 6.0, 2), (1.6, 4.0, 3), (4 / 3, 6.0, 5), (0.9, 2.0, 2), (4.0, 1.0, 1)],
)
def test_a_half_voxel_more_is_a_voxel_whatever_the_header_rounds(
    edge_mm: float, level_mm: float, expected: int, off: float
) -> None:
    image = sitk.Image([30, 24, 18], sitk.sitkFloat32)
    image.SetSpacing([edge_mm * (1 + off), 50.0, 50.0])
    shrunk = coarser(Brain(image, image > -1), level_mm)
    assert shrunk.image.GetSize() == (30 // expected, 24, 18)
    assert shrunk.image.GetSpacing()[0] == pytest.approx(expected * edge_mm)
