"""One file, sound and hostile; nibabel is the oracle for both directions."""

import gzip
import os
import re
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from small_case import AFFINE, NAME, SHAPE, brain, edited, fault, make_case, read, save

from cwdm.errors import CaseError
from cwdm.images.cases import write_volume


@pytest.mark.parametrize(
    "dtype", ["i1", "u1", "<i2", ">i2", "<u2", "<i4", ">i4", "u4", "i8", "u8", "<f4", ">f4", ">f8"]
)
@pytest.mark.parametrize("scaling", [None, (0.25, -3.0)])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_every_number_type_is_read_as_nibabel_does(
    tmp_path: Path, dtype: str, scaling: tuple[float, float] | None, kind: Any
) -> None:
    folder = make_case(tmp_path, "t2f")
    path = folder / f"{NAME}-t2w.nii"
    (folder / f"{NAME}-t2w.nii.gz").unlink()
    data = brain(5).astype(dtype)
    header = kind.header_class(endianness=dtype[0] if dtype[0] in "<>" else "<")
    image = kind(data, AFFINE, header)
    image.set_data_dtype(np.dtype(dtype))
    image.header.set_xyzt_units("mm")
    contents = bytearray(image.to_bytes())
    if scaling:
        # nibabel chooses the scaling itself when it saves.
        header = kind.header_class(bytes(contents[: kind.header_class.sizeof_hdr]))
        header.set_slope_inter(*scaling)
        contents[: kind.header_class.sizeof_hdr] = header.binaryblock
    path.write_bytes(contents)
    case = read(folder)
    np.testing.assert_array_equal(case.volumes["t2w"], nib.load(path).get_fdata(dtype=np.float64).astype(np.float32))
    assert case.nearest == "t2w"
    assert case.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_array_equal(case.header.get_best_affine(), AFFINE)


@pytest.mark.parametrize("seed", range(10))
def test_oblique_qforms_survive(tmp_path: Path, seed: int) -> None:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.random(random_state=seed).as_matrix() @ np.diag([1, 1.1, -1.2])
    image = nib.Nifti1Image(brain(), None)
    image.set_qform(affine, 1)
    image.set_sform(None, 0)
    folder = make_case(tmp_path)
    for path in folder.iterdir():
        nib.save(image, path)
    case = read(folder)
    np.testing.assert_allclose(case.affine, affine, atol=1e-5)
    assert "voxels of 1×1.1×1.2 mm" in case.warnings[1]


def test_a_fourth_axis_of_one_is_dropped(tmp_path: Path) -> None:
    folder = make_case(tmp_path)
    save(folder / f"{NAME}-t1c.nii.gz", brain(1)[..., None])
    case = read(folder)
    assert case.volumes["t1c"].shape == SHAPE
    write_volume(tmp_path / "out.nii.gz", brain(1), case)  # takes its header from t1c
    assert nib.load(tmp_path / "out.nii.gz").shape == SHAPE


def test_links_to_files_and_several_gzip_members(tmp_path: Path) -> None:
    folder = make_case(tmp_path / "in")
    path = folder / f"{NAME}-t1c.nii.gz"
    contents = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(contents[:500]) + gzip.compress(contents[500:]) + bytes(100))
    (tmp_path / "links" / NAME).mkdir(parents=True)
    for path in folder.iterdir():
        (tmp_path / "links" / NAME / path.name).symlink_to(path)
    np.testing.assert_array_equal(read(tmp_path / "links" / NAME).volumes["t1c"], brain(1))


def test_empty_gzip_members_are_passed_over(tmp_path: Path) -> None:
    folder = make_case(tmp_path)
    path = folder / f"{NAME}-t1c.nii.gz"
    contents, empty = gzip.decompress(path.read_bytes()), gzip.compress(b"")
    path.write_bytes(20_000 * empty + gzip.compress(contents[:500]) + 20_000 * empty + gzip.compress(contents[500:]))
    np.testing.assert_array_equal(read(folder).volumes["t1c"], brain(1))


