"""Scoring folders: metrics against other programs, pairing, summaries, files, and input that is not as it should be."""

import csv
import json
import os
import shutil
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import support
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from support import hostile
from typer.testing import CliRunner

from cwdm.cli.app import app
from cwdm.errors import CaseError, InputError
from cwdm.evaluation.cache import ScoreCache
from cwdm.evaluation.definitions import METRICS, VERSIONS
from cwdm.evaluation.folders import evaluate, score_pairs
from cwdm.evaluation.labels import SCHEMES
from cwdm.evaluation.pairs import Pair, find_pairs
from cwdm.evaluation.score import Score, Scorer, score_pair
from cwdm.evaluation.segmenters import Segmenter
from cwdm.evaluation.tables import summaries, summarise
from cwdm.images import MODALITIES, Image, read_grid, write_nifti

SHAPE = (22, 26, 20)
AFFINE = np.array([[-1.0, 0, 0, 11], [0, -1.2, 0, 7], [0, 0, 0.9, -30], [0, 0, 0, 1]])
NAMES = ("BraTS-GLI-00001-000", "BraTS-GLI-00002-000")


def head(seed: int) -> np.ndarray:
    """A brain of scanner-like int16 intensities in air."""
    random = np.random.RandomState(seed)
    volume = np.zeros(SHAPE, np.int16)
    volume[4:18, 5:21, 3:17] = random.randint(100, 900, (14, 16, 14))
    return volume


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """PRED with a t1n and a t2f, and TRUTH with two complete cases."""
    for number, (name, target) in enumerate(zip(NAMES, ("t1n", "t2f"), strict=True)):
        case = tmp_path / "truth" / name
        case.mkdir(parents=True)
        for index, modality in enumerate(MODALITIES):
            write_nifti(case / f"{name}-{modality}.nii.gz", head(10 * number + index), AFFINE)
        labels = np.zeros(SHAPE, np.uint8)
        labels[8:12, 9:14, 6:10] = 2
        labels[9:11, 10:12, 7:9] = 3
        write_nifti(case / f"{name}-seg.nii.gz", labels, AFFINE)
        noisy = head(10 * number + MODALITIES.index(target)) + np.random.RandomState(99).randint(0, 60, SHAPE)
        (tmp_path / "pred").mkdir(exist_ok=True)
        write_nifti(tmp_path / "pred" / f"{name}-{target}.nii.gz", noisy.astype(np.int16), AFFINE)
    return tmp_path / "pred", tmp_path / "truth"


def load(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj, np.float64)


def unit(volume: np.ndarray, low: float, high: float) -> np.ndarray:
    a, b = np.percentile(volume, [low, high])
    return (np.clip(volume, a, b) - a) / (b - a)


def similarity(a: np.ndarray, b: np.ndarray, span: float) -> tuple[float, np.ndarray]:
    """scikit-image's mean, which leaves a rim of 5 voxels out, and the map of all voxels, mirrored at the edges."""
    options = {"data_range": span, "gaussian_weights": True, "use_sample_covariance": False}
    padded = (np.pad(volume, 5, mode="reflect") for volume in (a, b))
    _, values = structural_similarity(*padded, full=True, **options)
    return structural_similarity(a, b, **options), values[5:-5, 5:-5, 5:-5]


