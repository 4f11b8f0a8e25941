"""The operations that a U-Net is made of, each computed in the fastest way that serves a tensor.

This is the only door to the kernels. A network says what it computes; here it is decided how:

- on a GPU, by the Triton kernels: in channels_last_3d and in the tensor's own type, with gradients;
- in float32 on the CPU without gradients, where a tensor is large enough, by the Winograd sweep;
- everywhere else by PyTorch's modules.

The Triton kernels add a bias, or take two tensors for one, in passes over memory that they make anyway. So that no pass
is spent on these alone, an operation may hand on a `Joined` or a `Sum` for the next one to write out.
"""

import math
import os
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cwdm.kernels.resampling import LAYOUT, Resample, resample, resized

# Below these sizes, transforming data and weights for the Winograd sweep costs more than it saves.
MIN_CHANNELS = 32
MIN_VOXELS = 4096


@dataclass(frozen=True)
class Joined:
    """`cat(pieces, dim=1)`, not yet written to memory; pieces (B, C, X, Y, Z)."""

    pieces: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sum:
    """Sum of `terms` (B, C, X, Y, Z) and of a bias of their channels, (C,) or (B, C), not yet written to memory."""

    terms: tuple[Tensor, ...]
    bias: Tensor


Features = Tensor | Joined | Sum
"""(B, C, X, Y, Z), as one operation hands it to the next."""


