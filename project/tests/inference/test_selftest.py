from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import TINY

from cwdm.checkpoint import Record
from cwdm.errors import WeightsError
from cwdm.images.cases import MODALITIES
from cwdm.inference.selftest import self_test
from cwdm.weights.untrained import write_untrained


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    write_untrained(tmp_path, TINY, Record())
    return tmp_path


def test_each_modality_is_tried(weights: Path) -> None:
    lines: list[str] = []
    self_test(weights, on_modality=lines.append)
    assert [line.split(":")[0] for line in lines] == list(MODALITIES)


def test_a_missing_modality_is_named(weights: Path) -> None:
    (weights / "t2w.safetensors").unlink()
    with pytest.raises(WeightsError, match="no weights for t2w"):
        self_test(weights)
    self_test(weights, [modality for modality in MODALITIES if modality != "t2w"])


def test_weights_whose_images_are_not_numbers_are_refused(weights: Path) -> None:
    path = weights / "t1c.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor * 1e20 for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata)
    (weights / "checksums.json").unlink(missing_ok=True)
    with pytest.raises(WeightsError, match="finite"):
        self_test(weights)