def test_metrics_against_scikit_image(folders: tuple[Path, Path]) -> None:
    pred, truth = folders
    score, _ = score_pairs(find_pairs(pred, truth, truth))
    files = {m: truth / NAMES[0] / f"{NAMES[0]}-{m}.nii.gz" for m in (*MODALITIES, "seg")}
    a, b = load(pred / f"{NAMES[0]}-t1n.nii.gz"), load(files["t1n"])
    tumour = load(files["seg"]) > 0
    brain = np.any([load(files[m]) != 0 for m in MODALITIES[1:]], axis=0)
    x, y = unit(a, 0.1, 99.9) * brain, unit(b, 0.1, 99.9) * brain
    mean, values = similarity(x, y, 1)
    p, q = unit(a, 0.5, 99.5), unit(b, 0.5, 99.5)
    regions = [(p * mask, q * mask, mask) for mask in (tumour, ~tumour)]
    maps = [similarity(c, d, max(np.ptp(c), np.ptp(d)))[1][mask].mean() for c, d, mask in regions]
    expected = {
        "psnr": peak_signal_noise_ratio(y, x, data_range=1),
        "mse": np.square(x - y).mean(),
        "mae": np.abs(x - y).mean(),
        "ssim": mean,
        "psnr_brain": peak_signal_noise_ratio(y[brain], x[brain], data_range=1),
        "ssim_brain": values[brain].mean(),
        "brasyn_2023_ssim": similarity(a, b, max(np.ptp(a), np.ptp(b)))[0],
        "brasyn_2024_ssim_tumour": maps[0],
        "brasyn_2024_ssim_healthy": maps[1],
        "brasyn_2025_mse_tumour": np.square(p - q)[tumour].mean(),
        "brasyn_2025_mse_healthy": np.square(p - q)[brain & ~tumour].mean(),
    }
    assert score.metrics == pytest.approx(expected, abs=1e-4)
    assert score.metrics["mse"] == pytest.approx(expected["mse"], abs=1e-6)
    assert (score.case, score.modality, score.brain, score.notes) == (NAMES[0], "t1n", "other contrasts", ())


def test_ssim_of_2023_leaves_out_the_rim(folders: tuple[Path, Path]) -> None:
    """As torchmetrics took the mean until 1.4.1: 0.5602468848 from torchmetrics 1.3.2 for this very pair."""
    pred, truth = folders
    random = np.random.RandomState(0)
    true = (gaussian_filter(random.random_sample((20, 24, 18)), 1) * 800).astype(np.float32)
    write_nifti(pred / f"{NAMES[0]}-t1n.nii.gz", (true + 40 * random.standard_normal(true.shape)).astype("f4"), AFFINE)
    for modality in MODALITIES:
        write_nifti(truth / NAMES[0] / f"{NAMES[0]}-{modality}.nii.gz", true, AFFINE)
    score = score_pair(find_pairs(pred, truth)[0])
    assert score.metrics["brasyn_2023_ssim"] == pytest.approx(0.5602468848, abs=5e-5)


