from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import SHAPE

from cwdm.brats import read_volume
from cwdm.datasets import Cache, Samples, Sampling, find_subjects
from cwdm.errors import CaseError, InputError
from cwdm.preprocess import centre, choose_window, normalise
from cwdm.train_config import DataSettings

AFFINE = np.array([[-2.0, 0, 0, 5], [0, -2, 0, 7], [0, 0, 3, -4], [0, 0, 0, 1]])


def samples(data: DataSettings, cache: Path, **changes) -> Samples:
    sampling = Sampling(data, **{"seed": 3, "value_range": (0.0, 1.0), "timestep_power": 1.0, **changes})
    return Samples(find_subjects(data.path, data), Cache(cache, data, 4), sampling)


def test_whole_volumes_are_what_inference_would_see(phantoms: Path, tmp_path: Path) -> None:
    data = DataSettings(path=phantoms, target="t2w", window=[32, 32, 32], workers=0)
    found = samples(data, tmp_path)[0]
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
    for name, tensor in first[7].items():
        assert tensor.equal(again[7][name]), name
    assert not first[7]["noise"].equal(first[8]["noise"])
    assert not first[7]["noise"].equal(samples(data, tmp_path / "a", seed=4)[7]["noise"])


def test_every_case_comes_once_an_epoch(phantoms: Path) -> None:
    orders = [np.random.default_rng([3, epoch, 1]).permutation(3).tolist() for epoch in range(5)]
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_any_target_is_taken_out_of_the_conditions(phantoms: Path, tmp_path: Path) -> None:
    data = DataSettings(path=phantoms, condition_on="any", window="brain", most_missing=3)
    drawn = [samples(data, tmp_path)[n] for n in range(24)]
    assert {int(sample["target"]) for sample in drawn} == {0, 1, 2, 3}
    missing = set()
    for sample in drawn:
        empty = [k for k in range(4) if not sample["conditions"][k].any()]
        assert int(sample["target"]) in empty
        assert sample["volume"].any()
        missing.add(len(empty))
    assert missing == {1, 2, 3}


def test_timesteps_cover_the_schedule_and_can_lean_towards_noise(phantoms: Path, tmp_path: Path) -> None:
    data = DataSettings(path=phantoms, target="t1n", window="brain", crop=[4, 4, 4])
    even = np.array([int(samples(data, tmp_path)[n]["t"]) for n in range(200)])
    noisy = np.array([int(samples(data, tmp_path, timestep_power=3.0)[n]["t"]) for n in range(200)])
    assert even.min() >= 0
    assert even.max() <= 999
    assert abs(even.mean() - 500) < 75
    assert abs(noisy.mean() - 750) < 60


def test_value_range_of_wdm(phantoms: Path, tmp_path: Path) -> None:
    data = DataSettings(path=phantoms, target="t1n", condition_on="nothing", window=[32, 32, 32], downsample=2)
    sample = samples(data, tmp_path, value_range=(-1.0, 1.0))[0]
    assert sample["volume"].shape == (1, 16, 16, 16)
    assert sample["conditions"].shape == (0, 32, 32, 32) or sample["conditions"].shape[0] == 0
    assert sample["volume"].min() == -1


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
    subjects = find_subjects(data.path, data)
    assert [subject.name for subject in subjects] == ["p1", "p2"]
    sample = samples(data, tmp_path / "cache")[0]
    assert sample["conditions"].shape == (3, 32, 32, 32)
    one_hot = sample["conditions"][1:]
    assert set(one_hot.unique().tolist()) == {0.0, 1.0}
    assert not (one_hot[0] * one_hot[1]).any()
    name = subjects[np.random.default_rng([3, 0, 1]).permutation(2)[0]].name
    ct = nib.load(data.path / "ct" / f"{name}_ct.nii.gz").get_fdata(dtype=np.float32)
    expected = (np.clip(ct, -1000, 1000) + 1000) / 2000
    x = (32 - SHAPE[0]) // 2
    z = (32 - SHAPE[2]) // 2
    assert not sample["volume"][0, :, :, :z].any()  # beyond the image is air, -1000 HU
    inside = sample["volume"][0, x : x + SHAPE[0], : SHAPE[1], z : z + SHAPE[2]].numpy()
    np.testing.assert_allclose(inside, expected, atol=1e-5)


def test_what_is_wrong_with_paired_data_is_said(tmp_path: Path) -> None:
    data = paired(tmp_path / "data", np.random.default_rng(0))
    (data.path / "mr" / "p2.nii").unlink()
    with pytest.raises(CaseError, match=r"p2.*there is no such file"):
        find_subjects(data.path, data)
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


def test_cache_is_read_and_notices_a_changed_file(tmp_path: Path) -> None:
    data = paired(tmp_path / "data", np.random.default_rng(0))
    cache = Cache(tmp_path / "cache", data, 4)
    subject = find_subjects(data.path, data)[0]
    first = cache.load(subject).unit()
    kept = sorted((tmp_path / "cache").iterdir())
    assert np.array_equal(cache.load(subject).unit(), first)
    assert sorted((tmp_path / "cache").iterdir()) == kept
    write(subject.files[0], np.full(SHAPE, 500, np.float32))
    assert not np.array_equal(cache.load(subject).unit(), first)
