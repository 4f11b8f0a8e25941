"""Laws of windows and voxel orders, with nibabel and the published numbers as oracles."""

import itertools
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cwdm.images.geometry import Orientation, Window, choose_window, tight_window, to_lps
from cwdm.images.intensity import brain_mask, normalise

SHARED = Path(__file__).resolve().parents[4] / "shared"
PUBLISHED = Window((8, 8, 0), (224, 224, 160), (240, 240, 155))
shapes = st.tuples(*[st.integers(1, 9)] * 3)


# Window


@st.composite
def boxes(draw: st.DrawFn) -> tuple[np.ndarray, int, tuple[int, int, int]]:
    """A brain's bounding box in a volume, a multiple and a published size."""
    shape = draw(st.tuples(*[st.integers(1, 40)] * 3))
    mask = np.zeros(shape, np.bool_)
    if draw(st.booleans()):
        corners = [sorted(draw(st.tuples(*[st.integers(0, length - 1)] * 2))) for length in shape]
        for end in (0, 1):
            mask[tuple(corner[end] for corner in corners)] = True
    return mask, draw(st.sampled_from([1, 4, 8])), draw(st.tuples(*[st.integers(1, 32)] * 3))


@given(boxes())
@settings(max_examples=150)
def test_window_holds_the_brain_and_is_restored(box: tuple[np.ndarray, int, tuple[int, int, int]]) -> None:
    mask, multiple, published = box
    window, warnings = choose_window(mask, multiple, published)
    assert all(size % multiple == 0 for size in window.size)
    assert min(window.start) >= 0
    for axis, length in enumerate(mask.shape):
        # Beyond the end only where the axis is shorter than the window.
        assert window.start[axis] + window.size[axis] <= max(length, window.size[axis])
    cropped = window.crop(mask)
    assert cropped.shape == window.size
    np.testing.assert_array_equal(window.restore(cropped), mask)

    volume = np.random.RandomState(0).standard_normal((2, *mask.shape)).astype(np.float32)
    inside = window.crop(volume)
    np.testing.assert_array_equal(inside[1], window.crop(volume[1]))
    np.testing.assert_array_equal(window.crop(window.restore(inside)), inside)
    touched = window.restore(np.ones(window.size, np.bool_))
    np.testing.assert_array_equal(window.restore(inside), volume * touched)

    rounded = [-(-size // multiple) * multiple for size in published]
    usual = [min(size, -(-length // multiple) * multiple) for size, length in zip(rounded, mask.shape, strict=True)]
    centre = [max(0, (length - size) // 2) for size, length in zip(usual, mask.shape, strict=True)]
    assert bool(warnings) == (window != Window(tuple(centre), tuple(usual), mask.shape))


def test_the_published_window() -> None:
    mask = np.zeros((240, 240, 155), np.bool_)
    mask[8:232, 8:232] = True
    assert choose_window(mask) == (PUBLISHED, ())
    assert choose_window(np.zeros_like(mask)) == (PUBLISHED, ())
    deeper, _ = choose_window(mask, multiple=64)
    assert deeper == Window((0, 0, 0), (256, 256, 192), (240, 240, 155))


def test_the_window_moves_the_least_needed() -> None:
    mask = np.zeros((240, 240, 155), np.bool_)
    mask[3:200, 30:235, 20:150] = True
    window, warnings = choose_window(mask)
    assert window == Window((3, 11, 0), (224, 224, 160), (240, 240, 155))
    assert len(warnings) == 2
    assert "axis 1" in warnings[0]
    assert "moved by -5" in warnings[0]
    assert "moved by +3" in warnings[1]


def test_the_window_grows_where_the_brain_is_larger() -> None:
    mask = np.zeros((240, 300, 155), np.bool_)
    mask[100:120, 4:260, 20:150] = True
    window, warnings = choose_window(mask)
    assert window == Window((8, 4, 0), (224, 256, 160), (240, 300, 155))
    assert len(warnings) == 1
    assert "axis 2" in warnings[0]
    assert "grew to 256" in warnings[0]


def test_a_small_volume_is_padded_at_the_end() -> None:
    window, warnings = choose_window(np.ones((33, 20, 64), np.bool_))
    assert window == Window((0, 0, 0), (64, 32, 64), (33, 20, 64))
    assert warnings == ()
    inside = window.crop(np.ones((33, 20, 64), np.float32))
    assert inside.sum() == 33 * 20 * 64
    assert inside[:33, :20].min() == 1


# Orientation

ALL_CODES = [
    "".join(letters[axis][way] for axis, way in zip(order, ways, strict=True))
    for letters in [("LR", "PA", "IS")]
    for order in itertools.permutations(range(3))
    for ways in itertools.product((0, 1), repeat=3)
]


def affine_of(code: str, tilt_deg: float = 0.0) -> np.ndarray:
    """Affine of voxels (1, 2, 3) mm stored in an order, perhaps tilted about an oblique axis."""
    affine = np.eye(4)
    affine[:3, 3] = 5, -60, 70
    for axis, (to, way) in enumerate(nib.orientations.axcodes2ornt(code).astype(int)):
        affine[:3, axis] = way * (axis + 1) * np.eye(3)[to]
    angle = np.deg2rad(tilt_deg)
    cross = np.cross(np.eye(3), np.array([-1, -2, -3]) / np.sqrt(14))  # Rodrigues' rotation
    turn = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    affine[:3, :3] = turn @ affine[:3, :3]
    return affine


def test_there_are_48_orders() -> None:
    assert len(set(ALL_CODES)) == 48
    assert ["".join(nib.aff2axcodes(affine_of(code))) for code in ALL_CODES] == ALL_CODES


@pytest.mark.parametrize("tilt_deg", [0, 20])
@pytest.mark.parametrize("target", ["LPS", "RAS", "SLA"])
def test_orientation_goes_there_and_back(target: str, tilt_deg: float) -> None:
    volume = np.arange(3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5)
    for code in ALL_CODES:
        affine = affine_of(code, tilt_deg)
        orientation = Orientation.to(target, affine)
        image = nib.Nifti1Image(volume, affine)
        change = nib.orientations.ornt_transform(
            nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(target)
        )
        expected = image.as_reoriented(change)
        assert "".join(nib.aff2axcodes(expected.affine)) == target
        np.testing.assert_array_equal(orientation.apply(volume), np.asarray(expected.dataobj))
        np.testing.assert_array_equal(orientation.invert(orientation.apply(volume)), volume)
        assert (orientation == Orientation.identity()) == (code == target)


@pytest.mark.parametrize(
    ("oriented", "expected"), [(True, Orientation((0, 1, 2), (False, True, False))), (False, Orientation.identity())]
)
def test_a_file_that_does_not_say_its_order_counts_as_stored_like_brats(oriented: bool, expected: Orientation) -> None:
    assert to_lps(np.diag([-1.0, 1, 1, 1]), oriented) == expected


def test_the_identity_changes_nothing() -> None:
    volume = np.arange(24).reshape(2, 3, 4)
    np.testing.assert_array_equal(Orientation.identity().apply(volume), volume)
    np.testing.assert_array_equal(Orientation.identity().invert(volume), volume)


# Real cases


@pytest.mark.skipif(not SHARED.is_dir(), reason="real cases stand beside the repository in development and CI only")
@pytest.mark.parametrize("name", ["case_BraTS-GLI-00001-000_t1n", "case_BraTS-TCGA-07294-000_t2f"])
def test_conditions_are_the_published_ones(name: str) -> None:
    record = json.loads((SHARED / "golden" / "case.json").read_text())[name]
    expected = np.load(SHARED / "golden" / f"{name}.npz")
    modalities = [modality for modality in ("t1n", "t1c", "t2w", "t2f") if modality != record["missing"]]
    folder = SHARED / "cases" / record["case"]
    loaded = [load(folder / f"{folder.name}-{modality}.nii.gz") for modality in modalities]
    window, warnings = choose_window(brain_mask(loaded))
    assert (window, warnings) == (PUBLISHED, ())
    conditions = [window.crop(normalise(volume)[0]) for volume in loaded]
    x, y, z = expected["condition_voxels"].T
    found = np.stack(conditions)[:, x, y, z]
    assert expected["condition_values"].max() > 0.5
    np.testing.assert_allclose(found, expected["condition_values"], rtol=0, atol=2e-5)


def load(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj, np.float32)


@given(st.data())
def test_tight_window_holds_the_brain_and_little_more(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(5, 40)) for _ in range(3))
    first = [data.draw(st.integers(0, n - 1)) for n in shape]
    last = [data.draw(st.integers(a, n - 1)) for a, n in zip(first, shape, strict=True)]
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b + 1) for a, b in zip(first, last, strict=True))] = True
    window = tight_window(mask, 8)
    assert window.crop(mask).sum() == mask.sum()
    for size, a, b in zip(window.size, first, last, strict=True):
        assert size % 8 == 0
        assert b - a + 1 <= size < b - a + 9
    assert np.array_equal(window.restore(window.crop(mask)), mask)
    assert tight_window(mask, 8, (64, 1, 9)).size[0] == 64
