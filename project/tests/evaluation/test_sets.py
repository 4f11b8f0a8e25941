"""FID and MS-SSIM against MONAI, SciPy and their formulas; MedicalNet against MONAI's ResNet; folders and bad files."""

import json
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.metrics.fid import get_fid_score
from monai.networks.nets import resnet50
from nibabel import orientations
from scipy.linalg import sqrtm
from scipy.ndimage import convolve1d, zoom
from scipy.stats import ortho_group
from typer.testing import CliRunner

from cwdm.cli.app import app
from cwdm.errors import InputError, WeightsError
from cwdm.evaluation.medicalnet import features_of, load_medicalnet
from cwdm.evaluation.sets import (
    ENOUGH,
    draw_pairs,
    evaluate_generated,
    frechet_distance,
    image_files,
    ms_ssim,
    onto_grid,
    to_unit,
)
from cwdm.images import write_nifti

AFFINE = np.array([[-1.0, 0, 0, 3], [0, 1.1, 0, 5], [0, 0, 0.9, -7], [0, 0, 0, 1]])
SHAPE = (20, 18, 16)


def samples(seed: int, count: int, features: int) -> np.ndarray:
    random = np.random.RandomState(seed)
    return random.standard_normal((count, features)) @ random.standard_normal((features, features)) + seed % 5


