"""Case folders of patients that are imaged anew."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from cwdm.errors import InputError
from cwdm.images import MODALITIES
from cwdm.phantoms.patients import write_phantoms
from cwdm.phantoms.reimaging import reimage_cases


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete case, one without t1c, and one in which too little is left."""
    folder = tmp_path_factory.mktemp("cases")
    _, three, two = write_phantoms(folder, 3, seed=7, shape=(96, 80, 66), spacing_mm=2.5)
    (three / f"{three.name}-t1c.nii.gz").unlink()
    (two / f"{two.name}-t2f.nii.gz").unlink()
    return folder


@pytest.fixture(scope="module")
def written(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("anew")
    outcomes = reimage_cases(cases, out, 2, seed=1)
    assert [outcome.status for outcome in outcomes] == ["written", "written", "failed"]
    assert "t2f missing" in outcomes[2].reason
    return out


def load(folder: Path, modality: str) -> tuple[np.ndarray, np.ndarray]:
    image = nib.load(folder / f"{folder.name}-{modality}.nii.gz")
    return np.asarray(image.dataobj), image.affine


def test_the_anatomy_is_the_same_and_the_images_are_new(cases: Path, written: Path) -> None:
    original = next(folder for folder in sorted(cases.iterdir()))
    first, second = (written / f"{original.name}-anew-{i:02d}" for i in (0, 1))
    for modality in MODALITIES:
        (old, affine), (one, there), (two, _) = (load(folder, modality) for folder in (original, first, second))
        np.testing.assert_array_equal(affine, there)
        np.testing.assert_array_equal(old > 0, one > 0)
        assert not np.array_equal(one, two)
        inside = old > 0
        if modality.startswith("t2"):
            assert np.corrcoef(old[inside], one[inside])[0, 1] > 0.6
    np.testing.assert_array_equal(load(first, "seg")[0], load(original, "seg")[0])
    assert nib.load(first / f"{first.name}-t1n.nii.gz").header["descrip"].item().startswith(b"imaged anew")


def test_what_was_not_there_is_not_invented(written: Path) -> None:
    folder = written / "BraTS-PHANTOM-00001-000-anew-00"
    images = {path.name.removeprefix(f"{folder.name}-") for path in folder.glob("*.nii.gz")}
    assert images == {"t1n.nii.gz", "t2w.nii.gz", "t2f.nii.gz", "seg.nii.gz"}


def test_a_second_run_makes_what_is_lacking_as_the_first_did(cases: Path, written: Path) -> None:
    lost = written / "BraTS-PHANTOM-00000-000-anew-01" / "BraTS-PHANTOM-00000-000-anew-01-t2w.nii.gz"
    before = lost.read_bytes()
    lost.unlink()
    outcomes = reimage_cases(cases, written, 2, seed=1)
    assert [outcome.status for outcome in outcomes] == ["written", "skipped", "failed"]
    assert lost.read_bytes() == before


def test_the_folder_of_the_cases_is_not_written_to(cases: Path) -> None:
    with pytest.raises(InputError, match="nothing else may be written"):
        reimage_cases(cases, cases / "anew", 1, seed=1)
