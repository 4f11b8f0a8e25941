"""Case folders with all four modalities for a segmenter: the originals and the synthesised one, marked as such."""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib

from cwdm import __version__
from cwdm.brats import CaseFolder, check_same_grid, find_cases, nearest_of, output_name, read_grid
from cwdm.errors import CaseError, InputError
from cwdm.files import check_apart, output_errors, write_atomically, write_json

NOTICE = "holds a synthesised image, which is no substitute for an acquisition"


@dataclass(frozen=True)
class Completed:
    """What became of a case.

    Attributes:
        modalities: what was synthesised, or should be.
        reason: why the case was not completed; empty if it was.
    """

    case: str
    modalities: tuple[str, ...]
    reason: str = ""


def complete_cases(data_path: Path, synthesised: Path, out: Path, copy: bool = False) -> Iterator[Completed]:
    """Write OUT/<case>/ with the files of each case, its synthesised images and a record of what is synthesised.

    The record is <case>-synthesised.json; it is written before the images, so that none stands there unmarked.
    A case that cannot be completed leaves nothing new in OUT, and the others go on. Files of the same names in OUT
    are replaced.

    Args:
        data_path: folder of cases with modalities missing; never written to.
        synthesised: flat folder of <case>-<modality>.nii.gz, as `cwdm infer` writes it; never written to.
        copy: copy the files instead of linking to them. Links are absolute: they survive a move of OUT, but do not
            lead out of a container that mounts OUT alone.

    Yields:
        Each case once it is done, sorted by name.

    Raises:
        InputError: there is no case, or OUT lies in a folder that is only read.
        OutputError: OUT cannot be written.
    """
    folders = find_cases(data_path)
    for kept in (data_path, synthesised):
        check_apart(out, kept)
    for folder in folders:
        for kept in (data_path, synthesised, folder.folder):
            check_apart(out / folder.name, kept)
    return (_complete(folder, synthesised, out / folder.name, copy) for folder in folders)


def _complete(folder: CaseFolder, synthesised: Path, target: Path, copy: bool) -> Completed:
    try:
        _write_case(folder, _checked_images(folder, synthesised), target, copy)
    except CaseError as error:
        return Completed(folder.name, folder.missing, error.reason)
    return Completed(folder.name, folder.missing)


def _checked_images(folder: CaseFolder, synthesised: Path) -> dict[str, Path]:
    """Modality -> synthesised image of a case, each known to be sound and on the grid of the contrast nearest to it."""
    if folder.problem:
        raise CaseError(folder.name, folder.problem)
    if not folder.missing:
        raise CaseError(folder.name, "expected a missing modality, found all four")
    return {modality: _checked_image(folder, modality, synthesised) for modality in folder.missing}


def _checked_image(folder: CaseFolder, modality: str, synthesised: Path) -> Path:
    image = synthesised / output_name(folder.name, modality)
    if not image.is_file():
        raise CaseError(
            folder.name, f"expected its synthesised {modality} as {image}, found none; run 'cwdm infer' first"
        )
    nearest = nearest_of(modality, folder.files)
    try:
        volume, affine, _ = read_grid(image)
        original, grid, _ = read_grid(folder.files[nearest])
    except InputError as error:
        raise CaseError(folder.name, str(error)) from error
    volumes, affines = {nearest: original, image.name: volume}, {nearest: grid, image.name: affine}
    check_same_grid(folder.name, nearest, volumes, affines)
    if volume.min() == volume.max():
        raise CaseError(folder.name, f"{image}: every voxel is {volume.flat[0]:g}; synthesise it again")
    return image


def _write_case(folder: CaseFolder, images: Mapping[str, Path], target: Path, copy: bool) -> None:
    record = {
        "program": f"cwdm {__version__}",
        "case": folder.name,
        "notice": NOTICE,
        "synthesised": [
            {
                "modality": modality,
                "file": output_name(folder.name, modality),
                "sha256": _sha256(folder.name, image),
                "header": _description(image),
            }
            for modality, image in images.items()
        ],
        "originals": {name: path.name for name, path in folder.files.items()},
    }
    with output_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        write_json(target / f"{folder.name}-synthesised.json", record)
        for source in sorted(folder.folder.iterdir()):
            if not source.name.startswith(".") and source.is_file():
                _put(folder.name, source, target / source.name, copy)
        for modality, image in images.items():
            _put(folder.name, image, target / output_name(folder.name, modality), copy)


def _put(case: str, source: Path, target: Path, copy: bool) -> None:
    target.unlink(missing_ok=True)
    if not copy:
        target.symlink_to(source.resolve())
        return
    try:
        file = source.open("rb")
    except OSError as error:
        raise CaseError(case, f"{source} cannot be read: {error.strerror}") from error
    with file:
        write_atomically(target, lambda written: shutil.copyfileobj(file, written))


def _sha256(case: str, path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CaseError(case, f"{path} cannot be read: {error.strerror}") from error


def _description(image: Path) -> str:
    """What the header says about the image's origin, such as `synthesised by cwdm 0.1.0 (t1n)`; the file is sound."""
    text = bytes(nib.load(image).header["descrip"].tobytes()).rstrip(b"\0")
    return text.decode(errors="backslashreplace")
