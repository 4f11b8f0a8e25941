"""Downstream comparison: overlap, distances and lesions against MONAI and by hand; segmenters, good and bad."""

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_dice, compute_hausdorff_distance
from skimage.measure import label
from typer.testing import CliRunner

from cwdm.cli.app import app
from cwdm.errors import CaseError, SettingsError
from cwdm.evaluation.score import find_pairs, score_pair
from cwdm.evaluation.segmenters import (
    SCHEMES,
    Segmenter,
    bundle_segmenter,
    command_segmenter,
    compare_with_true_case,
    count_lesions,
    dice,
    hd95,
    lesionwise,
    segment_pair,
)
from cwdm.images.cases import MODALITIES
from cwdm.images.image import read_volume, write_nifti

SHAPE = (13, 17, 11)
SPACING = (1.0, 1.5, 0.8)
AFFINE = np.array([[-1.0, 0, 0, 3], [0, 0, 0.8, 5], [0, 1.5, 0, -7], [0, 0, 0, 1]])
THRESHOLDS = """
import sys, nibabel
from pathlib import Path
folder, output = map(Path, sys.argv[1:])
image = nibabel.load(folder / f"{folder.name}-t1c.nii.gz")
voxels = image.get_fdata()
labels = (voxels > 100).astype("uint8") * 2
labels[voxels > 200] = 1
labels[voxels > 300] = 3
assert not list(folder.glob("*seg*")) and len(list(folder.iterdir())) == 4
nibabel.save(nibabel.Nifti1Image(labels, image.affine), output)
"""


def blobs(seed: int) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(np.random.RandomState(seed).standard_normal(SHAPE), 1.5) > 0.1


@pytest.fixture
def case(tmp_path: Path) -> dict[str, Path]:
    """Four true images of `patient` and, as `synthesised`, a t1c of other intensities."""
    folder = tmp_path / "truth" / "patient"
    folder.mkdir(parents=True)
    files = {modality: folder / f"patient-{modality}.nii.gz" for modality in MODALITIES}
    for seed, path in enumerate(files.values()):
        write_nifti(path, np.random.RandomState(seed).randint(1, 400, SHAPE).astype(np.int16), AFFINE)
    (tmp_path / "pred").mkdir()
    made = tmp_path / "pred" / "patient-t1c.nii.gz"
    write_nifti(made, np.clip(read_volume(files["t1c"]) + 20, 0, 400).astype(np.int16), AFFINE)
    return {**files, "synthesised": made}


def truth_of(case: dict[str, Path]) -> dict[str, Path]:
    return {modality: case[modality] for modality in MODALITIES}


def compared(
    segmenter: Segmenter, case: dict[str, Path], name: str = "patient", scheme: str = "2023"
) -> dict[str, float]:
    """Figures of the case with the synthesised t1c against the true one."""
    made, meaning = case["synthesised"], SCHEMES[scheme]
    return compare_with_true_case(segment_pair(segmenter, name, truth_of(case), "t1c", made, meaning), meaning)


def program(tmp_path: Path, code: str = THRESHOLDS) -> str:
    (tmp_path / "segment it.py").write_text(code)
    return f"'{sys.executable}' '{tmp_path / 'segment it.py'}' {{input}} {{output}}"


def as_tensor(mask: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(mask)[None, None]


@pytest.mark.parametrize("seed", range(4))
def test_against_monai(seed: int) -> None:
    a, b = blobs(seed), blobs(seed + 100)
    assert dice(a, b) == pytest.approx(compute_dice(as_tensor(a), as_tensor(b)).item(), abs=1e-6)
    expected = compute_hausdorff_distance(
        as_tensor(a), as_tensor(b), include_background=True, percentile=95, spacing=list(SPACING)
    )
    assert hd95(a, b, SPACING) == pytest.approx(expected.item(), abs=1e-4)


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(0, 2**31))
def test_laws(first: int, second: int) -> None:
    a, b = blobs(first), blobs(second)
    assert dice(a, a) == 1
    assert hd95(a, a, SPACING) == 0
    assert count_lesions(a, a)[:2] == (0, 0)
    assert dice(a, b) == dice(b, a)
    assert hd95(a, b, SPACING) == hd95(b, a, SPACING)
    assert count_lesions(a, b)[:2] == count_lesions(b, a)[1::-1]