def test_frechet_distance_against_scipy_and_monai() -> None:
    a, b = samples(1, 60, 12), samples(2, 50, 12)
    one, other = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    shift = np.square(a.mean(0) - b.mean(0)).sum()
    expected = shift + np.trace(one + other - 2 * sqrtm(one @ other).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI passes SciPy an argument that is going away
        monai = get_fid_score(torch.from_numpy(a), torch.from_numpy(b)).item()
    assert frechet_distance(a, b) == pytest.approx(monai, rel=1e-9)


def test_frechet_distance_of_fewer_samples_than_features() -> None:
    """Covariances without full rank, against square roots taken one after the other."""
    a, b = samples(1, 7, 40), samples(2, 9, 40)

    def root(matrix: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T

    one, other = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = root(root(one) @ other @ root(one))
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(one) + np.trace(other) - 2 * np.trace(cross)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@given(st.integers(0, 2**31), st.integers(2, 30), st.integers(2, 30), st.integers(2, 15))
def test_laws_of_the_frechet_distance(seed: int, n: int, m: int, features: int) -> None:
    a, b = samples(seed, n, features), samples(seed + 1, m, features)
    distance = frechet_distance(a, b)
    scale = float(np.square(a).sum() + np.square(b).sum())
    assert frechet_distance(b, a) == pytest.approx(distance, abs=1e-9 * scale)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9 * scale)
    turned = ortho_group.rvs(features, random_state=seed % 2**31)
    assert frechet_distance(a @ turned + 1, b @ turned + 1) == pytest.approx(distance, abs=1e-8 * (scale + features))
    assert frechet_distance(a, a + 2) == pytest.approx(4 * features, abs=1e-9 * (scale + features))


def test_frechet_distance_refuses() -> None:
    good = samples(0, 5, 3)
    for bad, said in ((good[:1], "at least 2 samples"), (good[:, :2], "expected features"), (good * np.nan, "NaN")):
        with pytest.raises(ValueError, match=said):
            frechet_distance(good, bad)


def smooth_noise(seed: int, shape: tuple[int, int, int]) -> np.ndarray:
    coarse = np.random.RandomState(seed).random_sample([n // 8 for n in shape])
    return np.clip(zoom(coarse, 8, order=1), 0, 1).astype(np.float32)


def test_ms_ssim_against_its_formula() -> None:
    shape = (112, 120, 112)
    a, b = smooth_noise(0, shape), smooth_noise(1, shape)
    offsets = np.arange(-3, 4)
    kernel = np.exp(-((offsets / 1.5) ** 2) / 2)
    kernel /= kernel.sum()

    def smooth(volume: np.ndarray) -> np.ndarray:
        for axis in range(3):
            volume = convolve1d(volume, kernel, axis)
        return volume[3:-3, 3:-3, 3:-3]

    def halve(volume: np.ndarray) -> np.ndarray:
        volume = volume[tuple(slice(n // 2 * 2) for n in volume.shape)]
        return sum(volume[i::2, j::2, k::2] for i in (0, 1) for j in (0, 1) for k in (0, 1)) / 8

    x, y, product = a.astype(np.float64), b.astype(np.float64), 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        mx, my = smooth(x), smooth(y)
        contrast = (2 * (smooth(x * y) - mx * my) + 0.03**2) / (smooth(x * x) - mx**2 + smooth(y * y) - my**2 + 0.03**2)
        luminance = (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2)
        product *= max((contrast * luminance if scale == 4 else contrast).mean(), 0) ** weight
        x, y = halve(x), halve(y)
    assert ms_ssim(a, b) == pytest.approx(product, abs=1e-4)
    assert ms_ssim(b, a) == pytest.approx(product, abs=1e-4)
    assert ms_ssim(a, a) == pytest.approx(1, abs=1e-5)


def test_ms_ssim_refuses() -> None:
    with pytest.raises(ValueError, match="larger than"):
        ms_ssim(np.zeros((112, 112, 100), np.float32), np.zeros((112, 112, 100), np.float32))
    with pytest.raises(ValueError, match="one shape"):
        ms_ssim(np.zeros((112, 112, 112), np.float32), np.zeros((112, 112, 113), np.float32))


@pytest.mark.parametrize(("count", "most"), [(2, 5), (6, 15), (6, 14), (50, 100)])
def test_pairs(count: int, most: int) -> None:
    pairs = draw_pairs(count, most, 3)
    assert len(pairs) == len(set(pairs)) == min(most, count * (count - 1) // 2)
    assert all(0 <= i < j < count for i, j in pairs)
    assert pairs == sorted(pairs) == draw_pairs(count, most, 3)


def test_a_brats_volume_as_wdm_prepares_it() -> None:
    volume = np.random.RandomState(0).random_sample((240, 240, 155)).astype(np.float32)
    padded = torch.zeros(1, 1, 256, 256, 256)
    padded[0, 0, 8:-8, 8:-8, 50:-51] = torch.from_numpy(volume)
    assert np.array_equal(onto_grid(volume, (256, 256, 256)), padded[0, 0])
    halved = torch.nn.functional.avg_pool3d(padded, 2)[0, 0].numpy()
    assert np.allclose(onto_grid(volume, (128, 128, 128)), halved, atol=1e-6)
    with pytest.raises(ValueError, match="at most 4 times"):
        onto_grid(volume, (32, 32, 32))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """MONAI's ResNet-50 with MedicalNet's dilations, and a file of its weights as MedicalNet publishes them."""
    torch.manual_seed(0)
    network = resnet50(spatial_dims=3, n_input_channels=1, conv1_t_stride=2, feed_forward=False, bias_downsample=False)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    for stage, dilation in ((network.layer3, 2), (network.layer4, 4)):
        for block in stage:
            block.conv2.stride, block.conv2.dilation, block.conv2.padding = (1,) * 3, (dilation,) * 3, (dilation,) * 3
        stage[0].downsample[0].stride = (1,) * 3
    path = tmp_path_factory.mktemp("medicalnet") / "resnet_50_23dataset.pth"
    state = {
        f"module.{name}": value for name, value in network.state_dict().items() if not name.endswith("batches_tracked")
    }
    torch.save({"state_dict": state}, path)
    return path, network.eval()


def test_medicalnet_against_monai(published: tuple[Path, torch.nn.Module]) -> None:
    path, reference = published
    volume = np.random.RandomState(0).random_sample((40, 33, 36)).astype(np.float32)
    features = features_of(load_medicalnet(path), volume)
    with torch.inference_mode():
        expected = reference(torch.from_numpy(volume)[None, None])[0].numpy()
    assert features.shape == (ENOUGH - 1,)
    assert expected.std() > 0
    assert np.abs(features - expected).max() < 1e-4 * np.abs(expected).max()


def test_weights_that_are_not_medicalnets(published: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    path, _ = published
    state = torch.load(path, weights_only=True)["state_dict"]
    cases = {
        "code": ({"state_dict": {"module.conv1.weight": InputError}}, "cannot be read as weights"),
        "missing": ({"state_dict": {"module.conv1.weight": state["module.conv1.weight"]}}, "tensors missing"),
        "extra": ({"state_dict": state | {"module.fc.weight": torch.zeros(1)}}, "1 left over"),
        "shape": ({"state_dict": {"module.conv1.weight": torch.zeros(3)}}, "size mismatch"),
        "list": ([1, 2], "a dictionary of tensors"),
    }
    for name, (content, said) in cases.items():
        file = tmp_path / name
        torch.save(content, file)
        with pytest.raises(WeightsError, match=said):
            load_medicalnet(file)
        file.unlink()
    for file in (tmp_path / "absent", tmp_path / "text"):
        (tmp_path / "text").write_text("no weights")
        with pytest.raises(WeightsError, match="cannot be read"):
            load_medicalnet(file)


def write_set(folder: Path, seeds: range, shape: tuple[int, int, int] = SHAPE, scale: float = 1) -> Path:
    folder.mkdir()
    for seed in seeds:
        volume = scale * np.random.RandomState(seed).random_sample(shape).astype("f4")
        write_nifti(folder / f"{seed}.nii.gz", volume, AFFINE)
    return folder


def test_folders(published: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    generated, real = (
        write_set(tmp_path / "generated", range(3)),
        write_set(tmp_path / "real", range(10, 14), scale=900),
    )
    (generated / "samples.json").write_text("{}")
    (generated / "1.nii.gz").write_text("damaged")
    score = evaluate_generated(generated, real, published[0])
    network = load_medicalnet(published[0])

    def volume(seed: int) -> np.ndarray:
        volume = np.random.RandomState(seed).random_sample(SHAPE).astype("f4")
        if seed < 10:  # generated: in [0, 1], taken as it is
            return volume
        low, high = np.quantile(volume, [0.001, 0.999])
        return ((np.clip(volume, low, high) - low) / (high - low)).astype("f4")

    sets = [np.stack([features_of(network, volume(seed)) for seed in seeds]) for seeds in ((0, 2), range(10, 14))]
    assert score.fid == pytest.approx(frechet_distance(*sets), rel=1e-3)
    assert (score.generated, score.real, score.ms_ssim) == (2, 4, None)
    assert "biased upwards" in score.notes[0]
    assert "no MS-SSIM: it needs 112" in score.notes[1]
    assert list(score.failed) == [str(generated / "1.nii.gz")]


@pytest.mark.parametrize("oriented", [True, False])
def test_sets_are_compared_in_the_voxel_order_of_the_real_one(
    oriented: bool, published: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    """The same volumes, stored with another axis first and another one reversed."""
    real, generated = write_set(tmp_path / "real", range(4)), tmp_path / "generated"
    generated.mkdir()
    for path in real.iterdir():
        turn = orientations.ornt_transform(orientations.io_orientation(AFFINE), orientations.axcodes2ornt("PRS"))
        turned = nib.load(path).as_reoriented(turn)
        write_nifti(generated / path.name, np.asarray(turned.dataobj), turned.affine, oriented=oriented)
    assert nib.load(generated / "0.nii.gz").shape != SHAPE
    fid = evaluate_generated(generated, real, published[0]).fid
    assert fid is not None
    assert (fid < 1e-6) == oriented


def test_intensities() -> None:
    unit = np.linspace(-0.1, 1.2, 60, dtype=np.float32).reshape(3, 4, 5)
    assert np.array_equal(to_unit(unit), np.clip(unit, 0, 1))
    scanner = to_unit(unit * 1000)
    assert (scanner.min(), scanner.max()) == (0, 1)
    for constant in (0, 0.5, 700, 3):
        with pytest.raises(ValueError, match="every voxel is"):
            to_unit(np.full((3, 4, 5), constant, np.float32))


def test_too_few_or_none(tmp_path: Path) -> None:
    generated, real = write_set(tmp_path / "generated", range(1)), write_set(tmp_path / "real", range(2))
    with pytest.raises(InputError, match="at least 2 usable volumes, found 1"):
        evaluate_generated(generated, real)
    with pytest.raises(InputError, match="does not exist"):
        evaluate_generated(tmp_path / "none", real)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no case found"):
        evaluate_generated(tmp_path / "empty", real)


def test_case_folders(phantoms: Path) -> None:
    names = sorted(path.name for path in phantoms.iterdir())
    assert [path.name for path in image_files(phantoms, "t2f")] == [f"{name}-t2f.nii.gz" for name in names]


def test_command(tmp_path: Path) -> None:
    shape = (112, 112, 112)
    generated, real = write_set(tmp_path / "generated", range(3), shape), write_set(tmp_path / "real", range(2), shape)
    arguments = ["evaluate-samples", str(generated), str(real), "--pairs", "2", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "samples-evaluation.json").read_text())
    assert record["fid"] is None
    assert record["pairs"] == 2
    assert 0 < record["ms_ssim"] < 1
    assert "2 of 3 pairs" in " ".join(record["notes"])
    (generated / "0.nii.gz").write_text("damaged")
    assert CliRunner().invoke(app, arguments).exit_code == 1