def conv3(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """3×3×3 convolution with padding 1: (B, C, X, Y, Z) -> (B, D, X, Y, Z)."""
    if triton_kernels(x) is not None:
        x = x.contiguous(memory_format=LAYOUT)
    output: Tensor = winograd().convolve(x, conv) if use_winograd(x, conv) else conv(module_layout(x))
    return output


def norm_silu(x: Features, norm: nn.Module) -> Tensor:
    """`silu(norm(x))`, (B, C, X, Y, Z); norm over the C channels."""
    kernels = triton_kernels(x)
    if kernels is None or not isinstance(norm, nn.GroupNorm):
        return plain_norm_silu(written(x), norm)
    if isinstance(x, Joined):
        return kernels.norm_silu(x.pieces, norm)
    if isinstance(x, Sum) and len(x.terms) == 1:
        return kernels.norm_silu(x.terms, norm, x.bias.expand(len(x.terms[0]), -1))
    return kernels.norm_silu((written(x),), norm)


def plain_norm_silu(x: Tensor, norm: nn.Module) -> Tensor:
    """`norm_silu` in PyTorch's operations; the result has the layout of x.

    They know GroupNorm on contiguous tensors only: on a GPU they return those whatever they get, and on the CPU they
    sum channels_last tensors carelessly (1e-3 wrong over a million voxels).
    """
    if not isinstance(norm, nn.GroupNorm):
        return F.silu(norm(module_layout(x)))
    x = module_layout(x)
    layout = LAYOUT if x.is_contiguous(memory_format=LAYOUT) else torch.contiguous_format
    return F.silu(norm(x.contiguous())).contiguous(memory_format=layout)


def norm_silu_conv(
    x: Features,
    norm: nn.Module,
    conv: nn.Conv3d,
    change: Resample = None,
    add: Features | None = None,
    overwrite: bool = False,
) -> Tensor:
    """`conv(resample(silu(norm(x)), change)) + add`.

    Args:
        x: (B, C, X, Y, Z).
        norm: over the C channels.
        conv: C to D channels, 3×3×3, padding 1.
        change: halve or double the sizes before the convolution.
        add: (B, D, X', Y', Z'), or what broadcasts to it.
        overwrite: the result may take the memory of `add`.

    Returns:
        (B, D, X', Y', Z').
    """
    if triton_kernels(x) is not None:
        h = resample(norm_silu(x, norm), change)
        return conv3(h, conv) if add is None else residual_add(F.conv3d(h, conv.weight, padding=1), conv.bias, add)
    x = written(x)
    add = None if add is None else written(add)
    if isinstance(norm, nn.GroupNorm) and use_winograd(x, conv, change):
        return winograd().convolve(x, conv, norm, change, add, overwrite)
    h = conv3(resample(norm_silu(x, norm), change), conv)
    return h if add is None else h + add


def norm_silu_conv_shift(
    x: Features, norm: nn.Module, conv: nn.Conv3d, shift: Tensor, change: Resample = None
) -> Features:
    """`norm_silu_conv` plus a shift of every channel, (B, D)."""
    if triton_kernels(x) is None:
        return norm_silu_conv(x, norm, conv, change, add=shift[:, :, None, None, None])
    h = F.conv3d(resample(norm_silu(x, norm), change), conv.weight, padding=1)
    return Sum((h,), shift.float() if conv.bias is None else shift.float() + conv.bias)


def residual_add(h: Tensor, bias: Tensor | None, add: Features) -> Tensor:
    """`h + bias + add` by the Triton kernel, in the memory of h; h and add (B, C, X, Y, Z), bias (C,)."""
    terms = add.terms if isinstance(add, Sum) else (written(add),)
    biases = [b.float() for b in (bias, add.bias if isinstance(add, Sum) else None) if b is not None]
    total = sum(biases[1:], start=biases[0]) if biases else h.new_zeros(h.shape[1])
    kernels = triton_kernels(h)
    assert kernels is not None
    return kernels.residual_add(h, total, *terms)


def shortcut(x: Features, module: nn.Module, change: Resample = None) -> Features:
    """`module(resample(x, change))` for what stands beside a block's convolutions: nothing, or a 1×1×1 convolution."""
    if not isinstance(module, nn.Conv3d) or triton_kernels(x) is None:
        output: Tensor = module(resample(written(x), change))
        return output
    pieces = x.pieces if isinstance(x, Joined) and change is None else (resample(written(x), change),)
    weights = module.weight.flatten(1).split([piece.shape[1] for piece in pieces], dim=1)
    terms = tuple(F.linear(piece.movedim(1, -1), w).movedim(-1, 1) for piece, w in zip(pieces, weights, strict=True))
    return Sum(terms, module.weight.new_zeros(module.out_channels) if module.bias is None else module.bias)


def concatenate(x: Tensor, skip: Tensor) -> Features:
    """`cat((x, skip), dim=1)`."""
    return torch.cat((x, skip), dim=1) if triton_kernels(x) is None else Joined((x, skip))


def written(x: Features) -> Tensor:
    """What x stands for, as a tensor."""
    if isinstance(x, Joined):
        return torch.cat(x.pieces, dim=1)
    if isinstance(x, Sum):
        first, *others = x.terms
        return sum(others, start=first) + x.bias.to(first.dtype)[..., None, None, None]
    return x


def in_layout_of(other: Tensor, x: Tensor) -> Tensor:
    """x in channels_last_3d, at the cost of a copy, where `other` is and the device does better with it."""
    last = x.device.type != "cpu" and other.is_contiguous(memory_format=LAYOUT)
    return x.contiguous(memory_format=LAYOUT) if last else x


def module_layout(x: Tensor) -> Tensor:
    """x in the layout in which PyTorch's own modules do well.

    On the CPU, its GroupNorm of channels_last tensors sums carelessly (1e-3 wrong over a million voxels), and its
    convolution spends more time on rearranging weights than on small tensors.
    """
    return x.contiguous() if x.device.type == "cpu" else x


def triton_kernels(x: Features) -> ModuleType | None:
    """The Triton kernels if they may be used on x; loaded only where there is a GPU, or Triton's interpreter."""
    tensor = x if isinstance(x, Tensor) else x.pieces[0] if isinstance(x, Joined) else x.terms[0]
    if not tensor.is_cuda and "TRITON_INTERPRET" not in os.environ:
        return None
    from cwdm.kernels import triton_kernels as kernels

    return kernels if kernels.can_use_triton(tensor) else None


def use_winograd(x: Tensor, conv: nn.Conv3d, change: Resample = None) -> bool:
    """Whether the Winograd sweep may be used on x, and is faster than the plain modules."""
    return supports(x) and conv.in_channels >= MIN_CHANNELS and math.prod(resized(x, change)) >= MIN_VOXELS


def supports(x: Tensor) -> bool:
    """Whether x may take that path: inference in float32 on the CPU."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def winograd() -> ModuleType:
    """The Winograd sweep; loaded only where it computes, as GPUs and small networks need none of it."""
    from cwdm.kernels import winograd as sweep

    return sweep
