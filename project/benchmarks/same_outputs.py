"""Do two versions of the package write the same files?

    python same_outputs.py BEFORE AFTER          # two checkouts' project/ folders

Both get the same small patients, and each runs phantom, drop, infer (bundled weights; several samples; a sharded run),
sample, translate, a few steps of training, complete, evaluate and report, on the CPU with one thread, in the same
folder. Every file is then compared byte by byte; JSON without what tells of the moment (times, checksums of times).
The exit code is 1 if anything differs.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cwdm.phantoms import write_phantoms

PAIRS = """
data: {layout: files, path: pairs, window: [32, 32, 32], workers: 0, images: [
  {file: "{case}/{case}-t1c.nii.gz", intensity: [0, 2000]}, {file: "{case}/{case}-t1n.nii.gz"}]}
network: {model_channels: 32, channel_mult: [1, 2]}
steps: 2
out: pairs-run
"""
SMALL = "network.model_channels=32 network.channel_mult=[1,2] data.workers=0 steps=3 save_every=2 validate_every=3"

COMMANDS = (
    "phantom full --cases 1 --seed 5",
    "drop cases input --seed 3",
    "infer --data_path input --output_path output --weights bundled --report_path records",
    "infer --data_path input --output_path several --weights bundled samples=2 sampler.steps=2",
    "infer --data_path input --output_path halves --weights bundled --shard 0/2",
    "infer --data_path input --output_path halves --weights bundled --shard 1/2",
    "complete input completed --synthesised output --copy",
    "evaluate output cases --seg cases --out scores",
    f"train cwdm-t2f data.path=cases out=run {SMALL}",
    f"train wdm-unet-128 data.path=cases out=volumes {SMALL} data.window=[32,32,32] data.downsample=1",
    "sample volumes/newest/unconditional.safetensors -n 2 --out made sampler.steps=3",
    "train pairs.yaml",
    "translate pairs-run/newest/weights.safetensors --data_path pairs --output_path translated sampler.steps=2",
    "report records --data-path input --output-path output",
    "infer --data_path cases --output_path nothing --weights bundled",
    "infer --data_path absent --output_path nothing",
)

MOMENT = {"seconds", "started", "program", "date", "input", "output", "key"}
NOT_COMPARED = (".html", ".tfevents")


def main(
    before: Path, after: Path, keep: Annotated[Path | None, typer.Option(help="Leave the files here.")] = None
) -> None:
    """Run both and compare."""
    with tempfile.TemporaryDirectory() as made:
        root = keep or Path(made)
        patients = Path(made) / "patients"
        write_phantoms(patients, 2, seed=7, shape=(40, 48, 36), spacing_mm=5.0)
        codes = {}
        for name, project in (("before", before), ("after", after)):
            # In one place, one after the other: records hold absolute paths.
            codes[name] = run_all(project.resolve(), root / "run", patients)
            (root / "run").rename(root / name)
        table = Table("command", "exit code before", "after")
        for command, old, new in zip(COMMANDS, codes["before"], codes["after"], strict=True):
            table.add_row(command[:90], str(old), str(new), style=None if old == new else "red")
        Console(width=130).print(table)
        contents = {name: dict(read_all(root / name)) for name in codes}
    old, new = contents["before"], contents["after"]
    different = sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))
    for path in different:
        print(path, "only before" if path not in new else "only after" if path not in old else "differs")
    print(f"{len(old)} files before, {len(new)} after, {len(different)} differ")
    sys.exit(bool(different) or codes["before"] != codes["after"])


def run_all(project: Path, folder: Path, patients: Path) -> list[int]:
    """The exit codes of all commands, run in a new folder with the package of a checkout."""
    folder.mkdir(parents=True)
    shutil.copytree(patients, folder / "cases")
    environment = os.environ | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    (folder / "pairs.yaml").write_text(PAIRS)
    codes = []
    for command in COMMANDS:
        if command.startswith("train pairs"):
            (folder / "pairs").symlink_to("cases")
        words = [sys.executable, "-P", "-m", "cwdm", *command.split()]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        print(f"{project.parent.name}: {done.returncode} {command}", file=sys.stderr)
        if done.returncode > 2:
            print(done.stdout, done.stderr, file=sys.stderr)
        codes.append(done.returncode)
    return codes


def read_all(folder: Path) -> Any:
    """Path -> digest of what is compared of every file."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or "cache/" in name or any(part in name for part in NOT_COMPARED):
            continue
        content = path.read_bytes()
        if path.suffix == ".json":
            name = "records/run.json" if path.name.startswith("run-") else name
            content = json.dumps(without_moment(json.loads(content)), sort_keys=True).encode()
        yield name, hashlib.sha256(content).hexdigest()


def without_moment(content: Any) -> Any:
    """JSON without what differs from run to run and from place to place."""
    if isinstance(content, dict):
        return {key: without_moment(value) for key, value in content.items() if key not in MOMENT}
    if isinstance(content, list):
        return [without_moment(value) for value in content]
    return Path(content).name if isinstance(content, str) and content.startswith("/") else content


if __name__ == "__main__":
    typer.run(main)
