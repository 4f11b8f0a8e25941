"""What the denoising networks are made of: their shape, and the residual blocks of the ablated diffusion U-Net.

Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, in three dimensions and without attention.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cwdm.kernels import Features, Resample, norm_silu_conv, norm_silu_conv_shift, shortcut


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a network.

    Attributes:
        in_channels: 8 noisy coefficients, and 8 for each condition.
        model_channels: width of the first level.
        channel_mult: width of each level as a multiple of `model_channels`.
        num_res_blocks: residual blocks a level (the decoder of `concat` and `additive` has one more).
        norm: `group`: GroupNorm over all voxels, as published; `voxel`: root mean square over the channels of each
            voxel (Zhang and Sennrich, RMSNorm, 2019), the same for part of a volume as for the whole.
        groups: groups of every GroupNorm.
        skips: how the decoder takes up what the encoder had; see the module.
        targets: kinds of volume that one network makes, told apart by an embedding; 0: one kind, as published.
        regression: the network learns what a linear regression of each voxel on its conditions does not know; see
            `Regression`.
        given: images of which any may be given, for a network that predicts one of them in one pass; see
            `cwdm.onepass`. 0: a network that denoises.
        products: the prior of such a network knows the squares and products of the images too.
    """

    in_channels: int
    out_channels: int = 8
    model_channels: int = 64
    channel_mult: tuple[int, ...] = (1, 2, 2, 4, 4)
    num_res_blocks: int = 2
    norm: Literal["group", "voxel"] = "group"
    groups: int = 32
    skips: Literal["concat", "additive", "wavelet"] = "concat"
    targets: int = 0
    regression: bool = False
    given: int = 0
    products: bool = False

    def __post_init__(self) -> None:
        # Bounds, because a configuration may come from a file that someone else made.
        sizes = (self.in_channels, self.out_channels, self.num_res_blocks, self.groups, self.model_channels)
        if not 1 <= len(self.channel_mult) <= 8 or self.num_res_blocks > 16 or min(*sizes, *self.channel_mult) < 1:
            raise ValueError(f"not a usable network: {self}")
        if self.skips == "wavelet" and self.num_res_blocks < 2:
            raise ValueError("the WavU-Net runs a level's last block twice, so it needs num_res_blocks of 2 or more")
        if not 0 <= self.targets <= 1024:
            raise ValueError(f"not a usable number of targets: {self.targets}")
        if self.regression and self.in_channels <= self.out_channels:
            raise ValueError("a regression needs conditions")
        one_pass = (self.in_channels, self.out_channels, self.targets) == (
            8 + 8 * self.given,
            one_pass_outputs(self.given),
            self.given,
        )
        if self.given and (self.regression or not one_pass or not 2 <= self.given <= 8):
            raise ValueError(f"not a usable network for one pass over {self.given} images: {self}")
        if self.products and not self.given:
            raise ValueError("products belong to the prior of a network for one pass")
        if max(*self.widths, self.in_channels, self.out_channels) > 8192:
            raise ValueError(f"a network wider than 8192 channels: {self}")
        groups = self.groups if self.norm == "group" else 1
        if self.model_channels % 2 or any(width % groups for width in self.widths):
            raise ValueError(f"widths {self.widths} must be even and multiples of {groups} groups")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.model_channels * mult for mult in self.channel_mult)

    @property
    def embedding(self) -> int:
        """Channels of the timestep embedding."""
        return 4 * self.model_channels

    @property
    def size_multiple(self) -> int:
        """Spatial sizes of the coefficients must be multiples of this."""
        halvings = len(self.channel_mult) - (self.skips != "wavelet")
        return int(2**halvings)


def one_pass_outputs(given: int) -> int:
    """Channels that a network of one pass over so many images answers with, see `cwdm.onepass.OnePassUNet`: a field,
    three gains of each image and of the prior, and the variances of eight bands."""
    return 1 + 3 * (given + 1) + 8


def new_conv3(in_channels: int, out_channels: int) -> nn.Conv3d:
    """3×3×3 convolution that keeps the size."""
    return nn.Conv3d(in_channels, out_channels, 3, padding=1)


class VoxelNorm(nn.Module):
    """Divides each voxel (B, C, X, Y, Z) by the root mean square of its channels, then scales and shifts these."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (tensor[:, None, None, None] for tensor in (self.weight, self.bias))
        return torch.addcmul(bias, weight, x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt())


class NormSiLUConv(nn.Module):
    """Normalisation, SiLU, an optional change of size, 3×3×3 convolution: what every block is made of."""

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig, zero: bool = False) -> None:
        super().__init__()
        per_voxel = config.norm == "voxel"
        self.norm = VoxelNorm(in_channels) if per_voxel else nn.GroupNorm(config.groups, in_channels)
        self.conv = new_conv3(in_channels, out_channels)
        if zero:
            nn.init.zeros_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return norm_silu_conv(x, self.norm, self.conv)


class ResBlock(nn.Module):
    """Residual block with the timestep added between its two convolutions; may halve or double the size."""

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig, resample: Resample = None) -> None:
        super().__init__()
        self.resample = resample
        self.first = NormSiLUConv(in_channels, out_channels, config)
        self.shift = nn.Linear(config.embedding, out_channels)
        self.second = NormSiLUConv(out_channels, out_channels, config, zero=True)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Features, emb: Tensor) -> Tensor:
        h = norm_silu_conv_shift(x, self.first.norm, self.first.conv, self.timestep(emb), self.resample)
        return self.join(x, h, self.resample)

    def timestep(self, emb: Tensor) -> Tensor:
        """What the embedding (B, embedding) adds to every voxel between the convolutions: (B, out)."""
        shift: Tensor = self.shift(F.silu(emb))
        return shift

    def join(self, x: Features, h: Features, resample: Resample = None) -> Tensor:
        """Second half of the block: shortcut (B, in, X, Y, Z) and main branch (B, out, X', Y', Z')."""
        add = shortcut(x, self.shortcut, resample)
        return norm_silu_conv(h, self.second.norm, self.second.conv, add=add, overwrite=add is not x)