def test_by_hand() -> None:
    a, b = np.zeros((2, *SHAPE), bool)
    a[2:4, 3, 3] = a[8, 8, 8] = True
    b[3, 3, 3] = b[11, 15, 9] = b[10, 14, 8] = b[6, 6, 1] = True
    assert dice(a, b) == 2 * 1 / (3 + 4)
    assert count_lesions(a, b) == (2, 1, 3)  # the two corner neighbours are one lesion
    one, other = np.zeros((2, *SHAPE), bool)
    one[2, 3, 4] = other[2, 7, 4] = True
    assert hd95(one, other, SPACING) == 4 * 1.5


def test_empty_masks() -> None:
    none, some = np.zeros(SHAPE, bool), blobs(0)
    assert (dice(none, none), hd95(none, none, SPACING), count_lesions(none, none)) == (1, 0, (0, 0, 0))
    assert dice(none, some) == dice(some, none) == 0
    diagonal = np.linalg.norm([12 * 1.0, 16 * 1.5, 10 * 0.8])
    assert hd95(none, some, SPACING) == hd95(some, none, SPACING) == pytest.approx(diagonal)


def balls(seed: int, shape: tuple[int, int, int] = (26, 31, 22), count: int = 7) -> np.ndarray:
    random = np.random.RandomState(seed)
    places = np.moveaxis(np.indices(shape), 0, -1)
    centres, radii = random.uniform(0, shape, (count, 3)), random.uniform(0.9, 4, count)
    return np.any([np.linalg.norm(places - c, axis=-1) < r for c, r in zip(centres, radii, strict=True)], axis=0)


def lesionwise_one_by_one(prediction: np.ndarray, truth: np.ndarray, spacing: tuple) -> tuple[float, ...]:
    """By scikit-image, voxel distances and sets, one lesion after the other."""
    offsets = np.argwhere(np.ones((3, 3, 3))) - 1
    steps = [offset for offset in offsets if np.abs(offset).sum() <= 2]

    def grow(mask: np.ndarray) -> np.ndarray:
        for _ in range(3):
            padded = np.pad(mask, 1)
            mask = np.any([np.roll(padded, step, (0, 1, 2))[1:-1, 1:-1, 1:-1] for step in steps], axis=0)
        return mask

    def parts(mask: np.ndarray) -> list[np.ndarray]:
        numbered = label(mask, connectivity=3)
        return [numbered == number for number in range(1, numbered.max() + 1)]

    found, met, scores, missed = parts(prediction), set(), [], 0
    for near in parts(grow(truth)):
        lesion = truth & near
        touching = [n for n, part in enumerate(found) if (part & near).any()]
        met |= set(touching)
        if lesion.sum() * np.prod(spacing) <= 50:
            continue
        if touching:
            whole = np.any([found[n] for n in touching], axis=0)
            scores.append((dice(whole, lesion), hd95(whole, lesion, spacing)))
        else:
            missed += 1
            scores.append((0, 374))
    scored, false = len(scores), len(found) - len(met)
    scores += [(0, 374)] * false
    return (*(np.mean(scores, axis=0) if scores else (1, 0)), scored, missed, false)


@pytest.mark.parametrize("seed", range(6))
def test_lesionwise_against_lesions_one_by_one(seed: int) -> None:
    truth = balls(seed)
    prediction = (balls(seed, count=5) & ~balls(seed + 50, count=2)) | balls(seed + 100, count=2)
    assert lesionwise(prediction, truth, SPACING) == pytest.approx(lesionwise_one_by_one(prediction, truth, SPACING))


