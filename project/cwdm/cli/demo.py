"""The whole system on synthetic patients: make them, take a contrast away, synthesise it, compare with the truth."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from cwdm.errors import CaseError, InputError
from cwdm.images import (
    CaseFolder,
    brain_mask,
    case_folder,
    find_cases,
    list_folder,
    normalise,
    output_name,
    read_case,
    read_volume,
)
from cwdm.inference import Synthesizer, synthesise_cohort
from cwdm.metrics import psnr, ssim
from cwdm.phantoms import write_phantoms
from cwdm.prepare import drop_modalities
from cwdm.report import Comparison, draw_comparisons
from cwdm.weights import BUNDLED

SEED = 20
NAME = "BraTS-PHANTOM-"
"""How the names of synthetic patients begin."""


def run_demo(out: Path, cases: int, weights: Path | str = BUNDLED, log: Callable[[str], None] = print) -> Path:
    """Run everything into a folder; patients that are there already are kept.

    Args:
        weights: folder or file, or the small ones that come with cwdm.

    Returns:
        The picture: conditions, synthesis, truth and difference of every case.
    """
    _check_own(out / "patients")
    log(f"1/4 making {cases} synthetic patients in {out / 'patients'}")
    write_phantoms(out / "patients", cases, SEED, on_case=lambda name: log(f"    {name}"))
    log(f"2/4 taking one contrast away from each, into {out / 'input'}")
    dropped = drop_modalities(out / "patients", out / "input", SEED)
    log(f"3/4 synthesising what is missing into {out / 'output'}")
    folders = [folder for folder in find_cases(out / "input") if folder.name in dict(dropped)]
    synthesizer = Synthesizer(weights, device="cpu")
    outcomes = synthesise_cohort(folders, synthesizer, out / "output", overwrite=True, report=out / "report")
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
    entries = list_folder(patients, "synthetic patients") if patients.exists() else []
    if others := [entry.name for entry in entries if not entry.name.startswith((NAME, "."))]:
        raise InputError(f"{patients} holds {others[0]}, which is no synthetic patient; choose another folder")


def _compare(out: Path, folder: CaseFolder, modality: str) -> Comparison:
    case = read_case(folder)
    truth_path = case_folder(out / "patients" / folder.name).files[modality]
    synthesis, _ = normalise(read_volume(out / "output" / output_name(folder.name, modality)))
    truth, _ = normalise(read_volume(truth_path))
    seg = read_volume(truth_path.with_name(f"{folder.name}-seg.nii.gz"))
    mask = brain_mask(case.volumes.values())
    return Comparison(
        name=folder.name,
        conditions={name: normalise(volume)[0] for name, volume in case.volumes.items()},
        target=modality,
        synthesis=synthesis,
        truth=truth,
        caption=f"PSNR {psnr(synthesis, truth, mask):.1f} dB, SSIM {ssim(synthesis, truth, mask):.3f} in the brain",
        slice_index=int(np.argmax(np.count_nonzero(seg, axis=(0, 1)))),  # where the tumour is largest
    )
