"""One pass: prior and standard deviations against closed forms, losses against PyTorch's and scikit-image's."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from cwdm import Pipeline, checkpoint
from cwdm.checkpoint import ANY, Record, new_network
from cwdm.errors import SettingsError, WeightsError
from cwdm.onepass import OnePassUNet, Prediction, Prior, voxel_std, with_gains
from cwdm.settings import load_settings
from cwdm.training.losses import one_pass_losses, structure_loss
from cwdm.training.priors import fit_prior
from cwdm.unet import UNetConfig
from cwdm.wavelet import BANDS, dwt, idwt

CONFIG = UNetConfig(40, 24, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, norm="voxel", targets=4, given=4)
PATTERNS = [(t, given) for t in range(4) for given in product((False, True), repeat=4) if any(given) and not given[t]]


@pytest.fixture
def network() -> OnePassUNet:
    """A network whose head is not zero any more, with a prior of its own."""
    torch.manual_seed(0)
    model = new_network(CONFIG).eval().requires_grad_(False)
    assert isinstance(model, OnePassUNet)
    model.head.conv.weight.normal_(std=0.05)
    model.prior.weight.mul_(torch.rand_like(model.prior.weight) + 0.5)
    model.prior.deviation.uniform_(0.05, 0.2)
    return model


def conditions(given: tuple[bool, ...] = (True, False, True, True)) -> torch.Tensor:
    """Volumes (1, 4, 8, 12, 4) in [0, 1] with a background, 0 where they are not given."""
    volumes = torch.rand(1, 4, 8, 12, 4, generator=torch.Generator().manual_seed(1))
    volumes[:, :, :2] = 0
    return volumes * torch.tensor(given)[:, None, None, None]


def examples(values: torch.Tensor, targets=(0, 1, 2, 3), shown=0b1111):
    """Images (4, X, Y, Z) of which some are given, a target at a time."""
    coefficients = dwt(values[:, None]).flatten(0, 1)
    inside = torch.ones(coefficients.shape[1:], dtype=torch.bool)
    given = coefficients * bits(shown)[:, None, None, None]
    return [(given, coefficients[8 * target : 8 * target + 8], inside, target) for target in targets]


def drawn(joint: torch.Tensor, mean: torch.Tensor, *size: int) -> torch.Tensor:
    """Images whose voxels have a mean and the covariance joint jointᵀ."""
    return (joint @ torch.randn(len(mean), *size).flatten(1)).unflatten(1, size) + mean[:, None, None, None]


@torch.no_grad()
def test_the_prior_is_the_conditional_normal_for_every_set_of_images() -> None:
    torch.manual_seed(0)
    joint, mean = torch.randn(4, 4) / 4 + 0.5 * torch.eye(4), torch.rand(4) + 0.5
    prior = Prior(4)
    # Some with everything, some without an image, which says nothing of what that is like.
    whole, without = examples(drawn(joint, mean, 40, 40, 40)), drawn(joint, mean, 20, 30, 30)
    fit_prior(prior, [*whole, *(one for k in range(4) for one in examples(without, (k,), 0b1111 - (1 << (k + 1) % 4)))])
    covariance, x = (joint @ joint.T).double(), drawn(joint, mean, 4, 6, 2)[None]
    for target, given in PATTERNS:
        shown = torch.tensor(given)
        weight = covariance[target, shown] @ torch.linalg.inv(covariance[shown][:, shown])
        left = float(covariance[target, target] - weight @ covariance[shown, target]) ** 0.5
        seen = x[0].flatten(1)[shown].double() - mean[shown, None]
        expected = (weight @ seen + mean[target]).unflatten(0, (4, 6, 2))
        flags, number = shown[None], torch.tensor([target])
        found, deviation = prior(x * shown[:, None, None, None], flags, number)
        assert (found[0, 0] - expected).abs().mean() < 0.08 * left, (target, given)
        in_bands = torch.tensor([left / 3] + 7 * [left])  # LLL is divided by 3
        torch.testing.assert_close(deviation.flatten(), in_bands, rtol=0.03, atol=0)


@torch.no_grad()
def test_a_prior_with_products_knows_curves() -> None:
    torch.manual_seed(0)
    volumes = torch.rand(4, 24, 20, 16)
    a, b = volumes[0], volumes[2]
    volumes[1] = 0.5 * a * b - 0.3 * a.square() + 0.2 * b + 0.1
    shown = (volumes * torch.tensor([1, 0, 1, 1])[:, None, None, None])[None]
    given, target = torch.tensor([[True, False, True, True]]), torch.tensor([1])
    linear, curved = Prior(4), Prior(4, products=True)
    for prior in (linear, curved):
        torch.testing.assert_close(prior(shown, given, target)[0][0, 0], shown[0].sum(0) / 3)
        fit_prior(prior, examples(volumes, (1,), 0b1101))
    (found, deviation), (straight, wider) = (prior(shown, given, target) for prior in (curved, linear))
    assert (found - volumes[1]).square().mean() < 0.02 * (straight - volumes[1]).square().mean()
    assert (deviation < wider).all()
    # Without b, nothing of what it had a part in is left.
    without = shown * torch.tensor([1, 1, 0, 1])[:, None, None, None]
    fewer = torch.tensor([[True, False, False, True]])
    both = curved(torch.cat((shown, without)), torch.cat((given, fewer)), target.repeat(2))[0]
    torch.testing.assert_close(both[:1], found)
    torch.testing.assert_close(both[1:], curved(without, fewer, target)[0])
    assert (both[1:] - volumes[1]).square().mean() > 2 * (found - volumes[1]).square().mean()
    with pytest.raises(ValueError, match="products belong to the prior"):
        UNetConfig(32, products=True)


@torch.no_grad()
def test_standard_deviations_are_of_each_band() -> None:
    """Errors that are large along one axis from voxel to voxel, and small in the mean of a block."""
    torch.manual_seed(0)
    volumes, deviation = torch.rand(4, 32, 24, 16), torch.rand(8) / 10 + 0.01
    errors = torch.randn(1, 8, 16, 12, 8) * deviation[:, None, None, None]
    volumes[1] = 0.4 * volumes[0] + 0.3 + idwt(errors)[0, 0]
    prior = Prior(4)
    fit_prior(prior, examples(volumes, (1,), 0b0001))
    given, target = torch.tensor([[True, False, False, False]]), torch.tensor([1])
    found = prior(volumes[None] * torch.tensor([1, 0, 0, 0])[:, None, None, None], given, target)[1]
    torch.testing.assert_close(found.flatten(), deviation, rtol=0.05, atol=0)


@torch.no_grad()
def test_a_prior_of_few_alike_voxels_stays_small() -> None:
    """Fewer voxels than weights, one image the copy of another: what is not determined is not made up."""
    torch.manual_seed(0)
    volumes = torch.rand(4, 4, 2, 2)
    volumes[1] = volumes[0]
    prior = Prior(4, products=True)
    fit_prior(prior, examples(volumes, targets=(0, 1, 3)))
    assert all(parameter.isfinite().all() for parameter in prior.parameters())
    assert prior.weight.abs().max() < 5
    assert prior.deviation.min() >= 1e-4
    for given in ((False, True, False, True), (False, True, False, False)):  # its copy and another; its copy alone
        shown = volumes[None] * torch.tensor(given)[:, None, None, None]
        found = prior(shown, torch.tensor([given]), torch.tensor([0]))[0]
        torch.testing.assert_close(found[0, 0], volumes[0], atol=0.1, rtol=0)
    torch.testing.assert_close(prior.weight[2], Prior(4, products=True).weight[2])  # of which there were no examples


def bits(number: int) -> torch.Tensor:
    return torch.tensor([number >> i & 1 for i in range(4)]).repeat_interleave(8)


@torch.no_grad()
def test_a_new_network_predicts_the_prior_and_the_first_prior_is_a_mean(network: OnePassUNet) -> None:
    x, given, target = dwt(conditions()), torch.tensor([[True, False, True, True]]), torch.tensor([1])
    found = new_network(CONFIG)(x, given, target)
    torch.testing.assert_close(found.mean, x.unflatten(1, (4, 8)).sum(1) / 3)
    assert (found.variance == 1).all()
    found = network(x, given, target)
    expected, deviation = network.prior(conditions(), given, target)
    assert (found.mean - dwt(expected)).abs().max() > 0.01
    assert not found.mean[:, :, 0].any()  # background
    assert torch.equal(found.deviation, deviation)
    for other in (network(x, ~given, target), network(x, given, torch.tensor([0]))):
        assert not torch.equal(other.log_ratio, found.log_ratio)
    with pytest.raises(ValueError, match=r"expected \(B, 32, X, Y, Z\) with X, Y, Z multiples of 2"):
        network(x[:, :24], given, target)


@torch.no_grad()
def test_where_no_image_has_detail_none_is_made_up(network: OnePassUNet) -> None:
    """Whatever the network says: even images of any brightness come out without a pattern of the wavelets' grid."""
    given, target = torch.tensor([[True, False, True, True]]), torch.tensor([1])
    even = torch.tensor([0.9, 0.0, 0.3, 0.7])[:, None, None, None].expand(1, 4, 80, 80, 80)
    network.head.conv.bias.normal_()
    mean = network(dwt(even), given, target).mean
    middle = mean[:, :, 18:-18, 18:-18, 18:-18]  # beyond the reach of the padding at the edges
    assert (middle[:, 0] - dwt(even)[:, ::8].sum(1)[0, 0, 0, 0] / 3).abs().max() > 0.01
    assert middle[:, 1:].abs().max() < 1e-5


