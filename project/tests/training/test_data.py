from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from support import SHAPE, link_case, samples
from torch import Tensor
from torch.utils.data import default_collate

from cwdm.errors import CaseError, InputError
from cwdm.images.geometry import choose_window
from cwdm.images.image import read_volume
from cwdm.images.intensity import normalise
from cwdm.images.pairs import centre
from cwdm.training.cases import find_subjects
from cwdm.training.data import Samples, assemble, draw_noise
from cwdm.training.settings import DataSettings
from cwdm.training.volumes import decode

AFFINE = np.array([[-2.0, 0, 0, 5], [0, -2, 0, 7], [0, 0, 3, -4], [0, 0, 0, 1]])


def sample(source: Samples, n: int) -> dict[str, Tensor]:
    """What the network would get of one sample."""
    batch = assemble(default_collate([source[n]]), source.settings, torch.device("cpu"))
    return {name: tensor[0] for name, tensor in batch.items()}


def test_whole_volumes_are_what_inference_would_see(phantoms: Path, tmp_path: Path) -> None:
    data = DataSettings(path=phantoms, target="t2w", window=[32, 32, 32], workers=0)
    found = sample(samples(data, tmp_path), 0)
    order = np.random.default_rng([3, 0, 1]).permutation(3)
    case = sorted(phantoms.iterdir())[order[0]]
    volumes = {m: read_volume(case / f"{case.name}-{m}.nii.gz") for m in ("t2w", "t1n", "t1c", "t2f")}
    mask = np.any(np.stack(list(volumes.values())) != 0, axis=0)
    window, _ = choose_window(mask, 4, (32, 32, 32))
    expected = [window.crop(normalise(volume)[0]) for volume in volumes.values()]
    np.testing.assert_allclose(found["volume"][0], expected[0], atol=1e-6)
    np.testing.assert_allclose(found["conditions"], np.stack(expected[1:]), atol=1e-6)


def test_sample_depends_on_seed_and_number_alone(phantoms: Path, tmp_path: Path) -> None:
    data = DataSettings(path=phantoms, condition_on="any", window="brain", crop=[16, 16, 16], mirror=True)
    first, again = samples(data, tmp_path / "a"), samples(data, tmp_path / "b")
    for name, tensor in sample(first, 7).items():
        assert tensor.equal(sample(again, 7)[name]), name
    assert not first[7]["noise"].equal(first[8]["noise"])
    assert not first[7]["noise"].equal(samples(data, tmp_path / "a", seed=4)[7]["noise"])


def test_every_case_comes_once_an_epoch(phantoms: Path) -> None:
    orders = [np.random.default_rng([3, epoch, 1]).permutation(3).tolist() for epoch in range(5)]
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_cases_can_come_several_times_an_epoch(phantoms: Path, tmp_path: Path) -> None:
    data = DataSettings(path=phantoms, target="t1n", window="brain", repeat={"BraTS-*": 2, "*-00001-*": 5})
    source = samples(data, tmp_path)
    for epoch in range(2):
        names = [source.subject(n).name[14:19] for n in range(9 * epoch, 9 * (epoch + 1))]
        assert sorted(names) == ["00000"] * 2 + ["00001"] * 5 + ["00002"] * 2


def test_any_target_is_taken_out_of_the_conditions(phantoms: Path, tmp_path: Path) -> None:
    data = DataSettings(path=phantoms, condition_on="any", window="brain", most_missing=3)
    source = samples(data, tmp_path)
    drawn = [sample(source, n) for n in range(24)]
    assert {int(found["target"]) for found in drawn} == {0, 1, 2, 3}
    missing = set()
    for found in drawn:
        empty = [k for k in range(4) if not found["conditions"][k].any()]
        assert int(found["target"]) in empty
        assert found["volume"].any()
        missing.add(len(empty))
    assert missing == {1, 2, 3}


def test_brain_intensities_are_those_of_inference(phantoms: Path, tmp_path: Path) -> None:
    data = DataSettings(path=phantoms, condition_on="any", window=[32, 32, 32], intensities="brain")
    source = samples(data, tmp_path)
    assert source.settings.to_record().intensities == "brain"
    found, files = sample(source, 0), source.subject(0).files
    volumes = [read_volume(file) for file in files]
    window, _ = choose_window(np.any(np.stack(volumes) != 0, axis=0), 4, (32, 32, 32))
    expected = np.stack([window.crop(normalise(volume, "brain")[0]) for volume in volumes])
    target = int(found["target"])
    np.testing.assert_allclose(found["volume"][0], expected[target], atol=1e-6)
    expected[target] = 0
    np.testing.assert_allclose(found["conditions"], expected, atol=1e-6)


