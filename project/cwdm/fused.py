"""GroupNorm with SiLU, and the sum that ends a residual block, on a GPU: as few passes over memory as they take.

Both are bound by memory. PyTorch makes of the first a copy into contiguous memory, two passes of normalisation, one of
SiLU and a copy back; here one pass reads the statistics and a second one normalises and activates, in
channels_last_3d and in the tensor's own type, with every sum in float32 or better. What would take passes of its own
comes along in these two: the timestep, the bias of the convolution before, and the concatenation with a skip.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
MOST_PARTS = 1024  # parts of a sample: enough for every GPU, and the same on all of them, so that sums are too


def fuses(x: Tensor, norm: nn.Module) -> bool:
    """Whether the kernels may be used: inference through a GroupNorm on a GPU (or in Triton's interpreter)."""
    return (
        triton is not None
        and (x.is_cuda or INTERPRETED)
        and x.dtype in DTYPES
        and isinstance(norm, nn.GroupNorm)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        and (INTERPRETED or trusted(x.device, x.dtype))
    )


@cache
def trusted(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels, as compiled for this GPU, agree with PyTorch on a small tensor.

    A GPU, driver or Triton that they do not suit must cost speed, neither results nor the run.
    """
    norm = nn.GroupNorm(4, 24, device=device, dtype=dtype).requires_grad_(False)
    x, skip = (torch.randn(2, n, 5, 6, 7, device=device, dtype=dtype).to(memory_format=LAYOUT) for n in (16, 8))
    shift = torch.randn(2, 24, device=device, dtype=dtype)
    try:
        found, wanted = with_kernels(x, norm, shift, skip), plain(x, norm, shift, skip)
        total = x + x + shift[0, :16, None, None, None]
        agree = close(found, wanted) and close(add_(x.clone(), shift[0, :16].contiguous(), x), total)
    except Exception as error:  # whatever a compiler or driver may raise
        _log.warning("the fused kernels cannot be used on %s (%s); going on without them", device, error)
        return False
    if not agree:
        _log.warning("the fused kernels give wrong results on %s; going on without them", device)
    return agree


def close(found: Tensor, wanted: Tensor) -> bool:
    """Equal but for the rounding of the type."""
    tolerance = 20 * torch.finfo(wanted.dtype).eps
    return torch.allclose(found.float(), wanted.float(), rtol=tolerance, atol=tolerance)


def group_norm_silu(x: Tensor, norm: nn.GroupNorm, shift: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
    """`silu(norm(cat((x, skip), dim=1) + shift))`.

    Args:
        x: (B, C, X, Y, Z), fastest in channels_last_3d.
        norm: over C + D channels, with weight and bias.
        shift: (B, C + D), added to every voxel.
        skip: (B, D, X, Y, Z), more channels of the same voxels; the two are not copied into one.

    Returns:
        (B, C + D, X, Y, Z) in the type of x: in channels_last_3d where the kernels run, else in the layout of x.
    """
    return with_kernels(x, norm, shift, skip) if fuses(x, norm) else plain(x, norm, shift, skip)


def with_kernels(x: Tensor, norm: nn.GroupNorm, shift: Tensor | None, skip: Tensor | None) -> Tensor:
    """`group_norm_silu` in two passes over memory."""
    pieces = [piece.contiguous(memory_format=LAYOUT) for piece in (x, skip) if piece is not None]
    shift = None if shift is None else shift.contiguous()
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be that of x
        statistics = group_statistics(pieces, norm, shift)
        shape = (len(x), norm.num_channels, *x.shape[2:])
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAYOUT)
        first = 0
        for piece in pieces:
            grid, block = tiles(piece)
            normalise[grid](
                piece, out, statistics, norm.weight, norm.bias, shift, rows=piece[0, 0].numel(),
                channels=piece.shape[1], first=first, all_channels=norm.num_channels,
                group=norm.num_channels // norm.num_groups, **block, num_warps=WARPS,
            )  # fmt: skip
            first += piece.shape[1]
    return out


def plain(x: Tensor, norm: nn.GroupNorm, shift: Tensor | None, skip: Tensor | None) -> Tensor:
    """`group_norm_silu` in PyTorch's operations, with gradients; the result has the layout of x.

    They know GroupNorm on contiguous tensors only: on a GPU they return those whatever they get, and on the CPU they
    sum channels_last tensors carelessly (1e-3 wrong over a million voxels).
    """
    layout = LAYOUT if x.is_contiguous(memory_format=LAYOUT) else torch.contiguous_format
    if skip is not None:
        x = torch.cat((x, skip), dim=1)
    if shift is not None:
        x = x + shift.to(x.dtype)[:, :, None, None, None]
    return F.silu(norm(x.contiguous())).contiguous(memory_format=layout)


def add_(x: Tensor, bias: Tensor, *others: Tensor) -> Tensor:
    """`x + bias + others[0] + …` in one pass, in the memory of x if that is in channels_last_3d.

    x and one or two others (B, C, X, Y, Z), bias (C,); only where `fuses` says that the kernels may be used.
    """
    x, first, *rest = (tensor.contiguous(memory_format=LAYOUT) for tensor in (x, *others))
    grid, block = tiles(x)
    with torch.cuda.device_of(x):
        accumulate[grid](
            x, bias, first, rest[0] if rest else None, rows=x[0, 0].numel(), channels=x.shape[1], **block,
            num_warps=WARPS,
        )  # fmt: skip
    return x


def group_statistics(pieces: list[Tensor], norm: nn.GroupNorm, shift: Tensor | None) -> Tensor:
    """Mean and 1 / sqrt(variance + eps) of every group, (B, groups, 2) float32.

    First the mean and the sum of squared deviations of every channel in every part of the volume, then all of those
    put together in a fixed order (Chan, Golub and LeVeque, 1983): nothing is lost beside a large mean, and the same
    input gives the same bits.
    """
    batch, rows = len(pieces[0]), pieces[0][0, 0].numel()
    channels = norm.num_channels
    block_rows = min(tiles(piece)[1]["ROWS"] for piece in pieces)
    part = block_rows * triton.cdiv(triton.cdiv(rows, block_rows), MOST_PARTS)
    parts = triton.cdiv(rows, part)
    moments = pieces[0].new_empty((2, batch, channels, parts), dtype=torch.float32)
    first = 0
    for piece in pieces:
        (_, blocks, _), block = tiles(piece)
        measure[(parts, blocks, batch)](
            piece, *moments, rows=rows, part=part, channels=piece.shape[1], first=first, all_channels=channels,
            **block, num_warps=WARPS,
        )  # fmt: skip
        first += piece.shape[1]
    statistics = moments.new_empty((batch, norm.num_groups, 2))
    combine[(norm.num_groups, batch)](
        *moments, shift, statistics, rows=rows, part=part, parts=parts, group=channels // norm.num_groups,
        eps=norm.eps, BLOCK=1024,
    )  # fmt: skip
    return statistics


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
