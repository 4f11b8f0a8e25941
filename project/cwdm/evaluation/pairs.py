"""Pairs of a synthesised image and the true one, found by the names of files; no image is opened."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from cwdm.errors import InputError, SettingsError
from cwdm.files import exists
from cwdm.images import (
    MODALITIES,
    CaseFolder,
    ImageSettings,
    find_cases,
    list_folder,
    list_subjects,
    output_name,
)

_ENDING = ".nii.gz"


@dataclass(frozen=True)
class Pair:
    """A synthesised image and what it is held against, not read yet.

    Attributes:
        modality: empty for images of other kinds than the four modalities.
        truth: the true image; None if there is none, and then `problem` says why.
        others: the case's other true images, modality -> file.
        seg: the reference segmentation or the mask, if one was asked for.
        problem: why the pair cannot be scored, found while looking.
    """

    case: str
    modality: str
    prediction: Path
    truth: Path | None = None
    others: Mapping[str, Path] = field(default_factory=dict)
    seg: Path | None = None
    problem: str = ""


def find_pairs(predictions: Path, truth: Path, seg: Path | None = None) -> list[Pair]:
    """Pair the images of a flat folder with the true ones by their names, sorted.

    A case folder in `truth` of which no image was synthesised is a pair with a problem too: a mean over fewer
    cases than were asked for would pass unnoticed.

    Args:
        predictions: flat folder of <case>-<modality>.nii.gz, as `cwdm infer` writes it.
        truth: folder of case folders, or flat like `predictions`.
        seg: folder with <case>-seg.nii.gz, flat or in case folders.

    Raises:
        InputError: a folder is missing or cannot be read, or no image is found.
    """
    found = [split for path in _files(predictions) if (split := _split(path))]
    if not found:
        raise InputError(
            f"no synthesised image in {predictions}; expected files such as {output_name('<case>', 'one of')} "
            f"{', '.join(MODALITIES)}, as 'cwdm infer' writes them; for images of 'cwdm translate', say which file "
            "of a case is the true one, such as --truth-file '{case}/ct.nii.gz'"
        )
    _files(truth)
    if seg:
        _files(seg)
    try:
        folders = {folder.name: folder for folder in find_cases(truth, flat=False) if folder.files}
    except InputError:  # flat
        folders = {}
    pairs = [_pair(case, modality, path, truth, folders.get(case), seg) for case, modality, path in found]
    pairs += [_missed(name, predictions) for name in folders.keys() - {pair.case for pair in pairs}]
    return sorted(pairs, key=lambda pair: (pair.case, pair.modality))


def find_translated(predictions: Path, truth: Path, truth_file: str, mask_file: str | None = None) -> list[Pair]:
    """Pair the images of a flat folder with true ones of other kinds, such as CT, sorted by case.

    A case with a true image and no synthesised one is a pair with a problem, as in `find_pairs`.

    Args:
        predictions: flat folder of <case>.nii.gz, as `cwdm translate` writes it.
        truth_file, mask_file: paths inside `truth` with {case} where the case's name stands.

    Raises:
        InputError: a folder is missing or cannot be read, or no image is found.
        SettingsError: a path leads out of the folder.
    """
    made = {path.name.removesuffix(_ENDING): path for path in _files(predictions) if path.name.endswith(_ENDING)}
    if not made:
        raise InputError(f"no image in {predictions}; expected <case>{_ENDING}, as 'cwdm translate' writes them")
    true = _true_files(truth, truth_file, mask_file)
    pairs = []
    for case in sorted(made.keys() | true.keys()):
        if case not in true:
            problem = f"expected its true image {truth_file.replace('{case}', case)} in {truth}, found none"
            pairs.append(Pair(case, "", made[case], problem=problem))
        elif case not in made:
            pairs.append(_missed(case, predictions))
        else:
            image, *masks = true[case]
            pairs.append(Pair(case, "", made[case], image, seg=masks[0] if masks else None))
    return pairs


def _files(folder: Path) -> list[Path]:
    return [path for path in list_folder(folder, "images") if not path.name.startswith(".")]


def _split(path: Path) -> tuple[str, str, Path] | None:
    """Case, modality and file, from its name."""
    for modality in MODALITIES:
        ending = output_name("", modality)
        if path.name.endswith(ending) and len(path.name) > len(ending):
            return path.name.removesuffix(ending), modality, path
    return None


def _missed(case: str, predictions: Path) -> Pair:
    return Pair(case, "", predictions, problem=f"no synthesised image of it in {predictions}")


def _pair(case: str, modality: str, path: Path, truth: Path, folder: CaseFolder | None, seg: Path | None) -> Pair:
    mask, problem = None, ""
    if seg:
        name = output_name(case, "seg")
        mask = next((place for place in (seg / name, seg / case / name) if exists(place)), None)
        problem = "" if mask else f"expected its segmentation {name} in {seg}, found none; add it"
    if folder is None:
        image = truth / output_name(case, modality)
        if not exists(image):
            problem = f"expected its true image {image.name} or a case folder {case} in {truth}, found neither"
        return Pair(case, modality, path, None if problem else image, {}, mask, problem)
    if folder.problem or modality not in folder.files:
        problem = folder.problem or f"expected the true {modality} in {folder.folder}, found none; add it"
    others = {name: file for name, file in folder.files.items() if name != modality}
    return Pair(case, modality, path, None if problem else folder.files[modality], others, mask, problem)


def _true_files(truth: Path, *patterns: str | None) -> dict[str, tuple[Path, ...]]:
    """Case -> its files, by the patterns, of all cases that have the first."""
    list_folder(truth, "true images")
    try:
        images = [ImageSettings(file=pattern) for pattern in patterns if pattern]
    except ValidationError as error:
        fault = error.errors()[0]["msg"]
        raise SettingsError(f"{' and '.join(filter(None, patterns))}: {fault}") from error
    return {subject.name: tuple(subject.files) for subject in list_subjects(truth, images)}