def test_cases_without_a_modality_are_trained_on_where_that_is_said(phantoms: Path, tmp_path: Path) -> None:
    cases = tmp_path / "cases"
    first, second = sorted(phantoms.iterdir())[:2]
    link_case(first, cases, "t1c")
    (link_case(second, cases, "t2w") / f"{second.name}-t1n.nii.gz").unlink()
    told = {"path": cases, "condition_on": "any", "window": "brain", "most_missing": 3, "crop": [16, 16, 16]}
    assert find_subjects(cases, DataSettings(**told)).subjects == []
    source = samples(DataSettings(**told, incomplete=True), tmp_path)
    assert [subject.absent for subject in source.subjects] == [(1,), (0, 2)]
    for n in range(24):
        absent, raw, found = source.subject(n).absent, source[n], sample(source, n)
        assert raw["voxels"].shape == (4, 16, 16, 16)
        assert int(raw["target"]) not in absent
        shown = set(raw["shown"].nonzero().ravel().tolist())
        assert shown
        assert not shown & {*absent, int(raw["target"])}
        assert not found["conditions"][list(absent)].any()
    with pytest.raises(ValidationError, match="'incomplete' needs condition_on 'any'"):
        DataSettings(path=cases, target="t1n", incomplete=True)


def test_timesteps_cover_the_schedule_and_can_lean_towards_noise(phantoms: Path, tmp_path: Path) -> None:
    data = DataSettings(path=phantoms, target="t1n", window="brain", crop=[4, 4, 4])
    uniform, leaning = samples(data, tmp_path), samples(data, tmp_path, loss={"timestep_power": 3.0})
    even = np.array([int(uniform[n]["t"]) for n in range(200)])
    noisy = np.array([int(leaning[n]["t"]) for n in range(200)])
    assert even.min() >= 0
    assert even.max() <= 999
    assert abs(even.mean() - 500) < 75
    assert abs(noisy.mean() - 750) < 60


def test_value_range_of_wdm(phantoms: Path, tmp_path: Path) -> None:
    data = DataSettings(path=phantoms, target="t1n", condition_on="nothing", window=[32, 32, 32], downsample=2)
    found = sample(samples(data, tmp_path, value_range=[-1.0, 1.0]), 0)
    assert found["volume"].shape == (1, 16, 16, 16)
    assert found["conditions"].shape[0] == 0
    assert found["volume"].min() == -1


@pytest.mark.parametrize("length", [1, 5, 8, 9, 12])
def test_centre_crops_and_pads_evenly(length: int) -> None:
    line = np.arange(1, length + 1)[None]
    cut = centre(line, 1, 8)[0]
    assert cut.shape == (8,)
    kept = cut[cut > 0]
    assert len(kept) == min(length, 8)
    before = abs(int(np.argmax(cut > 0)) - (kept[0] - 1))
    after = abs(8 - length) - before
    assert 0 <= after - before <= 1


def write(path: Path, volume: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume, affine), path)


def paired(folder: Path, rng: np.random.Generator) -> DataSettings:
    """CT from MR and a label map, in files of one's own naming."""
    for name in ("p1", "p2"):
        write(folder / "ct" / f"{name}_ct.nii.gz", rng.normal(0, 400, SHAPE).astype(np.float32))
        write(folder / "mr" / f"{name}.nii", rng.integers(0, 900, SHAPE).astype(np.int16))
        write(folder / "mask" / f"{name}.nii.gz", rng.integers(0, 4, SHAPE).astype(np.uint8))
    images = [
        {"file": "ct/{case}_ct.nii.gz", "intensity": [-1000.0, 1000.0]},
        {"file": "mr/{case}.nii"},
        {"file": "mask/{case}.nii.gz", "labels": [1, 3]},
    ]
    return DataSettings.model_validate({"path": folder, "layout": "files", "images": images, "window": [32, 32, 32]})