def test_flat_truth_takes_the_brain_from_the_true_image(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pred, truth = folders
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in truth.glob("*/*"):
        shutil.copy(path, flat)
    inside, beside = score_pairs(find_pairs(pred, truth, truth)), score_pairs(find_pairs(pred, flat, flat))
    assert [score.brain for score in beside] == ["true image"] * 2
    assert [score.metrics for score in beside] == [pytest.approx(score.metrics, rel=0.2) for score in inside]


def test_a_perfect_prediction(folders: tuple[Path, Path]) -> None:
    pred, truth = folders
    shutil.copy(truth / NAMES[0] / f"{NAMES[0]}-t1n.nii.gz", pred)
    score = score_pairs(find_pairs(pred, truth, truth))[0]
    metrics = dict(score.metrics)
    assert metrics.pop("psnr") == metrics.pop("psnr_brain") == float("inf")
    assert {name for name, value in metrics.items() if value == pytest.approx(1)} == {n for n in metrics if "ssim" in n}
    assert {name for name, value in metrics.items() if value == 0} == {n for n in metrics if "ssim" not in n}


def test_without_a_tumour_its_figures_have_no_value(folders: tuple[Path, Path]) -> None:
    pred, truth = folders
    write_nifti(truth / NAMES[0] / f"{NAMES[0]}-seg.nii.gz", np.zeros(SHAPE, np.uint8), AFFINE)
    write_nifti(truth / NAMES[1] / f"{NAMES[1]}-seg.nii.gz", np.ones(SHAPE, np.uint8), AFFINE)
    none, all_over = score_pairs(find_pairs(pred, truth, truth))
    assert {name for name in none.metrics if "brasyn_202" in name} == {
        "brasyn_2023_ssim",
        "brasyn_2024_ssim_healthy",
        "brasyn_2025_mse_healthy",
    }
    assert "no tumour" in none.notes[0]
    assert not any("healthy" in name for name in all_over.metrics)
    assert "whole brain" in all_over.notes[0]


def spoil(path: Path, volume: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    write_nifti(path, volume, affine)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda path: spoil(path, head(1)[:-1]), "expected volumes of one shape, found the true image 22×26×20"),
        (lambda path: spoil(path, head(1), AFFINE + np.eye(4, k=3) * 5), "register or resample"),
        (lambda path: spoil(path, np.zeros(SHAPE, np.int16)), "every voxel is 0"),
        (lambda path: spoil(path, np.where(head(1) > 0, np.nan, 0).astype(np.float32)), "NaN"),
        (lambda path: spoil(path, np.where(head(1) >= np.sort(head(1).flat)[-5], 9, 0)), "synthesised image cannot be"),
        (
            lambda path: spoil(path, np.where(head(1) >= np.sort(head(1).flat)[-50], 9, 0)),
            "synthesised image cannot be",
        ),
        (lambda path: path.write_bytes(path.read_bytes()[:400]), "too early"),
        (lambda path: path.write_text("no image"), "gzip"),
        (lambda path: (path.unlink(), path.mkdir()), "is a folder"),
    ],
    ids=["shape", "grid", "zeros", "nan", "lone-voxels", "few-voxels", "cut", "text", "folder"],
)
def test_one_bad_image_stops_no_other(folders: tuple[Path, Path], wrong, said: str) -> None:
    pred, truth = folders
    wrong(pred / f"{NAMES[0]}-t1n.nii.gz")
    bad, good = score_pairs(find_pairs(pred, truth, truth))
    assert said in bad.reason
    assert bad.metrics == {}
    assert good.reason == ""
    assert summarise([bad, good])["psnr"]["images"] == 1


def reorder(path: Path, code: str) -> None:
    """Store an image in another voxel order; every voxel stays at its place in space."""
    image = nib.load(path)
    change = ornt_transform(io_orientation(image.affine), axcodes2ornt(code))
    turned = image.as_reoriented(change)
    write_nifti(path, np.asarray(turned.dataobj), turned.affine)


@pytest.mark.parametrize("code", ["RAS", "SPL", "AIR"])
def test_another_voxel_order_is_no_other_grid(folders: tuple[Path, Path], code: str) -> None:
    pred, truth = folders
    expected = score_pairs(find_pairs(pred, truth, truth))
    reorder(pred / f"{NAMES[0]}-t1n.nii.gz", code)
    reorder(truth / NAMES[0] / f"{NAMES[0]}-t2w.nii.gz", code)
    reorder(truth / NAMES[1] / f"{NAMES[1]}-seg.nii.gz", code)
    found = score_pairs(find_pairs(pred, truth, truth))
    assert [score.reason for score in found] == ["", ""]
    assert [score.metrics for score in found] == [pytest.approx(score.metrics, rel=1e-9) for score in expected]
    shifted = nib.load(pred / f"{NAMES[0]}-t1n.nii.gz")
    moved = shifted.affine + np.eye(4, k=3) * 5
    write_nifti(pred / f"{NAMES[0]}-t1n.nii.gz", np.asarray(shifted.dataobj), moved)
    assert "register or resample" in score_pairs(find_pairs(pred, truth))[0].reason


