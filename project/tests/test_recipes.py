"""The recipe that calibrates weights of one pass."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support import link_case
from typer.testing import CliRunner

from cwdm import checkpoint
from cwdm.calibration import ONE_STD, coverage
from cwdm.checkpoint import ANY, Record, new_network
from cwdm.files import sha256
from cwdm.images import find_cases
from cwdm.unet import UNetConfig
from cwdm.weights import inspect, record, recorded

CONFIG = UNetConfig(40, 24, model_channels=8, channel_mult=(1, 1), norm="voxel", targets=4, given=4)


@pytest.fixture
def calibrate(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "recipes")
    monkeypatch.delitem(sys.modules, "calibrate", raising=False)
    return import_module("calibrate")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights" / "any.safetensors"
    path.parent.mkdir()
    told = Record(modality=ANY, objective="one-pass", most_missing=3, notice="small", training={"step": 3})
    checkpoint.save(path, new_network(CONFIG), told, torch.float16)
    record(path.parent, path.name, {"sha256": sha256(path), "recipe": "recipes/bundled.py"})
    return path


def test_factors_are_written_and_all_else_stays(calibrate: Any, weights: Path, phantoms: Path, tmp_path: Path) -> None:
    link_case(sorted(phantoms.iterdir())[0], tmp_path / "cases", "t1n", "lacks-one")
    before, tensors = checkpoint.load(weights).record, safetensors.torch.load_file(weights)
    result = CliRunner().invoke(calibrate.app, [str(weights), str(tmp_path / "cases"), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    loaded = checkpoint.load(weights)
    assert set(loaded.record.calibration) == {"t1c", "t2w", "t2f"}
    assert loaded.record.model_copy(update={"calibration": {}}) == before
    after = safetensors.torch.load_file(weights)
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[name], tensors[name]) and after[name].dtype == torch.float16 for name in after)
    assert recorded(weights.parent)[weights.name] == {"sha256": loaded.sha256, "recipe": "recipes/bundled.py"}
    assert next(inspect(weights.parent)).verified
    # Of one patient the factor makes the coverage exact, and it is measured without the one that stands there.
    found = calibrate.measure(loaded, find_cases(tmp_path / "cases")[0], "t2f", "cpu")
    assert found.factor == pytest.approx(loaded.record.calibration["t2f"], rel=1e-3)
    assert coverage(found.error, found.factor * found.std) == pytest.approx(ONE_STD, abs=1e-3)


def test_weights_that_predict_no_std_are_refused(calibrate: Any, weights_folder: Path, phantoms: Path) -> None:
    result = CliRunner().invoke(calibrate.app, [str(weights_folder / "t1_gen.pt"), str(phantoms)])
    assert result.exit_code == 2
    assert "predicts no std" in " ".join(result.output.split())
