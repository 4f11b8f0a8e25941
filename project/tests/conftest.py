"""What several tests need: golden outputs of the published systems, small cases and weights."""

import errno
import tempfile
from pathlib import Path

import pytest
import torch
from support import SHAPE, TINY, link_case

from cwdm.phantoms import write_phantoms
from cwdm.weights.folder import PUBLISHED_FILES
from cwdm.weights.untrained import untrained_state


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with three complete small phantoms of 31×32×25 voxels; not to be written to."""
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, 3, seed=0, shape=SHAPE, spacing_mm=6.5)
    return folder


@pytest.fixture(scope="session")
def weights_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with small conditional networks under the published names; not to be written to."""
    folder = tmp_path_factory.mktemp("weights")
    state = untrained_state(TINY)
    for name in PUBLISHED_FILES.values():
        torch.save(state, folder / name)
    return folder


@pytest.fixture
def cohort(phantoms: Path, tmp_path: Path) -> Path:
    """Input folder with three cases, each missing another modality."""
    for source, missing in zip(sorted(phantoms.iterdir()), ("t1n", "t2f", "t1n"), strict=True):
        link_case(source, tmp_path / "input", missing)
    return tmp_path / "input"


@pytest.fixture
def no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where nothing that Python takes for temporary files can be written; `tmp_path` is there before."""

    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", none)