def test_lesionwise_by_hand() -> None:
    truth, prediction = np.zeros((2, 40, 20, 20), bool)
    truth[2:7, 5:10, 5:10] = truth[10:15, 5:10, 5:10] = True  # 3 voxels apart: one lesion of 250 voxels
    truth[32:37, 5:10, 5:10] = True  # missed
    truth[22, 16, 16] = prediction[22, 17, 17] = True  # too small to be scored, and what meets it is not false
    prediction[2:7, 5:10, 5:10] = True
    prediction[25, 2, 2] = True  # false, however small
    assert dice(prediction[:20], truth[:20]) == pytest.approx(2 / 3)
    found = lesionwise(prediction, truth, (1, 1, 1))
    assert found == (pytest.approx((2 / 3 + 0 + 0) / 3), pytest.approx((8 + 374 + 374) / 3), 2, 1, 1)
    none = np.zeros_like(truth)
    assert lesionwise(none, none, SPACING) == (1, 0, 0, 0, 0)
    assert lesionwise(truth, none, SPACING) == (0, 374, 0, 0, 4)
    assert lesionwise(none, truth, SPACING) == (0, 374, 2, 2, 0)
    assert lesionwise(truth, truth, SPACING) == (1, 0, 2, 0, 0)
    assert lesionwise(truth, truth, (0.4, 0.5, 0.5)).scored == 0  # 25 mm³ and 12.5 are small


def test_against_the_reference_and_the_same_segmenter(case: dict[str, Path], tmp_path: Path) -> None:
    true, made = read_volume(case["t1c"]), read_volume(case["synthesised"])
    reference = np.where(true > 150, 2, 0) + (true > 350)  # 2 and 3
    write_nifti(case["t1c"].with_name("patient-seg.nii.gz"), reference.astype(np.uint8), AFFINE)
    segmenter = command_segmenter(program(tmp_path))
    pair = find_pairs(tmp_path / "pred", tmp_path / "truth", tmp_path / "truth")[0]
    score = score_pair(pair, segmenter)
    assert score.figures["dice_wt"] == dice(made > 100, true > 100)
    assert score.figures["reference_dice_wt"] == dice(made > 100, true > 150)
    assert score.figures["reference_dice_et"] == dice(made > 300, true > 350)
    expected = lesionwise(made > 100, true > 150, SPACING)
    assert score.figures["reference_lesionwise_dice_wt"] == expected.dice < 1
    assert score.figures["reference_lesionwise_hd95_wt"] == pytest.approx(expected.hd95_mm)
    assert score.figures["reference_lesionwise_dice_rc"] == 1

    # The same voxels in another order, for the segmenter too, which is given one order.
    for name in ("synthesised", "t2f"):
        image = nib.as_closest_canonical(nib.load(case[name]))
        write_nifti(case[name], np.asarray(image.dataobj), image.affine)
    one_order = "\nassert all((nibabel.load(p).affine == image.affine).all() for p in folder.iterdir())"
    turned = score_pair(pair, command_segmenter(program(tmp_path, THRESHOLDS + one_order)))
    assert turned.figures == pytest.approx(score.figures, rel=1e-9)

    # A segmentation that says it lies elsewhere is not compared with the reference.
    elsewhere = THRESHOLDS.replace("nibabel.save", "image.affine[0, 3] += 9\nnibabel.save")
    lost = score_pair(pair, command_segmenter(program(tmp_path, elsewhere)))
    assert lost.figures.keys() == {name for name in score.figures if not name.startswith("reference")}
    assert "no figures against the reference segmentation: expected volumes on one grid" in lost.notes[0]


