"""What is in a folder of weights, each file loaded and compared with its recorded checksum, and what it is good for."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cwdm import checkpoint
from cwdm.checkpoint import Checkpoint
from cwdm.errors import WeightsError
from cwdm.files import exists, is_file
from cwdm.weights.folder import CHECKSUMS, PUBLISHED_FILES, files_of, is_recorded, load_for, recorded, trained

KNOWN_SHA256 = {
    "brats_unet_128_1200k.pt": "01346a0ab8e406c0cbe7be43d383dffd3885c212b36ecd2aa8c315f54cc73d48",
    "lidc-idri_unet_128_1200k.pt": "6339773bb7051454c434fd06460fba77fdbbc35c98e2c4d1491beb793f01fd75",
}


@dataclass(frozen=True)
class WeightsFile:
    """One file as `cwdm weights list` shows it.

    Attributes:
        loaded: None where the file cannot be used; `fault` says why.
        verified: True if the checksum is as recorded, False if it differs, None if none is recorded.
    """

    path: Path
    loaded: Checkpoint | None
    verified: bool | None
    fault: str = ""


def inspect(weights: Path) -> Iterator[WeightsFile]:
    """Load every file of weights of a folder (or the one file) strictly and compare its recorded checksum."""
    folder = weights.parent if is_file(weights) else weights
    inside = [path for modality in PUBLISHED_FILES for path in trained(folder / modality)]
    paths = [weights] if is_file(weights) else [*files_of(folder), *inside]
    for path in paths:
        if path.suffix in (".pt", ".safetensors"):
            yield _inspect_one(path)
    for name in recorded(folder) if folder == weights else ():
        if not exists(folder / name):
            yield WeightsFile(folder / name, None, None, f"{folder / name}: recorded in {CHECKSUMS}, but not there")


def _inspect_one(path: Path) -> WeightsFile:
    entry = recorded(path.parent).get(path.name, {})
    expected = entry.get("sha256") or KNOWN_SHA256.get(path.name)
    try:
        loaded = checkpoint.load(path)
    except WeightsError as error:
        return WeightsFile(path, None, None, str(error))
    if expected is None:
        return WeightsFile(path, loaded, None)
    same = is_recorded({**entry, "sha256": expected}, loaded.sha256)
    return WeightsFile(path, loaded, same, "" if same else f"{path}: sha256 {loaded.sha256}, recorded {expected}")


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
        raise WeightsError("no case can be done with these weights:", *dict.fromkeys(faults))
