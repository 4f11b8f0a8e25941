"""The image's entry point: what each runner of containers says, or leaves unsaid, becomes a command line of `cwdm`.

Plain Docker and the BraTS orchestrator of 2025 mount /input and /output and give no arguments; MedPerf mounts its own
folders, with or without `infer`; MLCube and the orchestrator of 2024 name every folder.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cwdm.cli.app import main as run
from cwdm.weights import BUNDLED

MEDPERF = "mlcommons/volumes"
MOUNTS = (("input", "output"), (f"{MEDPERF}/data", f"{MEDPERF}/predictions"))
"""Where runners that name no folders put input and output: plain Docker and BraTS, then MedPerf."""

PARAMETERS = (f"{MEDPERF}/parameters/parameters.yaml", f"{MEDPERF}/parameters/parameters_file.yaml")
WEIGHTS = (f"{MEDPERF}/additional_files/weights", f"{MEDPERF}/additional_files", "weights")
"""Weights that MedPerf mounts without naming them, then those that were built in or mounted over them."""

SUFFIXES = (".safetensors", ".pt")

NO_WEIGHTS = """\
no weights are built into this image or mounted at /weights, so it takes the small ones that come with cwdm:
they were trained on synthetic brains and are not for clinical use"""

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
        print(HELP)
    sys.argv[1:] = arguments(sys.argv[1:])
    run()


def arguments(given: Sequence[str], root: Path = Path("/")) -> list[str]:
    """The command line of `cwdm` that a runner means by its arguments.

    Args:
        given: what stands behind the image's name.
        root: where the mounts are.
    """
    first = given[0] if given else "-"
    named = not (first.startswith("-") or "=" in first) or first in ("--help", "-h", "--version")
    command, *options = given if named else ("infer", *given)
    if {"--help", "-h"} & set(options):
        return [command, *options]
    if command == "infer":
        return [command, *_infer(options, root)]
    if command == "self-test":
        return [command, *_with_weights(options, root)]
    translate = {"train": _train, "evaluate": _evaluate}.get(command, list)
    return [command, *translate(options)]


def _infer(options: Sequence[str], root: Path) -> list[str]:
    known, _ = _paths(options)
    there = [(root / data, root / output) for data, output in MOUNTS if (root / data).is_dir()]
    data, output = there[0] if there else (root / MOUNTS[0][0], root / MOUNTS[0][1])
    filled = [f"--data_path={data}"] if known.data_path is None else []
    filled += [f"--output_path={output}"] if known.output_path is None else []
    parameters = [root / file for file in PARAMETERS if (root / file).is_file()]
    filled += [f"--parameters_file={parameters[0]}"] if parameters and known.parameters_file is None else []
    return [*filled, *_with_weights(options, root)]


def _with_weights(options: Sequence[str], root: Path) -> list[str]:
    """The options with weights: those named, unless their folder is empty, those mounted, built in or bundled."""
    known, others = _paths(options)
    if known.weights is not None and (known.weights == BUNDLED or not _is_empty(Path(known.weights))):
        return list(options)
    if known.weights is not None:
        _say(f"{known.weights} is an empty folder; taking the weights of the image")
    kept = [f"--{name}={value}" for name, value in vars(known).items() if name != "weights" and value is not None]
    own = [root / folder for folder in WEIGHTS if _may_hold_weights(root / folder)]
    if not own:
        _say(f"warning: {NO_WEIGHTS}")
    return [*kept, f"--weights={own[0] if own else BUNDLED}", *others]


def _train(options: Sequence[str]) -> list[str]:
    """MLCube's named folders as settings of `cwdm train`; a run that was stopped goes on."""
    known, others = _paths(options)
    if known.parameters_file is None:
        return list(options)
    folders = {"data.path": known.data_path, "out": known.output_path}
    settings = [f"{key}={value}" for key, value in folders.items() if value is not None]
    return [known.parameters_file, *settings, *others, "--resume"]


def _evaluate(options: Sequence[str]) -> list[str]:
    """MLCube's named folders as the arguments of `cwdm evaluate`; segmentations lie beside the true images."""
    known, others = _paths(options)
    if known.predictions is None or known.data_path is None:
        return list(options)
    out = [f"--out={known.output_path}"] if known.output_path is not None else []
    return [known.predictions, known.data_path, f"--seg={known.data_path}", *out, *others]


def _paths(options: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Files and folders among the options, under either spelling, and everything else."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("data_path", "output_path", "parameters_file"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name)
    parser.add_argument("--weights")
    parser.add_argument("--predictions")
    return parser.parse_known_args(list(options))


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
        return folder.is_dir() and not any(_files(folder))
    except OSError:
        return False  # let the command say what is wrong with it


def _files(folder: Path, depth: int = 2) -> Iterator[str]:
    """Names of the files in a folder and its folders that are not hidden, links followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_dir():
                yield entry.name
            elif depth > 1:
                yield from _files(Path(entry.path), depth - 1)


def _say(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    main()
