"""Which kernel serves, and the operations that are no kernels."""

import subprocess
import sys

import torch

from cwdm.kernels.ops import LAYOUT, plain_norm_silu
from cwdm.kernels.resampling import double, halve


def test_halving_and_doubling_in_channels_last() -> None:
    x = torch.randn(2, 3, 4, 6, 8).contiguous(memory_format=LAYOUT)
    torch.testing.assert_close(halve(x), torch.nn.functional.avg_pool3d(x, 2))
    assert torch.equal(double(x), torch.nn.functional.interpolate(x, scale_factor=2.0))
    assert halve(x).is_contiguous(memory_format=LAYOUT)
    assert double(x).is_contiguous(memory_format=LAYOUT)


@torch.no_grad()
def test_plain_path_keeps_layout_and_type() -> None:
    norm = torch.nn.GroupNorm(3, 6)
    x = torch.randn(2, 6, 3, 5, 7)
    for layout in (torch.contiguous_format, LAYOUT):
        result = plain_norm_silu(x.to("meta").contiguous(memory_format=layout), norm.to("meta"))
        assert result.is_contiguous(memory_format=layout)
    norm = torch.nn.GroupNorm(3, 6)
    exactly = torch.nn.functional.silu(torch.nn.functional.group_norm(x.double(), 3))
    torch.testing.assert_close(plain_norm_silu(x.contiguous(memory_format=LAYOUT), norm), exactly.float())
    assert plain_norm_silu(x.bfloat16(), norm.bfloat16()).dtype == torch.bfloat16


def test_a_pass_loads_the_kernels_that_compute_it_alone() -> None:
    program = """
import sys, torch
from cwdm.unet import UNet, UNetConfig
model = UNet(UNetConfig(in_channels=8, model_channels=8, channel_mult=(1, 2), groups=4))
model(torch.zeros(1, 8, 4, 4, 4), torch.tensor([0])).sum().backward()
assert "cwdm.kernels.winograd" not in sys.modules
with torch.no_grad():
    wide = UNet(UNetConfig(in_channels=8, model_channels=32, channel_mult=(1,)))
    wide(torch.zeros(1, 8, 16, 16, 16), torch.tensor([0]))
assert "cwdm.kernels.winograd" in sys.modules
assert "cwdm.kernels.triton_kernels" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
