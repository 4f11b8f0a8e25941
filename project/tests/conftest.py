"""What several tests need: golden outputs of the published systems, small cases and weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from cwdm.images.cases import MODALITIES
from cwdm.checkpoint import load_published
from cwdm.phantoms.scanner import write_phantoms
from cwdm.unet import UNet, UNetConfig
from cwdm.weights.untrained import untrained_state
from cwdm.weights.folder import PUBLISHED_FILES

# Examples take as long as the machine is busy; time is no law that a property test should check.
settings.register_profile("cwdm", deadline=None, print_blob=True)
settings.load_profile("cwdm")

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).resolve().parents[3] / "shared"
CASES = SHARED / "cases"

needs_cases = pytest.mark.skipif(
    not CASES.is_dir(), reason="real cases stand beside the repository in development and CI only"
)


def golden(name: str) -> dict[str, dict[str, Any]]:
    """Settings of the golden runs in one JSON file."""
    return json.loads((GOLDEN / name).read_text())


def config_of(settings: dict[str, Any]) -> UNetConfig:
    """Network configuration of a golden run."""
    known = {key: value for key, value in settings.items() if key in UNetConfig.__dataclass_fields__}
    return UNetConfig(**{**known, "channel_mult": tuple(known["channel_mult"])})


def golden_model(settings: dict[str, Any]) -> UNet:
    """The network of a golden run."""
    return load_published(untrained_state(config_of(settings)))


TINY = UNetConfig(in_channels=32, model_channels=32, channel_mult=(1, 2))
"""A conditional network small enough for tests."""

SHAPE = (31, 32, 25)


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


def link_case(source: Path, target: Path, missing: str, name: str | None = None) -> Path:
    """A case folder with links to the files of a complete one, without one modality."""
    case = target / (name or source.name)
    case.mkdir(parents=True)
    for modality in (*MODALITIES, "seg"):
        if modality != missing:
            (case / f"{case.name}-{modality}.nii.gz").symlink_to(source / f"{source.name}-{modality}.nii.gz")
    return case


@pytest.fixture
def cohort(phantoms: Path, tmp_path: Path) -> Path:
    """Input folder with three cases, each missing another modality."""
    for source, missing in zip(sorted(phantoms.iterdir()), ("t1n", "t2f", "t1n"), strict=True):
        link_case(source, tmp_path / "input", missing)
    return tmp_path / "input"
