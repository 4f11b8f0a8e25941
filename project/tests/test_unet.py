import json

import numpy as np
import pytest
import torch
from support import GOLDEN, TINY, golden, golden_model

from cwdm.blocks import VoxelNorm
from cwdm.published import published_config, published_names
from cwdm.unet import UNet, UNetConfig

LAYOUT = torch.channels_last_3d


@pytest.mark.parametrize("name", golden("unet.json"))
@torch.inference_mode()
def test_golden_forward_pass(name: str) -> None:
    run = golden("unet.json")[name]
    x = np.random.RandomState(run["input_seed"]).standard_normal(run["input_shape"]).astype(np.float32)
    output = golden_model(run)(torch.from_numpy(x), torch.full((x.shape[0],), run["timestep"]))
    np.testing.assert_allclose(output.numpy(), np.load(GOLDEN / f"unet_{name}.npy"), atol=2e-5, rtol=0)


PARAMETERS = {
    "cwdm": 81_511_048,
    "wdm_unet_128": 57_914_824,
    "wdm_unet_256": 83_158_728,
    "wdm_wavunet_128": 89_706_056,
    "wdm_wavunet_256": 125_499_720,
}


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_published_architectures(name: str, parameters: int) -> None:
    shapes = {
        key: tuple(shape) for key, shape in json.loads((GOLDEN / "state_dict_keys.json").read_text())[name].items()
    }
    with torch.device("meta"):
        model = UNet(published_config(shapes))
    names = published_names(model)
    assert {key: tuple(model.get_parameter(ours).shape) for key, ours in names.items()} == shapes
    assert set(names.values()) == {ours for ours, _ in model.named_parameters()}
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("skips", ["concat", "additive", "wavelet"])
def test_starts_at_zero_and_trains(skips: str) -> None:
    config = UNetConfig(in_channels=8, model_channels=8, channel_mult=(1, 2), groups=4, skips=skips)
    model = UNet(config)
    x = torch.randn(2, 8, 8, 4, 12)
    output = model(x, torch.tensor([0, 999]))
    assert output.shape == x.shape
    assert not output.any()
    (output - 1).square().mean().backward()
    assert model.head.conv.weight.grad.abs().sum() > 0


def test_timestep_matters_sample_by_sample() -> None:
    model = golden_model({"in_channels": 32, "model_channels": 32, "channel_mult": (1, 2)})
    x = torch.randn(1, 32, 4, 4, 4).expand(2, -1, -1, -1, -1)
    with torch.inference_mode():
        first, second = model(x, torch.tensor([10, 900]))
        alone = model(x[:1], torch.tensor([900]))[0]
    assert (first - second).abs().max() > 1e-3
    torch.testing.assert_close(second, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(1, 31, 4, 4, 4), (1, 32, 4, 5, 4), (32, 4, 4, 4)])
def test_wrong_input_is_refused_by_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 2"):
        UNet(TINY)(torch.zeros(shape), torch.tensor([0]))


@pytest.mark.parametrize(
    "change",
    [
        {"channel_mult": ()},
        {"channel_mult": (1,) * 9},
        {"num_res_blocks": 10**6},
        {"groups": 7},
        {"in_channels": 10**6},
    ],
)
def test_impossible_configurations_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"network|widths"):
        UNetConfig(**{"in_channels": 32, **change})


VOXEL = {"model_channels": 8, "channel_mult": (1, 2), "norm": "voxel"}


@torch.inference_mode()
def test_voxel_norm_sees_a_part_as_it_sees_the_whole() -> None:
    """Far enough from the cut, a part of a volume gives what the whole gives; with GroupNorm it does not."""
    x, t = torch.randn(1, 8, 8, 8, 96), torch.tensor([500])
    for norm, same in (("voxel", True), ("group", False)):
        model = UNet(UNetConfig(in_channels=8, num_res_blocks=1, groups=4, **{**VOXEL, "norm": norm}))
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
        whole, part = model(x, t)[..., :8], model(x[..., :64], t)[..., :8]
        assert torch.allclose(whole, part, rtol=1e-4, atol=1e-4 * float(whole.std())) == same


@torch.inference_mode()
def test_voxel_norm_is_the_root_mean_square_of_the_channels() -> None:
    x = torch.randn(2, 6, 3, 4, 5)
    norm = VoxelNorm(6)
    norm.weight.normal_()
    norm.bias.normal_()
    oracle = torch.nn.functional.rms_norm(x.movedim(1, -1), (6,), norm.weight, eps=1e-5) + norm.bias
    torch.testing.assert_close(norm(x), oracle.movedim(-1, 1))


@pytest.mark.parametrize("skips", ["concat", "additive", "wavelet"])
@pytest.mark.parametrize("norm", ["group", "voxel"])
def test_channels_last_stays_off_the_cpu(skips: str, norm: str) -> None:
    """Shapes and strides alone: convolutions made to keep the layout as cuDNN does, everything else has to."""
    config = UNetConfig(in_channels=8, model_channels=8, channel_mult=(1, 2), groups=4, skips=skips, norm=norm)
    with torch.device("meta"):
        model = UNet(config)
        x, t = torch.empty(2, 8, 8, 12, 4), torch.zeros(2, dtype=torch.long)
    lost = []

    def keep(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        lost.extend(x.shape for x in inputs if x.ndim == 5 and not x.is_contiguous(memory_format=LAYOUT))
        return output.contiguous(memory_format=LAYOUT)

    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv3d)]
    for convolution in convolutions:
        convolution.register_forward_hook(keep)
    output = model(x.contiguous(memory_format=LAYOUT), t)
    assert len(convolutions) > 10
    assert output.is_contiguous(memory_format=LAYOUT)
    assert not lost
