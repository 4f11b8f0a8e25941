"""Decoded volumes: whole ones come back, and originals are decoded once."""

import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from support import SHAPE, hostile, spoil

from cwdm.errors import CaseError, OutputError
from cwdm.images.cases import MODALITIES
from cwdm.images.image import read_volume
from cwdm.images.intensity import normalise
from cwdm.training import cache as cache_module
from cwdm.training.cache import Cache, CachedSubject
from cwdm.training.cases import find_subjects
from cwdm.training.settings import DataSettings
from cwdm.training.volumes import decode


@pytest.fixture
def patients(phantoms: Path, tmp_path: Path) -> Path:
    """A folder of cases that may be written to."""
    shutil.copytree(phantoms, tmp_path / "data")
    return tmp_path / "data"


def prepare(data: DataSettings, folder: Path) -> tuple[Cache, list[CachedSubject]]:
    """What a start of a run does."""
    cache, subjects = Cache(folder, data, 4), find_subjects(data.path, data).subjects
    digests = cache.digests(subjects)
    return cache, [cache.prepare(subject, digests) for subject in subjects]


def entries(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def write(path: Path, volume: np.ndarray) -> None:
    affine = np.array([[-2.0, 0, 0, 5], [0, 2, 0, 7], [0, 0, 3, -4], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(volume, affine), path)


@pytest.mark.parametrize("window", [[32, 32, 32], [48, 24, 16]])
def test_a_volume_comes_back_from_its_box(tmp_path: Path, window: list[int]) -> None:
    """With negative values, which make 0 something else than the least, and a window beyond the volume."""
    rng = np.random.default_rng(0)
    volume = np.zeros(SHAPE, np.float32)
    volume[4:20, 6:29, 3:21] = rng.normal(100, 80, (16, 23, 18))
    write(tmp_path / "a-t1n.nii.gz", volume)
    images = [{"file": "{case}-t1n.nii.gz"}]
    data = DataSettings.model_validate({"path": tmp_path, "layout": "files", "images": images, "window": window})
    cache, (case,) = prepare(data, tmp_path / "cache")
    (unit,) = cache.load(case).unit()
    stored = normalise(volume)[0][:, ::-1]  # LAS on disk, LPS for the network
    lengths = tuple(zip(SHAPE, window, strict=True))
    kept = tuple(slice((n - w) // 2, (n - w) // 2 + w) if n >= w else slice(None) for n, w in lengths)
    put = tuple(slice((w - n) // 2, (w - n) // 2 + n) if n < w else slice(None) for n, w in lengths)
    expected = np.zeros(window, np.float32)
    expected[put] = stored[kept]
    np.testing.assert_array_equal(unit, expected)
    part = (slice(3, 9), slice(0, 11), slice(5, 16))
    np.testing.assert_array_equal(cache.load(case).unit(part)[0], expected[part])


def test_an_entry_holds_the_brain_alone(tmp_path: Path) -> None:
    volume = np.zeros(SHAPE, np.int16)
    volume[10:14, 20:25, 5:9] = np.arange(1001, 1081).reshape(4, 5, 4)
    (tmp_path / "a").mkdir()
    for modality in MODALITIES:
        write(tmp_path / "a" / f"a-{modality}.nii.gz", volume)
    data = DataSettings(path=tmp_path, target="t1n", window=[32, 32, 32])
    cache, (case,) = prepare(data, tmp_path / "cache")
    assert max(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors")) < 1000
    assert cache.load(case).unit().shape == (4, 32, 32, 28)
    assert cache.load(case).whole


def test_a_label_that_is_nowhere_has_an_empty_box(tmp_path: Path) -> None:
    write(tmp_path / "a-t1n.nii.gz", np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE))
    write(tmp_path / "a-seg.nii.gz", np.zeros(SHAPE, np.uint8))
    images = [{"file": "{case}-t1n.nii.gz"}, {"file": "{case}-seg.nii.gz", "labels": [1, 3]}]
    data = DataSettings.model_validate({"path": tmp_path, "layout": "files", "images": images, "window": [32, 32, 32]})
    cache, (case,) = prepare(data, tmp_path / "cache")
    assert [bool(channel.any()) for channel in cache.load(case).unit()] == [True, False, False]


def test_runs_with_other_targets_windows_and_crops_share_the_entries(phantoms: Path, tmp_path: Path) -> None:
    for target in MODALITIES:
        prepare(DataSettings(path=phantoms, target=target, window=[32, 32, 32]), tmp_path)
    made = entries(tmp_path)
    assert len(made) == 3 * 4
    prepare(DataSettings(path=phantoms, condition_on="any", window="brain", crop=[8, 8, 8], jitter=0.1), tmp_path)
    prepare(DataSettings(path=phantoms, condition_on="nothing", target="t1c", window=[48, 32, 32]), tmp_path)
    assert entries(tmp_path) == made


def test_a_new_time_or_place_makes_no_second_entry(patients: Path, tmp_path: Path) -> None:
    data = DataSettings(path=patients, target="t2w", window="brain")
    cache, first = prepare(data, tmp_path / "cache")
    made = entries(tmp_path / "cache")
    for path in patients.rglob("*.nii.gz"):
        os.utime(path, ns=(1, 1))
    assert prepare(data, tmp_path / "cache")[1] == first
    moved = patients.rename(tmp_path / "mounted elsewhere")
    _, again = prepare(data.model_copy(update={"path": moved}), tmp_path / "cache")
    assert entries(tmp_path / "cache") == made
    np.testing.assert_array_equal(cache.load(again[1]).unit(), cache.load(first[1]).unit())


def test_changed_files_are_decoded_again(patients: Path, tmp_path: Path) -> None:
    data = DataSettings(path=patients, target="t2w", window="brain")
    cache, before = prepare(data, tmp_path / "cache")
    write(before[0].files[0], np.ones(SHAPE, np.float32) * np.arange(1, SHAPE[2] + 1))
    with pytest.raises(CaseError, match="affines differ"):
        prepare(data, tmp_path / "cache")
    for number, file in enumerate(before[0].files):
        write(file, np.random.default_rng(number).normal(100, 9, SHAPE).astype(np.float32))
    _, after = prepare(data, tmp_path / "cache")
    assert not np.array_equal(cache.load(before[0]).unit(), cache.load(after[0]).unit())


def test_samples_need_no_originals(patients: Path, tmp_path: Path) -> None:
    cache, subjects = prepare(DataSettings(path=patients, target="t2w", window="brain"), tmp_path / "cache")
    shutil.rmtree(patients)
    assert cache.load(subjects[2]).unit().any()


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "gone"])
def test_a_damaged_entry_is_decoded_again(patients: Path, tmp_path: Path, damage: str) -> None:
    cache, subjects = prepare(DataSettings(path=patients, target="t2w", window="brain"), tmp_path / "cache")
    whole = [cache.load(subject).unit() for subject in subjects]
    for path in (tmp_path / "cache").glob("*.safetensors"):
        content = path.read_bytes()
        path.unlink()  # not in place: another process may have it in memory
        if damage != "gone":
            path.write_bytes({"cut": content[:-100], "empty": b"", "other": b"not what it was"}[damage])
    (tmp_path / "cache" / "index.json").write_text("{")
    for subject, unit in zip(subjects, whole, strict=True):
        np.testing.assert_array_equal(cache.load(subject).unit(), unit)
    assert prepare(cache.data, tmp_path / "cache")[1] == subjects


@hostile
def test_a_hostile_cache_is_made_again(patients: Path, tmp_path: Path, how: str) -> None:
    cache, subjects = prepare(DataSettings(path=patients, target="t2w", window="brain"), tmp_path / "cache")
    whole = cache.load(subjects[0]).unit()
    for path in (tmp_path / "cache").iterdir():
        spoil(path, how)
    again, prepared = prepare(cache.data, tmp_path / "cache")
    assert prepared == subjects
    np.testing.assert_array_equal(again.load(subjects[0]).unit(), whole)


def test_a_damaged_entry_is_not_made_from_other_data(patients: Path, tmp_path: Path) -> None:
    cache, subjects = prepare(DataSettings(path=patients, target="t2w", window="brain"), tmp_path / "cache")
    for path in (tmp_path / "cache").glob("*.safetensors"):
        path.unlink()
    shutil.copy(subjects[1].files[0], subjects[0].files[0])
    with pytest.raises(CaseError, match=r"has changed since the run began"):
        cache.load(subjects[0])


def test_room_is_forecast_and_looked_for_before_all_is_decoded(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataSettings(path=phantoms, target="t2w", window="brain", workers=0)
    cache, subjects, said = Cache(tmp_path, data, 4), find_subjects(phantoms, data).subjects, []
    monkeypatch.setattr(cache_module, "FORECAST_FROM", 1)
    digests = cache.digests(subjects)
    assert len(cache.forecast(subjects, digests, said.append)) == 1
    assert len(entries(tmp_path)) == 4
    assert "decoding 12 files of 3 cases" in said[0]
    assert "data.cache=FOLDER" in said[0]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"needs about 1 MiB for 8 decoded files, found 1 MiB free"):
        cache.forecast(subjects, digests, said.append)
    monkeypatch.undo()
    list(cache.prepare_all(subjects, digests))
    assert cache.forecast(subjects, digests, said.append) == []
    assert len(said) == 2


def test_what_a_case_is_decoded_to_needs_no_cache(phantoms: Path) -> None:
    data = DataSettings(path=phantoms, target="t1n", window="brain")
    subject = find_subjects(phantoms, data).subjects[0]
    volumes = decode(subject, data, 4)
    assert volumes.unit().max() == 1
    volume = read_volume(subject.files[0])
    assert np.array_equal(np.sort(volume[volume != 0]), np.sort(volumes.raw()[0][volumes.raw()[0] != 0]))