def test_paired_images_by_their_patterns(tmp_path: Path) -> None:
    data = paired(tmp_path / "data", np.random.default_rng(0))
    subjects = find_subjects(data.path, data).subjects
    assert [subject.name for subject in subjects] == ["p1", "p2"]
    found = sample(samples(data, tmp_path / "cache"), 0)
    assert found["conditions"].shape == (3, 32, 32, 32)
    one_hot = found["conditions"][1:]
    assert set(one_hot.unique().tolist()) == {0.0, 1.0}
    assert not (one_hot[0] * one_hot[1]).any()
    name = subjects[np.random.default_rng([3, 0, 1]).permutation(2)[0]].name
    ct = nib.load(data.path / "ct" / f"{name}_ct.nii.gz").get_fdata(dtype=np.float32)
    expected = (np.clip(ct, -1000, 1000) + 1000) / 2000
    x = (32 - SHAPE[0]) // 2
    z = (32 - SHAPE[2]) // 2
    assert not found["volume"][0, :, :, :z].any()  # beyond the image is air, -1000 HU
    inside = found["volume"][0, x : x + SHAPE[0], : SHAPE[1], z : z + SHAPE[2]].numpy()
    np.testing.assert_allclose(inside, expected, atol=1e-5)


def test_what_is_wrong_with_paired_data_is_said(tmp_path: Path) -> None:
    data = paired(tmp_path / "data", np.random.default_rng(0))
    (data.path / "mr" / "p2.nii").unlink()
    found = find_subjects(data.path, data)
    assert [subject.name for subject in found.subjects] == ["p1"]
    assert [fault.case for fault in found.faults] == ["p2"]
    assert "there is no such file" in found.faults[0].reason
    (data.path / "ct" / "p2_ct.nii.gz").unlink()
    write(data.path / "mr" / "p1.nii", np.ones((4, 4, 4), np.int16))
    with pytest.raises(CaseError, match="same intensity"):
        samples(data, tmp_path / "cache")[0]
    rng = np.random.default_rng(1)
    write(data.path / "mr" / "p1.nii", rng.integers(0, 900, (4, 4, 4)).astype(np.int16))
    with pytest.raises(CaseError, match="one shape"):
        samples(data, tmp_path / "cache")[0]
    shifted = AFFINE + np.array([[0, 0, 0, 2], [0] * 4, [0] * 4, [0] * 4])
    write(data.path / "mr" / "p1.nii", rng.integers(0, 900, SHAPE).astype(np.int16), shifted)
    with pytest.raises(CaseError, match="one grid"):
        samples(data, tmp_path / "cache")[0]
    with pytest.raises(InputError, match="no file like"):
        find_subjects(tmp_path, data)


def test_conditions_and_target_are_scaled_where_the_network_is(tmp_path: Path) -> None:
    """From whole numbers, with padding and a range that does not begin at 0, in two batches of other value ranges."""
    data = paired(tmp_path / "data", np.random.default_rng(0)).model_copy(update={"jitter": 0.2, "mirror": True})
    source = samples(data, tmp_path / "cache", value_range=[-1.0, 1.0])
    batch = default_collate([source[n] for n in range(4)])
    made = assemble(batch, source.settings, torch.device("cpu"))
    for i in range(4):
        n = np.random.default_rng([3, i // 2, 1]).permutation(2)[i % 2]
        unit = decode(find_subjects(data.path, data).subjects[n], data).unit()
        volume = torch.from_numpy(unit * 2 - 1)
        assert any(made["volume"][i].equal(side) for side in (volume[:1], volume[:1].flip(1)))
        gammas = batch["gammas"][i, :, None, None, None]
        assert not (gammas == 1).any()
        expected = torch.from_numpy(unit[1:]) ** gammas * 2 - 1
        sides = (expected, expected.flip(1))
        assert any(torch.allclose(made["conditions"][i], side, atol=1e-6) for side in sides)


def test_whole_numbers_stay_small_on_their_way(phantoms: Path, tmp_path: Path) -> None:
    data = DataSettings(path=phantoms, target="t2w", window=[32, 32, 32])
    found = samples(data, tmp_path)[0]
    assert found["voxels"].dtype == torch.int16
    assert found["voxels"].shape == (4, 32, 32, 28)


def test_noise_on_the_device_is_of_the_samples_own_seed(phantoms: Path, tmp_path: Path) -> None:
    data = DataSettings(path=phantoms, target="t2w", window="brain")
    here, there = samples(data, tmp_path), samples(data, tmp_path, noise="device")
    assert "noise" not in there[5]
    drawn = draw_noise(int(there[5]["seed"]), there[5]["voxels"].shape[1:], torch.device("cpu"))
    assert sample(there, 5)["noise"].equal(drawn)
    assert sample(here, 5)["noise"].equal(drawn)