def test_what_has_no_partner_is_a_failure(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pred, truth = folders
    shutil.copy(pred / f"{NAMES[0]}-t1n.nii.gz", pred / "stranger-t1n.nii.gz")
    shutil.copytree(truth / NAMES[0], truth / "forgotten")
    (truth / NAMES[1] / f"{NAMES[1]}-seg.nii.gz").unlink()
    (pred / "notes.txt").write_text("no image")
    reasons = {score.case: score.reason for score in score_pairs(find_pairs(pred, truth, truth))}
    assert list(reasons) == sorted([*NAMES, "stranger", "forgotten"])
    assert reasons[NAMES[0]] == ""
    assert f"expected its segmentation {NAMES[1]}-seg.nii.gz" in reasons[NAMES[1]]
    assert "no synthesised image of it" in reasons["forgotten"]
    assert "expected its true image stranger-t1n.nii.gz or a case folder stranger" in reasons["stranger"]
    (truth / NAMES[0] / f"{NAMES[0]}-t1n.nii.gz").unlink()
    with pytest.raises(CaseError, match="expected the true t1n"):
        score_pair(find_pairs(pred, truth)[0])


def test_strange_labels_are_refused(folders: tuple[Path, Path]) -> None:
    pred, truth = folders
    write_nifti(truth / NAMES[0] / f"{NAMES[0]}-seg.nii.gz", head(3), AFFINE)
    assert "expected labels 0, 1, 2, 3, 4, found" in score_pairs(find_pairs(pred, truth, truth))[0].reason


def test_label_four_means_what_was_asked_for(folders: tuple[Path, Path]) -> None:
    pred, truth = folders
    path = truth / NAMES[0] / f"{NAMES[0]}-seg.nii.gz"
    labels = load(path)
    labels[labels == 3] = 4
    write_nifti(path, labels.astype(np.uint8), AFFINE)
    today, other = score_pairs(find_pairs(pred, truth, truth))
    assert "4 counts as resection cavity" in today.notes[0]
    assert other.notes == ()
    older, refused = score_pairs(find_pairs(pred, truth, truth), partial(score_pair, scheme=SCHEMES["2020"]))
    assert older.notes == ()
    assert "expected labels 0, 1, 2, 4, found 3" in refused.reason
    done = CliRunner().invoke(app, ["evaluate", str(pred), str(truth), "--seg", str(truth), "--labels", "2020"])
    assert done.exit_code == 1
    assert done.stderr.count("expected labels 0, 1, 2, 4, found 3") == 2  # as it is met, and at the end


def test_folders_that_cannot_be_used(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pred, truth = folders
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no synthesised image"):
        find_pairs(tmp_path / "empty", truth)
    for arguments in ((tmp_path / "none", truth), (pred, tmp_path / "none"), (pred, truth, tmp_path / "none")):
        with pytest.raises(InputError, match="does not exist"):
            find_pairs(*arguments)
    with pytest.raises(InputError, match="not a folder"):
        find_pairs(pred / f"{NAMES[0]}-t1n.nii.gz", truth)


def test_an_order_that_does_not_depend_on_the_workers(folders: tuple[Path, Path]) -> None:
    pairs = find_pairs(*folders)
    assert score_pairs(pairs, workers=1) == score_pairs(pairs, workers=4)


def test_command_and_its_files(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pred, truth = folders
    out = tmp_path / "out"
    shutil.copy(truth / NAMES[0] / f"{NAMES[0]}-t1n.nii.gz", pred)  # PSNR without end
    command = ["evaluate", str(pred), str(truth), "--seg", str(truth), "--out", str(out)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "could not be confirmed" in " ".join(done.stdout.split())
    rows = list(csv.DictReader((out / "evaluation.csv").open()))
    report = json.loads((out / "evaluation.json").read_text(), parse_constant=pytest.fail)
    scores = score_pairs(find_pairs(pred, truth, truth))
    for row, entry, score in zip(rows, report["images"], scores, strict=True):
        assert (row["case"], row["modality"]) == (entry["case"], entry["modality"]) == (score.case, score.modality)
        assert {name: float(row[name]) for name in score.metrics} == score.metrics
        assert {name: float(value) for name, value in entry["figures"].items()} == score.metrics
    assert report["images"][0]["figures"]["psnr"] == report["summary"]["all"]["psnr"]["mean"] == "inf"
    assert report["figures"].keys() == scores[0].metrics.keys()
    assert all(report["figures"][name]["not_confirmed"] == (METRICS[name].doubt or None) for name in scores[0].metrics)
    assert sorted(path.name for path in out.iterdir()) == ["evaluation.csv", "evaluation.json", "images"]

    (pred / f"{NAMES[1]}-t2f.nii.gz").write_text("damaged")
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert f"{NAMES[1]}: t2f FAILED" in done.stderr
    assert json.loads((out / "evaluation.json").read_text())["images"][1]["reason"]


def test_a_folder_of_images_inside_out_is_no_place_for_scores(folders: tuple[Path, Path]) -> None:
    pred, truth = folders
    pred.rename(pred.parent / "images")
    result = CliRunner().invoke(app, ["evaluate", str(pred.parent / "images"), str(truth), "--out", str(pred.parent)])
    assert isinstance(result.exception, InputError)
    long = CliRunner().invoke(
        app,
        ["evaluate", str(pred.parent / "images"), str(truth), "--segmenter", f"sh -c {'x' * 300} {{input}} {{output}}"],
    )
    assert long.exit_code == 1
    assert "FAILED" in long.output


@pytest.mark.parametrize("kept", ["pred", "truth"])
def test_nothing_is_written_into_what_is_scored(folders: tuple[Path, Path], kept: str) -> None:
    pred, truth = folders
    out = str(pred.parent / kept / "sub")
    result = CliRunner().invoke(app, ["evaluate", str(pred), str(truth), "--out", out])
    assert isinstance(result.exception, InputError)
    assert not Path(out).exists()


def test_a_stopped_evaluation_goes_on_where_it_was(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pairs, asked = find_pairs(*folders), []

    def segment(case: str, folder: Path) -> Image:
        asked.append(case)
        return Image(np.ones(SHAPE, np.float32), AFFINE, True)

    def changed(case: str, folder: Path) -> Image:
        os.utime(pairs[0].prediction, ns=(2, 2))
        return segment(case, folder)

    def cached(segmenter: Segmenter, name: str = "ones", renew: bool = False) -> Scorer:
        return ScoreCache(tmp_path, partial(score_pair, segmenter=segmenter), [name], renew=renew).score

    score_pairs(pairs[:1], cached(changed))
    assert not list(tmp_path.glob("*.json")), "an image that changed while it was scored"
    asked.clear()
    first = score_pairs(pairs[:1], cached(segment))
    both = score_pairs(pairs, cached(segment))
    assert both[0] == first[0]
    assert len(asked) == 4  # the true case and the completed one, of each
    assert score_pairs(pairs, cached(segment)) == both
    assert len(asked) == 4
    for other in (cached(segment, "twos"), cached(segment, renew=True)):
        assert score_pairs(pairs[:1], other) == first
    assert len(asked) == 8
    os.utime(pairs[1].prediction, ns=(1, 1))
    (tmp_path / f"{NAMES[0]}-t1n.json").write_text("damaged")
    assert score_pairs(pairs, cached(segment)) == both
    assert len(asked) == 12


@hostile
def test_hostile_scores_are_made_again(folders: tuple[Path, Path], tmp_path: Path, how: str) -> None:
    pairs = find_pairs(*folders)[:1]
    first = score_pairs(pairs, ScoreCache(tmp_path).score)
    for kept in tmp_path.glob("*.json"):
        support.spoil(kept, how)
    assert score_pairs(pairs, ScoreCache(tmp_path).score) == first


def test_scores_by_an_older_rule_are_made_again(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pairs = find_pairs(*folders)
    assert VERSIONS.keys() == METRICS.keys()
    first = score_pairs(pairs, ScoreCache(tmp_path).score)
    for kept in tmp_path.glob("*.json"):
        content = json.loads(kept.read_text())
        content["score"]["figures"]["psnr"] = -1.0
        kept.write_text(json.dumps(content))
    same = ScoreCache(tmp_path)
    assert [score.metrics["psnr"] for score in score_pairs(pairs, same.score)] == [-1, -1]
    newer = ScoreCache(tmp_path, versions={**VERSIONS, "psnr": VERSIONS["psnr"] + 1})
    assert score_pairs(pairs, newer.score) == first
    assert newer.used == []


def test_rules_and_their_versions(folders: tuple[Path, Path]) -> None:
    """Where a value differs, its rule has changed: raise its version here and in `evaluation.definitions`."""

    def segment(case: str, folder: Path) -> Image:
        image = read_grid(next(folder.glob("*-t1n.nii.gz")))
        return image._replace(volume=np.digitize(image.volume, [300, 500, 700, 880]).astype(np.float32))

    pred, truth = folders
    pair = find_pairs(pred, truth, truth)[0]
    expected = {
        "psnr": (1, 38.579833),
        "mse": (1, 0.0001386809),
        "mae": (1, 0.0050761833),
        "ssim": (1, 0.99714134),
        "psnr_brain": (1, 32.959334),
        "ssim_brain": (1, 0.99767003),
        "brasyn_2023_ssim": (2, 0.99539763),
        "brasyn_2024_ssim_tumour": (1, 0.99913014),
        "brasyn_2025_mse_tumour": (1, 0.00044312973),
        "brasyn_2024_ssim_healthy": (1, 0.69513791),
        "brasyn_2025_mse_healthy": (1, 0.00055459388),
        "dice_wt": (2, 0.94577778),
        "hd95_wt": (2, 0.89999998),
        "lesions_true_wt": (2, 1),
        "lesions_missed_wt": (2, 0),
        "lesions_added_wt": (2, 0),
        "reference_dice_wt": (1, 0.052181352),
        "reference_lesionwise_dice_wt": (1, 0.052181352),
        "reference_lesionwise_hd95_wt": (1, 9.2052412),
        "reference_lesions_wt": (1, 1),
        "reference_lesions_missed_wt": (1, 0),
        "reference_lesions_false_wt": (1, 0),
    }
    metrics = score_pair(pair, segment).metrics
    assert expected.keys() == {name for name in metrics if not name.endswith(("_tc", "_et", "_rc"))}
    for name, (version, value) in expected.items():
        assert (VERSIONS[name], metrics[name]) == (version, pytest.approx(value, rel=1e-5)), name
    for name, version in VERSIONS.items():  # a rule is the same in every region
        if METRICS[name].region:
            assert version == VERSIONS[f"{name[:-3]}_wt"]


def test_a_pair_without_truth_says_why() -> None:
    with pytest.raises(CaseError, match="none there"):
        score_pair(Pair("a", "t1n", Path("a-t1n.nii.gz"), problem="none there"))


def test_evaluate_in_one_line(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pred, truth = folders
    result = evaluate(str(pred), str(truth), seg=str(truth))
    assert list(result.scores) == score_pairs(find_pairs(pred, truth, truth))
    assert result.summary == summaries(result.scores)
    assert [*result.failed, *result.kept, *result.files] == []

    (pred / f"{NAMES[1]}-t2f.nii.gz").write_text("damaged")
    expected, met = [], []
    again = evaluate(pred, truth, truth, out=tmp_path / "out", expect=expected.append, on_score=met.append)
    assert expected == [2]
    assert sorted(met, key=lambda score: score.case) == again.scores
    assert [score.case for score in again.failed] == [NAMES[1]]
    assert again.summary["all"]["psnr"]["worst_case"] == f"{NAMES[0]}-t1n"
    assert [path.name for path in again.files] == ["evaluation.csv", "evaluation.json"]
    assert [score.case for score in evaluate(pred, truth, truth, out=tmp_path / "out").kept] == [NAMES[0]]


def test_files_call_metrics_figures(folders: tuple[Path, Path]) -> None:
    score = score_pair(find_pairs(*folders)[0])
    assert score.record()["figures"] == score.metrics
    assert Score.of_record(score.record()) == score
