"""`cwdm evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cwdm.cli.old import REQUIRED, either
from cwdm.cli.options import Overwrite, count, output
from cwdm.cli.outcomes import sum_up
from cwdm.progress import print_line, print_table
from cwdm.runner import Outcome

if TYPE_CHECKING:
    from cwdm.evaluation import Score


Predictions = Annotated[
    Path | None,
    typer.Argument(metavar="PRED", help=f"Flat folder of <case>-<modality>.nii.gz or <case>.nii.gz. {REQUIRED}"),
]
Truth = Annotated[
    Path | None, typer.Argument(metavar="TRUTH", help=f"The true images: case folders, or flat like PRED. {REQUIRED}")
]
Seg = Annotated[
    Path | None,
    typer.Option(help="Folder of <case>-seg.nii.gz, flat or in case folders, for the metrics of the tumour."),
]
Segmenter = Annotated[
    str | None,
    typer.Option(help="Command with {input} (folder of a case) and {output} (its -seg.nii.gz), for Dice and HD95."),
]
Bundle = Annotated[
    Path | None,
    typer.Option(help="MONAI bundle instead of a command. It runs code of its own: know where it is from."),
]
Labels = Annotated[
    Literal["2023", "2020"] | None,
    typer.Option(
        help="What segmentations hold: 3 is enhancing tumour and 4 resection cavity (2023), or 4 enhancing tumour "
        "(2020). Default: 2023."
    ),
]
TruthFile = Annotated[
    str | None,
    typer.Option(help="For images of 'cwdm translate': the true one inside TRUTH, such as {case}/ct.nii.gz."),
]
MaskFile = Annotated[
    str | None,
    typer.Option(help="With --truth-file: such as {case}/mask.nii.gz, not 0 where to score. Default: the body."),
]
ValueRange = Annotated[
    tuple[float, float] | None,
    typer.Option(
        "--range",
        metavar="LOW HIGH",
        help="With --truth-file: range of PSNR and SSIM, -1024 3000 for CT. Default: that of the true image.",
    ),
]


def evaluate(
    predictions: Predictions = None,
    truth: Truth = None,
    named_predictions: Annotated[Path | None, typer.Option("--predictions", hidden=True)] = None,
    data_path: Annotated[Path | None, typer.Option("--data_path", hidden=True)] = None,
    output_path: Annotated[
        Path | None, output("Folder for evaluation.csv and .json, and for images/ with a score of each image.")
    ] = None,
    seg: Seg = None,
    segmenter: Segmenter = None,
    segmenter_bundle: Bundle = None,
    labels: Labels = None,
    truth_file: TruthFile = None,
    mask_file: MaskFile = None,
    value_range: ValueRange = None,
    num_workers: Annotated[
        int | None, count("workers", "Images at a time, 0.75 GB of memory each. Default: one a processor, at most 8.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Score synthesised images against the true ones: each image, and mean, deviation, median and worst.

    With --output_path, a stopped evaluation goes on where it was.
    """

    from cwdm.evaluation import evaluate as evaluate_folder
    from cwdm.evaluation import tables
    from cwdm.progress import CohortProgress

    with CohortProgress(0) as progress:
        evaluation = evaluate_folder(
            either(predictions, named_predictions, "PRED"),
            either(truth, data_path, "TRUTH"),
            seg,
            segmenter=segmenter,
            bundle=segmenter_bundle,
            labels=labels,
            truth_file=truth_file,
            mask_file=mask_file,
            value_range=value_range,
            out=output_path,
            workers=num_workers,
            overwrite=overwrite,
            expect=progress.expect,
            on_score=lambda score: progress.end_case(score.line),
        )
    for table in tables(evaluation.scores):
        print_table(table)
    for path in evaluation.files:
        print_line(path)
    outcomes = [_outcome(score, score in evaluation.kept) for score in evaluation.scores]
    raise typer.Exit(sum_up(outcomes, "the tables", progress.log, "images", "--overwrite"))


def _outcome(score: "Score", known: bool) -> Outcome:
    name = f"{score.case}: {score.modality}" if score.modality else score.case
    return Outcome(name, "failed" if score.reason else "skipped" if known else "written", score.reason)
