"""GroupNorm, SiLU and 3×3×3 convolution in one sweep on the CPU, with a quarter of the multiplications.

Winograd's minimal filtering F(4, 3) makes 4 outputs of a 3-tap filter from 6 products instead of 12 (Lavin and Gray,
"Fast Algorithms for Convolutional Neural Networks", 2016). Along X and Y together that is 36 products for 16 outputs
instead of 144; the 3 taps along Z stay, so that every product is a matrix product over channels. The volume is worked
through in tiles so small that everything between reading the input and writing the output stays in the cache.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import product
from threading import Barrier
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Resample = Literal["down", "up"] | None

OUT = 4  # outputs of a tile along X and along Y
IN = OUT + 2  # inputs it needs there, and products it is made from
ROWS = 1024  # rows of a matrix product: enough to reuse the weights, few enough for the cache
BLOCKS_PER_THREAD = 4  # so that a thread that is held up does not hold up the others

# Below these sizes, transforming data and weights costs more than it saves.
MIN_CHANNELS = 32
MIN_VOXELS = 4096


def supports(x: Tensor) -> bool:
    """Whether x may take this path: inference in float32 on the CPU."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def pays(x: Tensor, conv: nn.Conv3d, resample: Resample = None) -> bool:
    """Whether `norm_silu_conv` may be used, and is faster than the plain modules."""
    channels = min(conv.in_channels, conv.out_channels)
    return supports(x) and channels >= MIN_CHANNELS and math.prod(resized(x, resample)) >= MIN_VOXELS


