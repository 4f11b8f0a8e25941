"""What the automatic check of outputs catches, and what it misses: true images of phantoms with one fault each.

    python quality.py                  # six phantoms, each modality in turn: 24 images a row, about ten minutes
    python quality.py --cases 2

A row a fault: how many of the images are rejected, how many are shown to someone, how many pass, and the reason that is
given most. "none" is the image as it is: whatever is not passed there is a false alarm.
"""

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy import ndimage

from cwdm.images import MODALITIES, MOST_SIMILAR, brain_mask, normalise
from cwdm.inference import VERDICTS, Quality, assess
from cwdm.phantoms import WIDE, make_phantom

Volume = npt.NDArray[np.float32]
SEED = 4004


def faults(truth: Volume, nearest: Volume, mask: npt.NDArray[np.bool_], other: Volume) -> Iterator[tuple[str, Volume]]:
    """A name and the output (X, Y, Z) with that fault."""
    random = np.random.default_rng(SEED)
    noise = random.random(truth.shape, np.float32)
    x, _, z = (np.arange(length) for length in truth.shape)
    top = int(np.flatnonzero(mask.any(axis=(0, 1)))[-1])
    yield "none", truth
    yield "left half empty", np.where(x[:, None, None] < truth.shape[0] // 2, truth, 0)
    yield "top 20 slices empty (truncated field of view)", np.where(z <= top - 20, truth, 0)
    yield "top 2 slices empty", np.where(z <= top - 2, truth, 0)
    yield "constant 0.5", np.full_like(truth, 0.5)
    yield "pure noise", noise
    yield "a third noise", truth + (noise - 0.5) * np.float32(1 / 3)
    yield "salt and pepper, 0.5 % of the voxels", np.where(noise < 0.0025, 1, np.where(noise > 0.9975, 0, truth))
    for voxels in (2, 4, 10):
        yield f"shifted by {voxels} voxels", np.roll(truth, voxels, axis=1)
    yield "mirrored left to right", truth[::-1]
    yield "inverted contrast", 1 - truth
    yield "most similar modality copied", nearest
    yield (
        "most similar modality copied, blurred, with noise",
        ndimage.gaussian_filter(nearest, 1.0) + 0.05 * (noise - 0.5),
    )
    for factor in (0.3, 0.7, 1.5, 3):
        yield f"intensities × {factor}", truth * np.float32(factor)
    yield "blurred by 2 voxels", ndimage.gaussian_filter(truth, 2.0)
    yield "a 20 voxel ball of constant intensity", np.where(_ball(mask, 20), np.float32(0.5), truth)
    yield "another patient's image", other


def _ball(mask: npt.NDArray[np.bool_], radius: float) -> npt.NDArray[np.bool_]:
    centre = np.argwhere(mask).mean(axis=0) + np.array((25, 0, 10))
    axes = np.ogrid[tuple(slice(length) for length in mask.shape)]
    squares = sum((axis - middle) ** 2 for axis, middle in zip(axes, centre, strict=True))
    return np.asarray(squares < radius**2)


def main(cases: int = 6) -> None:
    """Print the table."""
    found: dict[str, list[Quality]] = {}
    for number in track(range(cases), "phantoms", console=Console(stderr=True)):
        units, mask = _head(number)
        others, _ = _head(cases + number)
        for target in MODALITIES:
            conditions = {name: unit for name, unit in units.items() if name != target}
            for name, output in faults(units[target], units[MOST_SIMILAR[target]], mask, others[target]):
                inside = np.where(mask, output, 0).astype(np.float32)
                found.setdefault(name, []).append(assess(inside, conditions, mask, target))
    Console(width=170).print(_table(found))


def _head(number: int) -> tuple[Mapping[str, Volume], npt.NDArray[np.bool_]]:
    # Every other one differs from the rest as much as patients hardly do.
    phantom = make_phantom([SEED, number], variation=WIDE if number % 2 else None)
    units = {name: normalise(volume.astype(np.float32))[0] for name, volume in phantom.volumes.items()}
    return units, brain_mask(phantom.volumes.values())


def _table(found: Mapping[str, list[Quality]]) -> Table:
    table = Table("planted fault", *VERDICTS, "reason given most", title="images by what the check says of them")
    for name, qualities in found.items():
        counts = Counter(quality.verdict for quality in qualities)
        reasons: Counter[str] = Counter(_kind(quality.reasons[0]) for quality in qualities if quality.reasons)
        most = reasons.most_common(1)[0][0] if reasons else ""
        table.add_row(name, *(str(counts[verdict] or "") for verdict in VERDICTS), most)
    return table


def _kind(reason: str) -> str:
    """A reason without its numbers, so that equal ones can be counted."""
    return " ".join("…" if any(c.isdigit() for c in word) and "t" not in word else word for word in reason.split())


if __name__ == "__main__":
    typer.run(main)
