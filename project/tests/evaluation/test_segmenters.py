"""Segmenters, good and bad, and what they make of a completed case."""

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cwdm.cli.app import app
from cwdm.errors import CaseError, SettingsError
from cwdm.evaluation.labels import SCHEMES
from cwdm.evaluation.overlap import compare_with_true_case, count_lesions, dice, hd95, lesionwise
from cwdm.evaluation.pairs import find_pairs
from cwdm.evaluation.score import score_pair
from cwdm.evaluation.segmenters import Segmenter, bundle_segmenter, command_segmenter, segment_pair
from cwdm.images import MODALITIES, read_volume, write_nifti

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
    """Metrics of the case with the synthesised t1c against the true one."""
    made, meaning = case["synthesised"], SCHEMES[scheme]
    true, completed = segment_pair(segmenter, name, truth_of(case), "t1c", made, meaning)
    return compare_with_true_case(completed.volume, true.volume, SPACING, meaning)


def program(tmp_path: Path, code: str = THRESHOLDS) -> str:
    (tmp_path / "segment it.py").write_text(code)
    return f"'{sys.executable}' '{tmp_path / 'segment it.py'}' {{input}} {{output}}"


def test_against_the_reference_and_the_same_segmenter(case: dict[str, Path], tmp_path: Path) -> None:
    true, made = read_volume(case["t1c"]), read_volume(case["synthesised"])
    reference = np.where(true > 150, 2, 0) + (true > 350)  # 2 and 3
    write_nifti(case["t1c"].with_name("patient-seg.nii.gz"), reference.astype(np.uint8), AFFINE)
    segmenter = command_segmenter(program(tmp_path))
    pair = find_pairs(tmp_path / "pred", tmp_path / "truth", tmp_path / "truth")[0]
    score = score_pair(pair, segmenter)
    assert score.metrics["dice_wt"] == dice(made > 100, true > 100)
    assert score.metrics["reference_dice_wt"] == dice(made > 100, true > 150)
    assert score.metrics["reference_dice_et"] == dice(made > 300, true > 350)
    expected = lesionwise(made > 100, true > 150, SPACING)
    assert score.metrics["reference_lesionwise_dice_wt"] == expected.dice < 1
    assert score.metrics["reference_lesionwise_hd95_wt"] == pytest.approx(expected.hd95_mm)
    assert score.metrics["reference_lesionwise_dice_rc"] == 1

    # The same voxels in another order, for the segmenter too, which is given one order.
    for name in ("synthesised", "t2f"):
        image = nib.as_closest_canonical(nib.load(case[name]))
        write_nifti(case[name], np.asarray(image.dataobj), image.affine)
    one_order = "\nassert all((nibabel.load(p).affine == image.affine).all() for p in folder.iterdir())"
    turned = score_pair(pair, command_segmenter(program(tmp_path, THRESHOLDS + one_order)))
    assert turned.metrics == pytest.approx(score.metrics, rel=1e-9)

    # A segmentation that says it lies elsewhere is not compared with the reference.
    elsewhere = THRESHOLDS.replace("nibabel.save", "image.affine[0, 3] += 9\nnibabel.save")
    lost = score_pair(pair, command_segmenter(program(tmp_path, elsewhere)))
    assert lost.metrics.keys() == {name for name in score.metrics if not name.startswith("reference")}
    assert "no metrics against the reference segmentation: expected volumes on one grid" in lost.notes[0]


def test_a_command(case: dict[str, Path], tmp_path: Path) -> None:
    segmenter = command_segmenter(program(tmp_path))
    metrics = compared(segmenter, case)
    true, made = read_volume(case["t1c"]), read_volume(case["synthesised"])
    # 100 and up is tumour of some kind, 200 and up core, 300 and up enhancing.
    for region, threshold in (("wt", 100), ("tc", 200), ("et", 300)):
        a, b = made > threshold, true > threshold
        assert metrics[f"dice_{region}"] == dice(a, b) < 1
        assert metrics[f"hd95_{region}"] == pytest.approx(hd95(a, b, SPACING))
        assert metrics[f"lesions_true_{region}"] == count_lesions(a, b)[2] > 0
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
    metrics = compared(command_segmenter(program(tmp_path, THRESHOLDS.replace("300] = 3", "350] = 4"))), case)
    true, made = read_volume(case["t1c"]), read_volume(case["synthesised"])
    assert metrics["dice_rc"] == dice(made > 350, true > 350) < 1
    assert metrics["lesions_true_rc"] == count_lesions(made > 350, true > 350)[2] > 0
    assert (metrics["lesions_true_et"], metrics["lesions_added_et"]) == (0, 0)
    for region, low in (("wt", 100), ("tc", 200)):
        assert metrics[f"dice_{region}"] == dice((made > low) & (made <= 350), (true > low) & (true <= 350))
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
