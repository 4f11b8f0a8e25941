"""How the weights that come with cwdm are made; `benchmarks/bundled.py` says what they are worth.

    python bundled.py train WORK SHARED                   # everything; the same command goes on where it was stopped
    python bundled.py train WORK SHARED --without MS-07   # without a real patient, who can then be made a test of
    python bundled.py data WORK SHARED                    # what is trained on, alone: 2 GB in a quarter of an hour
    python bundled.py pack RUN                            # the run's weights -> cwdm/weights/bundled/any.safetensors
    python bundled.py calibrate WORK                      # these, by the validation case and runs that left one out

WORK is a folder for all of it and SHARED that of the real data, see `real_data.py`; RUN is WORK/run. Trained is on
phantoms, on the real patients that may be trained on, and on these imaged anew by other scanners; on a real patient
named for validation alone is not. What pieces of a run's settings should differ comes as `key=value` at the end.
"""

import json
import os
from pathlib import Path
from typing import Annotated

import calibrate as calibration
import real_data
import torch
import typer
from rich.console import Console

from cwdm import checkpoint
from cwdm.checkpoint import ANY
from cwdm.files import sha256
from cwdm.images import MODALITIES, find_cases
from cwdm.phantoms import WIDE, reimage_cases, write_phantoms
from cwdm.training import load_training_settings
from cwdm.training import train as run_training
from cwdm.weights import BUNDLED, folder_of, record

WIDE_PHANTOMS, USUAL_PHANTOMS, ANEW, TRAIN_SEED = 20, 40, 4, 1001
VALIDATION = "BraTS-GLI-00001-000"

SHARES = {"BraTS-PHANTOM": 0.3, "anew": 0.2, "MSL": 0.1, "": 0.4}
"""Of what is trained on, by a piece of the names; the rest are the real patients with all four contrasts."""

app = typer.Typer(help=__doc__, rich_markup_mode=None, pretty_exceptions_enable=False)
Work = Annotated[Path, typer.Argument(help="Folder for all of it.")]
Shared = Annotated[Path, typer.Argument(help="Holds cases/ and scans/.")]


@app.command()
def data(work: Work, shared: Shared) -> None:
    """Make what is trained on, but for what is there."""
    real_data.main(shared, work / "real")
    reimage_cases(work / "real", work / "anew", ANEW, TRAIN_SEED, on_outcome=lambda outcome: print(outcome.name))
    write_phantoms(work / "phantoms", WIDE_PHANTOMS, TRAIN_SEED, variation=WIDE, on_case=print)
    write_phantoms(work / "phantoms", USUAL_PHANTOMS, TRAIN_SEED, first=WIDE_PHANTOMS, on_case=print)


@app.command()
def train(
    work: Work,
    shared: Shared,
    without: Annotated[str, typer.Option(help="Beginning of the name of a real patient to leave out.")] = "",
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As steps=500.")] = None,
) -> None:
    """Make what is trained on, and train; without a patient in WORK/run-PATIENT."""
    data(work, shared)
    ending = f"-{without}" if without else ""
    cases, run = work / f"train{ending}", work / f"run{ending}"
    for name in ("real", "anew", "phantoms"):
        for case in sorted((work / name).iterdir()):
            if not (without and case.name.startswith(without)):
                link(case, cases)
    link(shared / "cases" / VALIDATION, work / "validation")
    held_out = [f"data.validation_path={work / 'validation'}", f"data.repeat={json.dumps(repeat(cases))}"]
    paths = [f"data.path={cases}", f"data.cache={work / 'cache'}", f"out={run}"]
    run_training(load_training_settings("bundled", [*paths, *held_out, *(settings or ())]), resume=run.exists())


@app.command()
def pack(run: Path) -> None:
    """Newest weights of a run in half precision."""
    loaded = checkpoint.load(run / "newest" / f"{ANY}.safetensors")
    target = folder_of(BUNDLED) / f"{ANY}.safetensors"
    target.parent.mkdir(exist_ok=True)
    checkpoint.save(target, loaded.model, loaded.record, torch.float16)
    record(target.parent, target.name, {"sha256": sha256(target), "recipe": "recipes/bundled.py"})
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


@app.command()
def calibrate(work: Work) -> None:
    """Write into the packed weights by what their standard deviations are multiplied."""
    measured = []
    for run in sorted(work.glob("run*")):
        loaded = checkpoint.load(run / "newest" / f"{ANY}.safetensors")
        _, _, name = run.name.partition("-")
        cases = find_cases(work / ("real" if name else "validation"))
        unseen = [case for case in cases if case.name.startswith(name)]
        todo = [(case, modality) for case in unseen for modality in MODALITIES if modality in case.files]
        measured += [calibration.measure(loaded, *one) for one in todo]
    factors = calibration.factors_of(measured)
    Console().print(calibration.table(measured, factors))
    calibration.write(folder_of(BUNDLED) / f"{ANY}.safetensors", factors)


def link(case: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    if not (folder / case.name).exists():
        (folder / case.name).symlink_to(os.path.realpath(case), target_is_directory=True)


def repeat(cases: Path) -> dict[str, int]:
    """How many times each case comes in an epoch, so that each kind has its share."""
    kinds: dict[str, list[str]] = {kind: [] for kind in SHARES}
    for case in sorted(cases.iterdir()):
        kinds[next(kind for kind in SHARES if kind in case.name)].append(case.name)
    each = {kind: SHARES[kind] / len(names) for kind, names in kinds.items() if names}
    return {name: round(each[kind] / min(each.values())) for kind in each for name in kinds[kind]}


if __name__ == "__main__":
    app()
