import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import GOLDEN, golden, golden_model
from torch import Tensor, nn

from cwdm.kernels import ops
from cwdm.kernels.ops import use_winograd
from cwdm.kernels.resampling import Resample
from cwdm.kernels.winograd import convolve, toom_cook

LAYOUT = torch.channels_last_3d


def modules(channels: int, out_channels: int, groups: int) -> tuple[nn.GroupNorm, nn.Conv3d]:
    torch.manual_seed(channels + out_channels)
    norm, conv = nn.GroupNorm(groups, channels), nn.Conv3d(channels, out_channels, 3, padding=1)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm, conv


def exact(x: Tensor, conv: nn.Conv3d, norm: nn.GroupNorm, resample: Resample) -> Tensor:
    """The plain operations in float64."""
    h = F.silu(F.group_norm(x.double(), norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps))
    if resample == "down":
        h = F.avg_pool3d(h, 2)
    if resample == "up":
        h = F.interpolate(h, scale_factor=2.0)
    return F.conv3d(h, conv.weight.double(), conv.bias.double(), padding=1)


def error(result: Tensor, reference: Tensor) -> float:
    """RMS difference relative to the reference's RMS."""
    return float((result - reference).square().mean().sqrt() / reference.square().mean().sqrt())


@pytest.mark.parametrize(
    ("shape", "out_channels", "groups", "resample"),
    [
        ((1, 64, 12, 16, 10), 64, 32, None),
        ((2, 32, 9, 13, 7), 48, 32, None),  # no size a multiple of the tile
        ((1, 96, 21, 61, 67), 32, 4, None),  # several blocks along both axes
        ((1, 8, 17, 3, 5), 8, 1, None),
        ((3, 40, 1, 1, 1), 8, 4, None),
        ((1, 32, 10, 14, 18), 32, 8, "down"),  # 5 and 7: odd after halving
        ((2, 16, 8, 12, 4), 16, 16, "down"),
        ((1, 32, 3, 5, 10), 32, 32, "up"),
        ((2, 16, 7, 2, 3), 24, 2, "up"),
    ],
)
@torch.inference_mode()
def test_equals_the_plain_modules(shape: tuple[int, ...], out_channels: int, groups: int, resample: Resample) -> None:
    norm, conv = modules(shape[1], out_channels, groups)
    x = 3 * torch.randn(shape) + 2
    shift = torch.randn(shape[0], out_channels, 1, 1, 1)
    reference = exact(x, conv, norm, resample)
    result = convolve(x, conv, norm, resample)
    assert error(result, reference) < 3e-6
    assert error(convolve(x.contiguous(memory_format=LAYOUT), conv, norm, resample, shift), reference + shift) < 3e-6
    residual = torch.randn(result.shape)
    assert error(convolve(x, conv, norm, resample, residual), reference + residual) < 3e-6


@torch.inference_mode()
def test_convolution_alone() -> None:
    _, conv = modules(32, 16, 1)
    x = torch.randn(2, 32, 6, 11, 9)
    reference = F.conv3d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    assert error(convolve(x, conv), reference) < 3e-6


@torch.inference_mode()
def test_statistics_far_from_zero() -> None:
    norm, conv = modules(32, 32, 8)
    x = torch.randn(1, 32, 24, 40, 32) + 300 * torch.rand(1, 32, 1, 1, 1).round()
    x += 1000  # a mean a thousand times the spread costs float32 three digits, and no more
    plain = conv(F.silu(norm(x)))
    reference = exact(x, conv, norm, None)
    assert error(convolve(x, conv, norm), reference) < max(3e-6, 2 * error(plain, reference))


@torch.inference_mode()
def test_memory_of_the_addend() -> None:
    norm, conv = modules(32, 32, 32)
    x = torch.randn(2, 32, 6, 8, 10)
    add = torch.randn(2, 32, 6, 8, 10).contiguous(memory_format=LAYOUT)
    before = add.clone()
    result = convolve(x, conv, norm, add=add)
    assert torch.equal(add, before)
    reused = convolve(x, conv, norm, add=add, overwrite=True)
    assert reused.data_ptr() == add.data_ptr()
    assert torch.equal(reused, result)


def test_transforms_are_a_correlation() -> None:
    data, filters, result = toom_cook()
    g, d = torch.randn(3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(result @ ((filters @ g) * (data @ d)), d.unfold(0, 3, 1) @ g)


@pytest.mark.parametrize("name", golden("unet.json"))
@torch.inference_mode()
def test_golden_forward_pass_all_this_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "MIN_CHANNELS", 1)
    monkeypatch.setattr(ops, "MIN_VOXELS", 1)
    run = golden("unet.json")[name]
    x = np.random.RandomState(run["input_seed"]).standard_normal(run["input_shape"]).astype(np.float32)
    output = golden_model(run)(torch.from_numpy(x), torch.full((x.shape[0],), run["timestep"]))
    np.testing.assert_allclose(output.numpy(), np.load(GOLDEN / f"unet_{name}.npy"), atol=2e-5, rtol=0)


def test_taken_in_float32_inference_on_large_volumes_only() -> None:
    _, conv = modules(32, 32, 1)
    x = torch.zeros(1, 32, 16, 16, 16)
    assert not use_winograd(x, conv)  # gradients
    with torch.no_grad():
        assert use_winograd(x, conv)
        assert not use_winograd(x, conv, "down")
        assert use_winograd(x[..., :8], conv, "up")
        assert not use_winograd(x[..., :8], conv)
        assert not use_winograd(x.double(), conv)
        assert not use_winograd(x.bfloat16(), conv)
        assert not use_winograd(x.to("meta"), conv)
        with torch.autocast("cpu", torch.bfloat16):
            assert not use_winograd(x, conv)


@torch.inference_mode()
def test_number_of_threads_stays_and_changes_nothing() -> None:
    norm, conv = modules(32, 32, 32)
    x = torch.randn(1, 32, 24, 24, 24)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(convolve(x, conv, norm))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*results, atol=1e-6, rtol=0)
