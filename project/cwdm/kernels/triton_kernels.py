"""GroupNorm with SiLU, and the sum that ends a residual block, on a GPU: as few passes over memory as they take.

Both are bound by memory. PyTorch makes of the first a copy into contiguous memory, two passes of normalisation, one of
SiLU and a copy back, and as many on the way back; under autocast all of them in float32. Here one pass reads the
statistics and a second one normalises and activates, in channels_last_3d and in the tensor's own type, with every sum
in float32 or better. The gradient takes two more: one for its sums, one for the result, and nothing is kept for it but
the input. What would take passes of its own comes along: the timestep, the bias of the convolution before, and the
concatenation with a skip.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with PyTorch's CUDA wheels alone
    triton = None
INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on the CPU

_log = logging.getLogger(__name__)

LAYOUT = torch.channels_last_3d
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

TILE = 4096  # elements that a program holds at a time: 16 a thread, so that loads are 16 bytes wide in bfloat16
MOST_CHANNELS = 64  # of a tile: a whole line of the cache in bfloat16
WARPS = 8
MOST_PARTS = 1024  # parts that a sample is summed in: enough to occupy any GPU; fixed, so that all add in one order


def can_use_triton(x: Tensor) -> bool:
    """Whether the kernels may be used on x: on a GPU that they suit, or in Triton's interpreter."""
    if triton is None or x.dtype not in DTYPES:
        return False
    return INTERPRETED or (x.is_cuda and self_check(x.device, x.dtype, torch.is_grad_enabled()))


@cache
def self_check(device: torch.device, dtype: torch.dtype, gradients: bool) -> bool:
    """Whether the kernels, as compiled for this GPU, agree with PyTorch on a small tensor.

    A GPU, driver or Triton that they do not suit must cost speed, neither results nor the run.

    Args:
        gradients: with those of the backward pass, which inference needs not wait for.
    """
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(gradients), torch.autocast(device.type, enabled=False):
            inputs = check_inputs(device, dtype, gradients)
            found, wanted = results_of(kernel_operations, inputs), results_of(plain_operations, inputs)
        agree = all(close(a, b) for a, b in zip(found, wanted, strict=True))
    except Exception as error:  # whatever a compiler or driver may raise
        _log.warning("the Triton kernels cannot be used on %s (%s); going on without them", device, error)
        return False
    if not agree:
        _log.warning("the Triton kernels give wrong results on %s; going on without them", device)
    return agree


def check_inputs(device: torch.device, dtype: torch.dtype, gradients: bool) -> list[Tensor]:
    """x, a skip, weight, bias and shift of the normalisation, and what a residual block adds.

    The parameters are in the type of x as in inference, or, with gradients, in float32 as in training under autocast.
    """
    generator = torch.Generator().manual_seed(0)  # not PyTorch's own, whose numbers a training counts on
    volumes = [(2, 16, 5, 6, 7), (2, 8, 5, 6, 7), (2, 24, 5, 6, 7)]
    shapes: list[tuple[int, ...]] = [*volumes[:2], (24,), (24,), (2, 24), volumes[2]]
    drawn = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    parameters = torch.float32 if gradients else dtype
    drawn = [x.to(dtype, memory_format=LAYOUT) if x.ndim == 5 else x.to(parameters) for x in drawn]
    return [x.requires_grad_(gradients) for x in drawn]


