"""The denoising networks of WDM and cWDM: a 3D U-Net on wavelet coefficients, with three kinds of skip connection.

`concat` is cWDM's (Friedrich et al., "cWDM: Conditional Wavelet Diffusion Models for Cross-Modality 3D Medical
Image Synthesis", 2024), `additive` and `wavelet` are WDM's U-Net and WavU-Net (Friedrich et al., 2024). All
descend from the ablated diffusion U-Net (Dhariwal and Nichol, 2021) without attention.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cwdm.diffusion import PUBLISHED, Schedule
from cwdm.kernels import (
    Features,
    Resample,
    concatenate,
    conv3,
    in_layout_of,
    norm_silu_conv,
    norm_silu_conv_shift,
    shortcut,
)
from cwdm.regression import Regression
from cwdm.wavelet import LLL_DIVISOR, haar, inverse_haar


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
        one_pass = (self.in_channels, self.out_channels, self.targets) == (8 + 8 * self.given, 16, self.given)
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


class UNet(nn.Module):
    """Predicts clean wavelet coefficients from noisy ones.

    `UNet(config)(x, t)`: x (B, in_channels, X, Y, Z), t (B,) integer timesteps -> (B, out_channels, X, Y, Z).
    X, Y and Z must be multiples of `config.size_multiple`. A network of several targets takes their numbers (B,)
    as a third argument and adds their embedding to the timestep's (Dhariwal and Nichol, 2021, as for classes).
    The noise schedule matters to a regression alone.
    """

    def __init__(self, config: UNetConfig, schedule: Schedule = PUBLISHED) -> None:
        super().__init__()
        self.config = config
        width = config.model_channels
        self.time_embed = nn.ModuleList(
            [nn.Linear(width, config.embedding), nn.Linear(config.embedding, config.embedding)]
        )
        if config.targets:
            table = torch.empty(config.targets, config.embedding)
            # On the meta device that would load PyTorch's compiler, which takes seconds and a folder to write to.
            self.target_embed = nn.Embedding.from_pretrained(table if table.is_meta else nn.init.normal_(table), False)
        self.stem = new_conv3(config.in_channels, width)
        self.body = WaveletBody(config) if config.skips == "wavelet" else SkipBody(config)
        self.head = NormSiLUConv(width, config.out_channels, config, zero=True)
        if config.regression:
            given = config.in_channels - config.out_channels
            self.regression = Regression(config.out_channels, given, max(config.targets, 1), schedule)

    def forward(self, x: Tensor, t: Tensor, target: Tensor | None = None) -> Tensor:
        check_shape(x, self.config.in_channels, self.config)
        emb = self.embed(t, target)
        if not self.config.regression:
            return self.denoise(x, emb)
        network_input, mean, deviation = self.regression(x, t, target)
        return torch.addcmul(mean, deviation, self.denoise(network_input, emb))

    def embed(self, t: Tensor, target: Tensor | None) -> Tensor:
        """What every block is told: (B, embedding)."""
        first, second = self.time_embed
        emb: Tensor = timestep_embedding(t, self.config.model_channels).to(self.stem.weight.dtype)
        emb = second(F.silu(first(emb)))
        if self.config.targets:
            if target is None:
                raise ValueError(f"which of the {self.config.targets} targets? Give their numbers, (B,)")
            emb = emb + self.target_embed(target)
        return emb

    def denoise(self, x: Tensor, emb: Tensor) -> Tensor:
        output: Tensor = self.head(self.body(conv3(x, self.stem), x, emb))
        return output


def check_shape(x: Tensor, channels: int, config: UNetConfig) -> None:
    """Raise ValueError if the network cannot take x."""
    multiple = config.size_multiple
    if x.ndim != 5 or x.shape[1] != channels or any(n % multiple for n in x.shape[2:]):
        raise ValueError(
            f"expected (B, {channels}, X, Y, Z) with X, Y, Z multiples of {multiple}, got {tuple(x.shape)}"
        )


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """Sinusoids of the timestep, cosines first (Vaswani et al., 2017): (B,) -> (B, channels), float32."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = t[:, None].float() * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def new_conv3(in_channels: int, out_channels: int) -> nn.Conv3d:
    """3×3×3 convolution that keeps the size."""
    return nn.Conv3d(in_channels, out_channels, 3, padding=1)


def join_bands(bands: list[Tensor]) -> Tensor:
    return in_layout_of(bands[0], inverse_haar(bands))


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