def resized(x: Tensor, resample: Resample) -> list[int]:
    """Spatial sizes of (B, C, X, Y, Z) after `resize`."""
    return [{None: n, "down": n // 2, "up": 2 * n}[resample] for n in x.shape[2:]]


def resize(x: Tensor, resample: Resample) -> Tensor:
    """Halve by averaging or double by nearest neighbour, each spatial axis of (B, C, X, Y, Z)."""
    if resample == "down":
        return F.avg_pool3d(x, 2)
    if resample == "up":
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return x


def norm_silu_conv(
    x: Tensor, norm: nn.GroupNorm, conv: nn.Conv3d, resample: Resample = None, add: Tensor | None = None
) -> Tensor:
    """`conv(resize(silu(norm(x)), resample)) + add`, without gradients.

    Args:
        x: (B, C, X, Y, Z), float32; best in `channels_last_3d`.
        norm: over the C channels, with weight and bias.
        conv: C to D channels, 3×3×3, padding 1, with bias.
        resample: halve or double the sizes before the convolution.
        add: broadcastable to the result.

    Returns:
        (B, D, X', Y', Z'), in `channels_last_3d`.
    """
    x = x.contiguous(memory_format=torch.channels_last_3d)
    shape = (x.shape[0], conv.out_channels, *resized(x, resample))
    out = torch.empty(shape, memory_format=torch.channels_last_3d)
    threads = torch.get_num_threads()
    pool = workers(threads)
    weight = transform_weight(conv.weight)
    for b in range(len(x)):
        sample = channels_last(x[b])
        scale, offset = affine(norm, sample, pool)
        residual = None if add is None else channels_last(add.expand(shape)[b])
        sweep = Sweep(sample, scale, offset, resample, weight, conv.bias, residual, channels_last(out[b]))
        blocks = iter(sweep.blocks(BLOCKS_PER_THREAD * threads))
        list(pool.map(sweep.run, [blocks] * threads))
    return out


def channels_last(x: Tensor) -> Tensor:
    """(C, X, Y, Z) -> (X, Y, Z, C), the same memory."""
    return x.permute(1, 2, 3, 0)


@cache
def workers(threads: int) -> ThreadPoolExecutor:
    """Threads that each compute on one core.

    Each takes whole tiles, so that nobody waits at the end of every small operation, as operations shared among
    threads do: on a busy machine that waiting took most of the time.
    """
    everyone = Barrier(threads)

    def compute_alone(_: int) -> None:
        torch.get_num_threads()  # a thread's first call gives it the common setting, so it must come first
        torch.set_num_threads(1)
        everyone.wait()

    pool = ThreadPoolExecutor(threads)
    list(pool.map(compute_alone, range(threads)))
    torch.set_num_threads(threads)  # each thread keeps its own; this is also what later threads get
    return pool


@cache
def toom_cook() -> tuple[Tensor, Tensor, Tensor]:
    """Transforms of F(4, 3) for data (6, 6), filter (6, 3) and result (4, 6), float64.

    y = result @ ((filter @ g) * (data @ d)) are the 4 outputs of filter g on 6 inputs d: the transpose of multiplying
    polynomials by their values at 6 points (Toom and Cook). Points 0, ±√½, ±√2 and infinity lose 2.7 times less
    precision in float32 than the usual 0, ±1, ±2 and infinity: 1.1e-6 instead of 3.1e-6 of the result's RMS in two
    axes, where direct summation loses 0.2e-6.
    """
    points = torch.tensor([0, math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2), -math.sqrt(2)], dtype=torch.float64)

    def values(coefficients: int) -> Tensor:
        leading = F.one_hot(torch.tensor([coefficients - 1]), coefficients)  # the value at infinity
        return torch.cat((points[:, None] ** torch.arange(coefficients), leading))

    return torch.linalg.inv(values(IN)).T, values(3), values(OUT).T


def transform_weight(weight: Tensor) -> Tensor:
    """Weights of the 36 products: (D, C, 3, 3, 3) -> (6 of X, 6 of Y, 3 of Z, C, D)."""
    out_channels, in_channels = weight.shape[:2]
    _, filters, _ = toom_cook()
    taps = weight.permute(2, 3, 4, 1, 0).reshape(9, -1)
    return (torch.kron(filters, filters).float() @ taps).view(IN, IN, 3, in_channels, out_channels)


def affine(norm: nn.GroupNorm, x: Tensor, pool: ThreadPoolExecutor) -> tuple[Tensor, Tensor]:
    """Scale and offset (C,) of each channel that do what `norm` does to x (X, Y, Z, C)."""
    sums, squares = (torch.stack(part).double() for part in zip(*pool.map(moments, x), strict=True))
    plane = x[0, :, :, 0].numel()
    mean = grouped_mean(sums / plane, norm.num_groups)
    variance = grouped_mean(squares / plane + (sums / plane - mean) ** 2, norm.num_groups)
    scale = norm.weight / (variance + norm.eps).sqrt()
    return scale.float(), (norm.bias - scale * mean).float()


@torch.inference_mode()
def moments(plane: Tensor) -> tuple[Tensor, Tensor]:
    """Sum, and sum of squared distances from the mean, of each channel of (Y, Z, C)."""
    total = plane.sum((0, 1))
    return total, (plane - total / plane[..., 0].numel()).square_().sum((0, 1))


def grouped_mean(x: Tensor, groups: int) -> Tensor:
    """Mean over planes and the channels of a group, (X, C) -> (C,)."""
    channels = x.shape[1]
    return x.mean(0).view(groups, -1).mean(1).repeat_interleave(channels // groups)


@dataclass(frozen=True)
class Sweep:
    """One sample's way from input to output.

    Attributes:
        x: input, (X, Y, Z, C).
        scale, offset: normalisation, (C,).
        resample: change of size after SiLU.
        weight: transformed, (6, 6, 3, C, D).
        bias: (D,).
        add: (X', Y', Z', D).
        out: written, (X', Y', Z', D).
    """

    x: Tensor
    scale: Tensor
    offset: Tensor
    resample: Resample
    weight: Tensor
    bias: Tensor | None
    add: Tensor | None
    out: Tensor

    def blocks(self, wanted: int) -> list[tuple[range, range]]:
        """Planes and rows of the output, cut into about as many blocks as wanted."""
        planes, rows, depth, _ = self.out.shape
        stripes = split(rows, math.ceil(rows / OUT * (depth + 2) / ROWS))
        return list(product(split(planes, math.ceil(wanted / len(stripes))), stripes))

    @torch.inference_mode()
    def run(self, blocks: Iterator[tuple[range, range]]) -> None:
        """Compute blocks of the output until none is left, each a slab of 4 planes after the other."""
        tiles: Tiles | None = None
        for planes, rows in blocks:
            if tiles is None or len(rows) != tiles.rows:
                tiles = Tiles(self.weight, len(rows), self.out.shape[2])
            tiles.window.zero_()
            self.read(tiles.window[:2], range(planes.start - 1, planes.start + 1), rows)
            for start in planes[::OUT]:
                self.read(tiles.window[2:], range(start + 1, start + 1 + OUT), rows)
                self.write(tiles.convolve(), range(start, start + OUT), rows)
                tiles.window[:2] = tiles.window[OUT:]

    def read(self, window: Tensor, planes: range, rows: range) -> None:
        """Activated input of these planes and of these rows and their neighbours, zero beyond the edges."""
        rows = range(rows.start - 1, rows.stop + 1)
        x, y = inside(planes, self.out.shape[0]), inside(rows, self.out.shape[1])
        if len(x) < len(planes):
            window.zero_()
        if len(x) == 0:
            return
        target = window[within(x, planes), within(y, rows), 1:-1]
        if self.resample is None:
            torch.addcmul(self.offset, self.x[span(x), span(y)], self.scale, out=target)
            F.silu(target, inplace=True)
            return
        source_x, source_y = source(x, self.resample), source(y, self.resample)
        h = F.silu(torch.addcmul(self.offset, self.x[span(source_x), span(source_y)], self.scale), inplace=True)
        h = channels_last(resize(h.permute(3, 0, 1, 2)[None], self.resample)[0])
        skip_x, skip_y = (x.start % 2, y.start % 2) if self.resample == "up" else (0, 0)
        target.copy_(h[skip_x : skip_x + len(x), skip_y : skip_y + len(y)])

    def write(self, result: Tensor, planes: range, rows: range) -> None:
        """Result (4, rows, Z' + 2, D) to the output, with the bias and what is added."""
        out = self.out[span(planes), span(rows)]
        result = result[: out.shape[0], : out.shape[1], : out.shape[2]]
        if self.bias is not None:
            result += self.bias
        if self.add is not None:
            result += self.add[span(planes), span(rows)]
        out.copy_(result)


def split(size: int, parts: int) -> list[range]:
    """0 to `size` in about `parts` equal ranges of whole tiles."""
    length = OUT * math.ceil(size / OUT / parts)
    return [range(start, min(start + length, size)) for start in range(0, size, length)]


def inside(r: range, size: int) -> range:
    return range(max(r.start, 0), min(r.stop, size))


def span(r: range) -> slice:
    return slice(r.start, r.stop)


def within(r: range, whole: range) -> slice:
    """Where r lies in the range that `whole` covers."""
    return slice(r.start - whole.start, r.stop - whole.start)


def source(r: range, resample: Resample) -> range:
    """What of the input `resize` makes r from."""
    return range(2 * r.start, 2 * r.stop) if resample == "down" else range(r.start // 2, (r.stop + 1) // 2)


class Tiles:
    """A row of n tiles along Y: its memory, and its convolution.

    Attributes:
        rows: rows of the output.
        window: input with a margin of one voxel, (6, 4n + 2, Z + 2, C).
    """

    def __init__(self, weight: Tensor, rows: int, depth: int) -> None:
        in_channels, out_channels = weight.shape[-2:]
        n, depth = math.ceil(rows / OUT), depth + 2
        self.weight, self.rows = weight, rows
        self.window = weight.new_empty(IN, OUT * n + 2, depth, in_channels)
        self.mixed = torch.empty_like(self.window)  # transformed along X
        self.data = weight.new_empty(IN, n, depth * in_channels)  # along X and Y, for one frequency of X
        self.products = weight.new_zeros(IN, n, depth * out_channels)
        self.back = weight.new_empty(IN, n, OUT, depth * out_channels)  # transformed back along Y
        self.result = weight.new_empty(OUT, OUT * n, depth, out_channels)
        forward, _, back = (matrix.float() for matrix in toom_cook())
        self.forward_x, self.back_x = forward, back
        self.forward_y, self.back_y = forward.expand(n, -1, -1), back.expand(n, -1, -1)

    def convolve(self) -> Tensor:
        """Convolution of the window: (4, 4n, Z + 2, D); the last two along Z mean nothing."""
        torch.mm(self.forward_x, self.window.flatten(1), out=self.mixed.flatten(1))
        for mixed, weight, back in zip(self.mixed, self.weight, self.back, strict=True):
            tiles = mixed.flatten(1).unfold(0, IN, OUT).transpose(1, 2)  # (n, 6, Z * C), overlapping
            torch.bmm(self.forward_y, tiles, out=self.data.transpose(0, 1))
            self.multiply(weight)
            torch.bmm(self.back_y, self.products.transpose(0, 1), out=back)
        torch.mm(self.back_x, self.back.flatten(1), out=self.result.flatten(1))
        return self.result

    def multiply(self, weight: Tensor) -> None:
        """Products of the 6 frequencies of Y, (6, 3, C, D), each a convolution along Z."""
        in_channels, out_channels = weight.shape[-2:]
        data = self.data.view(IN, -1, in_channels)
        n = data.shape[1] - 2
        products = self.products.view(IN, -1, out_channels)[:, :n]
        torch.bmm(data[:, :n], weight[:, 0], out=products)
        products.baddbmm_(data[:, 1 : n + 1], weight[:, 1])
        products.baddbmm_(data[:, 2:], weight[:, 2])