def test_a_command(case: dict[str, Path], tmp_path: Path) -> None:
    segmenter = command_segmenter(program(tmp_path))
    figures = compared(segmenter, case)
    true, made = read_volume(case["t1c"]), read_volume(case["synthesised"])
    # 100 and up is tumour of some kind, 200 and up core, 300 and up enhancing.
    for region, threshold in (("wt", 100), ("tc", 200), ("et", 300)):
        a, b = made > threshold, true > threshold
        assert figures[f"dice_{region}"] == dice(a, b) < 1
        assert figures[f"hd95_{region}"] == pytest.approx(hd95(a, b, SPACING))
        assert figures[f"lesions_true_{region}"] == count_lesions(a, b)[2] > 0
    same = compared(segmenter, {**case, "synthesised": case["t1c"]})
    assert [same[f"dice_{region}"] for region in ("wt", "tc", "et")] == [1, 1, 1]


def test_older_labels_when_asked_for(case: dict[str, Path], tmp_path: Path) -> None:
    expected = compared(command_segmenter(program(tmp_path)), case)
    older = command_segmenter(program(tmp_path, THRESHOLDS.replace("] = 3", "] = 4")))
    found = compared(older, case, scheme="2020")
    assert found == {name: value for name, value in expected.items() if not name.endswith("_rc")}
    with pytest.raises(CaseError, match="expected labels 0, 1, 2, 4, found 3"):
        compared(command_segmenter(program(tmp_path)), case, scheme="2020")


def test_a_resection_cavity_is_no_enhancing_tumour(case: dict[str, Path], tmp_path: Path) -> None:
    """Above 350 a cavity, which belongs to no other region, as in post-treatment glioma of 2024."""
    figures = compared(command_segmenter(program(tmp_path, THRESHOLDS.replace("300] = 3", "350] = 4"))), case)
    true, made = read_volume(case["t1c"]), read_volume(case["synthesised"])
    assert figures["dice_rc"] == dice(made > 350, true > 350) < 1
    assert figures["lesions_true_rc"] == count_lesions(made > 350, true > 350)[2] > 0
    assert (figures["lesions_true_et"], figures["lesions_added_et"]) == (0, 0)
    for region, low in (("wt", 100), ("tc", 200)):
        assert figures[f"dice_{region}"] == dice((made > low) & (made <= 350), (true > low) & (true <= 350))
    both = THRESHOLDS.replace("= 3\n", "= 3\nlabels[voxels > 350] = 4\n")
    assert compared(command_segmenter(program(tmp_path, both)), case)["lesions_true_et"] > 0


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit('out of\\nluck')", "exit code 1: luck"),
        ("import os; os._exit(7)", "exit code 7: it said nothing"),
        ("", "wrote no file; it should write patient-seg.nii.gz"),
        ("import sys; open(sys.argv[2], 'w').write('text')", "cannot be read"),
        (THRESHOLDS.replace("] = 3", "] = 7"), "expected labels 0, 1, 2, 3, 4, found 7"),
        (THRESHOLDS.replace("labels,", "labels[1:] if labels.sum() % 2 else labels[2:],"), "of one shape"),
    ],
    ids=["exit", "silent", "nothing", "text", "labels", "shape"],
)
def test_a_command_that_fails_names_the_case(case: dict[str, Path], tmp_path: Path, code: str, said: str) -> None:
    if "one shape" in said:  # make sure that the two segmentations differ in size
        code = code.replace("labels.sum() % 2", f"float(voxels.sum()) == {float(read_volume(case['t1c']).sum())}")
    with pytest.raises(CaseError, match=said) as caught:
        compared(command_segmenter(program(tmp_path, code)), case)
    assert caught.value.case == "patient"


def test_a_strange_name_stays_one_argument(case: dict[str, Path], tmp_path: Path) -> None:
    segmenter = command_segmenter(program(tmp_path))
    for name in ("a b; touch x", "{output}", "$(false)"):
        assert compared(segmenter, {**case, "synthesised": case["t1c"]}, name)["dice_wt"] == 1