@torch.no_grad()
def test_gains_are_of_bands_alike() -> None:
    torch.manual_seed(0)
    coefficients, gains = torch.randn(2, 24, 2, 3, 2), torch.randn(2, 9, 2, 3, 2)
    found = with_gains(coefficients, gains)
    images, high = coefficients.unflatten(1, (3, 8)), [BANDS[band].count("H") for band in range(8)]
    for band in range(1, 8):
        expected = (images[:, :, band] * gains.unflatten(1, (3, 3))[:, :, high[band] - 1]).sum(1)
        torch.testing.assert_close(found[:, band], expected)
    assert not found[:, 0].any()


def test_variances_of_voxels_are_those_of_drawn_coefficients() -> None:
    generator = torch.Generator().manual_seed(0)
    variance = torch.rand(1, 8, 2, 3, 2, generator=generator) ** 2
    drawn = torch.randn(20_000, 8, 2, 3, 2, generator=generator) * variance.sqrt()
    torch.testing.assert_close(voxel_std(variance), idwt(drawn).std(0, keepdim=True), rtol=0.03, atol=0)


def prediction(error: torch.Tensor, log_ratio: torch.Tensor, truth: torch.Tensor, deviation: torch.Tensor):
    """A model that is off by `error` standard deviations of the prior."""
    return lambda *_: Prediction(truth + deviation * error, deviation, log_ratio)