def results_of(operations: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """What comes out, and the gradients of all inputs if they want one."""
    result = operations(*inputs)
    if not result.requires_grad:
        return [result]
    return [result, *torch.autograd.grad(result, inputs, torch.cos(inputs[-1].detach()))]


def kernel_operations(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, add: Tensor) -> Tensor:
    h: Tensor = NormSiLU.apply(weight, bias, shift, 4, 1e-5, x, skip)
    return residual_add(h, bias, add)


def plain_operations(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, add: Tensor) -> Tensor:
    """The same in PyTorch's operations, in float64 and rounded at the end."""
    h = torch.cat((x, skip), dim=1).double() + shift.double()[:, :, None, None, None]
    h = F.silu(F.group_norm(h.contiguous(), 4, weight.double(), bias.double(), 1e-5))
    return (h + bias.double()[:, None, None, None] + add.double()).to(x.dtype)


def close(found: Tensor, wanted: Tensor) -> bool:
    """Equal but for the rounding of the type, beside the largest of the values."""
    tolerance = 20 * torch.finfo(wanted.dtype).eps
    scale = max(1.0, float(wanted.detach().abs().max()))
    return torch.allclose(found.float(), wanted.float(), rtol=tolerance, atol=tolerance * scale)


def norm_silu(pieces: tuple[Tensor, ...], norm: nn.GroupNorm, shift: Tensor | None = None) -> Tensor:
    """`silu(norm(cat(pieces, dim=1) + shift))`, with gradients.

    Args:
        pieces: one or two tensors (B, C, X, Y, Z), fastest in channels_last_3d; they are not copied into one.
        norm: over all their channels, with weight and bias.
        shift: (B, channels of norm), added to every voxel.

    Returns:
        (B, channels of norm, X, Y, Z) in the type of the first piece, in channels_last_3d.
    """
    out: Tensor = NormSiLU.apply(norm.weight, norm.bias, shift, norm.num_groups, norm.eps, *pieces)
    return out


def residual_add(x: Tensor, bias: Tensor, *others: Tensor) -> Tensor:
    """`x + bias + others[0] + …` in one pass, with gradients, in the memory of x if that is in channels_last_3d.

    x and one or two others (B, C, X, Y, Z), bias (C,).
    """
    out: Tensor = ResidualAdd.apply(x.contiguous(memory_format=LAYOUT), bias, *others)
    return out


class NormSiLU(torch.autograd.Function):
    """`norm_silu`, which keeps its input and two numbers a group for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float, *pieces: Tensor
    ) -> Tensor:
        pieces = tuple(piece.contiguous(memory_format=LAYOUT) for piece in pieces)
        shift = None if shift is None else shift.contiguous()
        channels = len(weight)
        shape = (len(pieces[0]), channels, *pieces[0].shape[2:])
        with torch.cuda.device_of(pieces[0]):  # Triton launches on the current device, which need not be that of x
            statistics = group_statistics(pieces, channels, groups, eps, shift)
            out = torch.empty(shape, dtype=pieces[0].dtype, device=pieces[0].device, memory_format=LAYOUT)
            for piece, first in with_first_channel(pieces):
                grid, block = tiles(piece)
                normalise[grid](
                    piece, out, statistics, weight, bias, shift, rows=piece[0, 0].numel(), channels=piece.shape[1],
                    first=first, all_channels=channels, group=channels // groups, **block, num_warps=WARPS,
                )  # fmt: skip
        ctx.save_for_backward(weight, bias, shift, statistics, *pieces)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, shift, statistics, *pieces = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=LAYOUT)
        channels, group = len(weight), len(weight) // statistics.shape[1]
        with torch.cuda.device_of(gradient):
            sums = gradient_sums(gradient, pieces, statistics, weight, bias, shift)
            means = torch.empty_like(statistics)
            of_shift = sums.new_empty(sums.shape[1:])
            combine_gradients[statistics.shape[:2][::-1]](
                sums, statistics, weight, means, of_shift, rows=gradient[0, 0].numel(), channels=channels, group=group,
                BLOCK=triton.next_power_of_2(group),
            )  # fmt: skip
            of_pieces = [torch.empty_like(piece, memory_format=LAYOUT) for piece in pieces]
            for (piece, first), of_piece in zip(with_first_channel(pieces), of_pieces, strict=True):
                grid, block = tiles(piece)
                normalise_backward[grid](
                    piece, gradient, of_piece, statistics, means, weight, bias, shift, rows=piece[0, 0].numel(),
                    channels=piece.shape[1], first=first, all_channels=channels, group=group, **block,
                    num_warps=WARPS,
                )  # fmt: skip
        of_bias, of_weight = sums[:2].sum(1)
        gradients = (
            of_weight.to(weight.dtype),
            of_bias.to(bias.dtype),
            None if shift is None else of_shift.to(shift.dtype),
        )
        return *gradients, None, None, *of_pieces


class ResidualAdd(torch.autograd.Function):
    """`residual_add` of an x in channels_last_3d, whose memory becomes the result's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, *others: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        ctx.bias_dtype, ctx.dtypes = bias.dtype, [x.dtype for x in others]
        first, *rest = (other.contiguous(memory_format=LAYOUT) for other in others)
        grid, block = tiles(x)
        with torch.cuda.device_of(x):
            accumulate[grid](
                x, bias, first, rest[0] if rest else None, rows=x[0, 0].numel(), channels=x.shape[1], **block,
                num_warps=WARPS,
            )  # fmt: skip
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_bias = gradient.sum((0, 2, 3, 4), dtype=torch.float32).to(ctx.bias_dtype)
        return gradient, of_bias, *(gradient.to(dtype) for dtype in ctx.dtypes)


def with_first_channel(pieces: tuple[Tensor, ...] | list[Tensor]) -> Iterator[tuple[Tensor, int]]:
    """Each piece and where its channels begin among those of all."""
    first = 0
    for piece in pieces:
        yield piece, first
        first += piece.shape[1]


def group_statistics(
    pieces: tuple[Tensor, ...], channels: int, groups: int, eps: float, shift: Tensor | None
) -> Tensor:
    """Mean and 1 / sqrt(variance + eps) of every group, (B, groups, 2) float32.

    First the mean and the sum of squared deviations of every channel in every part of the volume, then all of those
    put together in a fixed order (Chan, Golub and LeVeque, 1983): nothing is lost beside a large mean, and the same
    input gives the same bits.
    """
    batch, rows = len(pieces[0]), pieces[0][0, 0].numel()
    part, parts = divide(pieces)
    moments = pieces[0].new_empty((2, batch, channels, parts), dtype=torch.float32)
    for piece, first in with_first_channel(pieces):
        (_, blocks, _), block = tiles(piece)
        measure[(parts, blocks, batch)](
            piece, *moments, rows=rows, part=part, channels=piece.shape[1], first=first, all_channels=channels,
            **block, num_warps=WARPS,
        )  # fmt: skip
    statistics = moments.new_empty((batch, groups, 2))
    combine[(groups, batch)](
        *moments, shift, statistics, rows=rows, part=part, parts=parts, group=channels // groups, eps=eps, BLOCK=1024,
    )  # fmt: skip
    return statistics


def gradient_sums(
    gradient: Tensor, pieces: list[Tensor], statistics: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None
) -> Tensor:
    """Sums over the voxels of every channel, (3, B, C) float64, in a fixed order as those of `group_statistics`.

    Of the gradient at SiLU's input, of that times the normalised input, and of the normalised input.
    """
    batch, channels = gradient.shape[:2]
    rows, (part, parts) = gradient[0, 0].numel(), divide(pieces)
    sums = gradient.new_empty((3, batch, channels, parts), dtype=torch.float32)
    for piece, first in with_first_channel(pieces):
        (_, blocks, _), block = tiles(piece)
        measure_gradients[(parts, blocks, batch)](
            piece, gradient, *sums, statistics, weight, bias, shift, rows=rows, part=part, channels=piece.shape[1],
            first=first, all_channels=channels, group=channels // statistics.shape[1], **block, num_warps=WARPS,
        )  # fmt: skip
    return sums.sum(-1, dtype=torch.float64)


def divide(pieces: tuple[Tensor, ...] | list[Tensor]) -> tuple[int, int]:
    """Rows of a part of a sample, and the number of parts."""
    rows = pieces[0][0, 0].numel()
    block_rows = min(tiles(piece)[1]["ROWS"] for piece in pieces)
    part = block_rows * triton.cdiv(triton.cdiv(rows, block_rows), MOST_PARTS)
    return part, triton.cdiv(rows, part)


def tiles(x: Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Programs along rows (voxels of a sample), channels and batch of (B, C, X, Y, Z), and the shape of a tile."""
    channels = min(triton.next_power_of_2(x.shape[1]), MOST_CHANNELS)
    rows = TILE // channels
    grid = (triton.cdiv(x[0, 0].numel(), rows), triton.cdiv(x.shape[1], channels), len(x))
    return grid, {"ROWS": rows, "CHANNELS": channels}


def jit(kernel: Callable[..., None]) -> Any:
    """A Triton kernel, launched as `kernel[grid](...)`; without Triton, a function that no one calls."""
    return kernel if triton is None else triton.jit(kernel)


# The kernels see a tensor in channels_last_3d as (B, rows, channels). Offsets are 64 bits wide, because a batch of
# volumes may hold more than 2**31 numbers.


@jit
def measure(  # type: ignore[no-untyped-def]
    x, means, squares, rows, part, channels, first, all_channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Mean and sum of squared deviations (B, all_channels, parts) of a part's rows, from column `first` on.

    Every element of a tile keeps its own running mean (Welford, 1962); they meet at the end.
    """
    index, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    x += sample * rows * channels + column
    start = index * part
    stop = tl.minimum(start + part, rows)
    count = tl.zeros((ROWS, 1), tl.float32)
    mean = tl.zeros((ROWS, CHANNELS), tl.float32)
    square = tl.zeros((ROWS, CHANNELS), tl.float32)
    for tile in range(start, stop, ROWS):
        row = tile + tl.arange(0, ROWS)[:, None]
        valid = (row < stop) & (column < channels)
        value = tl.load(x + row.to(tl.int64) * channels, mask=valid, other=0.0).to(tl.float32)
        count += tl.where(row < stop, 1.0, 0.0)
        deviation = tl.where(valid, value - mean, 0.0)
        mean += deviation / tl.maximum(count, 1.0)
        square += deviation * (value - mean)
    total = tl.sum(count * mean, axis=0, keep_dims=True) / (stop - start)
    square = tl.sum(square + count * (mean - total) * (mean - total), axis=0, keep_dims=True)
    target = (sample * all_channels + first + column) * tl.num_programs(0) + index
    tl.store(means + target, total, mask=column < channels)
    tl.store(squares + target, square, mask=column < channels)


@jit
def combine(  # type: ignore[no-untyped-def]
    means, squares, shift, statistics, rows, part, parts, group, eps, BLOCK: tl.constexpr
):  # fmt: skip
    """Statistics of one group of `group` channels with all their parts, in float64: a few thousand numbers."""
    index = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    size = group * parts
    means += index * size
    squares += index * size
    sums = tl.zeros((BLOCK,), tl.float64)
    sums_of_squares = tl.zeros((BLOCK,), tl.float64)
    for block in range(0, size, BLOCK):
        place = block + tl.arange(0, BLOCK)
        known = place < size
        weight = tl.where(known, tl.minimum(rows - place % parts * part, part), 0)
        mean = tl.load(means + place, mask=known, other=0.0).to(tl.float64)
        if shift is not None:
            mean += tl.load(shift + index * group + place // parts, mask=known, other=0.0).to(tl.float64)
        sums += weight * mean
        sums_of_squares += weight * mean * mean + tl.load(squares + place, mask=known, other=0.0).to(tl.float64)
    centre = tl.sum(sums, axis=0) / group / rows
    # A difference of squares, but in float64: it takes a mean of 1e7 times the spread to lose it.
    variance = tl.maximum(tl.sum(sums_of_squares, axis=0) / group / rows - centre * centre, 0.0)
    tl.store(statistics + 2 * index, centre.to(tl.float32))
    tl.store(statistics + 2 * index + 1, (1.0 / tl.sqrt(variance + eps)).to(tl.float32))


@jit
def normalise(  # type: ignore[no-untyped-def]
    x, out, statistics, weight, bias, shift, rows, channels, first, all_channels, group,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """SiLU of the normalised x, to the columns of `out` (B, rows, all_channels) from `first` on."""
    sample = tl.program_id(2).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    known = column < channels
    valid = (row < rows) & known
    channel = first + column
    place = sample * all_channels + channel
    centre = tl.load(statistics + 2 * (place // group), mask=known, other=0.0)
    scale = tl.load(statistics + 2 * (place // group) + 1, mask=known, other=0.0)
    scale *= tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    if shift is not None:
        centre -= tl.load(shift + place, mask=known, other=0.0).to(tl.float32)
    value = tl.load(x + (sample * rows + row) * channels + column, mask=valid, other=0.0).to(tl.float32)
    value = (value - centre) * scale + offset
    value = value * tl.sigmoid(value)
    tl.store(out + (sample * rows + row) * all_channels + channel, value.to(out.dtype.element_ty), mask=valid)


@jit
def accumulate(  # type: ignore[no-untyped-def]
    x, bias, first, second, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """x += bias + first + second, the sum in float32 and rounded once."""
    sample = tl.program_id(2).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    known = column < channels
    valid = (row < rows) & known
    place = (sample * rows + row) * channels + column
    value = tl.load(x + place, mask=valid, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=known, other=0.0).to(tl.float32)
    value += tl.load(first + place, mask=valid, other=0.0).to(tl.float32)
    if second is not None:
        value += tl.load(second + place, mask=valid, other=0.0).to(tl.float32)
    tl.store(x + place, value.to(x.dtype.element_ty), mask=valid)


@jit
def normalised(  # type: ignore[no-untyped-def]
    x, statistics, weight, bias, shift, sample, row, column, rows, channels, first, all_channels, group
):  # fmt: skip
    """The normalised x of a tile, the factor that SiLU's derivative is, and that of the normalisation: 1 / std."""
    known = column < channels
    channel = first + column
    place = sample * all_channels + channel
    centre = tl.load(statistics + 2 * (place // group), mask=known, other=0.0)
    scale = tl.load(statistics + 2 * (place // group) + 1, mask=known, other=0.0)
    if shift is not None:
        centre -= tl.load(shift + place, mask=known, other=0.0).to(tl.float32)
    value = tl.load(x + (sample * rows + row) * channels + column, mask=(row < rows) & known, other=0.0)
    value = (value.to(tl.float32) - centre) * scale
    gain = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    inner = value * gain + tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(inner)
    return value, sigmoid * (1.0 + inner * (1.0 - sigmoid)), scale


@jit
def measure_gradients(  # type: ignore[no-untyped-def]
    x, gradient, sums, products, values, statistics, weight, bias, shift, rows, part, channels, first, all_channels,
    group, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The sums (B, all_channels, parts) of `gradient_sums` over a part's rows, from column `first` on."""
    index, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    start = index * part
    stop = tl.minimum(start + part, rows)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    total_product = tl.zeros((ROWS, CHANNELS), tl.float32)
    total_value = tl.zeros((ROWS, CHANNELS), tl.float32)
    for tile in range(start, stop, ROWS):
        row = (tile + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        valid = (row < stop) & (column < channels)
        value, slope, _ = normalised(
            x, statistics, weight, bias, shift, sample, row, column, rows, channels, first, all_channels, group
        )
        place = (sample * rows + row) * all_channels + first + column
        inner = tl.load(gradient + place, mask=valid, other=0.0).to(tl.float32) * slope
        total += inner
        total_product += inner * value
        total_value += tl.where(valid, value, 0.0)
    target = (sample * all_channels + first + column) * tl.num_programs(0) + index
    tl.store(sums + target, tl.sum(total, axis=0, keep_dims=True), mask=column < channels)
    tl.store(products + target, tl.sum(total_product, axis=0, keep_dims=True), mask=column < channels)
    tl.store(values + target, tl.sum(total_value, axis=0, keep_dims=True), mask=column < channels)


@jit
def combine_gradients(  # type: ignore[no-untyped-def]
    sums, statistics, weight, means, of_shift, rows, channels, group, BLOCK: tl.constexpr
):  # fmt: skip
    """What the statistics of one group take from the gradient, and the gradient of the shift of its channels.

    With g the gradient at the normalised input n: `means` are those of g and of g n over the group's channels and
    voxels, and x has the gradient (g - means[0] - n means[1]) / std.
    """
    index, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    member = tl.arange(0, BLOCK)
    known = member < group
    place = sample * channels + index * group + member
    length = tl.num_programs(1).to(tl.int64) * channels
    gain = tl.load(weight + index * group + member, mask=known, other=0.0).to(tl.float64)
    total = tl.load(sums + place, mask=known, other=0.0) * gain
    product = tl.load(sums + length + place, mask=known, other=0.0) * gain
    value = tl.load(sums + 2 * length + place, mask=known, other=0.0)
    mean = tl.sum(total, axis=0) / group / rows
    mean_product = tl.sum(product, axis=0) / group / rows
    at = 2 * (sample * tl.num_programs(0) + index)
    scale = tl.load(statistics + at + 1)
    tl.store(means + at, mean.to(tl.float32))
    tl.store(means + at + 1, mean_product.to(tl.float32))
    tl.store(of_shift + place, (total - rows * mean - value * mean_product) * scale, mask=known)


@jit
def normalise_backward(  # type: ignore[no-untyped-def]
    x, gradient, out, statistics, means, weight, bias, shift, rows, channels, first, all_channels, group,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradient of x (B, rows, channels) from the columns of `gradient` (B, rows, all_channels) from `first` on."""
    sample = tl.program_id(2).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    known = column < channels
    valid = (row < rows) & known
    channel = first + column
    value, slope, scale = normalised(
        x, statistics, weight, bias, shift, sample, row, column, rows, channels, first, all_channels, group
    )
    at = 2 * ((sample * all_channels + channel) // group)
    slope *= tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    inner = tl.load(gradient + (sample * rows + row) * all_channels + channel, mask=valid, other=0.0).to(tl.float32)
    inner = inner * slope - tl.load(means + at, mask=known, other=0.0)
    inner -= value * tl.load(means + at + 1, mask=known, other=0.0)
    tl.store(out + (sample * rows + row) * channels + column, (inner * scale).to(out.dtype.element_ty), mask=valid)
