"""`cwdm evaluate-samples`."""

from pathlib import Path
from typing import Annotated

import typer

from cwdm import __version__
from cwdm.cli.options import Modality, count, output
from cwdm.progress import CohortProgress, print_line, print_table


def evaluate_samples(
    generated: Annotated[Path, typer.Argument(metavar="GENERATED", help="Flat folder of .nii.gz from 'cwdm sample'.")],
    real: Annotated[Path, typer.Argument(metavar="REAL", help="Real volumes: flat, or case folders.")],
    features: Annotated[
        Path | None, typer.Option(help="resnet_50_23dataset.pth of MedicalNet, for FID; without it there is none.")
    ] = None,
    modality: Annotated[Modality, typer.Option(help="Which images of case folders to take.")] = Modality.t1n,
    num_pairs: Annotated[int, count("pairs", "Pairs for MS-SSIM; if there are more, so many are drawn.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed with which the pairs are drawn.")] = 0,
    output_path: Annotated[Path | None, output("Folder for samples-evaluation.json.")] = None,
) -> None:
    """Score generated volumes as a set: FID to the real ones, and MS-SSIM among themselves."""
    from dataclasses import asdict

    from rich.table import Table

    from cwdm.evaluation import evaluate_generated
    from cwdm.files import check_apart, check_writable, write_json

    if output_path:
        for kept in (generated, real):
            check_apart(output_path, kept)
        check_writable(output_path)
    progress = CohortProgress(0)
    score = evaluate_generated(generated, real, features, modality.value, num_pairs, seed, progress.log)
    table = Table("metric", "value", title=f"{score.generated} generated, {score.real} real", caption_justify="left")
    table.add_row("FID, lower is closer", "" if score.fid is None else f"{score.fid:.4f}")
    deviation = "" if score.ms_ssim_sd is None else f" ± {score.ms_ssim_sd:.4f}"
    mean = "" if score.ms_ssim is None else f"{score.ms_ssim:.4f}{deviation}"
    table.add_row(f"MS-SSIM of {score.pairs} pairs, lower is more diverse", mean)
    table.caption = "\n".join(f"{note}." for note in score.notes)
    print_table(table)
    if output_path:
        record = {"program": f"cwdm {__version__}", "folders": [str(generated), str(real)], **asdict(score)}
        write_json(output_path / "samples-evaluation.json", record)
        print_line(output_path / "samples-evaluation.json")
    if score.failed:
        progress.log(f"{len(score.failed)} volumes FAILED and are in no metric")
        raise typer.Exit(1)
