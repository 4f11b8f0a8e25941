"""The image's entry point: what each runner of containers says, or leaves unsaid, becomes a command line of `cwdm`.

Plain Docker and the BraTS orchestrator of 2025 mount /input and /output and give no arguments; MedPerf mounts its own
folders, with or without `infer`; MLCube and the orchestrator of 2024 name every folder.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cwdm import weights
from cwdm.cli.app import main as run
from cwdm.cli.app import said
from cwdm.files import is_file, is_folder
from cwdm.progress import print_line, print_notice

MEDPERF = "mlcommons/volumes"
MOUNTS = (("input", "output"), (f"{MEDPERF}/data", f"{MEDPERF}/predictions"))
"""Where runners that name no folders put input and output: plain Docker and BraTS, then MedPerf."""

PARAMETERS = (f"{MEDPERF}/parameters/parameters.yaml", f"{MEDPERF}/parameters/parameters_file.yaml")
WEIGHTS = (f"{MEDPERF}/additional_files/weights", f"{MEDPERF}/additional_files", "weights")
"""Weights that MedPerf mounts without naming them, then those that were built in or mounted over them."""

SUFFIXES = (".safetensors", ".pt")

NO_WEIGHTS = """\
no weights are built into this image or mounted at /weights, so it takes the small ones that come with cwdm:
they were trained on synthetic brains and a few real ones and are not for clinical use"""

HELP = """\
Give no arguments, with the cases mounted at /input and a writable folder at /output:

    docker run --rm --gpus all -v IN:/input:ro -v OUT:/output IMAGE

or any command of cwdm below, such as infer --data_path=... --output_path=...; folders that infer is not told are these.
/weights holds the weights; mount others there. Files are written as the container's user: where OUT is not writable
for uid 10001, add --user "$(id -u):$(id -g)".
"""


def main() -> None:
    """Run `cwdm` with the arguments that the runner meant."""
    if sys.argv[1:2] in (["--help"], ["-h"]):
        print_line(*HELP.split("\n"))
    sys.argv[1:] = arguments(sys.argv[1:])
    run()


def arguments(given: Sequence[str], root: Path = Path("/")) -> list[str]:
    """The command line of `cwdm` that a runner means by its arguments: what it left unsaid is added.

    Args:
        given: what stands behind the image's name.
        root: where the mounts are.
    """
    first = given[0] if given else "-"
    named = not (first.startswith("-") or "=" in first) or first in ("--help", "-h", "--version")
    command, *options = given if named else ("infer", *given)
    fill = {"infer": _infer, "self-test": _self_test, "train": _train, "evaluate": _evaluate}.get(command)
    if fill is None or {"--help", "-h"} & set(options):
        return [command, *options]
    return [command, *fill(options, root)]


def _infer(options: Sequence[str], root: Path) -> list[str]:
    told = said("infer", options)
    there = [(root / data, root / output) for data, output in MOUNTS if is_folder(root / data)]
    data, output = there[0] if there else (root / MOUNTS[0][0], root / MOUNTS[0][1])
    parameters = next((root / file for file in PARAMETERS if is_file(root / file)), None)
    folders = {"data_path": data, "output_path": output, "parameters_file": parameters}
    unsaid = [f"--{name}={path}" for name, path in folders.items() if told[name] is None and path is not None]
    return [*unsaid, *options, *_weights(told["weights"], root)]


def _self_test(options: Sequence[str], root: Path) -> list[str]:
    return [*options, *_weights(said("self-test", options)["weights"], root)]


def _weights(named: Path | None, root: Path) -> list[str]:
    """The option for weights mounted, built in or bundled; nothing if some are named, unless their folder is empty."""
    if named is not None and (str(named) == weights.BUNDLED or not _is_empty(named)):
        return []
    if named is not None:
        print_notice(f"{named} is an empty folder; taking the weights of the image")
    own = [root / folder for folder in WEIGHTS if _may_hold_weights(root / folder)]
    if not own:
        print_notice(*f"warning: {NO_WEIGHTS}".splitlines())
    return [f"--weights={own[0] if own else weights.BUNDLED}"]  # of two options the last counts


def _train(options: Sequence[str], _: Path) -> list[str]:
    """A run of MLCube, which names its settings as a file, goes on if it was stopped."""
    return [*options, "--resume"] if said("train", options)["parameters_file"] else [*options]


def _evaluate(options: Sequence[str], _: Path) -> list[str]:
    """MLCube names its folders; segmentations lie beside the true images."""
    told = said("evaluate", options)
    return [*([f"--seg={told['data_path']}"] if told["named_predictions"] and told["data_path"] else []), *options]


def _may_hold_weights(folder: Path) -> bool:
    """Whether there are weights in a folder, or it cannot be read: then the command says what is wrong with it."""
    try:
        return any(Path(name).suffix in SUFFIXES for name in _files(folder))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def _is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but hidden files and empty folders, as one that git or a runner made."""
    try:
        return is_folder(folder) and not any(_files(folder))
    except OSError:
        return False  # let the command say what is wrong with it


def _files(folder: Path, depth: int = 2) -> Iterator[str]:
    """Names of the files in a folder and its folders that are not hidden, links followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not is_folder(Path(entry.path)):
                yield entry.name
            elif depth > 1:
                yield from _files(Path(entry.path), depth - 1)


if __name__ == "__main__":
    main()
