"""Images of other kinds: trained on files, then made from files."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from cwdm import checkpoint
from cwdm.checkpoint import Record, load_published
from cwdm.cli.app import app
from cwdm.errors import SettingsError, WeightsError
from cwdm.images.image import write_nifti
from cwdm.images.pairs import Subject, decode
from cwdm.inference.generate import Generator
from cwdm.inference.translate import Translator
from cwdm.settings import load_settings
from cwdm.training import train
from cwdm.training.settings import load_training_settings
from cwdm.unet import UNetConfig
from cwdm.weights.folder import load_for
from cwdm.weights.untrained import untrained_state

PAIRS = """
data:
  layout: files
  path: {pairs}
  images:
    - {{file: "{{case}}/{{case}}-t2w.nii.gz", intensity: [-100, 900]}}
    - {{file: "{{case}}/{{case}}-t1n.nii.gz"}}
    - {{file: "{{case}}/{{case}}-seg.nii.gz", labels: [1, 2]}}
  window: [32, 48, 32]
  crop: [16, 16, 16]
  workers: 0
out: {out}
network: {{model_channels: 16, channel_mult: [1, 2], num_res_blocks: 1, groups: 8}}
record: {{sampler: ddim, steps: 2}}
value_range: [-1, 1]
device: cpu
steps: 2
"""


@pytest.fixture(scope="module")
def weights(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "pairs.yaml").write_text(PAIRS.format(pairs=phantoms, out=folder / "run"))
    return train(load_training_settings(str(folder / "pairs.yaml"), []))


def cwdm(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.split())


def test_what_was_trained_is_used_and_a_bad_case_stops_no_other(weights: Path, phantoms: Path, tmp_path: Path) -> None:
    for case in phantoms.iterdir():
        (tmp_path / "pairs" / case.name).mkdir(parents=True)
        for path in case.iterdir():
            if "t2w" not in path.name:  # it is to be made
                (tmp_path / "pairs" / case.name / path.name).symlink_to(path)
    bad, *good = sorted((tmp_path / "pairs").iterdir())
    (bad / f"{bad.name}-seg.nii.gz").unlink()
    command = ("translate", weights, "--data_path", tmp_path / "pairs", "--output_path", tmp_path / "out")
    code, said = cwdm(*command, "seed=3", "precision=fp32")
    assert code == 1
    assert f"{bad.name} FAILED" in said
    assert "seg.nii.gz" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "translations.json",
        *(f"{case.name}.nii.gz" for case in good),
    }
    translator = Translator(weights, load_settings(None, ["seed=3", "precision=fp32"]), "cpu")
    subject = next(subject for subject in translator.find(tmp_path / "pairs") if subject.name == good[0].name)
    made, given = nib.load(tmp_path / "out" / f"{good[0].name}.nii.gz"), nib.load(subject.files[0])
    assert made.shape == given.shape
    np.testing.assert_allclose(made.affine, given.affine)
    volume = translator(subject).volume
    np.testing.assert_array_equal(np.asarray(made.dataobj), volume)
    middle = tuple(slice(n // 2 - 4, n // 2 + 4) for n in volume.shape)
    assert volume[middle].std() > 0
    assert -100.1 < volume.min() < volume.max() < 900.1
    code, said = cwdm(*command, "seed=3", "precision=fp32")
    assert f"{good[0].name} is there already" in said
    code, said = cwdm(*command, "seed=4", "precision=fp32")
    assert code != 0
    assert not (bad.parent / "out").exists()


@pytest.mark.parametrize("downsample", [1, 2, 4])
@pytest.mark.parametrize("size", [(32, 40, 24), (16, 64, 32), (33, 41, 23)])
@pytest.mark.parametrize("code", ["LPS", "RAS", "PIR"])
def test_what_is_made_lies_where_it_was_seen(downsample: int, size: tuple[int, ...], code: str, tmp_path: Path) -> None:
    """A volume whose numbers are coordinates in space, through window, cubes and orientation and back."""
    axes = nib.orientations.axcodes2ornt(tuple(code))
    affine = np.diag([1.5, 2.0, 0.5, 1.0]) @ nib.orientations.inv_ornt_aff(axes, size)
    affine[:3, 3] += (7, -11, 13)
    for axis in range(3):
        indices = np.stack([*np.meshgrid(*map(np.arange, size), indexing="ij"), np.ones(size)])
        write_nifti(tmp_path / "a.nii.gz", np.tensordot(affine[axis], indices, 1).astype(np.float32), affine)
        image = {"file": "{case}.nii.gz", "intensity": [-500, 500]}
        told = {"images": [image, image], "downsample": downsample}
        translator = Translator(save(tmp_path / "w.safetensors", **told), device="cpu")
        subject = Subject("a", (tmp_path / "a.nii.gz",))
        volumes = decode(subject, translator.given, translator.window, translator.downsample)
        seen, grid = volumes.unit()[0] * np.float32(1000), volumes.files[0].grid
        volume, placed, _ = translator._on_grid(seen, grid, np.float32(-500))
        indices = np.stack([*np.meshgrid(*map(np.arange, volume.shape), indexing="ij"), np.ones(volume.shape)])
        expected = np.tensordot(placed[axis], indices, 1)
        seen_at = volume > -499  # the rest was not in the window
        assert seen_at.mean() > 0.2
        edges = np.abs(volume - expected)[seen_at] > 0.01  # cubes that reach beyond the volume
        assert edges.mean() < (0.5 if any(n < 32 for n in size) and downsample > 1 else 1e-9)
        if downsample == 1:
            assert volume.shape == size


def test_weights_for_something_else_are_refused_with_the_way_out(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cwdm translate"):
        load_for(weights, "t1n")
    with pytest.raises(WeightsError, match="cwdm translate"):
        Generator(weights)
    config = UNetConfig(in_channels=8, model_channels=16, channel_mult=(1, 1), groups=8)
    checkpoint.save(tmp_path / "w.safetensors", load_published(untrained_state(config), config), Record())
    with pytest.raises(WeightsError, match="does not say"):
        Translator(tmp_path / "w.safetensors")


def save(path: Path, in_channels: int = 16, **data: object) -> Path:
    """Weights that say that they were trained on pairs in a flat folder."""
    image = {"file": "{case}.nii.gz"}
    told = {"layout": "files", "images": [image, image], "window": [32, 32, 32], **data}
    config = UNetConfig(in_channels=in_channels, model_channels=16, channel_mult=(1, 1), groups=8)
    record = Record(training={"settings": {"data": told}})
    checkpoint.save(path, load_published(untrained_state(config), config), record)
    return path


def test_sizes_are_those_after_averaging(tmp_path: Path) -> None:
    Translator(save(tmp_path / "large.safetensors", window=[512, 512, 256], downsample=4), device="cpu")
    for wrong in ({"in_channels": 24}, {"window": [1024, 1024, 1024], "downsample": 8}):
        with pytest.raises(WeightsError, match="does not fit"):
            Translator(save(tmp_path / "wrong.safetensors", **wrong))


def test_odd_cases_stop_no_other(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    image = nib.Nifti1Image(np.random.default_rng(0).random((16, 20, 12), np.float32), None)
    image.header.set_zooms((1.0, 2.0, 3.0))
    for name in ("a" * 248, "b"):  # with .nii.gz just 255; whatever is written elsewhere would be longer
        nib.save(image, tmp_path / "in" / f"{name}.nii.gz")
    (tmp_path / "in" / "c.nii.gz").write_bytes(b"no image")
    nib.save(image, tmp_path / "in" / "d.nii.gz")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "d.nii.gz").write_bytes(b"my own")
    weights = save(tmp_path / "w.safetensors")
    command = ("translate", weights, "--data_path", tmp_path / "in", "--output_path", tmp_path / "out")
    code, said = cwdm(*command, "sampler.steps=1")
    assert code == 1
    assert "c FAILED" in said
    assert f"d FAILED: {tmp_path / 'out' / 'd.nii.gz'} is there and was not made by cwdm" in said
    assert (tmp_path / "out" / "d.nii.gz").read_bytes() == b"my own"
    made = nib.load(tmp_path / "out" / "b.nii.gz")
    assert (made.header["qform_code"], made.header["sform_code"]) == (0, 0)
    np.testing.assert_array_equal(made.affine, nib.load(tmp_path / "in" / "b.nii.gz").affine)
    (tmp_path / "out" / "translations.json").write_text("[]")
    result = CliRunner().invoke(app, [str(argument) for argument in command])
    assert isinstance(result.exception, SettingsError)


def test_patterns_stay_inside_the_data_folder(tmp_path: Path) -> None:
    for pattern in ("../{case}.nii.gz", "/etc/{case}.nii.gz"):
        image = {"file": pattern}
        with pytest.raises(WeightsError, match="does not say"):
            Translator(save(tmp_path / "w.safetensors", images=[image, image]))
