"""The kernels against PyTorch in float64: on a GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before Triton is first imported, so it has a process of its own.
"""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cwdm.blocks import ResBlock
from cwdm.kernels import triton_kernels as kernels
from cwdm.kernels.ops import Joined, plain_norm_silu
from cwdm.kernels.ops import triton_kernels as kernels_for
from cwdm.kernels.triton_kernels import DTYPES, LAYOUT, can_use_triton, norm_silu, residual_add, self_check
from cwdm.unet import UNet, UNetConfig

Run = Callable[..., Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Calls a function of this module where the kernels run."""
    if DEVICE == "cuda":
        yield lambda function, *arguments: function(*arguments)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, get_context("spawn"))
        pool.submit(os.getpid).result()  # starts the process, with this environment
    with pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, channels)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.to(DEVICE)


def exact(x: Tensor, norm: nn.GroupNorm, shift: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
    """`norm_silu` in float64."""
    x = x.double() if skip is None else torch.cat((x, skip), dim=1).double()
    if shift is not None:
        x = x + shift.double()[:, :, None, None, None]
    return F.silu(F.group_norm(x, norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps))


def plain(x: Tensor, norm: nn.GroupNorm, shift: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
    """The same in PyTorch's operations."""
    x = x if skip is None else torch.cat((x, skip), dim=1)
    return plain_norm_silu(x if shift is None else x + shift[:, :, None, None, None], norm)


def errors(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, skip: int, mean: float, last: bool, parts: int
) -> list[float]:
    """Largest error of the kernels and of the plain path, with and without a shift, in turn.

    Where the kernels write 16 bits, the rounding to them is taken off: what is left is the error before it. On a GPU
    they round to nearest; the interpreter cuts bfloat16 off.
    """
    torch.manual_seed(0)
    kernels.MOST_PARTS = parts
    batch, channels, *sizes = shape
    norm = group_norm(channels + skip, groups)
    layout = LAYOUT if last else torch.contiguous_format
    x = (torch.randn(shape, device=DEVICE) * 2 + mean).to(dtype).contiguous(memory_format=layout)
    more = torch.randn(batch, skip, *sizes, device=DEVICE).to(dtype) if skip else None
    pieces = (x,) if more is None else (x, more)
    shift = torch.randn(batch, channels + skip, device=DEVICE)
    found = []
    with torch.no_grad():
        assert can_use_triton(x)
        for given in (None, shift):
            reference = exact(x, norm, given, more)
            result, again = norm_silu(pieces, norm, given), norm_silu(pieces, norm, given)
            assert result.dtype == dtype
            assert result.is_contiguous(memory_format=LAYOUT)
            assert torch.equal(result, again)
            step = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps * reference.abs()
            step /= 1 if dtype == torch.bfloat16 and DEVICE == "cpu" else 2
            found.append(float(((result - reference).abs() - step).max()))
            oracle = plain(x.float(), norm, given, None if more is None else more.float())
            found.append(float((oracle - reference).abs().max()))
    return found


@needs_triton
@pytest.mark.parametrize(
    ("shape", "groups", "dtype", "skip", "mean", "last", "parts"),
    [
        ((1, 8, 3, 4, 5), 4, torch.float32, 0, 0.0, True, 1024),
        ((2, 24, 7, 5, 9), 10, torch.float32, 6, 0.0, True, 1024),  # 3 a group, which one of them shares with the skip
        ((2, 12, 5, 3, 2), 4, torch.float32, 0, 2.0, False, 1024),
        ((1, 96, 13, 7, 5), 32, torch.bfloat16, 32, 3.0, True, 1024),
        ((2, 64, 6, 7, 8), 32, torch.float16, 0, -1.0, True, 1024),
        ((1, 80, 11, 8, 4), 8, torch.float32, 0, 0.0, True, 3),  # several tiles in each part, the last one short
        ((1, 5, 1, 1, 1), 1, torch.float32, 0, 0.0, True, 1024),
    ],
)
def test_equals_group_norm_and_silu_in_float64(
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    skip: int,
    mean: float,
    last: bool,
    parts: int,
    run: Run,
) -> None:
    without, _, shifted, _ = run(errors, shape, groups, dtype, skip, mean, last, parts)
    assert max(without, shifted) < 4e-6


def errors_far_from_zero(mean: float, sizes: tuple[int, ...]) -> tuple[float, float]:
    """Largest error of the kernels and of the plain path for values of spread 1 about a mean, float32."""
    torch.manual_seed(0)
    norm = group_norm(1, 1)
    x = torch.randn(1, 1, *sizes, device=DEVICE) + mean
    with torch.no_grad():
        reference = exact(x, norm)
        found = norm_silu((x,), norm), plain(x, norm)
    return tuple(float((result - reference).abs().max()) for result in found)  # type: ignore[return-value]


@needs_triton
@pytest.mark.parametrize(("mean", "sizes"), [(1000.0, (100, 100, 100)), (-300.0, (40, 40, 50))])
def test_a_mean_far_from_zero_over_many_voxels(mean: float, sizes: tuple[int, ...], run: Run) -> None:
    """No worse than PyTorch's own float32 on contiguous tensors, up to the rounding of the mean itself."""
    kernels, oracle = run(errors_far_from_zero, mean, sizes)
    assert kernels < max(4 * abs(mean) * torch.finfo(torch.float32).eps, oracle)


def sums() -> float:
    """Largest error of `residual_add`, one and two addends, the first of them not in channels_last."""
    torch.manual_seed(0)
    x, a, b = torch.randn(3, 2, 20, 5, 7, 6, device=DEVICE)
    bias = torch.randn(20, device=DEVICE)
    reference = x.double() + bias[:, None, None, None] + a
    last = x.contiguous(memory_format=LAYOUT)
    one, two = (
        residual_add(last.clone(), bias, a),
        residual_add(last.clone(), bias, a, b.contiguous(memory_format=LAYOUT)),
    )
    in_place = residual_add(last, bias, a)
    assert in_place.data_ptr() == last.data_ptr()
    assert torch.equal(in_place, residual_add(x, bias, a))
    half = residual_add(last.bfloat16(), bias, a.bfloat16())
    assert half.dtype == torch.bfloat16
    return max(float((one - reference).abs().max()), float((two - reference - b).abs().max()))


@needs_triton
def test_sum_in_one_pass(run: Run) -> None:
    assert run(sums) < 1e-6


def network_error(skips: str, norm: str) -> float:
    """Largest error of a small network's output with the kernels, beside PyTorch's modules in float64."""
    torch.manual_seed(0)
    config = UNetConfig(
        in_channels=8, model_channels=8, channel_mult=(1, 2), num_res_blocks=2, groups=4, skips=skips, norm=norm
    )  # fmt: skip
    model = UNet(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.2)
    model.to(DEVICE)
    x, t = torch.randn(2, 8, 4, 8, 4, device=DEVICE), torch.tensor([5, 900], device=DEVICE)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        reference = model.double()(x.double(), t)
        assert kernels_for(x) is kernels
        return float((model.float()(x, t) - reference).abs().max() / reference.abs().max())


@needs_triton
@pytest.mark.parametrize("norm", ["group", "voxel"])
@pytest.mark.parametrize("skips", ["concat", "additive", "wavelet"])
def test_whole_networks(skips: str, norm: str, run: Run) -> None:
    assert run(network_error, skips, norm) < 1e-5


def gradient_errors(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, skip: int, mean: float, parts: int
) -> list[float]:
    """Largest errors of the gradients of pieces, weight, bias and shift, of the largest value of each.

    Of what the kernels make of the same numbers in float64: of rounding, only that of the result stands in it.
    """
    torch.manual_seed(0)
    kernels.MOST_PARTS = parts
    batch, channels, *sizes = shape
    norm = group_norm(channels + skip, groups)
    widths = [channels, skip] if skip else [channels]
    drawn = [(torch.randn(batch, width, *sizes, device=DEVICE) * 2 + mean).to(dtype) for width in widths]
    pieces = [piece.contiguous(memory_format=LAYOUT).requires_grad_() for piece in drawn]
    shift = torch.randn(batch, channels + skip, device=DEVICE, requires_grad=True)
    wanted = torch.randn(batch, channels + skip, *sizes, device=DEVICE).to(dtype)  # contiguous, as some operations give
    inputs = [*pieces, norm.weight, norm.bias, shift]
    result = norm_silu(tuple(pieces), norm, shift)
    found = torch.autograd.grad(result, inputs, wanted, retain_graph=True)
    again = torch.autograd.grad(result, inputs, wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert all(a.dtype == b.dtype for a, b in zip(found, inputs, strict=True))
    assert all(a.is_contiguous(memory_format=LAYOUT) for a in found[: len(pieces)])
    exactly = [x.detach().double().requires_grad_() for x in inputs]
    *parts_of_x, weight, bias, of_shift = exactly
    x = torch.cat(parts_of_x, dim=1) + of_shift[:, :, None, None, None]
    reference = torch.autograd.grad(F.silu(F.group_norm(x, groups, weight, bias, norm.eps)), exactly, wanted.double())
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, reference, strict=True)]


