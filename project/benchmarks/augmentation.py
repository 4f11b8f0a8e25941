"""What does augmentation do to an image, and how long does it take?

    python augmentation.py picture docs/augmentation.webp
    python augmentation.py time [--crop 64]

The picture shows each distortion of `cwdm.training.distort` on a slice of a phantom, before and after. The table says
what a sample of four contrasts with all of them costs on one core.
"""

import time as clock
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cwdm.arrays import Mask, Volume
from cwdm.images import MODALITIES, normalise
from cwdm.phantoms import make_phantom
from cwdm.training import distort
from cwdm.training.augment import MARGIN, AugmentSettings, augment

SEED, SPACING_MM = 11, (1.0, 1.0, 1.0)
LEVEL, ZOOM = 74, (slice(55, 185), slice(38, 204))

ALL = AugmentSettings(
    probability=1.0,
    rotation_deg=[0, 2],
    shift_mm=[0, 2],
    slice_mm=[1, 6],
    bias=[0, 0.3],
    noise=[0, 0.05],
    gamma=[0.7, 1.4],
    scanner=[0, 0.4],
    mask_mm=[-2, 1],
    flips=["x"],
)

app = typer.Typer(help=__doc__, rich_markup_mode=None, pretty_exceptions_enable=False)


def rng() -> np.random.Generator:
    return np.random.default_rng(SEED)


Distortion = Callable[[Volume, Mask], Volume]
SHOWN: dict[str, tuple[str, Distortion]] = {
    "turned by 2°, shifted by 2 mm": ("t1n", lambda v, m: distort.moved(v, (0, 0, 2), (1.4, 1.4, 0), SPACING_MM)),
    "slices of 6 mm, front to back": ("t2f", lambda v, m: distort.thick_slices(v, 1, 6, 1)),
    "coil bias 0.3": ("t1c", lambda v, m: distort.biased(v, 0.3, SPACING_MM, rng())),
    "noise 0.05": ("t2w", lambda v, m: distort.noisy(v, 0.05, rng())),
    "gamma 0.7": ("t1n", lambda v, m: distort.with_gamma(v, 0.7)),
    "another scanner's scale 0.4": ("t2f", lambda v, m: distort.rescaled(v, (0.5, -0.4, 0.6, -0.4, 0.1))),
    "mask 2 mm narrower": ("t1n", lambda v, m: v * distort.another_mask(m, -2, SPACING_MM, rng())),
    "mask 1 mm wider": ("t2w", lambda v, m: v * distort.another_mask(m, 1, SPACING_MM, rng())),
    "flipped, left and right": ("t1c", lambda v, m: distort.flipped(v, [0])),
}
STRIPPED_ANEW = ("mask 2 mm narrower", "mask 1 mm wider", "flipped, left and right")


@app.command()
def picture(path: Path) -> None:
    """Draw each distortion before and after."""
    made = make_phantom(SEED)
    mask = made.volumes["t1n"] > 0
    images = {name: normalise(volume.astype(np.float32))[0] for name, volume in made.volumes.items()}
    figure = Figure(figsize=(9.6, 6.7), facecolor="black")
    grid = figure.subplots(3, 6).reshape(-1, 2)
    for (before, after), (name, (modality, distortion)) in zip(grid, SHOWN.items(), strict=True):
        volume = images[modality]
        worse = distortion(distort.filled(volume, mask), mask)
        if name not in STRIPPED_ANEW:
            worse = worse * mask
        elif name.startswith("flipped"):
            worse = distortion(volume, mask)
        show(before, volume, modality)
        show(after, worse, name)
        if name.startswith("turned"):  # where it was
            after.contour(slice_of(volume), [0.28], colors="tab:red", linewidths=0.4)
    figure.subplots_adjust(0, 0, 1, 0.965, 0.02, 0.1)
    figure.savefig(path, dpi=100, **({"pil_kwargs": {"quality": 80}} if path.suffix == ".webp" else {}))
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


def slice_of(volume: Volume) -> NDArray[np.float32]:
    return volume[*ZOOM, LEVEL].T


def show(axes: Axes, volume: Volume, title: str) -> None:
    axes.imshow(slice_of(volume), cmap="gray", vmin=0, vmax=1)
    axes.set_title(title, color="white", fontsize=8)
    axes.axis("off")


@app.command()
def time(crop: int = 64, samples: Annotated[int, typer.Option(help="To average over.")] = 20) -> None:
    """Print how long a sample takes."""
    torch.set_num_threads(1)
    made = make_phantom(SEED)
    volumes = np.stack([made.volumes[modality] for modality in MODALITIES]).astype(np.float32)
    brightest = np.quantile(volumes, 0.999, axis=(1, 2, 3)).astype(np.float32)
    table = Table("probability", f"ms of a sample of {crop}³ voxels", "longest")
    for probability in (0.5, 1.0):
        settings, taken = ALL.model_copy(update={"probability": probability}), []
        for number in range(samples):
            rng = np.random.default_rng(number)
            starts = rng.integers(np.array(volumes.shape[1:]) - crop - 2 * MARGIN)
            box = tuple(slice(start, start + crop + 2 * MARGIN) for start in starts)
            start = clock.process_time()
            augment(volumes[:, *box], np.array([False, True, True, True]), brightest, SPACING_MM, settings, rng)
            taken.append(1000 * (clock.process_time() - start))
        table.add_row(f"{probability:g}", f"{np.mean(taken):.0f}", f"{max(taken):.0f}")
    Console().print(table)


if __name__ == "__main__":
    app()