def test_how_bright_a_whole_sample_is_can_count_less() -> None:
    torch.manual_seed(0)
    volumes, given, target = conditions(), torch.tensor([[True, False, True, True]]), torch.tensor([1])
    truth, deviation, log_ratio = dwt(volumes[:, :1]), torch.full((1, 8, 1, 1, 1), 0.1), torch.zeros(1, 8, 4, 6, 2)

    def loss(error: torch.Tensor, brightness: float) -> torch.Tensor:
        model = prediction(error, log_ratio, truth, deviation)
        return one_pass_losses(model, volumes[:, :1], volumes, given, target, brightness=brightness)

    error, brighter = torch.randn(1, 8, 4, 6, 2), torch.zeros(1, 8, 1, 1, 1)
    error[:, 0, 1:] -= error[:, 0, 1:].mean()  # of the voxels that are not background
    brighter[:, 0] = 3
    torch.testing.assert_close(loss(error + brighter, 0.0), loss(error, 1.0))
    torch.testing.assert_close(loss(error + brighter, 0.5), loss(error + brighter / 2, 1.0))


@pytest.mark.parametrize("errors", ["gaussian", "laplace"])
def test_without_beta_the_loss_is_the_likelihood_of_the_brain(errors: str) -> None:
    torch.manual_seed(0)
    volumes, given, target = conditions(), torch.tensor([[True, False, True, True]]), torch.tensor([1])
    truth, deviation = dwt(volumes[:, :1]), torch.rand(1, 8, 1, 1, 1) + 0.1
    error, log_ratio = torch.randn(2, 1, 8, 4, 6, 2)
    model = prediction(error, log_ratio, truth, deviation)
    found = one_pass_losses(model, volumes[:, :1], volumes, given, target, errors, beta=0.0)
    std = (log_ratio / 2).exp()
    normal, laplace = torch.distributions.Normal(0, std), torch.distributions.Laplace(0, std / 2**0.5)
    likelihood = normal.log_prob(error) if errors == "gaussian" else laplace.log_prob(error)
    constant = (
        torch.distributions.Normal(0, 1).log_prob(torch.tensor(0.0)) if errors == "gaussian" else -0.5 * np.log(2)
    )
    expected = (constant - likelihood)[:, :, 1:].sum((2, 3, 4)) / (4 * 6 * 2)  # the first slice is background
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("errors", ["gaussian", "laplace"])
def test_the_best_variance_is_that_of_the_errors_whatever_beta(errors: str, beta: float) -> None:
    torch.manual_seed(0)
    volumes, given, target = conditions(), torch.tensor([[True, False, True, True]]), torch.tensor([1])
    truth, deviation = dwt(volumes[:, :1]), torch.rand(1, 8, 1, 1, 1) + 0.1
    error = torch.randn(1, 8, 4, 6, 2, requires_grad=True)
    inside = error[:, :, 1:].detach()
    best = (
        inside.square().mean((2, 3, 4)).log() if errors == "gaussian" else (2 * inside.abs().mean((2, 3, 4)) ** 2).log()
    )
    log_ratio = best[..., None, None, None].clone().requires_grad_()
    model = prediction(error, log_ratio.expand_as(error), truth, deviation)
    one_pass_losses(model, volumes[:, :1], volumes, given, target, errors, beta).sum().backward()
    assert log_ratio.grad.abs().max() < 1e-6
    if beta == 1:  # the gradient of squared or absolute errors of the voxels, but for a factor
        scale = torch.tensor([3.0] + 7 * [1.0])[:, None, None, None] * deviation
        expected = scale**2 * inside if errors == "gaussian" else scale * inside.sign()
        ratio = error.grad[:, :, 1:] / expected
        torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio.mean())), rtol=1e-4, atol=0)
    assert not error.grad[:, :, 0].any()


