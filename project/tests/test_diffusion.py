import numpy as np
import pytest
import torch
from support import golden, golden_model

from cwdm.diffusion import SCHEDULES, add_noise, subband_losses
from cwdm.images.cases import MODALITIES


@pytest.mark.parametrize("name", golden("loss.json"))
@torch.inference_mode()
def test_golden_training_loss(name: str) -> None:
    run = golden("loss.json")[name]
    shape = (1, 4, *run["volume_shape"])
    volumes = torch.from_numpy(np.random.RandomState(run["seed"]).random_sample(shape).astype(np.float32))
    torch.manual_seed(run["seed"])
    noise = torch.randn(1, 1, *run["volume_shape"])
    target = MODALITIES.index(run["target"])
    conditions = volumes[:, [i for i in range(4) if i != target]]
    losses = subband_losses(golden_model(run), volumes[:, [target]], conditions, torch.tensor([run["timestep"]]), noise)
    np.testing.assert_allclose(losses[0].numpy(), run["mse_per_subband"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "their_name"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_schedule_against_diffusers(name: str, their_name: str) -> None:
    from diffusers import DDPMScheduler

    schedule = SCHEDULES[name]
    theirs = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule=their_name)
    torch.testing.assert_close(schedule.alpha_bars.float(), theirs.alphas_cumprod, atol=1e-6, rtol=1e-5)
    x0, noise, t = torch.randn(3, 8, 4, 4, 2), torch.randn(3, 8, 4, 4, 2), torch.tensor([0, 500, 999])
    torch.testing.assert_close(add_noise(x0, noise, t, schedule), theirs.add_noise(x0, noise, t), atol=1e-5, rtol=1e-4)
