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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cwdm.kernels.resampling import Resample, resize, resized

OUT = 4  # outputs of a tile along X and along Y
IN = OUT + 2  # inputs it needs there, and products it is made from
ROWS = 1024  # rows of a matrix product: enough to reuse the weights, few enough for the cache
BLOCKS_PER_THREAD = 4  # so that a thread that is held up does not hold up the others


def convolve(
    x: Tensor,
    conv: nn.Conv3d,
    norm: nn.GroupNorm | None = None,
    resample: Resample = None,
    add: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """`conv(resize(silu(norm(x)), resample)) + add`, or `conv(x)` if there is no norm; without gradients.

    Args:
        x: (B, C, X, Y, Z), float32; best in `channels_last_3d`.
        conv: C to D channels, 3×3×3, padding 1.
        norm: over the C channels, with weight and bias.
        resample: halve or double the sizes before the convolution.
        add: broadcastable to the result.
        overwrite: the result, of the same shape, may take the memory of `add`.

    Returns:
        (B, D, X', Y', Z'), in `channels_last_3d`.
    """
    x = x.contiguous(memory_format=torch.channels_last_3d)
    shape = (x.shape[0], conv.out_channels, *resized(x, resample))
    if add is not None and overwrite:
        add = out = add.contiguous(memory_format=torch.channels_last_3d)
    else:
        out = torch.empty(shape, memory_format=torch.channels_last_3d)
    threads = torch.get_num_threads()
    pool = workers(threads)
    weight = transform_weight(conv.weight)
    for b in range(len(x)):
        sample = channels_last(x[b])
        normalisation = None if norm is None else affine(norm, sample, pool)
        residual = None if add is None else channels_last(add.expand(shape)[b])
        sweep = Sweep(sample, normalisation, resample, weight, conv.bias, residual, channels_last(out[b]))
        blocks = iter(sweep.blocks(BLOCKS_PER_THREAD * threads))
        list(pool.map(sweep.run, [blocks] * threads))
    return out


def channels_last(x: Tensor) -> Tensor:
    """(C, X, Y, Z) -> (X, Y, Z, C), the same memory."""
    return x.permute(1, 2, 3, 0)


@cache
def workers(threads: int) -> ThreadPoolExecutor:
    """Threads that each compute on one core.

    Each takes whole tiles. Operations shared among threads wait for the slowest at the end of each one; with the many
    small operations here and other programs on the same cores, that waiting was measured to take most of the time.
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

    `result @ ((filter @ g) * (data @ d))` are the 4 outputs of filter g on 6 inputs d: the transpose of multiplying
    polynomials by way of their values at 6 points (Toom and Cook). The points 0, ±√½, ±√2 and infinity lose 2.7 times
    less precision than the usual 0, ±1, ±2 and infinity: in two axes the error in float32 is 1.1e-6 of the result's
    RMS instead of 3.1e-6, where direct summation has 0.2e-6.
    """
    points = torch.tensor([0, math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2), -math.sqrt(2)], dtype=torch.float64)

    def values(coefficients: int) -> Tensor:
        at_infinity = F.one_hot(torch.tensor([coefficients - 1]), coefficients)
        return torch.cat((points[:, None] ** torch.arange(coefficients), at_infinity))

    return torch.linalg.inv(values(IN)).T, values(3), values(OUT).T


def transform_weight(weight: Tensor) -> Tensor:
    """Weights of the 36 products: (D, C, 3, 3, 3) -> (6 of X, 6 of Y, 3 of Z, C, D)."""
    out_channels, in_channels = weight.shape[:2]
    _, filters, _ = toom_cook()
    taps = weight.permute(2, 3, 4, 1, 0).reshape(9, -1)
    return (torch.kron(filters, filters).float() @ taps).view(IN, IN, 3, in_channels, out_channels)


def affine(norm: nn.GroupNorm, x: Tensor, pool: ThreadPoolExecutor) -> tuple[Tensor, Tensor]:
    """Scale and offset (C,) of the channels that do what `norm` does to x (X, Y, Z, C)."""
    means, variances = (torch.stack(planes).double() for planes in zip(*pool.map(moments, x), strict=True))
    mean = grouped_mean(means, norm.num_groups)
    variance = grouped_mean(variances + (means - mean) ** 2, norm.num_groups)
    scale = norm.weight / (variance + norm.eps).sqrt()
    return scale.float(), (norm.bias - scale * mean).float()


