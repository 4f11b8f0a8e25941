"""The grids of spaces are those of the files that challenges distribute, and atlases bring their licences."""

from importlib.resources import files

import numpy as np
import pytest
from support import CASES, needs_cases

from cwdm.errors import SettingsError
from cwdm.images import Image, read_grid
from cwdm.scans import find_space

NOWHERE = Image(np.zeros((2, 3, 4), np.float32), np.diag([1.0, 2.0, 3.0, 1.0]), True)


def test_native_is_the_grid_of_the_reference() -> None:
    space = find_space("native", NOWHERE)
    assert space.shape == (2, 3, 4)
    assert space.affine is NOWHERE.affine
    assert space.atlas is None


@pytest.mark.parametrize("name", ["sri24", "mni152"])
def test_atlases_are_brains_with_licences_beside_them(name: str) -> None:
    folder = files("cwdm.scans") / "atlases"
    assert (folder / f"LICENSE-{name}.md").read_text(encoding="utf-8").startswith(f"# {name}.nii.gz")
    assert len((folder / f"{name}.nii.gz").read_bytes()) < 2_000_000
    space = find_space(name, NOWHERE)
    assert space.atlas is not None
    assert space.shape == {"sri24": (240, 240, 155), "mni152": (182, 218, 182)}[name]


@needs_cases
@pytest.mark.parametrize(("name", "file"), [("sri24", "BraTS-TCGA-07294-000"), ("mni152", "MS-07")])
def test_the_grid_is_that_of_real_cases(name: str, file: str) -> None:
    real, space = read_grid(CASES / file / f"{file}-t1n.nii.gz"), find_space(name, NOWHERE)
    assert real.volume.shape == space.shape
    np.testing.assert_allclose(real.affine, space.affine, atol=1e-4)


def test_other_spaces_are_refused() -> None:
    with pytest.raises(SettingsError, match="sri24, mni152 or native"):
        find_space("talairach", NOWHERE)
