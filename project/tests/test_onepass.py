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
from cwdm.onepass import OnePassUNet, Prediction, Prior, voxel_std
from cwdm.settings import load_settings
from cwdm.training.losses import one_pass_losses, structure_loss
from cwdm.unet import UNetConfig
from cwdm.wavelet import dwt, idwt

CONFIG = UNetConfig(40, 16, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, norm="voxel", targets=4, given=4)
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


def examples(noise: torch.Tensor, joint: torch.Tensor, mean: torch.Tensor, targets=(0, 1, 2, 3)):
    """Voxels of four images' coefficients with a mean and the covariance joint jointᵀ."""
    values = (joint @ noise.flatten(1)).unflatten(1, noise.shape[1:]) + mean[:, None, None, None]
    inside = torch.ones(noise.shape[1:], dtype=torch.bool)
    return [(values, values[8 * target : 8 * target + 8], inside, target) for target in targets]


@torch.no_grad()
def test_the_prior_is_the_conditional_normal_for_every_set_of_images() -> None:
    torch.manual_seed(0)
    joint, mean = torch.randn(32, 32) / 32**0.5 + 0.5 * torch.eye(32), torch.rand(32) + 0.5
    joint[::8] *= 10  # as LLL is much larger than the other bands
    prior = Prior(4)
    # Some with everything, some without an image, which says nothing of what that is like.
    whole, without = (examples(torch.randn(32, *size), joint, mean) for size in ((40, 40, 40), (20, 30, 30)))
    hidden = [bits(0b1111 - (1 << (target + 1) % 4))[:, None, None, None] for target in range(4)]
    prior.fit([*whole, *((given * shown, *rest) for shown, (given, *rest) in zip(hidden, without, strict=True))])
    covariance = (joint @ joint.T).double()
    x = examples(torch.randn(32, 4, 3, 2), joint, mean)[0][0][None]
    for target, given in PATTERNS:
        shown = torch.tensor(given).repeat_interleave(8)
        own = slice(8 * target, 8 * target + 8)
        weight = covariance[own][:, shown] @ torch.linalg.inv(covariance[shown][:, shown])
        left = covariance[own, own] - weight @ covariance[shown][:, own]
        seen = x[0].flatten(1)[shown].double() - mean[shown, None]
        expected = (weight @ seen + mean[own, None]).unflatten(1, (4, 3, 2))
        flags, number = torch.tensor([given]), torch.tensor([target])
        found, deviation = prior(x * shown[:, None, None, None], flags, number)
        true_deviation = left.diagonal().sqrt().float()
        assert ((found[0] - expected).abs().mean((1, 2, 3)) < 0.08 * true_deviation).all(), (target, given)
        torch.testing.assert_close(deviation.flatten(), true_deviation, rtol=0.03, atol=0)


@torch.no_grad()
def test_a_prior_with_products_knows_curves() -> None:
    torch.manual_seed(0)
    volumes = torch.rand(1, 4, 24, 20, 16)
    a, b, c = volumes[:, :1], volumes[:, 2:3], volumes[:, 3:]
    wanted = dwt(0.5 * a * b - 0.3 * a.square() + 0.2 * b + 0.1)
    shown = torch.cat((a, torch.zeros_like(a), b, c), dim=1)
    inside = torch.ones(12, 10, 8, dtype=torch.bool)
    given, target = torch.tensor([[True, False, True, True]]), torch.tensor([1])
    linear, curved = Prior(4), Prior(4, products=True)
    for prior in (linear, curved):
        torch.testing.assert_close(prior(dwt(shown), given, target)[0], Prior(4)(dwt(shown), given, target)[0])
        prior.fit([(dwt(shown)[0], wanted[0], inside, 1)])
    found, deviation = curved(dwt(shown), given, target)
    assert (found - wanted).square().mean() < 0.02 * (linear(dwt(shown), given, target)[0] - wanted).square().mean()
    assert (deviation < linear(dwt(shown), given, target)[1]).all()
    # Without b, nothing of what it had a part in is left.
    without = dwt(torch.cat((a, torch.zeros_like(a), torch.zeros_like(b), c), dim=1))
    fewer = torch.tensor([[True, False, False, True]])
    both = curved(torch.cat((dwt(shown), without)), torch.cat((given, fewer)), target.repeat(2))[0]
    torch.testing.assert_close(both[:1], found)
    torch.testing.assert_close(both[1:], curved(without, fewer, target)[0])
    assert (both[1:] - wanted).square().mean() > 2 * (found - wanted).square().mean()
    with pytest.raises(ValueError, match="products belong to the prior"):
        UNetConfig(32, products=True)


@torch.no_grad()
def test_a_prior_of_few_alike_voxels_stays_small() -> None:
    """Fewer voxels than weights, one image the copy of another: what is not determined is not made up."""
    torch.manual_seed(0)
    joint = torch.eye(32)
    joint[8:16] = joint[:8]
    shown = examples(torch.randn(32, 5, 2, 2), joint, torch.rand(32), targets=(0, 1, 3))
    prior = Prior(4)
    prior.fit(shown)
    assert all(parameter.isfinite().all() for parameter in prior.parameters())
    assert prior.weight.abs().max() < 5
    assert prior.deviation.min() >= 1e-4
    both = 0b0110  # of image 0 and 3, by its copy and another; by its copy alone
    for number in (both, 0b0010):
        found = prior(
            shown[0][0][None] * bits(number)[:, None, None, None], bits(number)[None, ::8] > 0, torch.tensor([0])
        )
        torch.testing.assert_close(found[0][0], shown[0][1], atol=0.1, rtol=0)
    torch.testing.assert_close(prior.weight[2], Prior(4).weight[2])  # of which there were no examples


def bits(number: int) -> torch.Tensor:
    return torch.tensor([number >> i & 1 for i in range(4)]).repeat_interleave(8)


@torch.no_grad()
def test_a_new_network_predicts_the_prior_and_the_first_prior_is_a_mean(network: OnePassUNet) -> None:
    x, given, target = dwt(conditions()), torch.tensor([[True, False, True, True]]), torch.tensor([1])
    found = new_network(CONFIG)(x, given, target)
    torch.testing.assert_close(found.mean, x.unflatten(1, (4, 8)).sum(1) / 3)
    assert (found.variance == 1).all()
    found = network(x, given, target)
    expected, deviation = network.prior(x, given, target)
    assert (found.mean - expected).abs().max() > 0.01
    assert not found.mean[:, :, 0].any()  # background
    assert torch.equal(found.deviation, deviation)
    for other in (network(x, ~given, target), network(x, given, torch.tensor([0]))):
        assert not torch.equal(other.log_ratio, found.log_ratio)
    with pytest.raises(ValueError, match=r"expected \(B, 32, X, Y, Z\) with X, Y, Z multiples of 2"):
        network(x[:, :24], given, target)


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
