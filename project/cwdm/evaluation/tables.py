"""Evaluations: what is scored and how, and the scores for people: their summary, a table, CSV and JSON."""

import csv
import io
import statistics
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from cwdm import __version__
from cwdm.errors import InputError, SettingsError
from cwdm.evaluation.catalogue import FIGURES, Figure
from cwdm.evaluation.score import Pair, Score, Scorer, find_pairs, score_pair, score_pairs
from cwdm.evaluation.segmenters import (
    REGIONS,
    SCHEMES,
    TODAY,
    bundle_segmenter,
    command_segmenter,
    one_at_a_time,
    program_files,
)
from cwdm.evaluation.target_score import find_translated, score_translated
from cwdm.files import check_writable, write_atomically, write_json
from cwdm.progress import printable

Summary = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Evaluation:
    """What is scored and how.

    Attributes:
        score: makes the score of a pair.
        folders: what is read, and must stay as it is.
        record: all this in words, for evaluation.json.
        means: what a score depends on beside the pair's files.
        programs: files that it depends on too.
    """

    pairs: Sequence[Pair]
    score: Scorer
    folders: Sequence[Path]
    record: Mapping[str, Any]
    means: Sequence[str] = ()
    programs: Sequence[Path] = ()


def contrasts(
    predictions: Path,
    truth: Path,
    seg: Path | None = None,
    segmenter: str | None = None,
    bundle: Path | None = None,
    labels: str = TODAY,
) -> Evaluation:
    """Of images of the four contrasts, as `cwdm infer` writes them.

    Args:
        predictions, truth, seg: see `find_pairs`.
        segmenter, bundle: a command or a MONAI bundle; see `cwdm.evaluation.segmenters`.
        labels: what the labels of segmentations mean, one of SCHEMES.

    Raises:
        InputError: a folder is missing or cannot be read, or holds no image.
        SettingsError: the segmenter cannot be used, or two are given.
    """
    if segmenter and bundle:
        raise SettingsError("--segmenter and --segmenter-bundle exclude each other; give one")
    pairs, scheme = find_pairs(predictions, truth, seg), SCHEMES[labels]
    segment = command_segmenter(segmenter) if segmenter else None
    segment = bundle_segmenter(bundle, scheme) if bundle else segment
    segmented_by = segmenter or (str(bundle) if bundle else None)
    return Evaluation(
        pairs,
        partial(score_pair, segmenter=one_at_a_time(segment) if segment else None, scheme=scheme),
        [folder for folder in (predictions, truth, seg) if folder],
        {
            "predictions": str(predictions),
            "truth": str(truth),
            "segmentations": str(seg) if seg else None,
            "segmenter": segmented_by,
            "labels": str(labels),
        },
        [segmented_by or "", str(labels)],
        program_files(segmenter, bundle),
    )


def translations(
    predictions: Path,
    truth: Path,
    truth_file: str,
    mask_file: str | None = None,
    value_range: tuple[float, float] | None = None,
) -> Evaluation:
    """Of images of other kinds, as `cwdm translate` writes them; see `cwdm.evaluation.target_score` for the arguments.

    Raises:
        InputError: a folder is missing or cannot be read, or holds no image.
        SettingsError: the range does not rise, or a path leads out of the folder.
    """
    if value_range and not -np.inf < value_range[0] < value_range[1] < np.inf:
        raise SettingsError(f"--range: expected two rising numbers, found {value_range[0]:g} {value_range[1]:g}")
    return Evaluation(
        find_translated(predictions, truth, truth_file, mask_file),
        partial(score_translated, value_range=value_range),
        [predictions, truth],
        {
            "predictions": str(predictions),
            "truth": str(truth),
            "truth_file": truth_file,
            "mask_file": mask_file,
            "range": value_range,
        },
        ["translation", str(value_range)],
    )


def evaluate(
    predictions: str | Path, truth: str | Path, seg: str | Path | None = None, workers: int | None = None
) -> dict[str, Summary]:
    """Scores of synthesised images against the true ones, summed up.

    Args:
        predictions, truth, seg: folders; see `find_pairs`.
        workers: images at a time; None for one a processor.

    Returns:
        "all", and each modality if there are several -> metric -> mean and so on; see `summarise`.

    Raises:
        InputError: a folder is missing or cannot be read, or holds no image; or none could be scored.
    """
    evaluation = contrasts(Path(predictions), Path(truth), None if seg is None else Path(seg))
    scores = score_pairs(evaluation.pairs, evaluation.score, workers)
    if all(score.reason for score in scores):
        raise InputError(f"no image in {predictions} could be scored; the first: {scores[0].line}")
    return summaries(scores)


