"""A folder of weights: finding the file for a contrast, downloading, converting and verifying."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

from cwdm import checkpoint
from cwdm.checkpoint import ANY, Checkpoint
from cwdm.errors import WeightsError
from cwdm.files import output_errors, sha256, write_json

PUBLISHED_REPO = "pfriedri/cwdm"
PUBLISHED_FILES = {"t1n": "t1_gen.pt", "t1c": "t1ce_gen.pt", "t2w": "t2_gen.pt", "t2f": "flair_gen.pt"}
BUNDLED = "bundled"
"""In place of a folder: the small weights that come with the package."""

CHECKSUMS = "checksums.json"
"""Beside the weights: file name -> sha256 and where it came from, written by download and convert."""

KNOWN_SHA256 = {
    "brats_unet_128_1200k.pt": "01346a0ab8e406c0cbe7be43d383dffd3885c212b36ecd2aa8c315f54cc73d48",
    "lidc-idri_unet_128_1200k.pt": "6339773bb7051454c434fd06460fba77fdbbc35c98e2c4d1491beb793f01fd75",
}
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
    `any.safetensors` (ours, for all contrasts), or `t1n/brats_1200000.pt` or `brats_1200000.pt` (the published
    training code's; the newest step wins).

    Raises:
        WeightsError: there is none.
    """
    try:
        return _find(weights, modality)
    except OSError as error:
        raise WeightsError(f"{weights}: cannot be read ({error.strerror})") from error


def _find(weights: Path, modality: str) -> Path:
    if weights.is_file():
        return weights
    names = (f"{modality}.safetensors", PUBLISHED_FILES[modality], f"{ANY}.safetensors")
    for path in (weights / name for name in names):
        if path.is_file():
            return path
    for folder in (weights / modality, weights):
        if trained := _trained(folder):
            return trained[-1]
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
    expected = recorded(path.parent).get(path.name, {}).get("sha256", loaded.sha256)
    if loaded.sha256 != expected:
        raise WeightsError(
            f"{path}: sha256 {loaded.sha256}, but {CHECKSUMS} beside it says {expected}; "
            "it is damaged or was replaced: move it away and fetch it again"
        )
    if loaded.record.trained_on.get("layout") == "files":
        raise WeightsError(f"{path}: was trained on other images than those of BraTS; 'cwdm translate' works with it")
    config = loaded.model.config
    if config.in_channels == config.out_channels:
        raise WeightsError(f"{path}: an unconditional network, which cannot synthesise {modality} of a patient")
    if (config.in_channels, config.out_channels, config.targets) not in ((32, 8, 0), (40, 8, len(PUBLISHED_FILES))):
        raise WeightsError(
            f"{path}: a network of {config.in_channels} inputs, {config.out_channels} outputs and {config.targets} "
            "targets; one that synthesises a contrast from three others has 32, 8 and 0, one for any contrast 40, 8, 4"
        )
    known = loaded.record.modality or modality_of(path)
    if (known == ANY) != (config.targets > 0):
        raise WeightsError(
            f"{path}: says that it synthesises {known}, which a network of {config.targets} targets cannot"
        )
    if known not in (modality, ANY, None):
        raise WeightsError(f"{path}: synthesises {known}, but {modality} is missing")
    unknown = f"{path.name} does not say which contrast it synthesises; taken for {modality}"
    notice = loaded.record.notice
    return replace(loaded, warnings=(*([] if known else [unknown]), *([notice] if notice else [])))


def check_usable(weights: Path, modalities: Iterable[str]) -> None:
    """Weights for at least one of the modalities.

    Raises:
        WeightsError: those of every modality are missing or cannot be used.
    """
    faults = []
    for modality in modalities:
        try:
            load_for(weights, modality)
        except WeightsError as error:
            faults.append(str(error))
        else:
            return
    if faults:
        raise WeightsError("\n".join(("no case can be done with these weights:", *dict.fromkeys(faults))))


def modality_of(path: Path) -> str | None:
    """Contrast that a weights file is for, or `ANY`, as far as its name tells."""
    if path.name == f"{ANY}.safetensors":
        return ANY
    for modality, published in PUBLISHED_FILES.items():
        if path.name in (published, f"{modality}.safetensors"):
            return modality
    return path.parent.name if path.parent.name in PUBLISHED_FILES else None


def _trained(folder: Path) -> list[Path]:
    """Checkpoints of the published training code, oldest first."""
    steps = {path: match for path in _files(folder) if (match := _TRAINED.fullmatch(path.name))}
    return sorted(steps, key=lambda path: int(steps[path][1]))


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_file())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise WeightsError(f"{folder}: cannot be read ({error.strerror})") from error


# ------------------------------------------------------------------------------------- download, convert, verify


