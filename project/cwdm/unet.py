"""The denoising networks of WDM and cWDM: a 3D U-Net on wavelet coefficients, with three kinds of skip connection.

`concat` is cWDM's (Friedrich et al., "cWDM: Conditional Wavelet Diffusion Models for Cross-Modality 3D Medical
Image Synthesis", 2024), `additive` and `wavelet` are WDM's U-Net and WavU-Net (Friedrich et al., 2024). All
descend from the ablated diffusion U-Net (Dhariwal and Nichol, 2021) without attention.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cwdm.blocks import NormSiLUConv, ResBlock, new_conv3
from cwdm.blocks import UNetConfig as UNetConfig
from cwdm.kernels import Features, concatenate, conv3

if TYPE_CHECKING:
    from cwdm.diffusion import Schedule
    from cwdm.wavunet import WaveletBody


class UNet(nn.Module):
    """Predicts clean wavelet coefficients from noisy ones.

    `UNet(config)(x, t)`: x (B, in_channels, X, Y, Z), t (B,) integer timesteps -> (B, out_channels, X, Y, Z).
    X, Y and Z must be multiples of `config.size_multiple`. A network of several targets takes their numbers (B,)
    as a third argument and adds their embedding to the timestep's (Dhariwal and Nichol, 2021, as for classes).
    The noise schedule, None for the published one, matters to a regression alone.
    """

    def __init__(self, config: UNetConfig, schedule: "Schedule | None" = None) -> None:
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
        self.body = new_body(config)
        self.head = NormSiLUConv(width, config.out_channels, config, zero=True)
        if config.regression:
            from cwdm.regression import Regression  # here, as the other networks need none of it

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


def new_body(config: UNetConfig) -> "SkipBody | WaveletBody":
    """What stands between the first convolution and the last."""
    if config.skips != "wavelet":
        return SkipBody(config)
    from cwdm.wavunet import WaveletBody  # here, as the other networks need none of it

    return WaveletBody(config)


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
