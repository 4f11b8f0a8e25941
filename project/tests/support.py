"""What several tests need, besides fixtures."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from cwdm.checkpoint import load_published
from cwdm.images.cases import MODALITIES
from cwdm.training.cache import Cache
from cwdm.training.cases import find_subjects
from cwdm.training.data import Samples
from cwdm.training.settings import DataSettings, TrainingSettings
from cwdm.unet import UNet, UNetConfig
from cwdm.weights.untrained import untrained_state

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


hostile = pytest.mark.parametrize("how", ["deep", "pipe"])
"""Ways in which a file of JSON can be meant to take a reader down."""


def spoil(path: Path, how: str) -> None:
    """A file that takes a careless reader down: it fills the stack, or waits for a writer for ever."""
    path.unlink(missing_ok=True)
    if how == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("[" * 100_000)


def link_to_a_name_too_long(path: Path) -> None:
    """A link, in place of a file, of which the system can say neither that it leads to a file nor that it does not."""
    path.unlink(missing_ok=True)
    path.symlink_to("x" * 300)


TINY = UNetConfig(in_channels=32, model_channels=32, channel_mult=(1, 2))
"""A conditional network small enough for tests."""

SHAPE = (31, 32, 25)


def link_case(source: Path, target: Path, missing: str, name: str | None = None) -> Path:
    """A case folder with links to the files of a complete one, without one modality."""
    case = target / (name or source.name)
    case.mkdir(parents=True)
    for modality in (*MODALITIES, "seg"):
        if modality != missing:
            (case / f"{case.name}-{modality}.nii.gz").symlink_to(source / f"{source.name}-{modality}.nii.gz")
    return case


def samples(data: DataSettings, cache: Path, **changes: Any) -> Samples:
    """Samples of a training run on all cases of a folder."""
    chosen = {"data": data, "out": cache, "network": {"channel_mult": [1]}, "seed": 3, **changes}
    settings = TrainingSettings.model_validate(chosen)
    held, subjects = Cache(cache, data, 4), find_subjects(data.path, data).subjects
    digests = held.digests(subjects)
    return Samples([held.prepare(subject, digests) for subject in subjects], held, settings)
