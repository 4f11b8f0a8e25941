"""What fewer steps cost a network that was trained for a thousand.

    python shortcuts.py golden     # against the published code's 1000 steps with the golden weights, which are random
    python shortcuts.py gaussian   # normal data, where mean and standard deviation are known

Of a sampler it prints how often it asks the network, how far its images are from the reference (root mean square over
voxels and eight seeds, in parts of the range) and how far they are from each other (standard deviation). A shortcut to
the mean should not deviate between seeds; one to a sample as much as samples do.
"""

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cwdm.checkpoint import Checkpoint, Record, load_published
from cwdm.diffusion import PUBLISHED
from cwdm.samplers import OF_DIFFUSION, Denoise, evaluations, planned_timesteps
from cwdm.sampling import clamped_denoiser
from cwdm.unet import UNetConfig
from cwdm.wavelet import BANDS, dwt, idwt
from cwdm.weights.untrained import untrained_state

SEEDS = 8
Plan = tuple[str, int, dict[str, Any]]
PLANS: list[Plan] = [("dpmpp", 5, {}), ("dpmpp", 20, {}), ("mean", 1, {})]
PLANS += [("texture", 5, {"tau": tau, "bands": bands}) for tau in (100, 300, 600) for bands in (BANDS[1:], BANDS)]

app = typer.Typer(help=__doc__, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def golden() -> None:
    """The conditional network, beside the volume of its 1000 steps."""
    folder = Path(__file__).parents[1] / "tests" / "golden"
    run = json.loads((folder / "ddpm.json").read_text())["ddpm1000_cwdm"]
    known = {name: value for name, value in run.items() if name in UNetConfig.__dataclass_fields__}
    config = UNetConfig(**{**known, "channel_mult": tuple(run["channel_mult"])})
    size = run["wavelet_shape"]
    volumes = np.random.RandomState(run["seed"]).random_sample((1, 3, *(2 * n for n in size))).astype(np.float32)
    model = load_published(untrained_state(config), config)
    denoise = clamped_denoiser(Checkpoint(model, Record()), dwt(torch.from_numpy(volumes)))
    reference = torch.from_numpy(np.load(folder / "ddpm1000_cwdm.npz")["volume"])
    print_table(denoise, reference, size, [("ddpm", 50, {}), ("ddim", 20, {}), *PLANS])


@app.command()
def gaussian(mean: float = 0.5, std: float = 0.2) -> None:
    """Coefficients that are normal around those of an even grey, with 0.2 of its range; the mean is the reference."""
    size, middle = (8, 8, 8), dwt(torch.full((1, 1, 16, 16, 16), mean))

    def denoise(x: Tensor, t: int) -> Tensor:
        alpha_bar = float(PUBLISHED.alpha_bars[t])
        gain = alpha_bar**0.5 * std**2 / (alpha_bar * std**2 + 1 - alpha_bar)
        return middle + gain * (x - alpha_bar**0.5 * middle)

    print_table(denoise, idwt(middle), size, [("ddpm", 1000, {}), *PLANS])


@torch.inference_mode()
def print_table(denoise: Denoise, reference: Tensor, size: Sequence[int], plans: Sequence[Plan]) -> None:
    table = Table("sampler", "evaluations", "from the reference", "between seeds", "ms a sample")
    for name, count, told in plans:
        timesteps = planned_timesteps(name, count, told.get("tau", 0))
        sampler = partial(OF_DIFFUSION[name], **({"bands": told["bands"]} if told else {}))
        start, made = time.perf_counter(), []
        for seed in range(SEEDS):
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(1, 8, *size, generator=generator)
            made.append(idwt(sampler(denoise, noise, timesteps, generator=generator)))
        milliseconds = 1000 * (time.perf_counter() - start) / SEEDS
        volumes = torch.stack(made)
        label = f"{name}, τ {told['tau']}, {'all bands' if len(told['bands']) == 8 else 'no LLL'}" if told else name
        asked = str(evaluations(OF_DIFFUSION[name], timesteps))
        table.add_row(label, asked, rms(volumes - reference), rms(volumes.std(0)), f"{milliseconds:.0f}")
    Console(width=110).print(table)


def rms(values: Tensor) -> str:
    return f"{float(values.square().mean().sqrt()):.4f}"


if __name__ == "__main__":
    app()
