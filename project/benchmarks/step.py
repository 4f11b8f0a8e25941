"""How long does one denoising step of the published network take at full size?

    python step.py [--size 112 112 80] [--runs 3]

On the CPU every variant runs in a process of its own, so that the peak memory is its own, and the variants take turns,
so that a machine that slows down slows all of them. "published way" is the plain modules on contiguous tensors in
float32. The agreement is 20 log10(largest value / RMS difference) against it, for one pass with the untrained weights.
Where the processor does not multiply bfloat16, that is left out: PyTorch would emulate it for many minutes a pass.

With a GPU, that is measured instead: first every convolution shape of the network against float64 (a wrong one ends the
run with a table of those that are), then a step in each precision and way, each time with other input and an emptied
cache. What it can't beat, per step at full size:

- 7.17 TFLOP: 2 × in × out × taps × voxels over 89 convolutions, 33 shapes. An H200 makes 790 TFLOP/s of bfloat16
  products, so 9.1 ms.
- 15.9 GB in bfloat16 with the Triton kernels, if the caches kept nothing: the 3×3×3 convolutions read and
  write 2.76 G numbers, those of one voxel 0.83 G, and the normalisations read 1.45 G twice and write them once. The
  sums of the residual blocks and the changes of size come on top.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cwdm.checkpoint import load_published
from cwdm.kernels import ops, triton_kernels
from cwdm.kernels.ops import LAYOUT
from cwdm.precision import has_bf16
from cwdm.unet import UNet, UNetConfig
from cwdm.weights import untrained_state

CONFIG = UNetConfig(in_channels=32)
REFERENCE, BFLOAT16 = "published way, float32", "cwdm, bfloat16"
VARIANTS = {
    REFERENCE: "contiguous tensors, PyTorch's modules",
    "cwdm, float32": "one sweep a block, Winograd convolution",
    BFLOAT16: "PyTorch's modules",
}


@dataclass(frozen=True)
class Way:
    """How a GPU does it: with the Triton kernels, in which layout, replayed as a CUDA graph."""

    kernels: bool
    layout: torch.memory_format
    graph: bool


WAYS = {
    "plain": Way(kernels=False, layout=torch.contiguous_format, graph=False),
    "channels_last": Way(kernels=False, layout=LAYOUT, graph=False),
    "fused": Way(kernels=True, layout=LAYOUT, graph=False),
    "fused, CUDA graph": Way(kernels=True, layout=LAYOUT, graph=True),
}
PRECISIONS = {"float32": (torch.float32, False), "TF32": (torch.float32, True), "bfloat16": (torch.bfloat16, True)}

# Largest error of a convolution, of the result's RMS. The result's own rounding is 2**-6 for values of 4 to 8 times
# the RMS in bfloat16; the factors are exact in both. A lost tap or tile costs a tenth and more.
LIMITS = {"TF32": 0.003, "bfloat16": 0.03}

Shape = tuple[int, int, int, tuple[int, ...]]  # in, out, taps an axis, sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=3, default=[112, 112, 80], help="of the coefficients")
    parser.add_argument("--runs", type=int, help="3 on the CPU, 30 on a GPU")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        measure(arguments.variant, arguments.size, arguments.output)
    elif torch.cuda.is_available():
        on_gpu(arguments.size, arguments.runs or 30)
    else:
        on_cpu(arguments.size, arguments.runs or 3)


def on_cpu(size: list[int], runs: int) -> None:
    results: dict[str, list[dict[str, float]]] = {name: [] for name in cpu_variants()}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(runs):
            for name in results:
                results[name].append(run_apart(name, size, Path(scratch) / f"{name}.npy"))
        show(results, size, Path(scratch))


def cpu_variants() -> list[str]:
    """What this processor computes itself."""
    return [name for name in VARIANTS if name != BFLOAT16 or has_bf16(torch.device("cpu"))]


def run_apart(variant: str, size: list[int], output: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--variant", variant, "--output", output, "--size", *map(str, size)]
    answer: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return answer


@torch.inference_mode()
def measure(variant: str, size: list[int], output: Path) -> None:
    """One step after a warm-up at a small size, which loads libraries and starts threads."""
    plain = not variant.startswith("cwdm, float32")
    if plain:
        ops.use_winograd = lambda *_: False
    dtype = torch.bfloat16 if variant.endswith("bfloat16") else torch.float32
    layout = torch.contiguous_format if "published" in variant else torch.channels_last_3d
    model = load_published(untrained_state(CONFIG)).to(dtype).to(memory_format=layout)
    inputs = torch.randn(1, 32, *size, generator=torch.Generator().manual_seed(0))
    inputs = inputs.to(dtype).contiguous(memory_format=layout)
    model(inputs[..., :16, :16, :16], torch.tensor([500]))
    start, cpu = time.perf_counter(), time.process_time()
    result = model(inputs, torch.tensor([500]))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    np.save(output, result.float().contiguous().numpy())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_gib": peak}))


def show(results: dict[str, list[dict[str, float]]], size: list[int], scratch: Path) -> None:
    base = statistics.median(run["seconds"] for run in results[REFERENCE])
    capabilities = torch.cpu.get_capabilities()
    sets = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if capabilities.get(name)]
    print(f"{capabilities.get('cpu_name')}, {os.cpu_count()} cores, {' '.join(sets)}, PyTorch {torch.__version__}")
    print(f"UNet of cWDM (81.5 M parameters), coefficients 32 × {' × '.join(map(str, size))}")
    table = Table("one step", "seconds: median", "min to max", "of published", "CPU seconds", "peak GiB", "agreement")
    for name, runs in results.items():
        seconds = sorted(run["seconds"] for run in runs)
        agreement = "" if name == REFERENCE else compare(scratch / f"{name}.npy", scratch / f"{REFERENCE}.npy")
        median = statistics.median(seconds)
        table.add_row(
            name,
            f"{median:.1f}",
            f"{seconds[0]:.1f} to {seconds[-1]:.1f}",
            f"{median / base:.2f}",
            f"{statistics.median(run['cpu_seconds'] for run in runs):.0f}",
            f"{max(run['peak_gib'] for run in runs):.1f}",
            agreement,
        )
    Console(width=140).print(table)
    if BFLOAT16 not in results:
        print("bfloat16 is left out: this processor does not multiply it; PyTorch would emulate it for many minutes.")


def compare(path: Path, reference_path: Path) -> str:
    """Agreement of two results in dB."""
    reference = np.load(reference_path)
    rms = float(np.sqrt(np.mean(np.square(np.load(path) - reference, dtype=np.float64))))
    return f"{20 * np.log10(np.abs(reference).max() / rms):.0f} dB" if rms else "the same numbers"


@torch.inference_mode()
def on_gpu(size: list[int], runs: int) -> None:
    properties = torch.cuda.get_device_properties()
    versions = f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    kernels = f"Triton {triton_kernels.triton.__version__}" if triton_kernels.triton else "no Triton"
    probes = {name: torch.empty(0, dtype=dtype, device="cuda") for name, (dtype, _) in PRECISIONS.items()}
    refused = [name for name, probe in probes.items() if not triton_kernels.can_use_triton(probe)]
    kernels += f"; 'fused' is 'channels_last' in {', '.join(refused)}" if refused else ""
    print(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {versions}, {kernels}")
    shapes, flops = survey(size)
    print(f"UNet of cWDM (81.5 M parameters), coefficients 32 × {' × '.join(map(str, size))}: {flops / 1e12:.2f} TFLOP")
    refuse_wrong(shapes)
    rate, bandwidth = ceilings()
    print(f"8192³ product in bfloat16: {rate / 1e12:.0f} TFLOP/s, so {1e3 * flops / rate:.1f} ms a step at the least")
    print(f"copying 2 GiB: {bandwidth / 1e12:.2f} TB/s")
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [torch.randn(1, 32, *size, device="cuda", generator=generator) for _ in range(3)]
    table = Table("one step", "", *WAYS)
    reference = None
    for precision in PRECISIONS:
        columns = []
        for way in WAYS.values():
            milliseconds, peak_gib, result = time_way(precision, way, inputs, runs)
            reference = result if reference is None else reference
            columns.append(cells(milliseconds, peak_gib, flops, agreement_db(result, reference)))
        for number, row in enumerate(zip(*columns, strict=True)):
            name = ("ms: median", "min to max", "TFLOP/s", "peak GiB", "agreement")[number]
            table.add_row("" if number else precision, name, *row, end_section=name == "agreement")
    Console(width=140).print(table)


def survey(size: list[int]) -> tuple[list[Shape], int]:
    """The distinct convolutions of a step and its floating-point operations, found without computing anything."""
    shapes = set()
    with torch.device("meta"):
        model, x, t = UNet(CONFIG), torch.empty(1, CONFIG.in_channels, *size), torch.zeros(1, dtype=torch.long)

    def note(conv: nn.Conv3d, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        shapes.add((conv.in_channels, conv.out_channels, conv.kernel_size[0], tuple(output.shape[2:])))

    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(note)
    with FlopCounterMode(display=False) as counter:
        model(x, t)
    return sorted(shapes), counter.get_total_flops()


def refuse_wrong(shapes: list[Shape], device: str = "cuda") -> None:
    """Ends the program with a table if the device's library gets a convolution wrong, as some versions of cuDNN do."""
    table = Table("in", "out", "taps", "sizes", "precision", "layout", "largest error, of the RMS", "allowed")
    for shape in shapes:
        for precision, layout, error in convolution_errors(shape, device):
            if not error < LIMITS[precision]:  # nor is NaN
                channels, out, taps, sizes = shape
                found = (str(layout).removeprefix("torch."), f"{error:.3g}", f"{LIMITS[precision]:.3g}")
                table.add_row(*map(str, (channels, out, taps, "×".join(map(str, sizes)), precision)), *found)
    if table.rows:
        Console(width=140).print(table)
        sys.exit(f"{table.row_count} convolutions give wrong results with these versions; nothing was timed")
    print(f"{len(shapes)} convolution shapes agree with float64, in TF32 and bfloat16, in both layouts")


