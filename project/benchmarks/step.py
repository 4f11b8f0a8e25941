"""How long does one denoising step of the published network take at full size?

    python step.py [--size 112 112 80] [--runs 3]

Every variant runs in a process of its own, so that the peak memory is its own, and the variants take turns, so that a
machine that slows down slows all of them. "published way" is the plain modules on contiguous tensors in float32. The
agreement is 20 log10(largest value / RMS difference) against it, for one pass with the untrained weights. Where the
processor does not multiply bfloat16, its agreement is measured on small coefficients and its time is not.
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
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cwdm import unet
from cwdm.checkpoint import load_published
from cwdm.synthesis import has_bf16
from cwdm.unet import UNetConfig
from cwdm.untrained import untrained_state

REFERENCE = "published way, float32"
SMALL = [32, 32, 16]
VARIANTS = {
    REFERENCE: "contiguous tensors, PyTorch's modules",
    "cwdm, float32": "one sweep a block, Winograd convolution",
    "cwdm, bfloat16": "PyTorch's modules",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=3, default=[112, 112, 80], help="of the coefficients")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        measure(arguments.variant, arguments.size, arguments.output)
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(arguments.runs):
            for name in VARIANTS:
                if name != "cwdm, bfloat16" or has_bf16(torch.device("cpu")):
                    results[name].append(run_apart(name, arguments.size, Path(scratch) / f"{name}.npy"))
        if not results["cwdm, bfloat16"]:
            for name in (REFERENCE, "cwdm, bfloat16"):
                run_apart(name, SMALL, Path(scratch) / f"small {name}.npy")
        show(results, arguments.size, Path(scratch))


def run_apart(variant: str, size: list[int], output: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--variant", variant, "--output", output, "--size", *map(str, size)]
    answer: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return answer


@torch.inference_mode()
def measure(variant: str, size: list[int], output: Path) -> None:
    """One step after a warm-up at a small size, which loads libraries and starts threads."""
    plain = not variant.startswith("cwdm, float32")
    if plain:
        unet.pays = lambda *_: False
    dtype = torch.bfloat16 if variant.endswith("bfloat16") else torch.float32
    layout = torch.contiguous_format if "published" in variant else torch.channels_last_3d
    model = load_published(untrained_state(UNetConfig(in_channels=32))).to(dtype).to(memory_format=layout)
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
        if not runs:
            agreement = compare(scratch / f"small {name}.npy", scratch / f"small {REFERENCE}.npy")
            small = f"{agreement}, {'×'.join(map(str, SMALL))}"
            table.add_row(name, "no bfloat16 in this processor", "", "", "", "", small)
            continue
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


def compare(path: Path, reference_path: Path) -> str:
    """Agreement of two results in dB."""
    reference = np.load(reference_path)
    rms = float(np.sqrt(np.mean(np.square(np.load(path) - reference, dtype=np.float64))))
    return f"{20 * np.log10(np.abs(reference).max() / rms):.0f} dB" if rms else "the same numbers"


if __name__ == "__main__":
    main()
