"""What does a training step cost, and what do TF32, bfloat16 and recomputed activations save?

    python training.py [--device cpu] [--crop 64 64 64] [--steps 6]

The published conditional network through `cwdm train`, on phantoms. Every variant runs in a process of its own, so that
the peak memory is its own; the first half of the steps is not counted. On a GPU, `--crop 224 224 160` is full size.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cwdm.phantoms import write_phantoms

VARIANTS = {
    "float32": [],
    "float32, recomputed": ["recompute=true"],
    "TF32": ["precision=tf32"],
    "bfloat16": ["precision=bf16"],
    "bfloat16, recomputed": ["precision=bf16", "recompute=true"],
}
LINE = re.compile(r"([\d.]+) volumes a second, waiting (\d+)%, ([\d.]+) GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--crop", type=int, nargs=3, default=[64, 64, 64], help="voxels")
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else torch.cpu.get_capabilities().get("cpu_name")
    print(f"{name}, {os.cpu_count()} cores, PyTorch {torch.__version__}, {arguments.crop} voxels, batch 1")
    table = Table("training step", "volumes a second", "waiting for data", "peak GiB")
    with tempfile.TemporaryDirectory() as scratch:
        write_phantoms(Path(scratch) / "data", 2, seed=0)
        for variant, changes in VARIANTS.items():
            table.add_row(variant, *measure(Path(scratch), variant, changes, arguments))
    Console(width=100).print(table)


def measure(scratch: Path, variant: str, changes: list[str], arguments: argparse.Namespace) -> tuple[str, str, str]:
    settings = [f"data.path={scratch / 'data'}", f"data.cache={scratch / 'cache'}", f"out={scratch / variant}"]
    settings += [f"data.crop={arguments.crop}", "data.workers=1", f"device={arguments.device}"]
    settings += [f"steps={arguments.steps}", f"log_every={arguments.steps // 2}", *changes]
    command = [sys.executable, "-m", "cwdm", "train", "cwdm-t1n", *settings]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    rate, waiting, memory = LINE.findall(output)[-1]
    return rate, f"{waiting} %", memory


if __name__ == "__main__":
    main()