def test_the_structure_loss_is_scikit_images_ssim() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 1, 1, 20, 16, 18, generator=generator)
    inside = torch.zeros(1, 1, 10, 8, 9, dtype=torch.bool)
    inside[:, :, 3:6, 3:5, 3:6] = True  # windows that do not reach beyond the volume
    options = {"data_range": 1.0, "win_size": 7, "use_sample_covariance": False, "full": True}
    ssim = structural_similarity(a[0, 0].double().numpy(), b[0, 0].double().numpy(), **options)[1]
    expected = (1 - ssim)[6:12, 6:10, 6:12].sum() / a.numel()
    assert float(structure_loss(a, b, inside)) == pytest.approx(expected, rel=1e-4)
    assert structure_loss(a, a, inside).abs().max() < 1e-6


@pytest.fixture
def weights(network: OnePassUNet, tmp_path: Path) -> Path:
    path = tmp_path / "any.safetensors"
    checkpoint.save(path, network, Record(modality=ANY, objective="one-pass", most_missing=3), torch.float16)
    return path


def test_a_pipeline_predicts_mean_and_std_by_one_evaluation(weights: Path) -> None:
    made = Pipeline.load(weights, "t1c", device="cpu")
    x = made.encode(conditions())
    mean, std = made.predict(x)
    with torch.inference_mode():
        found = made.checkpoint.model(x, torch.tensor([[True, False, True, True]]), torch.tensor([1]))
    torch.testing.assert_close(mean, idwt(found.mean).clamp(0, 1))
    torch.testing.assert_close(std[:, :, 2:], voxel_std(found.variance)[:, :, 2:])
    assert not std[:, :, :2].any()
    assert torch.equal(mean, made.predict(x, [True, False, True, True])[0])
    for changed in (made.predict(x, [True, True, True, True]), replace(made, target=3).predict(x)):
        assert not torch.equal(changed[0], mean)
    assert made.describe()["sampler"] == "one-pass"
    assert made.describe()["timesteps"] == [0]
    half = replace(made, checkpoint=replace(made.checkpoint, model=made.checkpoint.model.to(torch.bfloat16)))
    torch.testing.assert_close(half.predict(x)[0], mean, atol=0.02, rtol=0)