def test_header_extensions_are_passed_over(tmp_path: Path) -> None:
    folder = make_case(tmp_path)
    path = folder / f"{NAME}-t1c.nii.gz"
    image = nib.load(path)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"patient name" * 100))
    nib.save(nib.Nifti1Image(brain(1), AFFINE, image.header), path)
    case = read(folder)
    np.testing.assert_array_equal(case.volumes["t1c"], brain(1))
    write_volume(tmp_path / "out.nii.gz", brain(1), case)
    assert b"patient" not in gzip.decompress((tmp_path / "out.nii.gz").read_bytes())


# Hostile files: each maker puts something else in place of a sound t2w


def dims(*lengths: int) -> Callable[[Path], object]:
    return edited(40, np.array([*lengths], "<i2").tobytes())


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def cut(compressed: float = 1, plain: int | None = None) -> Callable[[Path], object]:
    def truncate(path: Path) -> None:
        contents = path.read_bytes()
        if plain is not None:
            contents = gzip.compress(gzip.decompress(contents)[:plain])
        path.write_bytes(contents[: int(len(contents) * compressed)])

    return truncate


def bad_checksum(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[-8] ^= 1
    path.write_bytes(contents)


def bad_middle(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 0xFF
    path.write_bytes(contents)


def bomb(path: Path) -> None:
    """A sound volume followed by 4 GiB of zeros."""
    block = gzip.compress(bytes(1 << 24), 1)
    path.write_bytes(path.read_bytes() + block * 256)


def with_voxels(value: float, count: int = 1) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        volume = brain().astype(np.float32)
        volume.reshape(-1)[:count] = value
        save(path, volume)

    return change


def of_type(dtype: Any) -> Callable[[Path], object]:
    return lambda path: nib.save(nib.Nifti1Image(np.zeros(SHAPE, dtype), AFFINE), path)


RGB = [("R", "u1"), ("G", "u1"), ("B", "u1")]
NAN = np.array(np.nan, "<f4").tobytes()

HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (as_folder, "is a folder"),
    "pipe": (as_pipe, "not a regular file"),
    "broken link": (as_broken_link, "cannot be read: No such file"),
    "empty": (lambda path: path.write_bytes(b""), "not a NIfTI file"),
    "text": (lambda path: path.write_text("not an image " * 100), "not a sound gzip file"),
    "compressed text": (lambda path: path.write_bytes(gzip.compress(b"not an image" * 100)), "not a NIfTI file"),
    "not compressed": (lambda path: path.write_bytes(gzip.decompress(path.read_bytes())), "not a sound gzip file"),
    "half a file": (cut(0.5), "end too early"),
    "half a gzip header": (lambda path: path.write_bytes(path.read_bytes()[:5]), "end too early"),
    "half a NIfTI header": (cut(plain=200), "ends within its header"),
    "too few voxels": (cut(plain=352 + 12 * 10 * 2 * 4 + 7), "ends in slice 5"),
    "no voxels": (cut(plain=352), "ends in slice 1"),
    "checksum": (bad_checksum, "not a sound gzip file .*CRC"),
    "damaged inside": (bad_middle, "gzip|end too early|CRC"),
    "bomb": (bomb, "far more than the volume"),
    "zeros without end": (lambda path: os.truncate(path, 1 << 31), "at most 1,207,959,552 bytes, found 2,147,483,648"),
    "magic": (edited(344, b"no"), "not a NIfTI file"),
    "header of a pair": (edited(344, b"ni1\0"), "not a NIfTI file"),
    "2D": (lambda path: save(path, brain()[:, :, 3]), "one 3D volume, found 12×10 voxels"),
    "4D": (lambda path: save(path, np.stack([brain()] * 2, -1)), "one 3D volume, found 12×10×9×2 voxels"),
    "5D": (lambda path: save(path, brain()[..., None, None].repeat(3, -1)), "found 12×10×9×1×3 voxels"),
    "no axes": (dims(0), "3 axes, found 0"),
    "many axes": (dims(99), "3 axes, found 99"),
    "axis of 0": (dims(3, 12, 0, 9), "found 12×0×9"),
    "negative axis": (dims(3, 12, -10, 9), "found 12×-10×9"),
    "long axis": (dims(3, 1, 1, 1025), "found 1×1×1025"),
    "huge": (dims(3, 1024, 1024, 1024), "found 1024×1024×1024"),
    "large but allowed": (dims(3, 512, 512, 512), "ends in slice 1"),
    "RGB": (of_type(RGB), "one real number a voxel, found RGB"),
    "complex": (of_type(np.complex64), "one real number a voxel, found complex64"),
    "unknown type": (edited(70, b"\x63\x00"), "found <unknown code 99>"),
    "binary type": (edited(70, b"\x01\x00"), "found binary"),
    "offset too small": (edited(108, np.array(100, "<f4").tobytes()), "begin within 1 MiB, found byte 100"),
    "offset of 0": (edited(108, np.array(0, "<f4").tobytes()), "begin within 1 MiB, found byte 0"),
    "offset too large": (edited(108, np.array(2e9, "<f4").tobytes()), "begin within 1 MiB, found byte 2e[+]09"),
    "offset NaN": (edited(108, NAN), "begin within 1 MiB, found byte nan"),
    "offset beyond the end": (edited(108, np.array(1e6, "<f4").tobytes()), "ends in slice 1"),
    "intercept NaN": (edited(112, np.array([2, np.nan], "<f4").tobytes()), "header is damaged"),
    "scaled beyond float32": (edited(112, np.array([3e38, 0], "<f4").tobytes()), "NaN or infinite"),
    "singular affine": (lambda path: save(path, srow_z=0), "affine .* not invertible"),
    "flat affine": (lambda path: save(path, srow_x=[-1, 0, 1, 0], srow_z=[0, 0, 1e-4, 0]), "affine .* not invertible"),
    "affine NaN": (edited(280, NAN), "affine .* not invertible"),
    "affine infinite": (edited(280, np.array(np.inf, "<f4").tobytes()), "affine .* not invertible"),
    "bad quaternion": (
        lambda path: save(path, sform_code=0, qform_code=1, quatern_b=3),
        "orientation in the header is damaged",
    ),
    "NaN": (with_voxels(np.nan), "^BraTS-GLI-00001-000-t2w.nii.gz: 1 voxels are NaN or infinite"),
    "infinite": (with_voxels(-np.inf, 7), "7 voxels are NaN or infinite"),
    "all zero": (of_type(np.int16), "every voxel is 0"),
    "constant": (lambda path: save(path, np.full(SHAPE, 42, np.int16)), "every voxel is 42"),
    "other shape": (
        lambda path: save(path, brain()[:11]),
        "one shape, found t1c 12×10×9, t2w 11×10×9, t2f 12×10×9",
    ),
    "shifted": (lambda path: save(path, affine=AFFINE + np.eye(4, k=3)), "corners of t2w and t1c 1 mm apart"),
    "flipped": (lambda path: save(path, affine=AFFINE @ np.diag([-1, 1, 1, 1])), "corners of t2w and t1c 22 mm"),
    "other spacing": (
        lambda path: save(path, affine=AFFINE @ np.diag([1, 1, 1.1, 1])),
        "corners of t2w and t1c 0.8 mm apart .affines differ",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files(tmp_path: Path, what: str) -> None:
    folder = make_case(tmp_path)
    path = folder / f"{NAME}-t2w.nii.gz"
    make, expected = HOSTILE[what]
    make(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reason = fault(folder)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < 64
    assert re.search(expected, reason), reason


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_case(tmp_path_factory.mktemp("cases"))


@given(garbage=st.binary(min_size=1, max_size=40), offset=st.integers(0, 351))
def test_a_garbled_header_is_read_or_refused(sound: Path, garbage: bytes, offset: int) -> None:
    path = sound / f"{NAME}-t1c.nii.gz"
    before = path.read_bytes()
    edited(offset, garbage)(path)
    try:
        with suppress(CaseError):
            assert np.isfinite(read(sound).volumes["t1c"]).all()
    finally:
        path.write_bytes(before)
