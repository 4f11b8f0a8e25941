"""Scores: how near the synthesised images of a report come to the true ones, and which of them are poor.

They are those of `cwdm evaluate`, inside the brain, so that both tell the same number of the same image.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from cwdm.errors import CwdmError, InputError
from cwdm.evaluation import Pair, Score, score_pairs
from cwdm.files import read_json
from cwdm.images import case_folder
from cwdm.report.data import Entry, ReportPaths, output_file, truth_file

Scores = Mapping[tuple[str, str], Score]
"""Case and modality -> score."""

PSNR, SSIM = "psnr_brain", "ssim_brain"

EVALUATION = "evaluation.json"

POOR_PSNR_DB = 15.0
"""Below this an image is poor whatever the others are: with one grey value all over the brain, eight images of four
patients come to 10.7 to 16.4 dB."""

POOR_GAP_DB = 3.0
"""So far below the median of its modality an image has twice the squared error, and is poor if that is unusual too."""

POOR_DEVIATIONS = 3.0
"""How many standard deviations below the median are unusual, by the median absolute deviation."""


class _Evaluation(BaseModel):
    """What `cwdm evaluate --out` says of each image."""

    images: list[Score]


def score_entries(
    entries: Iterable[Entry],
    paths: ReportPaths,
    workers: int | None = None,
    on_score: Callable[[Score], None] = lambda score: None,
) -> Scores:
    """The scores of all written cases against the folder of true images, as many as that may be.

    Args:
        workers: images at a time; see `cwdm.evaluation.score_pairs`.
        on_score: called after each image.
    """
    pairs = [_pair(entry, paths) for entry in entries if not entry.failed]
    return {(score.case, score.modality): score for score in score_pairs(pairs, workers=workers, on_score=on_score)}


def read_scores(folder: Path, entries: Iterable[Entry], paths: ReportPaths) -> Scores:
    """What `cwdm evaluate --out` wrote of the cases of a report; an image made after it has no score.

    Raises:
        InputError: there is no evaluation, or it is none of these cases.
    """
    path = folder / EVALUATION
    try:
        images = _Evaluation.model_validate(read_json(path)).images
        evaluated = path.stat().st_mtime
    except OSError as error:
        advice = f"'cwdm evaluate --out {folder}' writes it"
        raise InputError(f"{path} cannot be read: {error.strerror}; {advice}") from error
    except ValueError as error:  # among them pydantic's ValidationError
        raise InputError(f"{path} is not an evaluation as 'cwdm evaluate --out' writes it") from error
    found = {(score.case, score.modality): score for score in images}
    known = {(entry.case, entry.modality): entry for entry in entries if not entry.failed}
    if known and not known.keys() & found.keys():
        raise InputError(f"{path} scores none of the images of {paths.report}; check --scores")
    return {key: _if_of_today(found[key], entry, paths, evaluated) for key, entry in known.items() if key in found}


def find_poor(scores: Scores) -> dict[tuple[str, str], str]:
    """Which images are poor, and why: against what an image without detail has, and against the others."""
    values = {key: score.metrics[PSNR] for key, score in scores.items() if PSNR in score.metrics}
    poor = {}
    for key, value in values.items():
        alike = np.array([other for (_, modality), other in values.items() if modality == key[1]])
        finite = alike[np.isfinite(alike)]
        if value < POOR_PSNR_DB:
            poor[key] = f"PSNR {value:.1f} dB: one grey value all over a brain has 11 to 16"
        elif finite.size and value < _usual(finite):
            poor[key] = f"PSNR {value:.1f} dB, where half of the {key[1]} have {np.median(finite):.1f} or more"
    return poor


def _usual(values: npt.NDArray[np.float64]) -> float:
    """The value below which one is unusual among its like."""
    median = float(np.median(values))
    deviation = 1.4826 * float(np.median(np.abs(values - median)))  # of a normal distribution
    return median - max(POOR_GAP_DB, POOR_DEVIATIONS * deviation)


def _pair(entry: Entry, paths: ReportPaths) -> Pair:
    """A synthesised image and the true one, with what `cwdm evaluate` would take along."""
    case, modality = entry.case, entry.modality
    try:
        prediction, truth = output_file(entry, paths), truth_file(entry, paths)
        folder = case_folder(truth.parent) if truth and truth.parent != paths.truth else None
    except CwdmError as error:
        return Pair(case, modality, Path(), problem=getattr(error, "reason", str(error)))
    if truth is None or (folder and folder.problem):
        problem = (folder and folder.problem) or f"its true image is not in {paths.truth}"
        return Pair(case, modality, prediction, problem=problem)
    contrasts = {name: path for name, path in folder.files.items() if name != modality} if folder else {}
    return Pair(case, modality, prediction, truth, contrasts)


def _if_of_today(score: Score, entry: Entry, paths: ReportPaths, evaluated: float) -> Score:
    """The score, unless the image was written after the evaluation; one that is not there cannot be asked."""
    try:
        newer = output_file(entry, paths).stat().st_mtime > evaluated
    except (CwdmError, OSError):
        return score
    reason = "its image was written after it was scored; run 'cwdm evaluate' again"
    return Score(score.case, score.modality, reason=reason) if newer else score