@needs_triton
@pytest.mark.parametrize(
    ("shape", "groups", "dtype", "skip", "mean", "parts"),
    [
        ((1, 8, 3, 4, 5), 4, torch.float32, 0, 0.0, 1024),
        ((2, 24, 7, 5, 9), 10, torch.float32, 6, 0.0, 1024),
        ((1, 96, 13, 7, 5), 32, torch.bfloat16, 32, 3.0, 1024),
        ((2, 64, 6, 7, 8), 32, torch.float16, 0, -1.0, 1024),
        ((1, 80, 11, 8, 4), 8, torch.float32, 0, 1.0, 3),  # several tiles in each part, the last one short
    ],
)
def test_gradients_equal_those_in_float64(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, skip: int, mean: float, parts: int, run: Run
) -> None:
    *of_pieces, weight, bias, shift = run(gradient_errors, shape, groups, dtype, skip, mean, parts)
    assert max(weight, bias, shift) < 3e-6
    assert max(of_pieces) < (3e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


def sum_gradients() -> None:
    x, a, b = torch.randn(3, 2, 20, 5, 7, 6, dtype=torch.float32, device=DEVICE).unbind()
    inputs = [
        x.requires_grad_(),
        torch.randn(20, device=DEVICE, requires_grad=True),
        a.requires_grad_(),
        b.requires_grad_(),
    ]
    wanted = torch.randn(2, 20, 5, 7, 6, device=DEVICE)
    found = torch.autograd.grad(residual_add(x * 1, *inputs[1:]), inputs, wanted)
    reference = torch.autograd.grad(x + inputs[1][:, None, None, None] + a + b, inputs, wanted)
    for one, other in zip(found, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@needs_triton
def test_gradients_of_the_sum(run: Run) -> None:
    run(sum_gradients)


def network_gradient_error(skips: str, bfloat16: bool) -> tuple[float, float]:
    """RMS error of a small network's gradients, of their RMS: with the kernels and with PyTorch's modules.

    Beside PyTorch's modules in float64; both under autocast if `bfloat16`.
    """
    torch.manual_seed(0)
    config = UNetConfig(in_channels=8, model_channels=8, channel_mult=(1, 2), groups=4, skips=skips)  # type: ignore[arg-type]
    model = UNet(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.to(DEVICE)
    x, t = torch.randn(2, 8, 4, 8, 4, device=DEVICE), torch.tensor([5, 900], device=DEVICE)

    def gradients(x: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bfloat16 and x.dtype == torch.float32):
            output = model(x, t)
        return torch.cat([g.flatten() for g in torch.autograd.grad(output.square().mean(), list(model.parameters()))])

    model.double()
    reference = gradients(x.double())
    model.float()
    errors = []
    # oneDNN's weight gradients of small convolutions in bfloat16 hold what memory held before.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.backends.mkldnn.flags(enabled=False):
        for allowed in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kernels, "DTYPES", DTYPES if allowed else ())
                error = gradients(x) - reference
                errors.append(float(error.square().mean().sqrt() / reference.square().mean().sqrt()))
    return errors[0], errors[1]


@needs_triton
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("skips", ["concat", "additive", "wavelet"])
def test_gradients_of_whole_networks(skips: str, bfloat16: bool, run: Run) -> None:
    found, oracle = run(network_gradient_error, skips, bfloat16)
    rounded = 1.5 if DEVICE == "cuda" else 6  # cutting bfloat16 off, errors have one sign and add up
    assert found < (rounded * oracle if bfloat16 else 1e-5)


def gradients_with_and_without_recomputing() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    model = UNet(UNetConfig(in_channels=8, model_channels=8, channel_mult=(1, 2), groups=4))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.to(DEVICE)
    x, t = torch.randn(1, 8, 4, 4, 4, device=DEVICE), torch.tensor([5], device=DEVICE)
    found = []
    for _ in range(2):
        gradients = torch.autograd.grad(model(x, t).square().mean(), list(model.parameters()))
        found.append(torch.cat([gradient.flatten() for gradient in gradients]).cpu())
        for block in model.modules():
            if isinstance(block, ResBlock):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    return found[0], found[1]


@needs_triton
def test_blocks_whose_activations_are_recomputed(run: Run) -> None:
    torch.testing.assert_close(*run(gradients_with_and_without_recomputing))


def types_of_a_training_step() -> list[tuple[torch.dtype, bool]]:
    """Type, and whether in channels_last_3d, of what is kept for the gradient of a residual block under autocast."""
    config = UNetConfig(in_channels=8, model_channels=8, channel_mult=(1, 2), groups=4)
    block = UNet(config).body.decoder[0][0].to(DEVICE)
    x, skip = (torch.randn(1, 16, 4, 4, 4, device=DEVICE).bfloat16().contiguous(memory_format=LAYOUT) for _ in "ab")
    kept: list[tuple[torch.dtype, bool]] = []

    def keep(x: Tensor) -> Tensor:
        if x.ndim == 5 and x.shape[2:] == (4, 4, 4):
            kept.append((x.dtype, x.is_contiguous(memory_format=LAYOUT)))
        return x

    with torch.autocast(DEVICE, torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = block(Joined((x.requires_grad_(), skip)), torch.randn(1, 32, device=DEVICE))
    kept.append((output.dtype, output.is_contiguous(memory_format=LAYOUT)))
    return kept


@needs_triton
def test_a_training_step_keeps_type_and_layout(run: Run) -> None:
    kept = run(types_of_a_training_step)
    assert len(kept) >= 4
    assert set(kept) == {(torch.bfloat16, True)}


def check() -> tuple[bool, ...]:
    with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16):
        return tuple(
            self_check(torch.device(DEVICE), dtype, gradients) for dtype in DTYPES for gradients in (False, True)
        )


@needs_triton
def test_self_check_passes_whatever_the_mode(run: Run) -> None:
    assert all(run(check))


def check_with_a_wrong_gradient() -> tuple[bool, bool]:
    right = kernels.gradient_sums
    kernels.gradient_sums = lambda *arguments: 1.01 * right(*arguments)
    self_check.cache_clear()
    try:
        return tuple(self_check(torch.device(DEVICE), torch.float32, gradients) for gradients in (False, True))  # type: ignore[return-value]
    finally:
        kernels.gradient_sums = right
        self_check.cache_clear()


@needs_triton
def test_a_wrong_gradient_costs_training_the_kernels_and_not_inference(run: Run) -> None:
    assert run(check_with_a_wrong_gradient) == (True, False)


@needs_gpu
@needs_triton
def test_taken_on_a_gpu_with_and_without_gradients() -> None:
    x = torch.randn(1, 8, 4, 4, 4, device="cuda")
    assert can_use_triton(x)
    assert not can_use_triton(x.cpu())
    assert not can_use_triton(x.double())
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        assert can_use_triton(x)


SUMS = ("means", "squares", "shift", "statistics", "bias", "sums", "products", "values")  # in float32


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_compile_for_hopper(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As launched for the published network: 16 bytes a load, nothing spilled. Needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tool = Path(kernels.triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    data = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    tensors = dict.fromkeys(("x", "out", "weight", "first", "second", "gradient"), data)
    tile = {"ROWS": 64, "CHANNELS": 64}
    for kernel, constants in (
        (kernels.measure_gradients, {**tile, "shift": None}),
        (kernels.normalise_backward, {**tile, "shift": None}),
        (kernels.measure, tile),
        (kernels.combine, {"BLOCK": 1024}),
        (kernels.normalise, tile),
        (kernels.accumulate, tile),
        (kernels.measure_gradients, tile),
        (kernels.combine_gradients, {"BLOCK": 4}),
        (kernels.normalise_backward, tile),
    ):
        kinds = dict.fromkeys(kernel.arg_names, "i32")
        kinds |= {name: "*fp32" for name in SUMS if name in kinds}
        kinds |= (
            dict.fromkeys({"sums", "of_shift"} & set(kinds), "*fp64") if kernel is kernels.combine_gradients else {}
        )
        kinds |= {name: kind for name, kind in tensors.items() if name in kinds}
        kinds |= {"first": "i32"} if "all_channels" in kinds else {}  # a column there, a tensor in `accumulate`
        kinds |= {"eps": "fp32"} if "eps" in kinds else {}
        kinds |= dict.fromkeys(constants, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds.values()) if kind[0] in "*i"}
        binary = compile(
            ASTSource(kernel, kinds, constants, aligned),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": kernels.WARPS},
        )
        path = tmp_path / f"{kernel.__name__}.cubin"
        path.write_bytes(binary.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", path], check=True, capture_output=True, text=True).stdout
        assert re.findall(r"(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"], usage
        if kernel not in (kernels.combine, kernels.combine_gradients):
            writes = kernel not in (kernels.measure, kernels.measure_gradients)
            assert dtype != torch.bfloat16 or not writes or "cvt.rn.bf16x2" in binary.asm["ptx"]
            wide = binary.asm["ptx"].count("ld.global.v4.b32")
            assert wide >= 4 * dtype.itemsize // 4, f"{kernel.__name__}: {wide} loads of 16 bytes"


def test_kernels_that_cannot_run_are_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """On the CPU without the interpreter they cannot be launched, as on a GPU that they do not suit."""
    if kernels.triton is None or kernels.INTERPRETED:
        pytest.skip("needs Triton's compiler without a GPU for it")
    assert not self_check(torch.device("cpu"), torch.float32, False)
    assert "going on without them" in caplog.text
