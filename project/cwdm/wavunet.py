"""WDM's WavU-Net, whose sizes change by Haar transforms (Friedrich et al., 2024)."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from cwdm.blocks import ResBlock, UNetConfig, new_conv3
from cwdm.kernels import conv3, in_layout_of
from cwdm.wavelet import LLL_DIVISOR, haar, inverse_haar


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


def join_bands(bands: list[Tensor]) -> Tensor:
    return in_layout_of(bands[0], inverse_haar(bands))
