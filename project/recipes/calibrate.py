"""How the standard deviation that a network of one pass predicts is calibrated, on patients it was not trained on.

    python calibrate.py WEIGHTS CASES...     # a file of weights; folders of case folders; 5 s an image on 2 cores

Each modality of each patient is predicted from all others that are there. The factor by which the predicted standard
deviation would hold 68.27 % of the errors in the brain is taken of each patient, and the median of the patients' is
written into the header of WEIGHTS, where `cwdm infer` finds it. The tensors stay as they are. Errors are those of the
range in which the network predicts: of each image scaled by its own intensities, as in training.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple

import safetensors
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cwdm import Pipeline, Settings, checkpoint
from cwdm.calibration import Values, calibration_factor, coverage, rank_correlation
from cwdm.checkpoint import Checkpoint
from cwdm.device import choose_device
from cwdm.files import sha256
from cwdm.images import MODALITIES, CaseFolder, Image, find_cases, in_order_of, normalise, read_case, read_grid
from cwdm.inference import draw, prepare
from cwdm.weights import record, recorded

app = typer.Typer(help=__doc__, rich_markup_mode=None, pretty_exceptions_enable=False)


class Voxels(NamedTuple):
    """What a modality of a patient has in the brain, in the units of the network: (N,) each."""

    patient: str
    modality: str
    error: Values
    std: Values

    @property
    def factor(self) -> float:
        return calibration_factor(self.error, self.std)


@app.command()
def main(
    weights: Annotated[Path, typer.Argument(help="File of weights of one pass; its header is written anew.")],
    cases: Annotated[list[Path], typer.Argument(help="Folders of held-out cases with two modalities or more.")],
    device: str = "auto",
) -> None:
    """Measure the factors, print what they do, and write them."""
    loaded = checkpoint.load(weights)
    if not loaded.record.one_pass:
        raise typer.BadParameter(f"{weights} was trained by {loaded.record.objective}, which predicts no std")
    folders = [folder for path in cases for folder in find_cases(path)]
    todo = [(folder, name) for folder in folders for name in MODALITIES if name in folder.files]
    console = Console(stderr=True)
    measured = [measure(loaded, *item, device) for item in track(todo, "modalities", console=console)]
    factors = factors_of(measured)
    Console().print(table(measured, factors))
    write(weights, factors)


def measure(loaded: Checkpoint, folder: CaseFolder, modality: str, device: str = "auto") -> Voxels:
    """Predict a modality that is there from all others, without the factors that the file may hold already."""
    plain = replace(loaded, record=loaded.record.model_copy(update={"calibration": {}}))
    settings = Settings()
    pipeline = Pipeline.of(plain, settings, choose_device(device), modality)
    case = read_case(replace(folder, chosen=modality))
    prepared = prepare(case, pipeline, settings)
    samples = draw(prepared, pipeline, settings)
    assert samples.std is not None
    name, volume = next(iter(case.volumes.items()))
    like, path = Image(volume, case.affine, case.has_orientation), folder.files[modality]
    true = in_order_of(like, read_grid(path), case.name, (name, path.name))
    unit = normalise(true, prepared.intensities)[0]
    truth, brain = (prepared.window.crop(prepared.orientation.apply(one)) for one in (unit, prepared.mask))
    std = samples.std.numpy()
    inside = brain & (std > 0)  # 0 where all that is given is 0 in [0, 1], which a voxel of the brain may be too
    return Voxels(case.name, modality, (samples.mean.numpy() - truth)[inside], std[inside])


def factors_of(measured: Sequence[Voxels]) -> dict[str, float]:
    """The median of the patients' factors, by modality; those that no patient has are left out."""
    found = {name: [one.factor for one in measured if one.modality == name] for name in MODALITIES}
    return {name: float(f"{statistics.median(factors):.4g}") for name, factors in found.items() if factors}


def table(measured: Sequence[Voxels], factors: Mapping[str, float]) -> Table:
    """What each image says of its error, before and with the factors of all."""
    drawn = Table("patient", "modality", "its factor", "within 1 std", "calibrated", "rank correlation")
    for one in measured:
        shares = [coverage(one.error, factor * one.std) for factor in (1, factors[one.modality])]
        rank = rank_correlation(one.error, one.std)
        drawn.add_row(one.patient, one.modality, f"{one.factor:.3f}", *(f"{s:.1%}" for s in shares), f"{rank:.2f}")
    drawn.caption = ", ".join(f"{name} × {factor:g}" for name, factor in factors.items())
    return drawn


def write(weights: Path, factors: Mapping[str, float]) -> None:
    """The same file with these factors in its header, at once, and its checksum where one is recorded beside it."""
    loaded, entry = checkpoint.load(weights), recorded(weights.parent).get(weights.name)
    calibrated = type(loaded.record).model_validate({**dict(loaded.record), "calibration": dict(factors)})

    def announce(digest: str) -> None:
        """Record the new file beside the old one, so that whichever a killed run leaves is known."""
        if entry is not None:
            record(weights.parent, weights.name, {**entry, "sha256": digest, "replaces": loaded.sha256})

    checkpoint.save_tensors(weights, dict(tensors(weights)), loaded.model.config, calibrated, announce)
    if entry is not None:
        record(weights.parent, weights.name, {**entry, "sha256": sha256(weights)})


def tensors(weights: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of a file, in the type in which it holds them."""
    with safetensors.safe_open(weights, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            yield name, file.get_tensor(name)


if __name__ == "__main__":
    app()
