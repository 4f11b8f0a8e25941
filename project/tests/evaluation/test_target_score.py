"""Scores of CT and the like: against scikit-image by the challenge's description, bodies in air, folders, options."""

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from skimage.filters import threshold_otsu
from skimage.metrics import structural_similarity
from typer.testing import CliRunner

from cwdm.cli.app import app
from cwdm.errors import InputError, SettingsError
from cwdm.evaluation.folders import score_pairs
from cwdm.evaluation.pairs import Pair, find_translated
from cwdm.evaluation.score import Score
from cwdm.evaluation.target_score import body_mask, otsu_threshold, score_translated
from cwdm.images import write_nifti

SHAPE = (24, 28, 20)
AFFINE = np.array([[-1.0, 0, 0, 9], [0, -1.1, 0, 4], [0, 0, 1.4, -60], [0, 0, 0, 1]])
RANGE = (-1024.0, 3000.0)


def body() -> np.ndarray:
    """An elliptic cylinder that ends at the volume's top and bottom, as a trunk does."""
    x, y, _ = np.indices(SHAPE)
    return ((x - 11) / 9) ** 2 + ((y - 13) / 10) ** 2 < 1


def lungs() -> np.ndarray:
    x, y, z = np.indices(SHAPE)
    return (((x - 11) / 4) ** 2 + ((y - 13) / 4) ** 2 < 1) & (z > 5)  # open to the air at the top


def scan(seed: int = 0) -> np.ndarray:
    """A CT in HU: noisy air, tissue with bone, lungs, and a table under the patient."""
    random = np.random.RandomState(seed)
    volume = np.where(body(), 40 + 900 * (gaussian_filter(random.standard_normal(SHAPE), 1) > 0.35), -1000)
    volume = np.where(lungs(), -850, volume)
    volume[2:22, 26, :] = 100
    return np.round(volume + 12 * random.standard_normal(SHAPE)).astype(np.int16)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """PRED as `cwdm translate` leaves it, and TRUTH as training on pairs reads it, with two cases."""
    (tmp_path / "pred").mkdir()
    for seed, case in enumerate(("1PA001", "1PB002")):
        folder = tmp_path / "truth" / case
        folder.mkdir(parents=True)
        true = scan(seed)
        write_nifti(folder / "ct.nii.gz", true, AFFINE)
        write_nifti(folder / "mask.nii.gz", body().astype(np.uint8), AFFINE)
        made = true + 80 * np.random.RandomState(seed + 10).standard_normal(SHAPE)
        made[11, 13, 3] = 4000  # beyond the range
        write_nifti(tmp_path / "pred" / f"{case}.nii.gz", made.astype(np.float32), AFFINE)
    (tmp_path / "pred" / "translations.json").write_text("{}")
    return tmp_path / "pred", tmp_path / "truth"


def load(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj, np.float64)


def expected(made: np.ndarray, true: np.ndarray, mask: np.ndarray, low: float, high: float) -> dict[str, float]:
    clipped = [np.clip(volume, low, high) for volume in (true, made)]
    error = np.square(clipped[0] - clipped[1])[mask].mean()
    x, y = (np.where(mask, volume, low) - low for volume in clipped)
    _, values = structural_similarity(x, y, data_range=high - low, full=True)
    inside = (slice(3, -3),) * 3
    return {
        "target_mae": np.abs(made - true)[mask].mean(),
        "target_psnr": 10 * np.log10((high - low) ** 2 / error),
        "target_ssim": values[inside][mask[inside]].mean(),
    }


@pytest.mark.parametrize("code", ["LPS", "RAS", "SPL"])
def test_metrics_against_scikit_image(folders: tuple[Path, Path], code: str) -> None:
    pred, truth = folders
    image = nib.load(pred / "1PA001.nii.gz")
    made, true = load(pred / "1PA001.nii.gz"), load(truth / "1PA001" / "ct.nii.gz")
    change = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(image.affine), nib.orientations.axcodes2ornt(code)
    )
    turned = image.as_reoriented(change)
    write_nifti(pred / "1PA001.nii.gz", np.asarray(turned.dataobj), turned.affine)
    pair, _ = find_translated(pred, truth, "{case}/ct.nii.gz", "{case}/mask.nii.gz")
    score = score_translated(pair, RANGE)
    assert score.metrics == pytest.approx(expected(made, true, body(), *RANGE), rel=1e-5)
    assert (score.case, score.name, score.notes) == ("1PA001", "1PA001", ())
    own = score_translated(pair)
    assert own.metrics == pytest.approx(expected(made, true, body(), true.min(), true.max()), rel=1e-5)


def test_the_body_is_found_where_no_mask_is_given(folders: tuple[Path, Path]) -> None:
    pred, truth = folders
    true = scan()
    assert np.array_equal(body_mask(true.astype(np.float32), AFFINE), body())  # with the lungs, without the table
    order = (2, 0, 1)
    affine = AFFINE[:, [*order, 3]]
    assert np.array_equal(body_mask(true.transpose(order).astype(np.float32), affine), body().transpose(order))
    given, found = (
        score_translated(find_translated(pred, truth, "{case}/ct.nii.gz", mask)[0], RANGE).metrics
        for mask in ("{case}/mask.nii.gz", None)
    )
    assert given == found


def test_threshold_against_scikit_image() -> None:
    for volume in (scan(), scan(3)[:, :14], np.random.RandomState(1).gamma(2.0, size=SHAPE)):
        image = volume.astype(np.float32)
        step = float(image.max() - image.min()) / 256
        assert otsu_threshold(image) == pytest.approx(float(threshold_otsu(image)), abs=step)
    assert not body_mask(np.full(SHAPE, 7, np.float32), AFFINE).any()


