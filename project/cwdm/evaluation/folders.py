"""Whole folders of images scored: several at a time, a bad one passed over, finished ones kept."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cwdm.errors import CaseError, CwdmError, OutputError, SettingsError
from cwdm.evaluation.cache import ScoreCache
from cwdm.evaluation.labels import SCHEMES, TODAY
from cwdm.evaluation.pairs import Pair, find_pairs, find_translated
from cwdm.evaluation.score import Score, Scorer, score_pair
from cwdm.evaluation.segmenters import bundle_segmenter, command_segmenter, one_at_a_time, program_files
from cwdm.evaluation.tables import Summary, summaries, write_evaluation
from cwdm.evaluation.target_score import score_translated
from cwdm.files import check_apart, check_writable, remove_stale

MOST_WORKERS = 8
"""A pair of full-size volumes takes 0.75 GB; more workers than this hardly help, since the disk is shared."""


@dataclass(frozen=True)
class Evaluation:
    """The scores of a folder of images.

    Attributes:
        scores: one an image, sorted; one that could not be made carries its reason and is in no mean.
        kept: those of them that are from an earlier run into the same folder.
        files: what was written.
    """

    scores: Sequence[Score]
    kept: Sequence[Score] = ()
    files: Sequence[Path] = ()

    @property
    def summary(self) -> dict[str, Summary]:
        """ "all", and each modality if there are several -> metric -> mean, sd, median, worst and its case."""
        return summaries(self.scores)

    @property
    def failed(self) -> list[Score]:
        """The scores that could not be made."""
        return [score for score in self.scores if score.reason]


def evaluate(
    predictions: Path | str,
    truth: Path | str,
    seg: Path | str | None = None,
    *,
    segmenter: str | None = None,
    bundle: Path | None = None,
    labels: str | None = None,
    truth_file: str | None = None,
    mask_file: str | None = None,
    value_range: tuple[float, float] | None = None,
    out: Path | str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    expect: Callable[[int], None] = lambda images: None,
    on_score: Callable[[Score], None] = lambda score: None,
) -> Evaluation:
    """Score synthesised images against the true ones.

    >>> result = evaluate("output", "cases", seg="cases")               # doctest: +SKIP
    >>> result.summary["all"]["ssim_brain"]["mean"]                     # doctest: +SKIP
    0.934
    >>> {score.name: score.metrics["psnr_brain"] for score in result.scores}  # doctest: +SKIP
    {'BraTS-GLI-00001-000-t1n': 24.1, 'BraTS-GLI-00002-000-t2f': 22.7}

    Args:
        predictions: flat folder of <case>-<modality>.nii.gz, or, with `truth_file`, of <case>.nii.gz.
        truth: the true images: case folders, or flat like `predictions`.
        seg: folder of <case>-seg.nii.gz, flat or in case folders, for the metrics of the tumour.
        segmenter, bundle: command or MONAI bundle for Dice and HD95; see `command_segmenter`, `bundle_segmenter`.
        labels: what the labels of segmentations mean: "2023", the default, or "2020".
        truth_file, mask_file: for other images than the four modalities, the true one and the mask inside `truth`,
            such as "{case}/ct.nii.gz"; without a mask the body is scored.
        value_range: with `truth_file`, intensities that PSNR and SSIM refer to; None for the true image's.
        out: folder for evaluation.csv and .json, and images/ with the scores that the next run goes on from.
        workers: images at a time, 0.75 GB of memory each; None for one a processor, MOST_WORKERS at most.
        overwrite: score again what `out` holds scores of.
        expect, on_score: told how many images there are, and each score as it is made.

    Raises:
        InputError: a folder cannot be read or holds no image, or `out` lies in one that is read.
        SettingsError: options exclude each other, or the segmenter cannot be run at all.
        OutputError: `out` cannot be written.
    """
    if truth_file and (seg or segmenter or bundle or labels):
        raise SettingsError("--truth-file is for other images; it excludes --seg, --segmenter(-bundle) and --labels")
    if not truth_file and (mask_file or value_range):
        raise SettingsError("--mask-file and --range are for images of 'cwdm translate'; add --truth-file")
    predictions, truth, seg = Path(predictions), Path(truth), Path(seg) if seg else None
    if truth_file:
        plan = _plan_translated(predictions, truth, truth_file, mask_file, value_range)
    else:
        plan = _plan_modalities(predictions, truth, seg, segmenter, bundle, labels or TODAY)
    return _carry_out(plan, Path(out) if out else None, workers, overwrite, expect, on_score)


def score_pairs(
    pairs: Sequence[Pair],
    score: Scorer = score_pair,
    workers: int | None = None,
    on_score: Callable[[Score], None] = lambda score: None,
) -> list[Score]:
    """The scores of all pairs, in their order; one that cannot be scored carries its reason.

    Args:
        score: makes a score, in several threads; see `ScoreCache` for one that keeps them.
        workers, on_score: as for `evaluate`.

    Raises:
        SettingsError: the segmenter cannot be run at all.
    """
    scores: dict[int, Score] = {}
    # Threads: reading, filtering and most arithmetic let go of the interpreter, and nothing need be sent to them.
    with ThreadPoolExecutor(workers or min(_processors(), MOST_WORKERS), "score") as pool:
        running = {pool.submit(_score_or_reason, pair, score): index for index, pair in enumerate(pairs)}
        try:
            for done in as_completed(running):
                scored = scores[running[done]] = done.result()
                on_score(scored)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [scores[index] for index in range(len(pairs))]


@dataclass(frozen=True)
class _Plan:
    """What is scored and how.

    Attributes:
        folders: what is read, and must stay as it is.
        record: all this in words, for evaluation.json.
        means: what a score depends on beside the pair's files.
        programs: files that it depends on too.
    """

    pairs: Sequence[Pair]
    score: Scorer
    folders: Sequence[Path]
    record: Mapping[str, Any]
    means: Sequence[str]
    programs: Sequence[Path] = ()


def _carry_out(
    plan: _Plan,
    out: Path | None,
    workers: int | None,
    overwrite: bool,
    expect: Callable[[int], None],
    on_score: Callable[[Score], None],
) -> Evaluation:
    """Score what is planned, keeping the scores in a folder if there is one."""
    if not out:
        expect(len(plan.pairs))
        return Evaluation(score_pairs(plan.pairs, plan.score, workers, on_score))
    for kept in plan.folders:
        check_apart(out, kept)
        check_apart(out / "images", kept)
    check_writable(out / "images")
    remove_stale(out / "images")
    expect(len(plan.pairs))
    cache = ScoreCache(out / "images", plan.score, plan.means, plan.programs, renew=overwrite)
    scores = score_pairs(plan.pairs, cache.score, workers, on_score)
    return Evaluation(scores, cache.used, write_evaluation(out, scores, plan.record))


def _plan_modalities(
    predictions: Path, truth: Path, seg: Path | None, segmenter: str | None, bundle: Path | None, labels: str
) -> _Plan:
    if segmenter and bundle:
        raise SettingsError("--segmenter and --segmenter-bundle exclude each other; give one")
    pairs, scheme = find_pairs(predictions, truth, seg), SCHEMES[labels]
    segment = command_segmenter(segmenter) if segmenter else None
    segment = bundle_segmenter(bundle, scheme) if bundle else segment
    segmented_by = segmenter or (str(bundle) if bundle else None)
    record = {
        "predictions": str(predictions),
        "truth": str(truth),
        "segmentations": str(seg) if seg else None,
        "segmenter": segmented_by,
        "labels": str(labels),
    }
    score = partial(score_pair, segmenter=one_at_a_time(segment) if segment else None, scheme=scheme)
    folders = [folder for folder in (predictions, truth, seg) if folder]
    return _Plan(pairs, score, folders, record, [segmented_by or "", str(labels)], program_files(segmenter, bundle))


def _plan_translated(
    predictions: Path, truth: Path, truth_file: str, mask_file: str | None, value_range: tuple[float, float] | None
) -> _Plan:
    if value_range and not -np.inf < value_range[0] < value_range[1] < np.inf:
        raise SettingsError(f"--range: expected two rising numbers, found {value_range[0]:g} {value_range[1]:g}")
    record = {
        "predictions": str(predictions),
        "truth": str(truth),
        "truth_file": truth_file,
        "mask_file": mask_file,
        "range": value_range,
    }
    pairs = find_translated(predictions, truth, truth_file, mask_file)
    score = partial(score_translated, value_range=value_range)
    return _Plan(pairs, score, [predictions, truth], record, ["translation", str(value_range)])


def _score_or_reason(pair: Pair, score: Scorer) -> Score:
    try:
        return score(pair)
    except (OutputError, SettingsError):
        raise
    except CaseError as error:
        reason = error.reason
    except CwdmError as error:
        reason = str(error)
    except MemoryError:
        reason = "not enough memory; give fewer --workers"
    except Exception as error:  # whatever it is, it must not take the other images down
        reason = f"unexpected {type(error).__name__}: {error}"
    return Score(pair.case, pair.modality, reason=reason)


def _processors() -> int:
    """Those that this process may use, which in a container are fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