def test_one_pass_makes_no_samples_and_samplers_no_prediction(weights: Path, weights_folder: Path) -> None:
    made = Pipeline.load(weights, "t1c", device="cpu")
    with pytest.raises(ValueError, match="makes no samples"):
        made.sample(made.encode(conditions()))
    with pytest.raises(SettingsError, match=r"samples=2: .* nothing to average"):
        Pipeline.load(weights, "t1c", load_settings(None, ["samples=2"]), "cpu")
    sampling = Pipeline.load(weights_folder, "t1c", device="cpu")
    with pytest.raises(ValueError, match="trained by diffusion"):
        sampling.predict(sampling.encode(conditions()))


def test_weights_say_their_objective_and_others_are_as_they_were(
    weights: Path, network: OnePassUNet, tmp_path: Path
) -> None:
    loaded = checkpoint.load(weights)
    assert isinstance(loaded.model, OnePassUNet)
    assert loaded.record.objective == "one-pass"
    assert "objective" not in Record().model_dump(mode="json")
    for record in (Record(), Record(objective="one-pass", wavelet="db2")):
        checkpoint.save(tmp_path / "wrong.safetensors", network, record)
        with pytest.raises(WeightsError, match=r"the objective diffusion|needs the Haar wavelet"):
            checkpoint.load(tmp_path / "wrong.safetensors")
    newer = Record.model_construct(**{**dict(loaded.record), "objective": "score"})
    checkpoint.save(tmp_path / "newer.safetensors", network, newer)
    with pytest.raises(WeightsError, match=r"newer cwdm .*objective, 'score'.*upgrade"):
        checkpoint.load(tmp_path / "newer.safetensors")


def test_a_calibration_goes_round_and_scales_the_std_alone(weights: Path, network: OnePassUNet, tmp_path: Path) -> None:
    plain = Pipeline.load(weights, "t1c", device="cpu")
    assert "calibration" not in plain.checkpoint.record.model_dump(mode="json")  # so that older versions read the file
    path = tmp_path / "calibrated" / "any.safetensors"
    path.parent.mkdir()
    told = Record(modality=ANY, objective="one-pass", most_missing=3, calibration={"t1c": 1.25, "t2f": 0.5})
    checkpoint.save(path, network, told, torch.float16)
    assert checkpoint.read_record(path) == told
    x = plain.encode(conditions())
    for modality, factor in (("t1c", 1.25), ("t1n", 1.0), ("t2f", 0.5)):
        (mean, std), (same, wide) = (Pipeline.load(p, modality, device="cpu").predict(x) for p in (weights, path))
        torch.testing.assert_close(wide, factor * std)
        assert torch.equal(same, mean)


@pytest.mark.parametrize("factors", [{"t1c": 0.0}, {"t1c": -1.0}, {"t1c": float("inf")}, {"pd": 1.0}])
def test_a_calibration_is_of_known_modalities_and_positive(factors: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="calibration"):
        Record(objective="one-pass", calibration=factors)


def test_weights_of_diffusion_have_no_calibration(weights_folder: Path, tmp_path: Path) -> None:
    loaded = checkpoint.load(weights_folder / "t1ce_gen.pt")
    told = loaded.record.model_copy(update={"calibration": {"t1c": 1.2}})
    checkpoint.save(tmp_path / "t1c.safetensors", loaded.model, told)
    with pytest.raises(WeightsError, match="no standard deviation that could be calibrated"):
        checkpoint.load(tmp_path / "t1c.safetensors")