def test_a_perfect_image_and_a_thin_one(tmp_path: Path) -> None:
    for name, volume in (("thick", scan()), ("thin", scan()[:, :, :5])):
        write_nifti(tmp_path / f"{name}.nii.gz", volume, AFFINE)
    thick, thin = score_pairs(find_translated(tmp_path, tmp_path, "{case}.nii.gz"), score_translated)
    assert thick.metrics == {"target_mae": 0, "target_psnr": float("inf"), "target_ssim": pytest.approx(1)}
    assert thin.metrics == {"target_mae": 0, "target_psnr": float("inf")}
    assert thin.notes == ("no SSIM: SSIM needs at least 7 voxels along each axis, found 24×28×5",)


def test_what_cannot_be_paired_or_scored_is_named(folders: tuple[Path, Path]) -> None:
    pred, truth = folders
    write_nifti(pred / "stranger.nii.gz", scan(), AFFINE)
    (truth / "forgotten").mkdir()
    write_nifti(truth / "forgotten" / "ct.nii.gz", scan(), AFFINE)
    write_nifti(truth / "1PA001" / "mask.nii.gz", np.zeros(SHAPE, np.uint8), AFFINE)
    write_nifti(pred / "1PB002.nii.gz", scan()[::2], AFFINE)
    scores = score_pairs(find_translated(pred, truth, "{case}/ct.nii.gz", "{case}/mask.nii.gz"), score_translated)
    reasons = {score.case: score.reason for score in scores}
    assert list(reasons) == ["1PA001", "1PB002", "forgotten", "stranger"]
    assert "mask.nii.gz: is 0 everywhere" in reasons["1PA001"]
    assert "expected volumes of one shape, found the true image 24×28×20, 1PB002.nii.gz 12×28×20" in reasons["1PB002"]
    assert "no synthesised image of it" in reasons["forgotten"]
    assert f"expected its true image stranger/ct.nii.gz in {truth}, found none" in reasons["stranger"]
    (truth / "1PA001" / "mask.nii.gz").unlink()
    assert (
        "cannot be read"
        in score_pairs(find_translated(pred, truth, "{case}/ct.nii.gz", "{case}/mask.nii.gz"), score_translated)[
            0
        ].reason
    )


def test_folders_and_patterns_that_cannot_be_used(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pred, truth = folders
    for arguments, said in (
        ((truth, truth, "{case}/ct.nii.gz"), "no image in"),
        ((tmp_path / "none", truth, "{case}/ct.nii.gz"), "does not exist"),
        ((pred, tmp_path / "none", "{case}/ct.nii.gz"), "does not exist"),
        ((pred, truth, "{case}/pet.nii.gz"), "no file like"),
        ((pred, truth, "ct.nii.gz"), "put {case}"),
    ):
        with pytest.raises(InputError, match=said):
            find_translated(*arguments)
    with pytest.raises(SettingsError, match="must be a path inside the data folder"):
        find_translated(pred, truth, "../{case}/ct.nii.gz")


def cwdm(*arguments: object) -> tuple[int, str, BaseException | None]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output, result.exception


def test_through_the_command_line(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pred, truth = folders
    files = ("--truth-file", "{case}/ct.nii.gz", "--mask-file", "{case}/mask.nii.gz")
    command = ("evaluate", pred, truth, *files, "--out", tmp_path / "out")
    code, said, _ = cwdm(*command, "--range", -1024, 3000)
    assert code == 0, said
    assert "MAE (the target's unit)" in said
    assert "1PA00" in said
    assert "1PA001-" not in said
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    pairs = find_translated(pred, truth, *files[1::2])
    metrics = [score_translated(pair, RANGE).metrics for pair in pairs]
    assert [image["figures"] for image in content["images"]] == metrics
    assert (content["truth_file"], content["range"]) == ("{case}/ct.nii.gz", [-1024, 3000])
    assert content["summary"]["all"]["target_mae"]["mean"] == pytest.approx(np.mean([f["target_mae"] for f in metrics]))
    rows = list(csv.DictReader((tmp_path / "out" / "evaluation.csv").open()))
    assert [float(row["target_ssim"]) for row in rows] == [f["target_ssim"] for f in metrics]
    assert "2 of them from before" in cwdm(*command, "--range", -1024, 3000)[1]
    assert "from before" not in cwdm(*command, "--range", -1000, 2000)[1]


def test_options_that_do_not_go_together(folders: tuple[Path, Path]) -> None:
    pred, truth = folders
    files = ("--truth-file", "{case}/ct.nii.gz")
    for options, said in (
        ((*files, "--seg", truth), "excludes --seg"),
        ((*files, "--labels", "2020"), "excludes --seg"),
        (("--range", 0, 1), "add --truth-file"),
        (("--mask-file", "{case}.nii.gz"), "add --truth-file"),
        ((*files, "--range", 3, 1), "two rising numbers, found 3 1"),
        ((*files, "--range", 0, "inf"), "two rising numbers"),
    ):
        _, _, error = cwdm("evaluate", pred, truth, *options)
        assert isinstance(error, SettingsError), options
        assert said in str(error)
    _, _, error = cwdm("evaluate", pred, truth)
    assert "--truth-file" in str(error)
    _, _, error = cwdm("evaluate", pred, truth, *files, "--out", truth / "scores")
    assert isinstance(error, InputError)


def test_an_image_without_a_modality_has_its_case_for_a_name() -> None:
    assert (Score("a", "").name, Score("a", "t1n").name) == ("a", "a-t1n")
    assert Pair("a", "", Path("a.nii.gz")).seg is None