def summarise(scores: Iterable[Score]) -> Summary:
    """Figure -> number of images, mean, standard deviation (n − 1), median, worst value and its case.

    An infinite value (PSNR of equal images) makes the mean infinite; the deviation is None then, and for one image.
    """
    scored = [score for score in scores if not score.reason]
    summary: Summary = {}
    for name, figure in FIGURES.items():
        values = [(score.figures[name], score) for score in scored if name in score.figures]
        if not values:
            continue
        numbers = [value for value, _ in values]
        worst, of = (min if figure.higher_is_better else max)(values, key=lambda pair: pair[0])
        spread = statistics.stdev(numbers) if len(numbers) > 1 and np.isfinite(numbers).all() else None
        summary[name] = {
            "images": len(numbers),
            "mean": statistics.fmean(numbers),
            "sd": spread,
            "median": statistics.median(numbers),
            "worst": worst,
            "worst_case": of.name,
        }
    return summary


def summaries(scores: Sequence[Score]) -> dict[str, Summary]:
    """`summarise` for all images together, and for each modality if there are several."""
    modalities = sorted({score.modality for score in scores if not score.reason})
    groups = {"all": summarise(scores)}
    if len(modalities) > 1:
        groups |= {name: summarise(score for score in scores if score.modality == name) for name in modalities}
    return groups


def tables(scores: Sequence[Score]) -> list[Table]:
    """The summaries as tables for the terminal; below the last what the brain mask is and which rules are open.

    A region that no segmentation holds, such as the resection cavity before treatment, has no rows.
    """
    groups = summaries(scores)
    absent = _absent_regions(groups["all"])
    groups = {
        name: {figure: row for figure, row in summary.items() if FIGURES[figure].region not in absent}
        for name, summary in groups.items()
    }
    doubts = dict.fromkeys(FIGURES[name].doubt for name in groups["all"] if FIGURES[name].doubt)
    marks = dict(zip(doubts, string.ascii_lowercase, strict=False))
    drawn = [_table(name, summary, marks) for name, summary in groups.items()]
    brains = sorted({score.brain for score in scores if score.brain})
    legend = [f"Brain: nonzero voxels of the {' or '.join(brains)}."] if brains else []
    legend += [f"No {REGIONS[region]} in any segmentation, so it has no rows." for region in absent]
    legend += [f"({marks[doubt]}) {doubt}." for doubt in doubts]
    drawn[-1].caption = "\n".join(legend)
    return drawn


def write_evaluation(out: Path, scores: Sequence[Score], record: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write OUT/evaluation.csv, a line an image, and OUT/evaluation.json, with the summaries and what the figures mean.

    Raises:
        OutputError: the folder cannot be written.
    """
    check_writable(out)
    used = [name for name in FIGURES if any(name in score.figures for score in scores)]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "modality", *used, "brain", "notes", "reason"])
    for score in scores:
        row = [repr(score.figures[name]) if name in score.figures else "" for name in used]
        writer.writerow([score.case, score.modality, *row, score.brain, "; ".join(score.notes), score.reason])
    table, report = out / "evaluation.csv", out / "evaluation.json"
    contents = text.getvalue().encode(errors="backslashreplace")  # names of files can be any bytes
    write_atomically(table, lambda file: file.write(contents))
    write_json(
        report,
        {
            "program": f"cwdm {__version__}",
            **record,
            "figures": {name: _explanation(FIGURES[name]) for name in used},
            "summary": _finite(summaries(scores)),
            "images": [_finite(_entry(score)) for score in scores],
        },
    )
    return table, report


# Showing


def _absent_regions(summary: Summary) -> list[str]:
    """Regions of which there are counts of lesions, and all are 0."""
    counts: dict[str, float] = {}
    for name, row in summary.items():
        if name.startswith("lesions_") or name.startswith("reference_lesions_"):
            region = FIGURES[name].region
            counts[region] = counts.get(region, 0.0) + row["mean"]
    return [region for region, count in counts.items() if not count]


def _table(name: str, summary: Summary, marks: Mapping[str, str]) -> Table:
    images = max((row["images"] for row in summary.values()), default=0)
    table = Table(title=f"{name}, n = {images}", caption_justify="left")
    for column in ("figure", "mean", "sd", "median", "worst", "worst case"):
        table.add_column(column, justify="left" if column in ("figure", "worst case") else "right", overflow="fold")
    for figure, row in summary.items():
        explanation = FIGURES[figure]
        mark = f" ({marks[explanation.doubt]})" if explanation.doubt else ""
        count = f", n = {row['images']}" if row["images"] < images else ""
        numbers = ("" if row[key] is None else f"{row[key]:.4g}" for key in ("mean", "sd", "median", "worst"))
        table.add_row(explanation.title + mark + count, *numbers, Text(printable(row["worst_case"], lines=False)))
    return table


def _explanation(figure: Figure) -> dict[str, Any]:
    return {
        "title": figure.title,
        "rule": figure.rule,
        "version": figure.version,
        "not_confirmed": figure.doubt or None,
        "worst": "lowest" if figure.higher_is_better else "highest",
    }


def _entry(score: Score) -> dict[str, Any]:
    return {
        "case": score.case,
        "modality": score.modality,
        "figures": score.figures,
        "brain": score.brain,
        "notes": list(score.notes),
        "reason": score.reason,
    }


def _finite(content: Any) -> Any:
    """The same with infinite numbers as text, since JSON has none."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return str(content) if isinstance(content, float) and not np.isfinite(content) else content
