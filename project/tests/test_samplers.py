from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import GOLDEN, golden, golden_model

from cwdm.checkpoint import Checkpoint, Record
from cwdm.diffusion import PUBLISHED, SCHEDULES, Schedule
from cwdm.samplers import (
    FLOW_SAMPLERS,
    SAMPLERS,
    SHORTCUTS,
    ddim,
    ddpm,
    dpmpp,
    euler,
    evaluations,
    flow_timesteps,
    heun,
    planned_timesteps,
    posterior_mean,
    spaced_timesteps,
    texture,
)
from cwdm.sampling import clamped_denoiser
from cwdm.wavelet import BANDS, dwt, idwt


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.full if r["steps"] == 1000 else ()) for n, r in golden("ddpm.json").items()],
)
@torch.inference_mode()
def test_golden_sampling_run(name: str) -> None:
    run = golden("ddpm.json")[name]
    size = run["wavelet_shape"]
    condition = None
    if run["task"] == "cwdm":
        volumes = np.random.RandomState(run["seed"]).random_sample((1, 3, *(2 * n for n in size)))
        condition = dwt(torch.from_numpy(volumes.astype(np.float32)))
    record = Record(value_range=tuple(run.get("value_range", (0, 1))))
    denoise = clamped_denoiser(Checkpoint(golden_model(run), record), condition, torch.float32)
    generator = torch.Generator().manual_seed(run["seed"])
    noise = torch.randn(1, 8, *size, generator=generator)
    coefficients = ddpm(denoise, noise, spaced_timesteps(run["steps"]), generator=generator)
    expected = np.load(GOLDEN / f"{name}.npz")
    np.testing.assert_allclose(coefficients.numpy(), expected["coefficients"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(idwt(coefficients).numpy(), expected["volume"], atol=1e-4, rtol=0)


def gaussian_denoiser(mean: float, sd: float, schedule: Schedule = PUBLISHED):
    """The exact denoiser where every x0 is drawn from N(mean, sd²): E[x0 | x_t]."""

    def denoise(x: torch.Tensor, t: int) -> torch.Tensor:
        alpha_bar = float(schedule.alpha_bars[t])
        gain = alpha_bar**0.5 * sd**2 / (alpha_bar * sd**2 + 1 - alpha_bar)
        return mean + gain * (x - alpha_bar**0.5 * mean)

    return denoise


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_gaussian_data_come_out_with_their_mean_and_spread(sampler, schedule: Schedule) -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(100_000, generator=generator, dtype=torch.float64)
    denoise = gaussian_denoiser(2.0, 0.5, schedule)
    x = sampler(denoise, noise, spaced_timesteps(1000), generator=generator, schedule=schedule)
    assert abs(x.mean() - 2.0) < 0.01
    assert abs(x.std() - 0.5) < 0.02


def scheduler(name: str):
    import diffusers

    common = {
        "num_train_timesteps": 1000,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "prediction_type": "sample",
    }
    if name == "ddim":
        return diffusers.DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=True)
    return diffusers.DPMSolverMultistepScheduler(
        **common, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", final_sigmas_type="zero"
    )


@pytest.mark.parametrize(("name", "sampler"), [("ddim", ddim), ("dpmpp", dpmpp)])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_against_diffusers(name: str, sampler, steps: int) -> None:
    theirs = scheduler(name)
    theirs.set_timesteps(1000)
    timesteps = spaced_timesteps(steps)
    noise = torch.randn(1, 8, 4, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    denoise = gaussian_denoiser(0.3, 0.4)
    x = noise
    if name == "ddim":
        # Its next timestep is a fixed stride below, so each step gets a schedule with the stride that we take.
        for t, following in zip(timesteps, [*timesteps[1:], -1], strict=True):
            theirs.num_inference_steps = 1
            theirs.register_to_config(num_train_timesteps=t - following)
            x = theirs.step(denoise(x, t), t, x).prev_sample
    else:
        theirs.set_timesteps(timesteps=timesteps)
        for t in theirs.timesteps:
            x = theirs.step(denoise(x, int(t)), t, x).prev_sample
    torch.testing.assert_close(sampler(denoise, noise, timesteps), x, atol=1e-5, rtol=1e-5)


def even_in_log_snr(steps: int) -> list[int]:
    """Timesteps from 999 to 0 between which log(ᾱ / (1 − ᾱ)) changes evenly."""
    log_snr = torch.logit(PUBLISHED.alpha_bars)
    wanted = torch.linspace(float(log_snr[-1]), float(log_snr[0]), steps, dtype=torch.float64)
    return sorted({int((log_snr - value).abs().argmin()) for value in wanted}, reverse=True)


def test_dpmpp_is_of_higher_order_than_ddim() -> None:
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)
    denoise = gaussian_denoiser(0.3, 0.4)
    # What the probability flow makes of x_T: the Gaussian's own transport to t = 0, then the denoiser.
    variance = PUBLISHED.alpha_bars * 0.4**2 + 1 - PUBLISHED.alpha_bars
    x = PUBLISHED.alpha_bars[0] ** 0.5 * 0.3 + (variance[0] / variance[-1]).sqrt() * (
        noise - PUBLISHED.alpha_bars[-1] ** 0.5 * 0.3
    )
    exact = denoise(x, 0)

    def error(sampler, steps: int) -> float:
        return float((sampler(denoise, noise, even_in_log_snr(steps)) - exact).abs().max())

    assert error(dpmpp, 20) < error(ddim, 20) / 4
    assert error(dpmpp, 40) < error(dpmpp, 20) / 2.5
    assert error(ddim, 40) > error(ddim, 20) / 2.5


def test_ddim_with_eta_one_on_the_full_schedule_is_ddpm_with_the_small_variance() -> None:
    noise = torch.randn(50_000, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    denoise = gaussian_denoiser(1.0, 0.3)
    timesteps = spaced_timesteps(100)
    eta = ddim(denoise, noise, timesteps, generator=torch.Generator().manual_seed(6), eta=1.0)
    assert abs(eta.mean() - 1.0) < 0.01
    repeated = ddim(denoise, noise, timesteps, generator=torch.Generator().manual_seed(6), eta=1.0)
    assert torch.equal(eta, repeated)
    assert not torch.equal(eta, ddim(denoise, noise, timesteps))


@given(st.integers(2, 1000))
def test_spaced_timesteps_fall_from_999_to_0(steps: int) -> None:
    timesteps = spaced_timesteps(steps)
    assert (len(timesteps), timesteps[0], timesteps[-1]) == (steps, 999, 0)
    assert timesteps == sorted(set(timesteps), reverse=True)


def test_spaced_timesteps_of_the_published_shortened_schedule() -> None:
    assert spaced_timesteps(50) == [round(i * 999 / 49) for i in range(49, -1, -1)]
    assert spaced_timesteps(1) == [999]


@pytest.mark.parametrize("timesteps", [[], [0, 1], [5, 5], [1000, 0], [3, -1]])
def test_impossible_timesteps_are_refused(timesteps: list[int]) -> None:
    with pytest.raises(ValueError, match="must be a falling list"):
        ddpm(lambda x, t: x, torch.zeros(1), timesteps)


def test_same_generator_same_result_whatever_the_global_state() -> None:
    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(11)
        noise = torch.randn(4, generator=generator)
        return ddpm(gaussian_denoiser(0, 1), noise, [3, 2, 1, 0], generator=generator)

    first = run()
    torch.manual_seed(0)
    torch.randn(7)
    assert torch.equal(first, run())


SEVERAL = {**SAMPLERS, "ddim with noise": partial(ddim, eta=1.0)}


@pytest.mark.parametrize("sampler", SEVERAL.values(), ids=SEVERAL)
def test_with_a_generator_each_samples_of_a_batch_come_out_as_alone(sampler) -> None:
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]

    noise = torch.randn(3, 8, 4, 6, 2, generator=torch.Generator().manual_seed(0))
    denoise, timesteps = gaussian_denoiser(0.3, 0.4), [700, 200, 30, 0]
    alone = [sampler(denoise, x[None], timesteps, generator=one) for x, one in zip(noise, generators(), strict=True)]
    assert torch.equal(sampler(denoise, noise, timesteps, generator=generators()), torch.cat(alone))


def test_as_many_generators_as_samples() -> None:
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        ddpm(gaussian_denoiser(0, 1), torch.zeros(3, 8, 2, 2, 2), [1, 0], [torch.Generator(), torch.Generator()])


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_mean_is_exact_for_normal_data_whatever_the_noise(schedule: Schedule) -> None:
    noise = torch.randn(2, 8, 2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    denoise, alpha_bar = gaussian_denoiser(2.0, 0.5, schedule), float(schedule.alpha_bars[999])
    # E[x0 | x_T] of opposite x_T: all that is left of the noise is the prior's shrinkage towards its own mean.
    gain = alpha_bar**0.5 * 0.5**2 / (alpha_bar * 0.5**2 + 1 - alpha_bar)
    expected = torch.full_like(noise, 2.0 - gain * alpha_bar**0.5 * 2.0)
    torch.testing.assert_close(posterior_mean(denoise, noise, [999], schedule=schedule), expected, rtol=1e-12, atol=0)
    assert (ddim(denoise, noise, [999], schedule=schedule) - 2).abs().max() > 100 * (expected - 2).abs().max()


@pytest.mark.parametrize("tau", [100, 300, 700])
def test_texture_has_the_distribution_that_follows_from_tau(tau: int) -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(20_000, 8, 1, 1, 1, dtype=torch.float64, generator=generator)
    denoise, alpha_bar = gaussian_denoiser(2.0, 0.3), float(PUBLISHED.alpha_bars[tau])
    made = texture(denoise, noise, planned_timesteps("texture", tau + 1, tau), generator, bands=["LLH", "HHH"])
    chosen = [BANDS.index("LLH"), BANDS.index("HHH")]
    expected = 0.3 * ((1 - alpha_bar) / (1 - alpha_bar + alpha_bar * 0.3**2)) ** 0.5
    assert made[:, chosen].std().item() == pytest.approx(expected, rel=0.02)
    assert made[:, chosen].mean().item() == pytest.approx(2.0, abs=0.01)
    others = [i for i in range(8) if i not in chosen]
    assert torch.equal(made[:, others], posterior_mean(denoise, noise, [999])[:, others])


def test_few_steps_of_texture_are_near_many() -> None:
    noise = torch.randn(500, 8, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    denoise = gaussian_denoiser(2.0, 0.3)

    def made(steps: int) -> torch.Tensor:
        timesteps = planned_timesteps("texture", steps, 300)
        return texture(denoise, noise, timesteps, torch.Generator().manual_seed(2))

    exact = made(301)
    assert (made(5) - exact).std() < 0.15 * exact[:, 1:].std()
    assert (made(20) - exact).std() < 0.03 * exact[:, 1:].std()
    again = made(5)
    assert torch.equal(again[:, 1:], made(5)[:, 1:])


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("sampler", FLOW_SAMPLERS.values(), ids=FLOW_SAMPLERS)
def test_a_straight_path_is_followed_exactly_in_any_number_of_steps(sampler, steps: int) -> None:
    source, target = torch.randn(2, 1, 8, 2, 3, 2, dtype=torch.float64)
    made = sampler(lambda x, t: target - source, source, flow_timesteps(steps))
    torch.testing.assert_close(made, target, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_flows_converge_with_their_order_to_the_closed_form(sampler, order: int) -> None:
    """Of dx/dt = x, which ends at e x, and of one that hangs on time alone, t, which ends half further."""
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)

    def error(steps: int) -> float:
        return float((sampler(lambda x, t: x, x, flow_timesteps(steps)) - np.e * x).abs().max())

    assert error(10) / error(20) == pytest.approx(2**order, rel=0.1)
    made = sampler(lambda x, t: torch.full_like(x, t / 1000), x, [0, 500])
    torch.testing.assert_close(made, x + (0.25 if order == 1 else 0.5))


@pytest.mark.parametrize("name", [*SAMPLERS, *SHORTCUTS, *FLOW_SAMPLERS])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_samplers_ask_the_network_as_often_as_they_say(name: str, steps: int) -> None:
    asked = []

    def network(x: torch.Tensor, t: int) -> torch.Tensor:
        asked.append(t)
        return x / 2

    sampler = (SAMPLERS | SHORTCUTS | FLOW_SAMPLERS)[name]
    timesteps = flow_timesteps(steps) if name in FLOW_SAMPLERS else planned_timesteps(name, steps, 300)
    sampler(network, torch.randn(1, 8, 1, 1, 1), timesteps)
    assert len(asked) == evaluations(sampler, timesteps)
    if name == "texture":
        assert asked[:3] == [999, 999, 300]
        assert evaluations(partial(texture, bands=["HHH"]), timesteps) == 2 + steps
