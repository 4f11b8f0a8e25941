"""The scores of many images for people: their summary, tables for the terminal, CSV and JSON."""

import csv
import io
import statistics
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from cwdm import __version__
from cwdm.evaluation.definitions import METRICS, Metric
from cwdm.evaluation.labels import REGIONS
from cwdm.evaluation.score import Score
from cwdm.files import check_writable, write_atomically, write_json
from cwdm.progress import printable

Summary = dict[str, dict[str, Any]]
"""Metric -> number of images, mean, standard deviation, median, worst value and its case."""


def summarise(scores: Iterable[Score]) -> Summary:
    """The summary of the metrics of scores; the deviation is that of a sample (n − 1).

    An infinite value (PSNR of equal images) makes the mean infinite; the deviation is None then, and for one image.
    """
    scored = [score for score in scores if not score.reason]
    summary: Summary = {}
    for name, metric in METRICS.items():
        values = [(score.metrics[name], score) for score in scored if name in score.metrics]
        if not values:
            continue
        numbers = [value for value, _ in values]
        worst, of = (min if metric.higher_is_better else max)(values, key=lambda pair: pair[0])
        std = statistics.stdev(numbers) if len(numbers) > 1 and np.isfinite(numbers).all() else None
        summary[name] = {
            "images": len(numbers),
            "mean": statistics.fmean(numbers),
            "sd": std,
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
        name: {metric: row for metric, row in summary.items() if METRICS[metric].region not in absent}
        for name, summary in groups.items()
    }
    doubts = dict.fromkeys(METRICS[name].doubt for name in groups["all"] if METRICS[name].doubt)
    marks = dict(zip(doubts, string.ascii_lowercase, strict=False))
    drawn = [_table(name, summary, marks) for name, summary in groups.items()]
    brains = sorted({score.brain.replace("contrasts", "modalities") for score in scores if score.brain})
    legend = [f"Brain: nonzero voxels of the {' or '.join(brains)}."] if brains else []
    legend += [f"No {REGIONS[region]} in any segmentation, so it has no rows." for region in absent]
    legend += [f"({marks[doubt]}) {doubt}." for doubt in doubts]
    drawn[-1].caption = "\n".join(legend)
    return drawn


def write_evaluation(out: Path, scores: Sequence[Score], record: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write OUT/evaluation.csv, a line an image, and OUT/evaluation.json, with the summaries and definitions.

    Raises:
        OutputError: the folder cannot be written.
    """
    check_writable(out)
    used = [name for name in METRICS if any(name in score.metrics for score in scores)]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "modality", *used, "brain", "notes", "reason"])
    for score in scores:
        row = [repr(score.metrics[name]) if name in score.metrics else "" for name in used]
        said = printable(score.case), "; ".join(map(printable, score.notes)), printable(score.reason)  # a line an image
        writer.writerow([said[0], score.modality, *row, score.brain, *said[1:]])
    table, report = out / "evaluation.csv", out / "evaluation.json"
    contents = text.getvalue().encode(errors="backslashreplace")  # names of files can be any bytes
    write_atomically(table, lambda file: file.write(contents))
    write_json(
        report,
        {
            "program": f"cwdm {__version__}",
            **record,
            "figures": {name: _definition(METRICS[name]) for name in used},
            "summary": _finite(summaries(scores)),
            "images": [_finite(score.record()) for score in scores],
        },
    )
    return table, report


# Showing


def _absent_regions(summary: Summary) -> list[str]:
    """Regions of which there are counts of lesions, and all are 0."""
    counts: dict[str, float] = {}
    for name, row in summary.items():
        if name.startswith("lesions_") or name.startswith("reference_lesions_"):
            region = METRICS[name].region
            counts[region] = counts.get(region, 0.0) + row["mean"]
    return [region for region, count in counts.items() if not count]


def _table(name: str, summary: Summary, marks: Mapping[str, str]) -> Table:
    images = max((row["images"] for row in summary.values()), default=0)
    table = Table(title=f"{name}, n = {images}", caption_justify="left")
    for column in ("metric", "mean", "sd", "median", "worst", "worst case"):
        table.add_column(column, justify="left" if column in ("metric", "worst case") else "right", overflow="fold")
    for name, row in summary.items():
        metric = METRICS[name]
        mark = f" ({marks[metric.doubt]})" if metric.doubt else ""
        count = f", n = {row['images']}" if row["images"] < images else ""
        numbers = ("" if row[key] is None else f"{row[key]:.4g}" for key in ("mean", "sd", "median", "worst"))
        table.add_row(metric.title + mark + count, *numbers, Text(printable(row["worst_case"])))
    return table


def _definition(metric: Metric) -> dict[str, Any]:
    return {
        "title": metric.title,
        "rule": metric.rule,
        "version": metric.version,
        "not_confirmed": metric.doubt or None,
        "worst": "lowest" if metric.higher_is_better else "highest",
    }


def _finite(content: Any) -> Any:
    """The same with infinite numbers as text, since JSON has none."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return str(content) if isinstance(content, float) and not np.isfinite(content) else content
