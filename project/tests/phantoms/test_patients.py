from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from cwdm.errors import InputError, OutputError
from cwdm.images import MODALITIES
from cwdm.phantoms.anatomy import Anatomy, make_anatomy
from cwdm.phantoms.patients import Phantom, make_phantom, write_phantom, write_phantoms
from cwdm.phantoms.variation import Variation

SHAPE, SPACING_MM = (48, 40, 33), 5.0
FINE_SHAPE, FINE_MM = (96, 80, 66), 2.5
SEED = (7, 1)  # of the second case that `written` holds
NAMES = ("BraTS-PHANTOM-00000-000", "BraTS-PHANTOM-00001-000")
QUIET = Variation(
    bias=(0.0, 0.0),
    noise=(0.001, 0.001),
    misregistration_mm=(0.0, 0.0),
    thick_slice=0.0,
    tissue=0.0,
    maximum=(700.0, 700.0),
    outlier=0.0,
)


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return make_phantom(SEED, SHAPE, SPACING_MM)


@pytest.fixture(scope="module")
def fine() -> Phantom:
    """The same patient, fine enough for voxels of one tissue, in a scanner that adds little of its own."""
    return make_phantom(SEED, FINE_SHAPE, FINE_MM, QUIET)


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    """What `fine` is made of: the first of the generators that a phantom is drawn from makes its anatomy."""
    return make_anatomy(np.random.default_rng(SEED).spawn(1)[0], FINE_SHAPE, FINE_MM, QUIET)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two cases; not to be written to."""
    folder = tmp_path_factory.mktemp("cases")
    assert write_phantoms(folder, 2, 7, SHAPE, SPACING_MM) == [folder / name for name in NAMES]
    return folder


def pure_voxels(anatomy: Anatomy, tissue: str, least: float = 0.95) -> NDArray[np.bool_]:
    """Voxels that are one tissue almost alone."""
    fraction = np.zeros(len(anatomy.grid.near))
    for layer in anatomy.layers:
        fraction[layer.index] *= 1 - layer.fraction
        if layer.tissue == tissue:
            fraction[layer.index] += layer.fraction
    return anatomy.grid.embed((anatomy.grid.volume(fraction) > least) & anatomy.mask)


def contents(case: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in case.iterdir()}


def test_the_same_patient_appears_at_another_resolution(phantom: Phantom, fine: Phantom) -> None:
    sizes = [(p.volumes["t1n"] > 0).sum() * s**3 for p, s in ((phantom, SPACING_MM), (fine, FINE_MM))]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)
    tumours = [
        (np.argwhere(p.seg > 0).mean(0) - (np.array(p.seg.shape) - 1) / 2) * s
        for p, s in ((phantom, SPACING_MM), (fine, FINE_MM))
    ]
    np.testing.assert_allclose(*tumours, atol=2.5)


def test_volumes_share_one_mask_and_are_zero_outside(phantom: Phantom) -> None:
    mask = phantom.volumes["t1n"] > 0
    assert 0.8e6 < mask.sum() * SPACING_MM**3 < 2.2e6  # mm3
    for volume in phantom.volumes.values():
        assert volume.shape == SHAPE
        assert volume.dtype == np.int16
        np.testing.assert_array_equal(volume > 0, mask)
        assert volume.min() == 0
        assert volume.max() >= 500
    assert not phantom.seg[~mask].any()
    assert mask.sum() == mask[1:-1, 1:-1, 1:-1].sum(), "the head should fit into the array"


def test_affine_is_lps_with_the_front_at_the_start(phantom: Phantom) -> None:
    np.testing.assert_array_equal(phantom.affine, [[-5, 0, 0, 0], [0, -5, 0, 195], [0, 0, 5, 0], [0, 0, 0, 1]])


def test_modalities_order_the_tissues_as_a_radiologist_expects(fine: Phantom, anatomy: Anatomy) -> None:
    tissues = {name: pure_voxels(anatomy, name) for name in ("csf", "grey", "white")}
    orders: dict[str, Sequence[str]] = {
        "t1n": ("csf", "grey", "white"),
        "t1c": ("csf", "grey", "white"),
        "t2w": ("white", "grey", "csf"),
        "t2f": ("csf", "white", "grey"),
    }
    for modality, order in orders.items():
        low, middle, high = (np.median(fine.volumes[modality][tissues[name]]) for name in order)
        assert low < 0.95 * middle < 0.95 * high, modality
    fluid, white = (np.median(fine.volumes["t2f"][tissues[name]]) for name in ("csf", "white"))
    assert fluid < 0.3 * white


def test_flair_shows_oedema_and_contrast_agent_shows_the_rim(fine: Phantom) -> None:
    healthy = (fine.seg == 0) & (fine.volumes["t1n"] > 0)
    flair = fine.volumes["t2f"].astype(float)
    assert np.median(flair[fine.seg == 2]) > 1.2 * np.percentile(flair[healthy], 75)
    # Before and after contrast agent: the rim gains, healthy brain hardly does.
    before, after = (fine.volumes[m] / np.median(fine.volumes[m][healthy]) for m in ("t1n", "t1c"))
    assert np.median(after[fine.seg == 3]) > 1.2 * np.median(before[fine.seg == 3])
    assert np.median(after[fine.seg == 3]) > 1.2 * np.median(after[fine.seg == 2])


def in_the_brain(phantom: Phantom) -> NDArray[np.float64]:
    """Modalities by voxels of the brain, clipped as networks see them."""
    inside = np.stack([volume[volume > 0] for volume in phantom.volumes.values()]).astype(float)
    return np.clip(inside.T, *np.percentile(inside, (0.1, 99.9), axis=1)).T


def test_modalities_are_not_each_others_negatives() -> None:
    correlations = np.stack(
        [np.corrcoef(in_the_brain(make_phantom((8, number), FINE_SHAPE, FINE_MM))) for number in range(4)]
    )
    t1n_t2w, t1c_t2w = correlations[:, 0, 2], correlations[:, 1, 2]
    for pair in (t1n_t2w, t1c_t2w):  # patients: -0.2 to -0.75
        assert -0.75 < pair.mean() < -0.2
        assert np.ptp(pair) > 0.2
    of_others = 1 - 1 / np.array([np.linalg.inv(c).diagonal() for c in correlations])
    assert (of_others.mean(0) < 0.7).all(), "a linear function of the others"


def test_t1_and_t2_vary_by_themselves_within_a_tissue() -> None:
    found = []
    for number in range(4):
        seed = (8, number)
        patient = make_anatomy(np.random.default_rng(seed).spawn(1)[0], FINE_SHAPE, FINE_MM, QUIET)
        volumes, white = make_phantom(seed, FINE_SHAPE, FINE_MM, QUIET).volumes, pure_voxels(patient, "white")
        found.append(np.corrcoef(volumes["t1n"][white], volumes["t2w"][white])[0, 1])
    assert abs(np.mean(found)) < 0.35  # longer T1 with longer T2 everywhere would make it negative
    assert np.ptp(found) > 0.2


def test_dura_enhances(fine: Phantom, anatomy: Anatomy) -> None:
    membranes, white = pure_voxels(anatomy, "dura", 0.5), pure_voxels(anatomy, "white")
    before, after = (fine.volumes[m] / np.median(fine.volumes[m][white]) for m in ("t1n", "t1c"))
    assert np.median(after[membranes]) > 1.3 * np.median(before[membranes])


def test_thick_slices_are_boxes_with_straight_lines_between_them() -> None:
    thick = replace(QUIET, thick_slice=1.0, slice_mm=(10.0, 10.0), maximum=(30000.0, 30000.0), noise=(0.0, 0.0))
    volume = make_phantom(SEED, FINE_SHAPE, FINE_MM, thick).volumes["t2w"].astype(float)
    inside, straight = volume > 0, []
    for axis in range(3):
        before, at, after = (np.roll(volume, k, axis) for k in (1, 0, -1))
        whole = np.all([np.roll(inside, k, axis) for k in (-1, 0, 1)], axis=0)
        straight.append(np.mean(abs(before - 2 * at + after)[whole] < 4))
    _, middle, high = sorted(straight)
    assert high > 0.45  # slices four voxels apart bend a line at every other voxel
    assert middle < 0.1


def test_modalities_lie_beside_each_other_by_as_much_as_asked_for() -> None:
    aligned, moved = (
        make_phantom(SEED, FINE_SHAPE, FINE_MM, replace(QUIET, misregistration_mm=(std_mm, std_mm)))
        for std_mm in (0.0, 2.0)
    )
    np.testing.assert_array_equal(aligned.seg, moved.seg)
    shifts = []
    for before, after in zip(aligned.volumes.values(), moved.volumes.values(), strict=True):
        np.testing.assert_array_equal(before > 0, after > 0)
        spectrum = np.fft.fftn(after) * np.fft.fftn(before).conj()
        peak = np.unravel_index(np.fft.ifftn(spectrum / (abs(spectrum) + 1)).real.argmax(), before.shape)
        shifts.append([(k + n // 2) % n - n // 2 for k, n in zip(peak, before.shape, strict=True)])
    assert 1 <= np.abs(shifts).max() <= 3  # voxels of 2.5 mm
    assert len({tuple(shift) for shift in shifts}) > 1


def test_the_brightest_voxel_is_as_asked_for(fine: Phantom) -> None:
    assert all(volume.max() == 700 for volume in fine.volumes.values())


def test_written_files_come_back_as_they_were(phantom: Phantom, tmp_path: Path) -> None:
    folder = write_phantom(phantom, tmp_path, "BraTS-X")
    assert folder == tmp_path / "BraTS-X"
    expected = {f"BraTS-X-{suffix}.nii.gz" for suffix in (*MODALITIES, "seg")}
    assert {path.name for path in folder.iterdir()} == expected
    volumes: dict[str, NDArray[Any]] = {**phantom.volumes, "seg": phantom.seg}
    for suffix, volume in volumes.items():
        image = nib.load(folder / f"BraTS-X-{suffix}.nii.gz")
        stored = np.asanyarray(image.dataobj)
        assert stored.dtype == volume.dtype
        np.testing.assert_array_equal(stored, volume)
        np.testing.assert_array_equal(image.affine, phantom.affine)
        assert image.header.get_zooms() == (SPACING_MM,) * 3
        assert int(image.header["qform_code"]) == int(image.header["sform_code"]) == 1
        assert image.header.get_xyzt_units()[0] == "mm"
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")


def test_a_case_depends_on_seed_and_number_alone(written: Path, phantom: Phantom, tmp_path: Path) -> None:
    assert {path.name for path in written.iterdir()} == set(NAMES)
    assert contents(write_phantom(phantom, tmp_path, NAMES[1])) == contents(written / NAMES[1])


def test_another_number_is_another_patient(written: Path, phantom: Phantom) -> None:
    case = written / NAMES[0]
    other = {suffix: nib.load(case / f"{case.name}-{suffix}.nii.gz").get_fdata() for suffix in (*MODALITIES, "seg")}
    assert not np.array_equal(phantom.seg, other["seg"])
    assert all(np.mean(phantom.volumes[m] != other[m]) > 0.1 for m in MODALITIES)


def test_finished_cases_are_left_and_incomplete_ones_made_whole(written: Path, tmp_path: Path) -> None:
    folder = copytree(written / NAMES[0], tmp_path / NAMES[0])
    names: list[str] = []
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert write_phantoms(tmp_path, 1, 7, SHAPE, SPACING_MM, on_case=names.append) == [folder]
    assert names == [NAMES[0]]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    (folder / f"{NAMES[0]}-t2w.nii.gz").unlink()
    write_phantoms(tmp_path, 1, 7, SHAPE, SPACING_MM)
    assert contents(folder) == contents(written / NAMES[0])


@pytest.mark.parametrize("there", ["text", "another patient", "all five"])
def test_a_file_that_it_did_not_write_stays(written: Path, tmp_path: Path, there: str) -> None:
    folder = copytree(written / NAMES[0], tmp_path / NAMES[0])
    foreign = folder / f"{NAMES[0]}-t1c.nii.gz"
    another = written / NAMES[1] / f"{NAMES[1]}-t1c.nii.gz"
    foreign.write_bytes(another.read_bytes() if there == "another patient" else b"bytes")
    if there != "all five":
        (folder / f"{NAMES[0]}-t1n.nii.gz").unlink()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match=rf"{foreign} is there and is no image of this synthetic patient"):
        write_phantoms(tmp_path, 1, 7, SHAPE, SPACING_MM)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_reported(phantom: Phantom, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        write_phantom(phantom, tmp_path / "file", "BraTS-X")
