import dataclasses
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import TINY

from cwdm import Pipeline, checkpoint
from cwdm.checkpoint import ANY, Record, load_published
from cwdm.diffusion import SCHEDULES
from cwdm.errors import SettingsError, WeightsError
from cwdm.pipeline import plan_sampling
from cwdm.samplers import SAMPLERS, ddim, ddpm, euler
from cwdm.sampling import clamped_denoiser
from cwdm.settings import SamplerSettings, load_settings
from cwdm.unet import UNetConfig
from cwdm.weights.untrained import untrained_state

SIZE = (8, 12, 4)
UNCONDITIONAL = UNetConfig(in_channels=8, model_channels=32, channel_mult=(1, 2))


def settings(*overrides: str):
    return load_settings(overrides=("precision=fp32", "sampler.timesteps=[600, 40, 0]", *overrides))


def pipeline(weights_folder: Path, *overrides: str) -> Pipeline:
    return Pipeline.load(weights_folder, "t1c", settings(*overrides), "cpu")


@pytest.fixture
def condition() -> torch.Tensor:
    return torch.rand(1, 24, *(n // 2 for n in SIZE), generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_that_share_a_pass_are_those_drawn_alone(
    name: str, weights_folder: Path, condition: torch.Tensor
) -> None:
    alone = pipeline(weights_folder, f"sampler.name={name}")
    passes: list[int] = []
    alone.checkpoint.model.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    seeds = [5, 6, 7]
    expected = torch.cat([alone.sample(condition, seeds=[seed]) for seed in seeds])
    assert torch.equal(alone.sample(condition, seeds=seeds), expected)
    assert passes == [1] * 18
    passes.clear()
    together = replace(alone, batch=2).sample(condition, seeds=seeds)
    assert passes == [2] * 3 + [1] * 3
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=0)
    assert not torch.equal(expected[0], expected[1])
    assert together.shape == (3, 8, *(n // 2 for n in SIZE))


def test_the_callback_hears_of_every_evaluation(weights_folder: Path, condition: torch.Tensor) -> None:
    told = []

    def callback(step: int, total: int, x0: torch.Tensor) -> None:
        told.append((step, total, tuple(x0.shape)))

    replace(pipeline(weights_folder), batch=2).sample(condition, seeds=[1, 2, 3], callback=callback)
    sizes = tuple(n // 2 for n in SIZE)
    assert told == [(step, 3, (batch, 8, *sizes)) for batch in (2, 1) for step in (1, 2, 3)]


def test_whatever_the_callback_raises_ends_the_sampling(weights_folder: Path, condition: torch.Tensor) -> None:
    steps = []

    def stop(step: int, total: int, x0: torch.Tensor) -> None:
        steps.append(step)
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace(pipeline(weights_folder), batch=2).sample(condition, seeds=[1, 2], callback=stop)
    assert steps == [1, 2]


def test_a_fault_outside_the_network_ends_a_shared_pass(weights_folder: Path, condition: torch.Tensor) -> None:
    def breaks(denoise, noise, timesteps, generator):
        denoise(noise, timesteps[0])
        raise RuntimeError("no noise for the second sample")

    with pytest.raises(RuntimeError, match="no noise"):
        replace(pipeline(weights_folder), batch=2, sampler=breaks).sample(condition, seeds=[1, 2])


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error)[:40])
def test_what_does_not_fit_is_halved(error: Exception, weights_folder: Path, condition: torch.Tensor) -> None:
    made = pipeline(weights_folder)
    expected = made.sample(condition, seeds=range(5))
    held: list[weakref.ref] = []

    def small(module, inputs):
        if inputs[0].shape[0] > 1:
            activations = torch.zeros(8)
            held.append(weakref.ref(activations))
            raise type(error)(str(error))
        assert held[-1]() is None, "what did not fit is still there"

    made.checkpoint.model.register_forward_pre_hook(small)
    assert torch.equal(replace(made, batch=4).sample(condition, seeds=range(5)), expected)
    assert len(held) == 2  # of 4 and of 2; the rest came one by one


def test_other_faults_and_a_single_sample_that_does_not_fit_are_raised(
    weights_folder: Path, condition: torch.Tensor
) -> None:
    made, error = replace(pipeline(weights_folder), batch=2), RuntimeError("CUDA error: an illegal memory access")

    def fail(module, inputs):
        raise error

    made.checkpoint.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="illegal"):
        made.sample(condition, seeds=[1, 2])
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        made.sample(condition, seeds=[1, 2])


