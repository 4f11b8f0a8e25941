"""How the weights that come with cwdm were made; `benchmarks/bundled.py` says what they are worth.

    python bundled.py phantoms WORK     # the phantoms alone, 1.2 GB in five minutes: WORK/train, WORK/val
    python bundled.py train WORK        # phantoms, training (1.5 hours on 2 idle cores), packing
    python bundled.py pack RUN          # newest weights of a run -> cwdm/weights/bundled/any.safetensors

WORK is a folder for all of it, RUN the folder of a training run.
"""

from pathlib import Path

import torch
import typer

from cwdm import checkpoint
from cwdm.checkpoint import ANY
from cwdm.phantoms import WIDE, write_phantoms
from cwdm.training import load_training_settings
from cwdm.training import train as run_training
from cwdm.weights import BUNDLED, folder_of, record

WIDE_PHANTOMS, USUAL_PHANTOMS, TRAIN_SEED, VALIDATION_SEED = 40, 80, 1001, 2002

app = typer.Typer(help=__doc__, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def phantoms(work: Path) -> None:
    """Make the phantoms of training and validation, but for those that are there."""
    write_phantoms(work / "train", WIDE_PHANTOMS, TRAIN_SEED, variation=WIDE, on_case=print)
    write_phantoms(work / "train", USUAL_PHANTOMS, TRAIN_SEED, first=WIDE_PHANTOMS, on_case=print)
    write_phantoms(work / "val", 4, VALIDATION_SEED, on_case=print)


@app.command()
def train(work: Path, resume: bool = False) -> None:
    """Make the phantoms, train, and pack the result into the package."""
    phantoms(work)
    paths = [f"data.path={work / 'train'}", f"data.validation_path={work / 'val'}", f"out={work / 'run'}"]
    run_training(load_training_settings("bundled", paths), resume)
    pack(work / "run")


@app.command()
def pack(run: Path, sampler: str | None = None, steps: int | None = None) -> None:
    """Newest weights of a run in half precision, with what the table of steps recommends."""
    loaded = checkpoint.load(run / "newest" / f"{ANY}.safetensors")
    told = {name: value for name, value in (("sampler", sampler), ("steps", steps)) if value is not None}
    target = folder_of(BUNDLED) / f"{ANY}.safetensors"
    target.parent.mkdir(exist_ok=True)
    checkpoint.save(target, loaded.model, loaded.record.model_copy(update=told), torch.float16)
    record(target.parent, target.name, {"sha256": checkpoint.sha256(target), "recipe": "recipes/bundled.py"})
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    app()
