"""A folder of weights: the file for a modality found, checked and loaded, and the checksums beside it."""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cwdm import checkpoint
from cwdm.blocks import one_pass_outputs
from cwdm.checkpoint import ANY, Checkpoint
from cwdm.errors import WeightsError
from cwdm.files import is_file, read_json, write_json

PUBLISHED_FILES = {"t1n": "t1_gen.pt", "t1c": "t1ce_gen.pt", "t2w": "t2_gen.pt", "t2f": "flair_gen.pt"}
BUNDLED = "bundled"
"""In place of a folder: the small weights that come with the package."""

CHECKSUMS = "checksums.json"
"""Beside the weights: file name -> sha256 and where it came from, written by download and convert."""


_TRAINED = re.compile(r"brats_(\d{6,})\.pt")


def default_folder() -> Path:
    """$CWDM_WEIGHTS, or the user's cache: where `cwdm weights download` puts files and `cwdm infer` looks."""
    named = os.environ.get("CWDM_WEIGHTS")
    # Not Path.home(), which fails for a user without name or home, as in many containers.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111
    return Path(named) if named else cache / "cwdm" / "weights"


def folder_of(weights: Path | str | None) -> Path:
    """Folder or file that a choice of weights means: `BUNDLED`, a path, or None for the default folder."""
    if weights is None:
        return default_folder()
    return Path(__file__).parent / BUNDLED if str(weights) == BUNDLED else Path(weights)


def find(weights: Path, modality: str) -> Path:
    """File with the weights that synthesise `modality`.

    `weights` is a file, taken as it is, or a folder with `t1n.safetensors` (ours), `t1_gen.pt` (published),
    `any.safetensors` (ours, for all modalities), or `t1n/brats_1200000.pt` or `brats_1200000.pt` (the published
    training code's; the newest step wins).

    Raises:
        WeightsError: there is none.
    """
    try:
        return _find(weights, modality)
    except OSError as error:
        raise WeightsError(f"{weights}: cannot be read ({error.strerror})") from error


def _find(weights: Path, modality: str) -> Path:
    if is_file(weights):
        return weights
    names = (f"{modality}.safetensors", PUBLISHED_FILES[modality], f"{ANY}.safetensors")
    for path in (weights / name for name in names):
        if is_file(path):
            return path
    for folder in (weights / modality, weights):
        if checkpoints := trained(folder):
            return checkpoints[-1]
    raise WeightsError(
        f"no weights for {modality} in {weights}: looked for {', '.join(names)} and brats_<step>.pt; "
        f"'cwdm weights download {weights}' fetches the published ones, --weights names another folder or file"
    )


def load_for(weights: Path, modality: str) -> Checkpoint:
    """The checkpoint that synthesises `modality`, with warnings about it.

    Raises:
        WeightsError: there is none, it is damaged, or it synthesises something else.
    """
    path = find(weights, modality)
    loaded = checkpoint.load(path)
    entry = recorded(path.parent).get(path.name, {})
    expected = entry.get("sha256", loaded.sha256)
    if not is_recorded(entry, loaded.sha256):
        raise WeightsError(
            f"{path}: sha256 {loaded.sha256}, but {CHECKSUMS} beside it says {expected}; "
            "it is damaged or was replaced: move it away and fetch it again"
        )
    if loaded.record.trained_on.get("layout") == "files":
        raise WeightsError(f"{path}: was trained on other images than those of BraTS; 'cwdm translate' works with it")
    config = loaded.model.config
    if config.in_channels == config.out_channels:
        raise WeightsError(f"{path}: an unconditional network, which cannot synthesise {modality} of a patient")
    any_of = len(PUBLISHED_FILES)
    outputs = one_pass_outputs(any_of) if config.given else 8
    if (config.in_channels, config.out_channels, config.targets) not in ((32, 8, 0), (40, outputs, any_of)):
        raise WeightsError(
            f"{path}: a network of {config.in_channels} inputs, {config.out_channels} outputs and {config.targets} "
            "targets; one that synthesises a modality from three others has 32, 8 and 0, one for any modality 40, 8, 4 "
            f"or, in one pass, 40, {one_pass_outputs(any_of)}, 4"
        )
    known = loaded.record.modality or modality_of(path)
    if (known == ANY) != (config.targets > 0):
        raise WeightsError(
            f"{path}: says that it synthesises {known}, which a network of {config.targets} targets cannot"
        )
    if known not in (modality, ANY, None):
        raise WeightsError(f"{path}: synthesises {known}, but {modality} is missing")
    unknown = f"{path.name} does not say which modality it synthesises; taken for {modality}"
    notice = loaded.record.notice
    return replace(loaded, warnings=(*([] if known else [unknown]), *([notice] if notice else [])))


def modality_of(path: Path) -> str | None:
    """Modality that a weights file is for, or `ANY`, as far as its name tells."""
    if path.name == f"{ANY}.safetensors":
        return ANY
    for modality, published in PUBLISHED_FILES.items():
        if path.name in (published, f"{modality}.safetensors"):
            return modality
    return path.parent.name if path.parent.name in PUBLISHED_FILES else None


def trained(folder: Path) -> list[Path]:
    """Checkpoints of the published training code, oldest first."""
    steps = {path: match for path in files_of(folder) if (match := _TRAINED.fullmatch(path.name))}
    return sorted(steps, key=lambda path: int(steps[path][1]))


def files_of(folder: Path) -> list[Path]:
    """Files directly in a folder, by name; none where there is no folder."""
    try:
        return sorted(path for path in folder.iterdir() if is_file(path))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise WeightsError(f"{folder}: cannot be read ({error.strerror})") from error


def is_recorded(entry: Mapping[str, Any], sha256: str) -> bool:
    """Whether a file is the one of an entry, or the one that it replaces and that is still there; any without one."""
    return sha256 in (entry.get("sha256", sha256), entry.get("replaces"))


def record(folder: Path, name: str, entry: dict[str, Any]) -> None:
    """Add one file's entry to the checksums beside the weights."""
    from cwdm.folders import locked  # here, as whoever reads weights needs none of it

    with locked(folder):
        put_entry(folder, name, entry)


def put_entry(folder: Path, name: str, entry: dict[str, Any]) -> None:
    """`record`, for whoever has locked the folder."""
    write_json(folder / CHECKSUMS, dict(sorted({**recorded(folder), name: entry}.items())))


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """The checksums recorded beside the weights; empty if there are none."""
    path = folder / CHECKSUMS
    try:
        return {str(name): dict(entry) for name, entry in read_json(path).items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise WeightsError(f"{path}: cannot be read ({error}); delete it and download again") from error
