"""Case folders with all four modalities for a segmenter: the originals and the synthesised one, marked as such."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from cwdm import __version__
from cwdm.copies import check_replaceable, put_files
from cwdm.errors import CaseError, CwdmError
from cwdm.files import check_apart, check_no_source_in, is_file, output_errors, read_json, sha256, write_json
from cwdm.folders import locked
from cwdm.images import (
    MARK,
    CaseFolder,
    case_files,
    check_same_grid,
    find_cases,
    nearest_of,
    output_name,
    read_description,
    read_grid,
)
from cwdm.runner import Outcome, run_each

NOTICE = "holds a synthesised image, which is no substitute for an acquisition"


def complete_cases(
    data_path: Path,
    synthesised: Path,
    out: Path,
    copy: bool = False,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Write OUT/<case>/ with the files of each case, its synthesised images and a record of what is synthesised.

    The record is <case>-synthesised.json; it is written before the images, so that none stands there unmarked.
    A case that cannot be completed leaves nothing new in OUT, and the others go on. Links and copies that an earlier
    run made in OUT are replaced; a case in whose place there is another file fails.

    Args:
        data_path: folder of cases with modalities missing; never written to.
        synthesised: flat folder of <case>-<modality>.nii.gz, as `cwdm infer` writes it; never written to.
        copy: copy the files instead of linking to them. Links are absolute: they survive a move of OUT, but do not
            lead out of a container that mounts OUT alone.
        on_outcome: told about each case once it is done, sorted by name.

    Raises:
        InputError: there is no case, or OUT lies in a folder that is only read, or holds what a file there links to.
        OutputError: OUT cannot be written.
    """
    folders = find_cases(data_path)
    for kept in (data_path, synthesised):
        check_apart(out, kept)
    for folder in folders:
        for kept in (data_path, synthesised, folder.folder):
            check_apart(out / folder.name, kept)
    check_no_source_in(
        [out / folder.name for folder in folders],
        (path for folder in folders for path in (*_usable(folder), *_images(folder, synthesised).values())),
    )
    return run_each(
        folders,
        lambda folder: _complete(folder, synthesised, out / folder.name, copy),
        name=lambda folder: folder.name,
        on_outcome=on_outcome,
    )


def _complete(folder: CaseFolder, synthesised: Path, target: Path, copy: bool) -> tuple[str, ...]:
    """Complete a case; returns what its user should know."""
    _write_case(folder, _checked_images(folder, synthesised), target, copy)
    several = len(folder.missing) > 1
    return (f"its {' and '.join(folder.missing)} {'are' if several else 'is'} synthesised, not acquired",)


def _usable(folder: CaseFolder) -> Collection[Path]:
    """The files of a case, none where it cannot be used; then it is not completed either, and says why."""
    try:
        return case_files(folder).values()
    except CwdmError:
        return ()


def _images(folder: CaseFolder, synthesised: Path) -> dict[str, Path]:
    """Modality -> synthesised image of a case, there or not."""
    return {modality: synthesised / output_name(folder.name, modality) for modality in folder.missing}


def _checked_images(folder: CaseFolder, synthesised: Path) -> dict[str, Path]:
    """Modality -> synthesised image of a case, each known to be sound and on the grid of the modality nearest to it."""
    if folder.problem:
        raise CaseError(folder.name, folder.problem)
    if not folder.missing:
        raise CaseError(folder.name, "expected a missing modality, found all four")
    images = _images(folder, synthesised)
    for modality, image in images.items():
        _check_image(folder, modality, image)
    return images


def _check_image(folder: CaseFolder, modality: str, image: Path) -> None:
    if not is_file(image):
        raise CaseError(
            folder.name, f"expected its synthesised {modality} as {image}, found none; run 'cwdm infer' first"
        )
    nearest = nearest_of(modality, folder.files)
    volume, affine, _ = read_grid(image)
    original, grid, _ = read_grid(folder.files[nearest])
    volumes, affines = {nearest: original, image.name: volume}, {nearest: grid, image.name: affine}
    check_same_grid(folder.name, nearest, volumes, affines)
    if not read_description(image).startswith(MARK):
        raise CaseError(folder.name, f"{image} was not synthesised by cwdm; run 'cwdm infer' into a folder of its own")
    if volume.min() == volume.max():
        raise CaseError(folder.name, f"{image}: every voxel is {volume.flat[0]:g}; synthesise it again")


def _write_case(folder: CaseFolder, images: Mapping[str, Path], target: Path, copy: bool) -> None:
    path = target / f"{folder.name}-synthesised.json"
    sources = {name: file for name, file in case_files(folder).items() if name != path.name}
    put_in = {output_name(folder.name, modality): image for modality, image in images.items()}
    record = _record(folder, images)
    check_replaceable(target, sources.keys() | put_in.keys())
    with locked(target):
        earlier = _read_record(path)
        if earlier is None:
            check_replaceable(target, [path.name])
        synthesised, originals = _names(earlier or {})
        # Also one in whose place an original comes: the new record does not call it synthesised.
        gone = (synthesised - put_in.keys()) | (originals - sources.keys() - put_in.keys())
        with output_errors(target):
            gone &= {path.name for path in target.iterdir()}  # a record that was changed may hold any text
        put_files(sources | put_in, target, copy, gone, between=lambda: write_json(path, record))


def _record(folder: CaseFolder, images: Mapping[str, Path]) -> dict[str, Any]:
    """What is synthesised of a case, and from what."""
    return {
        "program": f"cwdm {__version__}",
        "case": folder.name,
        "notice": NOTICE,
        "synthesised": [
            {
                "modality": modality,
                "file": output_name(folder.name, modality),
                "sha256": _sha256(folder.name, image),
                "header": read_description(image),
            }
            for modality, image in images.items()
        ],
        "originals": {name: path.name for name, path in folder.files.items()},
    }


def _read_record(path: Path) -> dict[str, Any] | None:
    """The record of an earlier run; None where a file is none."""
    try:
        record: dict[str, Any] = read_json(path)
        return record if record["notice"] == NOTICE else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _names(record: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """Names that an earlier run put beside its record: of synthesised images, and of originals."""
    try:
        return {one["file"] for one in record["synthesised"]}, set(record["originals"].values())
    except (KeyError, TypeError, AttributeError):  # there was none, or it was changed
        return set(), set()


def _sha256(case: str, path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise CaseError(case, f"{path} cannot be read: {error.strerror}") from error