def test_a_sampler_of_ones_own_has_one_generator_until_it_asks_for_more(
    weights_folder: Path, condition: torch.Tensor
) -> None:
    asked = []

    def mine(denoise, noise, timesteps, generator):
        asked.append((len(noise), timesteps, type(generator)))
        return ddpm(denoise, noise, timesteps, generator)

    made = Pipeline.load(weights_folder, "t1c", settings(), "cpu", sampler=mine)
    expected = pipeline(weights_folder, "sampler.name=ddpm").sample(condition, seeds=[1, 2])
    assert torch.equal(made.sample(condition, seeds=[1, 2]), expected)
    assert asked == [(1, [600, 40, 0], torch.Generator)] * 2
    together = replace(made, batch=2).sample(condition, seeds=[1, 2])
    assert asked[2:] == [(2, [600, 40, 0], list)]
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=0)
    assert made.describe()["sampler"] == "mine"


@pytest.mark.parametrize("switch", ["fp32_precision of everything", "fp32_precision of cuDNN", "allow_tf32"])
def test_sampling_is_exact_whatever_was_switched_on(switch: str, weights_folder: Path, condition: torch.Tensor) -> None:
    def sampler(denoise, noise, timesteps, generator):
        backends = torch.backends
        found = [part.fp32_precision for part in (backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.conv)]
        assert found == ["ieee"] * 3
        return ddim(denoise, noise, timesteps, generator)

    expected = pipeline(weights_folder, "sampler.name=ddim").sample(condition)
    try:
        if switch == "allow_tf32":
            torch.set_float32_matmul_precision("high")
        elif "cuDNN" in switch:
            torch.backends.cudnn.conv.fp32_precision = "ieee"
        else:
            torch.backends.fp32_precision = "tf32"
        made = Pipeline.load(weights_folder, "t1c", settings(), "cpu", sampler=sampler)
        assert torch.equal(made.sample(condition), expected)
    finally:
        torch.backends.fp32_precision = "none"
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        torch.set_float32_matmul_precision("highest")