def convolution_errors(shape: Shape, device: str) -> Iterator[tuple[str, torch.memory_format, float]]:
    """Precision, layout and largest error of a convolution of this shape, for factors that bfloat16 holds exactly."""
    channels, out, taps, sizes = shape
    generator = torch.Generator(device).manual_seed(channels + out)
    x = torch.randn(1, channels, *sizes, device=device, generator=generator).bfloat16()
    weight = torch.randn(out, channels, taps, taps, taps, device=device, generator=generator).bfloat16()
    reference = exact_convolution(x, weight)
    rms = reference.square().mean().sqrt()
    for precision, layout in product(LIMITS, (torch.contiguous_format, LAYOUT)):
        dtype, _ = PRECISIONS[precision]
        left, right = (tensor.to(dtype).contiguous(memory_format=layout) for tensor in (x, weight))
        with flags(precision):
            result = F.conv3d(left, right, padding=taps // 2)
        yield precision, layout, float((result - reference).abs().max() / rms)


def exact_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution in float64 that keeps the size, as one matrix product a tap, which no convolution library makes."""
    taps = weight.shape[2]
    padded = F.pad(x.double(), (taps // 2,) * 6).movedim(1, -1)
    size_x, size_y, size_z = x.shape[2:]
    result = torch.zeros((), dtype=torch.float64, device=x.device)
    for a, b, c in product(range(taps), repeat=3):
        window = padded[:, a : a + size_x, b : b + size_y, c : c + size_z]
        result = result + window @ weight[:, :, a, b, c].double().T
    return result.movedim(-1, 1)


@contextmanager
def flags(precision: str) -> Iterator[None]:
    """cuDNN tries its algorithms and keeps the fastest; TF32 or not, in matrix products too."""
    _, tf32 = PRECISIONS[precision]
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32):
        yield
    torch.backends.cuda.matmul.allow_tf32 = before


def ceilings() -> tuple[float, float]:
    """FLOP/s of a large bfloat16 product and bytes/s of a copy (read and written), as this GPU has them today."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    product_ms = statistics.median(event_times(lambda _: torch.mm(a, b), 20))
    copy_ms = statistics.median(event_times(lambda _: target.copy_(source), 20))
    return 2 * 8192**3 / (product_ms / 1e3), 2 * source.nbytes / (copy_ms / 1e3)


def event_times(work: Callable[[int], object], runs: int) -> list[float]:
    """Milliseconds of each run by the GPU's clock, after two that do not count, each with an overwritten cache."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    events = []
    for run in range(2 + runs):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work(run)
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events[2:]]


def time_way(precision: str, way: Way, inputs: list[Tensor], runs: int) -> tuple[list[float], float, Tensor]:
    """Milliseconds of each step, peak memory in GiB, and what came out for the first input."""
    dtype, _ = PRECISIONS[precision]
    held = torch.cuda.memory_allocated()
    with flags(precision), kernels_if(way.kernels):
        model = load_published(untrained_state(CONFIG)).to("cuda", dtype).to(memory_format=way.layout)
        ready = [x.to(dtype).contiguous(memory_format=way.layout) for x in inputs]
        t = torch.tensor([500], device="cuda")
        for _ in range(2):
            model(ready[0], t)
        torch.cuda.reset_peak_memory_stats()  # trying algorithms takes memory that no later step needs
        step = captured(model, ready[0], t) if way.graph else partial(model, t=t)
        result = step(ready[0]).float().clone()
        peak = torch.cuda.max_memory_allocated() - held
        milliseconds = event_times(lambda run: step(ready[run % len(ready)]), runs)
    return milliseconds, peak / 2**30, result


@contextmanager
def kernels_if(wanted: bool) -> Iterator[None]:
    """Without them, every block takes PyTorch's modules."""
    before = ops.triton_kernels
    ops.triton_kernels = before if wanted else lambda _: None
    yield
    ops.triton_kernels = before


def captured(model: UNet, x: Tensor, t: Tensor) -> Callable[[Tensor], Tensor]:
    """The model as a CUDA graph: one launch a step. Its output is overwritten by the next step."""
    static = x.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model(static, t)  # capturing wants libraries and memory of that stream to be ready
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = model(static, t)

    def step(x: Tensor) -> Tensor:
        static.copy_(x)
        graph.replay()
        return output

    return step


def cells(milliseconds: list[float], peak_gib: float, flops: int, agreement: str) -> list[str]:
    median = statistics.median(milliseconds)
    spread = f"{min(milliseconds):.2f} to {max(milliseconds):.2f}"
    return [f"{median:.2f}", spread, f"{flops / median / 1e9:.0f}", f"{peak_gib:.1f}", agreement]


def agreement_db(result: Tensor, reference: Tensor) -> str:
    rms = float((result - reference).double().square().mean().sqrt())
    return f"{20 * np.log10(float(reference.abs().max()) / rms):.0f} dB" if rms else "the same numbers"


if __name__ == "__main__":
    main()
