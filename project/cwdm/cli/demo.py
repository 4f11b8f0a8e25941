"""`cwdm demo`: make synthetic patients, take a modality away, synthesise it, compare with the truth."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cwdm import images, inference, phantoms, prepare
from cwdm.cli.old import REQUIRED, Word, either
from cwdm.cli.options import count, output
from cwdm.errors import CaseError, InputError, needs_extra
from cwdm.files import exists
from cwdm.progress import print_line

if TYPE_CHECKING:
    from cwdm.images import CaseFolder
    from cwdm.report import Comparison

SEED = 20
NAME = "BraTS-PHANTOM-"
"""How the names of synthetic patients begin."""


def demo(
    out: Word = None,
    output_path: Annotated[Path | None, output(f"Folder for patients, results and the picture. {REQUIRED}")] = None,
    num_cases: Annotated[int, count("cases", "How many synthetic patients to make.", most=16)] = 2,
    weights: Annotated[
        Path, typer.Option(help="Folder or file of weights, or 'bundled', the small ones that come with cwdm.")
    ] = Path("bundled"),
) -> None:
    """Try everything on synthetic patients: make, drop, synthesise, compare, and draw a picture."""
    folder = either(output_path, out, "--output_path")
    print_line(f"look at {run_demo(folder, num_cases, weights, print_line)}")


def run_demo(out: Path, cases: int, weights: Path, log: Callable[[str], None] = print_line) -> Path:
    """Run everything into a folder; patients that are there already are kept.

    Returns:
        The picture: conditions, synthesis, truth and difference of every case.
    """
    with needs_extra("report,eval", "what the demo needs"):
        from cwdm.report import draw_comparisons

    _check_own(out / "patients")
    log(f"1/4 making {cases} synthetic patients in {out / 'patients'}")
    phantoms.write_phantoms(out / "patients", cases, SEED, on_case=lambda name: log(f"    {name}"))
    log(f"2/4 taking one modality away from each, into {out / 'input'}")
    dropped = prepare.drop_modalities(out / "patients", out / "input", SEED)
    log(f"3/4 synthesising what is missing into {out / 'output'}")
    folders = [folder for folder in images.find_cases(out / "input") if folder.name in dict(dropped)]
    synthesizer = inference.Synthesizer(weights, device="cpu")
    outcomes = inference.synthesise_cohort(folders, synthesizer, out / "output", overwrite=True, report=out / "report")
    if failed := [outcome for outcome in outcomes if outcome.status == "failed"]:
        raise CaseError(failed[0].case, failed[0].reason)
    log("4/4 comparing with the truth")
    comparisons = [_compare(out, folder, modality) for folder, (_, modality) in zip(folders, dropped, strict=True)]
    for comparison in comparisons:
        log(f"    {comparison.name}: {comparison.target} {comparison.caption}")
    picture = out / "demo.png"
    notices = {warning for outcome in outcomes for warning in outcome.warnings}
    draw_comparisons(picture, comparisons, "; ".join(sorted(notices)) or "synthesised on the CPU")
    return picture


def _check_own(patients: Path) -> None:
    """Real patients are not what a demo is for: it would replace what was synthesised for them.

    Raises:
        InputError: the folder holds others than synthetic ones.
    """
    entries = images.list_folder(patients, "synthetic patients") if exists(patients) else []
    if others := [entry.name for entry in entries if not entry.name.startswith((NAME, "."))]:
        raise InputError(f"{patients} holds {others[0]}, which is no synthetic patient; choose another folder")


def _compare(out: Path, folder: "CaseFolder", modality: str) -> "Comparison":
    from cwdm.metrics import psnr, ssim
    from cwdm.report import Comparison

    case = images.read_case(folder)
    truth_path = images.case_folder(out / "patients" / folder.name).files[modality]
    synthesis, _ = images.normalise(images.read_volume(out / "output" / images.output_name(folder.name, modality)))
    truth, _ = images.normalise(images.read_volume(truth_path))
    seg = images.read_volume(truth_path.with_name(f"{folder.name}-seg.nii.gz"))
    mask = images.brain_mask(case.volumes.values())
    return Comparison(
        name=folder.name,
        conditions={name: images.normalise(volume)[0] for name, volume in case.volumes.items()},
        target=modality,
        synthesis=synthesis,
        truth=truth,
        caption=f"PSNR {psnr(synthesis, truth, mask):.1f} dB, SSIM {ssim(synthesis, truth, mask):.3f} in the brain",
        slice_index=int((seg != 0).sum(axis=(0, 1)).argmax()),  # where the tumour is largest
    )
