"""Flow matching: source, path and loss against their formulas, a pipeline from file to image."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cwdm import Pipeline, checkpoint
from cwdm.checkpoint import ANY, Record
from cwdm.errors import SettingsError, WeightsError
from cwdm.flow import flow_losses, source
from cwdm.settings import load_settings
from cwdm.unet import UNet, UNetConfig
from cwdm.wavelet import dwt

CONFIG = UNetConfig(40, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, norm="voxel", targets=4)
RECORD = Record(modality=ANY, objective="flow", sampler="euler", steps=1)


def conditions() -> torch.Tensor:
    volumes = torch.rand(1, 4, 8, 12, 4, generator=torch.Generator().manual_seed(1))
    volumes[:, 1] = 0  # what is missing
    return volumes


def test_the_source_is_the_mean_of_what_is_given() -> None:
    given = dwt(conditions())
    expected = dwt(conditions()[:, [0, 2, 3]].mean(1, keepdim=True))
    torch.testing.assert_close(source(given), expected)
    assert not source(torch.zeros_like(given)).any()


def test_the_loss_is_that_of_the_velocity_beside_the_path() -> None:
    generator = torch.Generator().manual_seed(0)
    volume, noise = (f(1, 1, 8, 12, 4, generator=generator) for f in (torch.rand, torch.randn))
    t, seen = torch.tensor([300.0]), []
    constant = torch.randn(1, 8, 4, 6, 2, generator=generator)

    def model(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        seen.append((x, time))
        return constant

    losses = flow_losses(model, volume, conditions(), t, noise)
    given, x_1, plain = dwt(conditions()), dwt(volume), dwt(noise, lll_divisor=1.0)
    x_s = given.unflatten(1, (4, 8)).sum(1) / 3
    x_t = 0.7 * x_s + 0.3 * x_1 + 0.5 * (0.3 * 0.7) ** 0.5 * plain
    torch.testing.assert_close(seen[0][0], torch.cat((x_t, given), 1))
    assert torch.equal(seen[0][1], t)
    torch.testing.assert_close(losses, (constant - (x_1 - x_s)).square().mean((2, 3, 4)))
    exact = flow_losses(lambda *_: x_1 - x_s, volume, conditions(), t, noise)
    assert exact.max() < 1e-10


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = UNet(CONFIG).requires_grad_(False)
    model.head.conv.weight.normal_(std=0.02)
    path = tmp_path / "any.safetensors"
    checkpoint.save(path, model, RECORD)
    return path


def test_a_pipeline_follows_the_flow_in_the_steps_that_it_is_told(weights: Path) -> None:
    made = Pipeline.load(weights, "t1c", device="cpu")
    x, told = made.encode(conditions()), []
    found = made.sample(x, seeds=[1, 2], callback=lambda step, total, _: told.append((step, total)))
    assert told == [(1, 1)] * 2
    assert torch.equal(found[0], found[1])  # no noise
    with torch.inference_mode():
        velocity = made.checkpoint.model(torch.cat((source(x), x), 1), torch.tensor([0]), torch.tensor([1]))
    expected = made.decode(source(x) + velocity).clamp(0, 1)
    torch.testing.assert_close(made.decode(found[:1]), expected, atol=1e-5, rtol=0)
    steps = Pipeline.load(weights, "t1c", load_settings(None, ["sampler.name=heun", "sampler.steps=2"]), "cpu")
    assert (steps.timesteps, steps.sampler_name) == ((0, 500), "heun")
    assert not torch.allclose(steps.sample(x), found[:1])
    with pytest.raises(ValueError, match="trained by flow makes samples"):
        made.predict(x)


@pytest.mark.parametrize(
    ("told", "match"),
    [
        ("sampler.name=dpmpp", "sampler dpmpp: weights that were trained by flow take euler, heun"),
        ("sampler.preset=mean", "sampler mean: weights that were trained by flow take euler, heun"),
        ("sampler.timesteps=[3,2]", "steps instead of timesteps"),
        ("samples=2", "one image, so that there is nothing to average"),
    ],
)
def test_settings_that_no_flow_can_follow_are_refused(weights: Path, told: str, match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        Pipeline.load(weights, "t1c", load_settings(None, [told]), "cpu")


def test_diffusion_takes_no_sampler_of_flows(weights_folder: Path) -> None:
    with pytest.raises(SettingsError, match="trained by diffusion take ddpm, ddim, dpmpp, mean, texture"):
        Pipeline.load(weights_folder, "t1c", load_settings(None, ["sampler.name=heun"]), "cpu")


def test_a_flow_needs_conditions_and_no_regression(tmp_path: Path) -> None:
    path = tmp_path / "any.safetensors"
    for config in (replace(CONFIG, regression=True), replace(CONFIG, in_channels=8)):
        checkpoint.save(path, UNet(config), RECORD)
        with pytest.raises(WeightsError, match="a flow starts at conditions, and has no regression"):
            checkpoint.load(path)