def test_volumes_are_encoded_and_decoded_in_the_networks_range(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    record = Record(value_range=(-1, 1), wavelet="db2")
    checkpoint.save(path, load_published(untrained_state(UNCONDITIONAL), UNCONDITIONAL), record)
    made = Pipeline.load(path, settings=settings(), device="cpu")
    unit = torch.rand(2, 1, *SIZE)
    torch.testing.assert_close(made.decode(made.encode(unit)), unit, atol=1e-5, rtol=0)
    volume = made.decode(made.sample(size=SIZE, seeds=[3]))
    assert volume.shape == (1, 1, *SIZE)
    assert -0.01 < volume.min() < volume.max() < 1.01
    with pytest.raises(ValueError, match="a condition or a size"):
        made.sample()


def test_a_network_samples_by_the_schedule_that_it_was_trained_with(tmp_path: Path, condition: torch.Tensor) -> None:
    path = tmp_path / "t1c.safetensors"
    checkpoint.save(path, load_published(untrained_state(TINY)), Record(modality="t1c", schedule="cosine"))
    made = Pipeline.load(path, "t1c", settings(), "cpu")
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(1, 8, *condition.shape[2:], generator=generator)
    with torch.inference_mode():
        denoise = clamped_denoiser(made.checkpoint, condition)
        expected = ddpm(denoise, noise, [600, 40, 0], generator, SCHEDULES["cosine"])
    assert torch.equal(made.sample(condition, seeds=[4]), expected)

    def knows_the_published_alone(denoise, noise, timesteps, generator):
        raise AssertionError("would give wrong images")

    with pytest.raises(TypeError, match="schedule"):
        replace(made, sampler=knows_the_published_alone).sample(condition)


def test_shortcuts_are_planned_and_told_by_settings(weights_folder: Path, condition: torch.Tensor) -> None:
    def load(*overrides: str) -> Pipeline:
        return Pipeline.load(weights_folder, "t1c", load_settings(None, list(overrides)), "cpu")

    mean = load("sampler.preset=mean")
    assert (mean.timesteps, mean.sampler_name) == ((999,), "mean")
    told = []
    expected = mean.sample(condition, seeds=[5], callback=lambda step, total, _: told.append((step, total)))
    assert told == [(1, 2), (2, 2)]
    made = load("sampler.name=texture", "sampler.tau=200", "sampler.steps=3", "sampler.bands=[HHH]")
    assert made.timesteps == (999, 200, 50, 0)
    assert made.sampler_name == "texture of HHH"
    found = made.sample(condition, seeds=[5])
    assert torch.equal(found[:, :7], expected[:, :7])
    assert not torch.equal(found[:, 7:], expected[:, 7:])
    assert load("sampler.preset=texture").timesteps == (999, 300, 169, 75, 19, 0)
    shared = replace(made, batch=2).sample(condition, seeds=[5, 6])
    torch.testing.assert_close(shared[:1], found, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["own", "euler"])
def test_a_sampler_that_was_added_is_found_by_its_name_even_by_a_flow_s(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own(denoise, noise, timesteps, generator=None):
        return ddim(denoise, noise, timesteps)

    monkeypatch.setitem(SAMPLERS, name, own)
    told = load_settings(overrides=[f"sampler.name={name}", "sampler.steps=2"]).sampler
    assert plan_sampling(Record(), told) == (own, (999, 0))
    flow = Record(objective="flow", sampler="euler", steps=2)
    assert plan_sampling(flow, SamplerSettings()) == (euler, (0, 500))


def test_a_pipeline_cannot_change(weights_folder: Path) -> None:
    made = pipeline(weights_folder)
    for field in dataclasses.fields(made):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, None)


def test_weights_are_a_file_a_folder_the_bundled_or_the_default(
    weights_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CWDM_WEIGHTS", str(weights_folder))
    for weights in (weights_folder, None, weights_folder / "t1ce_gen.pt"):
        assert Pipeline.load(weights, "t1c", device="cpu").checkpoint.path == weights_folder / "t1ce_gen.pt"
    assert Pipeline.load(weights_folder / "t1ce_gen.pt", device="cpu").target == 0
    bundled = Pipeline.load("bundled", modality="t2f", device="cpu")
    assert (bundled.checkpoint.record.modality, bundled.target) == (ANY, 3)
    assert (bundled.sampler_name, bundled.timesteps) == ("one-pass", (0,))
    with pytest.raises(SettingsError, match="predicts in one pass"):
        Pipeline.load("bundled", modality="t2f", device="cpu", sampler=ddim)
    assert bundled.dtype == torch.float32
    for wrong in ({"weights": weights_folder}, {"weights": bundled.checkpoint.path}):
        with pytest.raises(WeightsError, match="say which modality"):
            Pipeline.load(**wrong, device="cpu")
    with pytest.raises(SettingsError, match="expected one of t1n, t1c"):
        Pipeline.load(weights_folder, "t1ce", device="cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_seed_gives_the_same_noise_on_a_gpu(weights_folder: Path, condition: torch.Tensor) -> None:
    def sampler(denoise, noise, timesteps, generator):
        return noise

    def noise(device: str, *overrides: str) -> torch.Tensor:
        made = Pipeline.load(weights_folder, "t1c", settings(*overrides), device, sampler)
        return made.sample(condition, seeds=[1]).cpu()

    assert torch.equal(noise("cuda"), noise("cpu"))
    assert not torch.equal(noise("cuda", "noise=device"), noise("cpu"))
