import pytest
import torch

from cwdm.diffusion import PUBLISHED
from cwdm.training.priors import fit_regression
from cwdm.unet import UNet, UNetConfig

VOXEL = {"model_channels": 8, "channel_mult": (1, 2), "norm": "voxel"}


@torch.inference_mode()
def test_regression_is_bayes_rule_for_a_linear_gaussian_model() -> None:
    """A network whose head is still zero gives the mean that follows from the joint covariance, voxel by voxel."""
    torch.manual_seed(0)
    model = UNet(UNetConfig(in_channels=32, targets=4, regression=True, **VOXEL))
    for parameter in model.regression.parameters():
        parameter.copy_(torch.rand_like(parameter) + 0.1)
    x, targets, t = torch.randn(3, 32, 4, 6, 2), torch.tensor([1, 3, 0]), torch.tensor([999, 400, 3])
    x[:, 8:, 0] = 0  # outside the head
    weight, bias, deviation = (p[targets].double() for p in list(model.regression.parameters())[:3])
    expected = torch.einsum("boi,bixyz->boxyz", weight, x[:, 8:].double()) + bias[..., None, None, None]
    expected[:, :, 0] = 0
    alpha_bar = PUBLISHED.alpha_bars[t][:, None]
    # Of x_0 and x_t = sqrt(alpha_bar) x_0 + noise: covariance, variance of x_t.
    covariance, variance = alpha_bar.sqrt() * deviation**2, alpha_bar * deviation**2 + 1 - alpha_bar
    news = x[:, :8].double() - (alpha_bar.sqrt()[..., None] * expected.flatten(2)).unflatten(2, (4, 6, 2))
    mean = expected + (covariance / variance)[..., None, None, None] * news
    torch.testing.assert_close(model(x, t, targets), mean.float(), rtol=1e-4, atol=1e-4)

    network_input, _, left = model.regression(x, t, targets)
    torch.testing.assert_close(left.flatten(1), (deviation**2 - covariance**2 / variance).sqrt().float())
    torch.testing.assert_close(network_input[:, 8:] * model.regression.magnitude[:, None, None, None], x[:, 8:])
    torch.testing.assert_close(
        network_input[:, :8] * deviation[..., None, None, None].float(), (mean - expected).float(), rtol=1e-4, atol=1e-4
    )


@torch.inference_mode()
def test_regression_starts_as_the_mean_of_the_conditions() -> None:
    model = UNet(UNetConfig(in_channels=32, targets=4, regression=True, **VOXEL))
    x, targets, t = torch.randn(2, 32, 4, 4, 4), torch.tensor([1, 3]), torch.tensor([999, 999])
    assert (model(x, t, targets) - x[:, 8:].unflatten(1, (3, 8)).mean(1)).abs().max() < 0.05


def test_regression_needs_conditions() -> None:
    with pytest.raises(ValueError, match="conditions"):
        UNetConfig(in_channels=8, regression=True)


@torch.inference_mode()
def test_regression_fit_finds_a_linear_map_and_its_errors() -> None:
    config = UNetConfig(in_channels=40, targets=4, regression=True, **VOXEL)
    torch.manual_seed(0)
    truth = torch.randn(4, 8, 33)
    spread = torch.rand(4, 8) + 0.5
    magnitude = torch.rand(32) + 0.5
    for target in range(4):
        truth[target, :, 8 * target : 8 * target + 8] = 0  # the target itself is no condition
    examples = []
    for target in (0, 1, 2, 3, 2):
        conditions = torch.randn(32, 26, 15, 24) * magnitude[:, None, None, None]
        conditions[8 * target : 8 * target + 8] = 0
        conditions[:, :2] = 0  # background, where the constant must not be learned from
        wanted = (
            torch.einsum("oi,ixyz->oxyz", truth[target, :, :32], conditions) + truth[target, :, 32, None, None, None]
        )
        wanted += torch.randn(wanted.shape) * spread[target, :, None, None, None]
        inside = conditions.any(0)
        examples.append((conditions, wanted * inside, inside, target))
    model = UNet(config)
    fit_regression(model.regression, examples)
    torch.testing.assert_close(model.regression.weight, truth[..., :32], rtol=0.1, atol=0.1)
    torch.testing.assert_close(model.regression.bias, truth[..., 32], rtol=0.1, atol=0.1)
    torch.testing.assert_close(model.regression.deviation, spread, rtol=0.05, atol=0)
    torch.testing.assert_close(model.regression.magnitude, magnitude, rtol=0.05, atol=0)


@torch.inference_mode()
def test_regression_fit_of_exact_or_absent_examples_stays_finite() -> None:
    model = UNet(UNetConfig(in_channels=16, targets=2, regression=True, **VOXEL))
    conditions = torch.randn(8, 6, 5, 4)
    conditions[3] = 0
    fit_regression(model.regression, [(conditions, 2 * conditions, torch.ones(6, 5, 4, dtype=torch.bool), 1)])
    assert all(parameter.isfinite().all() for parameter in model.regression.parameters())
    torch.testing.assert_close(model.regression.deviation[0], torch.ones(8))
    assert 0 < model.regression.deviation[1].min() <= model.regression.deviation[1].max() < 0.01
    assert model.regression.magnitude[3] == 1