def test_what_a_segmenter_writes_beside_its_input_stays_out_of_the_truth(case: dict[str, Path], tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in case["t1c"].parent.iterdir()}
    code = THRESHOLDS + "\n(folder / 'litter').write_text('')\n(folder / f'{folder.name}-t1n.nii.gz').unlink()"
    segment_pair(command_segmenter(program(tmp_path, code)), "patient", truth_of(case), "t1c", case["synthesised"])
    assert {path.name: path.read_bytes() for path in case["t1c"].parent.iterdir()} == before


def test_a_case_must_be_complete(case: dict[str, Path], tmp_path: Path) -> None:
    files = {"t1c": case["t1c"]}
    with pytest.raises(CaseError, match="t1n, t2w, t2f missing"):
        segment_pair(command_segmenter(program(tmp_path)), "patient", files, "t1c", case["synthesised"])


@pytest.mark.parametrize(
    "template", ["", "true {input}", "true {output}", "no-such-program {input} {output}", "'{input"]
)
def test_impossible_commands(template: str) -> None:
    with pytest.raises(SettingsError, match="segmenter's"):
        command_segmenter(template)


def bundle(tmp_path: Path, channels: int) -> Path:
    """A MONAI bundle whose network thresholds the first image, t1c."""
    folder = tmp_path / "bundle"
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    config = {
        "network_def": {"_target_": "torch.nn.Conv3d", "in_channels": 4, "out_channels": channels, "kernel_size": 1},
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [{"_target_": "LoadImaged", "keys": "image"}, {"_target_": "EnsureTyped", "keys": "image"}],
        },
        "inferer": {"_target_": "SimpleInferer"},
    }
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    network = torch.nn.Conv3d(4, channels, 1)
    torch.nn.init.zeros_(network.weight)
    if channels == 3:  # core, whole, enhancing
        network.weight.data[:, 0] = 1
        network.bias.data = torch.tensor([-200.0, -100.0, -300.0])
    else:  # lines that cross at 100.5, 200.5 and 300.5, so that each label is highest in between
        network.weight.data[:, 0, 0, 0, 0] = torch.tensor([0.0, 2.0, 1.0, 3.0])
        network.bias.data = torch.tensor([0.0, -301.0, -100.5, -601.5])
    torch.save(network.state_dict(), folder / "models" / "model.pt")
    return folder


@pytest.mark.parametrize("channels", [3, 4])
def test_a_bundle_is_the_same_as_the_command(case: dict[str, Path], tmp_path: Path, channels: int) -> None:
    expected = compared(command_segmenter(program(tmp_path)), case)
    assert compared(bundle_segmenter(bundle(tmp_path, channels)), case) == expected
    if channels == 3:  # its regions become the labels that were asked for
        older = compared(bundle_segmenter(tmp_path / "bundle", SCHEMES["2020"]), case, scheme="2020")
        assert older == {name: value for name, value in expected.items() if not name.endswith("_rc")}


def test_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="expected a MONAI bundle"):
        bundle_segmenter(tmp_path)
    folder = bundle(tmp_path, 3)
    torch.save({"module": SettingsError}, folder / "models" / "model.pt")  # a pickle that wants code
    with pytest.raises(SettingsError, match="cannot be loaded"):
        bundle_segmenter(folder)


def test_through_the_command_line(case: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["evaluate", str(tmp_path / "pred"), str(tmp_path / "truth"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*arguments, "--segmenter", program(tmp_path)])
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())["summary"]["all"]
    assert 0 < summary["dice_wt"]["mean"] < 1
    done = CliRunner().invoke(app, [*arguments, "--segmenter", program(tmp_path, "import sys; sys.exit('no luck')")])
    assert done.exit_code == 1
    assert "patient: t1c FAILED: the segmenter ended with exit code 1: no luck" in done.stderr
    done = CliRunner().invoke(app, [*arguments, "--segmenter", "x", "--segmenter-bundle", "y"])
    assert isinstance(done.exception, SettingsError)