@torch.inference_mode()
def moments(plane: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) of a plane (Y, Z, C)."""
    mean = plane.mean((0, 1))
    return mean, (plane - mean).square_().mean((0, 1))


def grouped_mean(x: Tensor, groups: int) -> Tensor:
    """Mean over planes and over the channels of a group, for each channel: (X, C) -> (C,)."""
    channels = x.shape[1]
    return x.mean(0).view(groups, -1).mean(1).repeat_interleave(channels // groups)


@dataclass(frozen=True)
class Sweep:
    """The way of one sample from input to output.

    Attributes:
        x: input, (X, Y, Z, C).
        normalisation: scale and offset (C,), followed by SiLU.
        resample: change of size after that.
        weight: transformed, (6, 6, 3, C, D).
        bias: (D,).
        add: (X', Y', Z', D).
        out: to be written, (X', Y', Z', D).
    """

    x: Tensor
    normalisation: tuple[Tensor, Tensor] | None
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
        """Compute blocks of the output until none is left, each in slabs of 4 planes."""
        tiles: Tiles | None = None
        for planes, rows in blocks:
            if tiles is None or tiles.rows != len(rows):
                tiles = Tiles(self.weight, len(rows), self.out.shape[2])
            tiles.window.zero_()
            self.read(tiles.window[:2], range(planes.start - 1, planes.start + 1), rows)
            for start in planes[::OUT]:
                self.read(tiles.window[2:], range(start + 1, start + 1 + OUT), rows)
                self.write(tiles.convolve(self.weight), range(start, start + OUT), rows)
                tiles.window[:2] = tiles.window[OUT:]

    def read(self, window: Tensor, planes: range, rows: range) -> None:
        """Activated input of these planes, and of these rows and their neighbours; zero beyond the edges."""
        rows = range(rows.start - 1, rows.stop + 1)
        x, y = inside(planes, self.out.shape[0]), inside(rows, self.out.shape[1])
        if len(x) < len(planes):
            window.zero_()
        if len(x) == 0:
            return
        target = window[within(x, planes), within(y, rows), 1:-1]
        if self.resample is None:
            self.activate(self.x[span(x), span(y)], target)
            return
        source_x, source_y = source(x, self.resample), source(y, self.resample)
        h = self.x[span(source_x), span(source_y)]
        h = self.activate(h, torch.empty_like(h, memory_format=torch.contiguous_format))
        h = channels_last(resize(h.permute(3, 0, 1, 2)[None], self.resample)[0])
        whole_x, whole_y = (resized_range(r, self.resample) for r in (source_x, source_y))
        target.copy_(h[within(x, whole_x), within(y, whole_y)])

    def activate(self, x: Tensor, out: Tensor) -> Tensor:
        """Normalisation and SiLU of (..., C)."""
        if self.normalisation is None:
            return out.copy_(x)
        scale, offset = self.normalisation
        return F.silu(torch.addcmul(offset, x, scale, out=out), inplace=True)

    def write(self, result: Tensor, planes: range, rows: range) -> None:
        """Result of a row of tiles, with the bias and what is added, to the output."""
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
    """Where r lies in what covers `whole`."""
    return slice(r.start - whole.start, r.stop - whole.start)


def source(r: range, resample: Resample) -> range:
    """Input that `resize` makes r from."""
    return range(2 * r.start, 2 * r.stop) if resample == "down" else range(r.start // 2, (r.stop + 1) // 2)


def resized_range(r: range, resample: Resample) -> range:
    """What `resize` makes of r."""
    return range(r.start // 2, r.stop // 2) if resample == "down" else range(2 * r.start, 2 * r.stop)


class Tiles:
    """A row of n tiles along Y: its memory, and its convolution.

    Attributes:
        rows: rows of the output.
        window: input with a margin of one voxel, (6, 4n + 2, Z + 2, C).
    """

    def __init__(self, weight: Tensor, rows: int, depth: int) -> None:
        in_channels, out_channels = weight.shape[-2:]
        n, depth = math.ceil(rows / OUT), depth + 2
        self.rows = rows
        self.window = torch.empty(IN, OUT * n + 2, depth, in_channels)
        self.along_x = torch.empty_like(self.window)  # transformed along X
        self.along_xy = torch.empty(IN, n, depth * in_channels)  # and along Y, for one frequency of X
        self.products = torch.zeros(IN, n, depth * out_channels)
        self.back_along_y = torch.empty(IN, n, OUT, depth * out_channels)
        self.result = torch.empty(OUT, OUT * n, depth, out_channels)
        self.forward, _, self.back = (matrix.float() for matrix in toom_cook())

    def convolve(self, weight: Tensor) -> Tensor:
        """Convolution of the window, (4, 4n, Z + 2, D), of which the last two along Z mean nothing."""
        torch.mm(self.forward, self.window.flatten(1), out=self.along_x.flatten(1))
        n = self.products.shape[1]
        forward, back = self.forward.expand(n, -1, -1), self.back.expand(n, -1, -1)
        for frequency in range(IN):
            tiles = self.along_x[frequency].flatten(1).unfold(0, IN, OUT).transpose(1, 2)  # (n, 6, Z * C), overlapping
            torch.bmm(forward, tiles, out=self.along_xy.transpose(0, 1))
            self.multiply(weight[frequency])
            torch.bmm(back, self.products.transpose(0, 1), out=self.back_along_y[frequency])
        torch.mm(self.back, self.back_along_y.flatten(1), out=self.result.flatten(1))
        return self.result

    def multiply(self, weight: Tensor) -> None:
        """Products for the 6 frequencies of Y, each a convolution along Z with (6, 3, C, D)."""
        in_channels, out_channels = weight.shape[-2:]
        data = self.along_xy.view(IN, -1, in_channels)
        count = data.shape[1] - 2
        products = self.products.view(IN, -1, out_channels)[:, :count]
        torch.bmm(data[:, :count], weight[:, 0], out=products)
        products.baddbmm_(data[:, 1 : count + 1], weight[:, 1])
        products.baddbmm_(data[:, 2:], weight[:, 2])