class SkipBody(nn.Module):
    """Encoder and decoder whose every encoder output is used once by the decoder, concatenated or averaged."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.concat = config.skips == "concat"
        width, widths = config.model_channels, config.widths
        skips = [width]
        self.encoder = nn.ModuleList()
        for level, level_width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.encoder.append(ResBlock(width, level_width, config))
                width = level_width
                skips.append(width)
            if level < len(widths) - 1:
                self.encoder.append(ResBlock(width, width, config, "down"))
                skips.append(width)
        self.middle = nn.ModuleList([ResBlock(width, width, config) for _ in range(2)])
        self.decoder = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            blocks = nn.ModuleList()
            for _ in range(config.num_res_blocks + 1):
                skip = skips.pop()
                out = level_width if self.concat else (skips[-1] if skips else config.model_channels)
                blocks.append(ResBlock(width + skip if self.concat else width, out, config))
                width = out
            if level > 0:
                blocks.append(ResBlock(width, width, config, "up"))
            self.decoder.append(blocks)

    def forward(self, h: Tensor, x: Tensor, emb: Tensor) -> Tensor:
        skips = [h]
        for block in self.encoder:
            h = block(h, emb)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for blocks in self.decoder:
            for block in cast(Iterable[ResBlock], blocks):
                h = block(h if block.resample else self.merge(h, skips.pop()), emb)
        return h

    def merge(self, h: Tensor, skip: Tensor) -> Features:
        return concatenate(h, skip) if self.concat else (h + skip) / 2


class WaveletBody(nn.Module):
    """WavU-Net: sizes change by Haar transforms, high bands are the skips, a pyramid of the input feeds each level."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width, pyramid = config.model_channels, config.in_channels
        self.encoder = nn.ModuleList()
        for level_width in config.widths:
            self.encoder.append(WaveletEncoderLevel(width, level_width, pyramid, config))
            width = pyramid = level_width
        self.middle = nn.ModuleList([ResBlock(width, width, config) for _ in range(2)])
        self.decoder = nn.ModuleList()
        for level_width in reversed(config.widths):
            self.decoder.append(WaveletDecoderLevel(width, level_width, config))
            width = level_width
        self.refine = nn.ModuleList([ResBlock(width, width, config) for _ in range(config.num_res_blocks)])

    def forward(self, h: Tensor, x: Tensor, emb: Tensor) -> Tensor:
        skips = []
        pyramid = x
        for level in self.encoder:
            h, high = level(h, pyramid, emb)
            pyramid = h
            skips.append(high)
        for block in self.middle:
            h = block(h, emb)
        for level in self.decoder:
            h = level(h, skips.pop(), emb)
        for block in self.refine:
            h = block(h, emb)
        return h


class WaveletEncoderLevel(nn.Module):
    """Residual blocks, then half the size: low band onward, high bands aside, the input's own bands added."""

    def __init__(self, in_channels: int, out_channels: int, pyramid_channels: int, config: UNetConfig) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * config.num_res_blocks
        self.blocks = nn.ModuleList(ResBlock(a, b, config) for a, b in pairwise(widths))
        self.down = ResBlock(out_channels, out_channels, config)
        self.pyramid = new_conv3(8 * pyramid_channels, out_channels)

    def forward(self, h: Tensor, pyramid: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        for block in self.blocks:
            h = block(h, emb)
        low, *high = haar(self.down.first(h))
        shift = self.down.timestep(emb)[:, :, None, None, None]
        h = self.down.join(haar(h)[0] / LLL_DIVISOR, low / LLL_DIVISOR + shift)
        return h + conv3(torch.cat(haar(pyramid), dim=1) / LLL_DIVISOR, self.pyramid), high


class WaveletDecoderLevel(nn.Module):
    """Residual blocks, then double the size with the encoder's high bands in both branches."""

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * config.num_res_blocks
        self.blocks = nn.ModuleList(ResBlock(a, b, config) for a, b in pairwise(widths))
        self.up = ResBlock(out_channels, out_channels, config)

    def forward(self, h: Tensor, high: list[Tensor], emb: Tensor) -> Tensor:
        # The published network runs the last block of a level twice, with the same weights.
        for block in [*self.blocks, self.blocks[-1]]:
            h = block(h, emb)
        shift = self.up.timestep(emb)[:, :, None, None, None]
        main = join_bands([self.up.first(h) * LLL_DIVISOR, *high]) + shift
        return self.up.join(join_bands([h * LLL_DIVISOR, *high]), main)