def download(
    folder: Path,
    repo: str = PUBLISHED_REPO,
    revision: str = "main",
    files: tuple[str, ...] = tuple(PUBLISHED_FILES.values()),
    on_kept: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Fetch weights from a Hugging Face repository, check and record their checksums.

    `HF_ENDPOINT` and `HF_TOKEN` are honoured. A file that is already there whole is not fetched again. One that is
    neither the repository's nor what was downloaded earlier stays as it is.

    Args:
        on_kept: told about each file of somebody else's that stays, and what to do.

    Returns:
        The repository's files that are there now.

    Raises:
        WeightsError: no connection, no such repository, revision or file, or a checksum that does not match.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    paths = [_download_one(folder, repo, revision, name, on_kept) for name in files]
    return [path for path in paths if path]


def _download_one(folder: Path, repo: str, revision: str, name: str, on_kept: Callable[[str], None]) -> Path | None:
    try:
        metadata = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision))
        commit = metadata.commit_hash or revision
        # The hub tags large files with their sha256; small ones carry a git hash, which says nothing about content.
        tag = metadata.etag if metadata.etag and len(metadata.etag) == 64 else None
        if _is_anothers(folder, name, tag):
            on_kept(
                f"{folder / name} is neither the file of {repo} ({revision}) nor one downloaded earlier, so it is "
                "kept; move it away to fetch that one, or download into another folder"
            )
            return None
        path = Path(str(hf_hub_download(repo, name, revision=commit, local_dir=folder)))
    except (HTTPError, HFValidationError, OSError) as error:
        raise WeightsError(f"{name} could not be downloaded from {repo} ({revision}): {error}") from error
    found = sha256(path)
    for expected in filter(None, (tag, KNOWN_SHA256.get(name))):
        if found != expected:
            path.unlink()
            raise WeightsError(f"{name}: downloaded with sha256 {found}, expected {expected}; removed, try again")
    record(folder, name, {"sha256": found, "repo": repo, "revision": commit})
    return path


def _is_anothers(folder: Path, name: str, tag: str | None) -> bool:
    """Whether a file stands under the name whose content no download can bring back.

    The hub's client would replace it: of its own record of the folder it compares the time of the file alone.
    """
    if not (folder / name).is_file():
        return False
    entry = recorded(folder).get(name, {})
    downloaded = entry.get("sha256") if "repo" in entry else None
    return sha256(folder / name) not in (tag, downloaded)


def convert(source: Path, target: Path, modality: str | None, dtype: torch.dtype) -> Path:
    """Write a checkpoint as our safetensors, with what its header needs to say.

    Raises:
        WeightsError: the source is not usable, no one knows which contrast it synthesises, or the target is the source
            or another file that was not converted here.
    """
    if target.suffix != ".safetensors":
        raise WeightsError(f"{target}: the converted file is a safetensors file and must be named so")
    _check_free(target, source)
    loaded = checkpoint.load(source)
    conditional = loaded.model.config.in_channels > loaded.model.config.out_channels
    modality = modality or loaded.record.modality or modality_of(source)
    if conditional and modality is None:
        raise WeightsError(f"{source}: the file does not say which contrast it synthesises; give --modality")
    entry = loaded.record.model_copy(update={"modality": modality})
    checkpoint.save(target, loaded.model, entry, dtype)
    record(target.parent, target.name, {"sha256": sha256(target), "converted_from": loaded.sha256})
    return target


def _check_free(target: Path, source: Path) -> None:
    """Refuse to replace what an earlier conversion did not write."""
    if not target.exists():
        return
    entry = recorded(target.parent).get(target.name, {})
    converted = "converted_from" in entry and entry.get("sha256") == sha256(target)
    if not converted or (source.exists() and target.samefile(source)):
        raise WeightsError(
            f"{target} is there and is no earlier conversion of another file; move it away or give another name"
        )


def record(folder: Path, name: str, entry: dict[str, Any]) -> None:
    """Add one file's entry to the checksums beside the weights."""
    write_json(folder / CHECKSUMS, dict(sorted({**recorded(folder), name: entry}.items())))


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """The checksums recorded beside the weights; empty if there are none."""
    path = folder / CHECKSUMS
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): dict(entry) for name, entry in entries.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise WeightsError(f"{path}: cannot be read ({error}); delete it and download again") from error


@dataclass(frozen=True)
class Listed:
    """One weights file as `cwdm weights list` and `verify` show it.

    Attributes:
        loaded: None where the file cannot be used; `fault` says why.
        verified: True if the checksum is as recorded, False if it differs, None if none is recorded.
    """

    path: Path
    loaded: Checkpoint | None
    verified: bool | None
    fault: str = ""


def inspect(weights: Path) -> Iterator[Listed]:
    """Load every weights file of a folder (or the one file) strictly and compare its recorded checksum."""
    folder = weights.parent if weights.is_file() else weights
    inside = [path for modality in PUBLISHED_FILES for path in _trained(folder / modality)]
    paths = [weights] if weights.is_file() else [*_files(folder), *inside]
    for path in paths:
        if path.suffix in (".pt", ".safetensors"):
            yield _inspect_one(path)
    for name in recorded(folder) if folder == weights else ():
        if not (folder / name).exists():
            yield Listed(folder / name, None, None, f"{folder / name}: recorded in {CHECKSUMS}, but not there")


def _inspect_one(path: Path) -> Listed:
    expected = recorded(path.parent).get(path.name, {}).get("sha256") or KNOWN_SHA256.get(path.name)
    try:
        loaded = checkpoint.load(path)
    except WeightsError as error:
        return Listed(path, None, None, str(error))
    if expected is None:
        return Listed(path, loaded, None)
    same = loaded.sha256 == expected
    return Listed(path, loaded, same, "" if same else f"{path}: sha256 {loaded.sha256}, recorded {expected}")
