"""Many patients, from their scans to what is missing: one at a time, a bad one is passed over, finished ones stay."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from cwdm.device import choose_device
from cwdm.errors import CaseError, DeviceLostError, NameInUseError, OutputError
from cwdm.files import check_apart, check_writable, remove_stale
from cwdm.folders import hidden_folder, put_in_place, remove_stale_folders
from cwdm.images import MARK
from cwdm.inference import Provenance, Synthesizer, device_works, explain
from cwdm.pipeline import Pipeline
from cwdm.progress import CohortProgress
from cwdm.runner import Outcome, run_each
from cwdm.samplers import evaluations
from cwdm.scans.find import read_patient
from cwdm.scans.kept import changes_of_case, changes_of_synthetic
from cwdm.scans.patient import Patient, PatientFolder
from cwdm.scans.steps import InSpace, Synthetic, bring_into, made_with, missing_of, synthesise_missing
from cwdm.scans.table import ModalityTable
from cwdm.scans.written import (
    PREPARED,
    check_possible,
    is_finished,
    place_of,
    write_case,
    write_dataset,
    write_synthetic,
)
from cwdm.temporary import temporary_folder


@dataclass(frozen=True)
class ScanOptions:
    """How patients' scans are brought into a space and back.

    Attributes:
        space: sri24, mni152 or native.
        table: what a person said about the images.
        brain_mask: path of masks of one's own; see `masks_of`.
        grid: modality of the scan that results are brought back to; empty: the best-resolved one.
        dicom: results as DICOM series, too.
        keep_atlas: cases in the space and the transforms, too.
        keep_rejected: go on with patients whose registration the check rejects.
    """

    space: str = "sri24"
    table: ModalityTable | None = None
    brain_mask: str = ""
    grid: str = ""
    dicom: bool = False
    keep_atlas: bool = False
    keep_rejected: bool = False


def scan_patients(
    patients: Sequence[PatientFolder],
    synthesizer: Synthesizer,
    output: Path,
    options: ScanOptions | None = None,
    *,
    overwrite: bool = False,
    report: Path | None = None,
    progress: CohortProgress | None = None,
) -> list[Outcome]:
    """Synthesise what each patient lacks, on the grid of one of the scans.

    Args:
        patients: see `find_patients`.
        output: folder for a folder a patient or, of a BIDS dataset, for a dataset of derivatives.
        overwrite: make finished patients again.
        report: folder for a record of each patient, with pictures, of which `write_scan_report` makes a page.

    Returns:
        One outcome a patient.

    Raises:
        OutputError: a folder cannot be written or is full; finished patients stay.
        DeviceLostError: the device no longer works; finished patients stay.
    """
    options, progress = options or ScanOptions(), progress or CohortProgress(len(patients))

    def work(found: PatientFolder, root: Path, told: _Told) -> None:
        with temporary_folder() as converted:
            patient = told.patient = read_patient(found, converted, options.table)
            missing_of(patient, synthesizer.weights)  # before minutes are spent on it
            check_possible(patient, options.grid, options.dicom)
            scans = told.scans = _bring_into(patient, options, str(synthesizer.device), progress)
            _check_accepted(scans, options)
            made = told.made = _synthesise(scans, synthesizer, options.grid, progress)
            write_synthetic(root, scans, made, options.dicom, options.keep_atlas)

    _check_writable(output, report)
    write_dataset(output, patients, options.keep_atlas)
    on = synthesizer.device

    @cache  # or patients who lack different modalities would load their weights again and again
    def today(modality: str) -> Provenance:
        return made_with(synthesizer.pipeline(modality), synthesizer.settings, options.space, options.grid)

    def told(error: Exception) -> str:
        return explain(error, lambda: device_works(on), progress.log)

    def changed(found: PatientFolder) -> tuple[str, ...]:
        return changes_of_synthetic(output / place_of(found), today, told)

    return _each(_Run(patients, output, MARK, place_of, overwrite, report, progress, on), work, changed)


def prepare_patients(
    patients: Sequence[PatientFolder],
    output: Path,
    options: ScanOptions | None = None,
    device: str = "auto",
    *,
    overwrite: bool = False,
    report: Path | None = None,
    progress: CohortProgress | None = None,
) -> list[Outcome]:
    """Write each patient's scans in a space as a case folder, <output>/<name>/<name>-<modality>.nii.gz.

    Args:
        options: `keep_atlas` adds the transforms; `grid` is the modality that the others are registered to.

    Returns, raises:
        As `scan_patients`.
    """
    options, progress = options or ScanOptions(), progress or CohortProgress(len(patients))
    on = choose_device(device)

    def work(found: PatientFolder, root: Path, told: _Told) -> None:
        with temporary_folder() as converted:
            patient = told.patient = read_patient(found, converted, options.table)
            scans = told.scans = _bring_into(patient, options, str(on), progress, options.grid)
            _check_accepted(scans, options)
            write_case(root / patient.name, scans, transforms=options.keep_atlas)

    _check_writable(output, report)
    run = _Run(patients, output, PREPARED, _named_place, overwrite, report, progress, on)
    return _each(run, work, lambda found: changes_of_case(output / found.name, options.space))


def _named_place(found: PatientFolder) -> Path:
    return Path(found.name)


# The stages, with progress


def _bring_into(
    patient: Patient, options: ScanOptions, device: str, progress: CohortProgress, reference: str = ""
) -> InSpace:
    for one in patient.passed_over:
        progress.log(f"{patient.name}: {one.line}")
    progress.start_case(f"{patient.name}, registration", len(patient.scans) + 1)  # registering and judging is one more
    return bring_into(patient, options.space, device, options.brain_mask, reference, progress.step)


def _check_accepted(scans: InSpace, options: ScanOptions) -> None:
    """Refuse what the check rejects, unless a person says that it is right."""
    if scans.judgement.verdict == "reject" and not options.keep_rejected:
        reasons = "; ".join(scans.judgement.reasons)
        raise CaseError(scans.patient.name, f"registration rejected: {reasons}; --keep-rejected goes on all the same")


def _synthesise(scans: InSpace, synthesizer: Synthesizer, grid: str, progress: CohortProgress) -> tuple[Synthetic, ...]:
    def start(modality: str, pipeline: Pipeline) -> None:
        steps = evaluations(pipeline.sampler, pipeline.timesteps) * synthesizer.settings.samples
        progress.start_case(f"{scans.patient.name}, {modality}", steps)

    def after_step(step: int, total: int, x0: object) -> None:
        progress.step()

    return synthesise_missing(scans, synthesizer, grid, start, after_step)


# Many patients


@dataclass
class _Told:
    """What is known of a patient so far, for the record of one that fails."""

    patient: Patient | None = None
    scans: InSpace | None = None
    made: tuple[Synthetic, ...] = ()


@dataclass(frozen=True)
class _Run:
    """What is done with all patients; see `scan_patients`.

    Attributes:
        mark: that of finished ones.
        place_of: a patient's folder inside the output folder.
    """

    patients: Sequence[PatientFolder]
    output: Path
    mark: str
    place_of: Callable[[PatientFolder], Path]
    overwrite: bool
    report: Path | None
    progress: CohortProgress
    device: torch.device


def _each(
    run: _Run,
    work: Callable[[PatientFolder, Path, _Told], None],
    changes: Callable[[PatientFolder], tuple[str, ...]],
) -> list[Outcome]:
    """Each patient's folder made under a hidden name, recorded, and put in place.

    Args:
        changes: warnings of a finished patient.
    """
    ended: list[Outcome] = []

    def make(found: PatientFolder) -> tuple[str, ...]:
        place, told = run.place_of(found), _Told()
        with hidden_folder(run.output) as root, _recorded(run.report, found, told), _explained(found, run):
            work(found, root, told)
            if run.report:
                _record(run.report, found, told)
            put_in_place(root / place, run.output / place)
        return _warnings(told)

    def is_settled(found: PatientFolder) -> bool:
        return is_finished(run.output / run.place_of(found), run.mark) and not run.overwrite

    def end(outcome: Outcome) -> None:
        ended.append(outcome)
        run.progress.end_case(f"[{len(ended)}/{len(run.patients)}] {outcome.line}")

    run.progress.expect(len(run.patients))
    with run.progress:
        return run_each(
            run.patients,
            make,
            name=lambda found: found.name,
            is_finished=is_settled,
            changes=changes,
            on_outcome=end,
        )


def _check_writable(output: Path, report: Path | None) -> None:
    for folder in (output, report) if report else (output,):
        check_writable(folder)
        remove_stale(folder)
        remove_stale_folders(folder)


@contextmanager
def _explained(found: PatientFolder, run: _Run) -> Iterator[None]:
    """Whatever befalls a patient takes no other down, but for a disk that is full and a device that is lost."""
    try:
        yield
    except (CaseError, DeviceLostError):
        raise
    except Exception as error:
        if isinstance(error, OutputError) and not isinstance(error, NameInUseError):
            raise
        raise CaseError(found.name, explain(error, lambda: device_works(run.device), run.progress.log)) from None


@contextmanager
def _recorded(report: Path | None, found: PatientFolder, told: _Told) -> Iterator[None]:
    """A record of a patient that fails."""
    try:
        yield
    except CaseError as error:
        if report:
            _record(report, found, told, error.reason)
        raise


def _record(report: Path, found: PatientFolder, told: _Told, failure: str = "") -> None:
    from cwdm.report import write_scan_record
    from cwdm.scans.shown import record_of

    write_scan_record(report, record_of(found.name, told.patient, told.scans, told.made, failure))


def _warnings(told: _Told) -> tuple[str, ...]:
    """What the user should know of a finished patient."""
    assert told.patient is not None
    assert told.scans is not None
    found = (line for one in told.made for line in (*one.findings, *one.warnings))
    return (*told.patient.remarks, *told.scans.judgement.findings, *found)


def check_places(scans: Path, patients: Sequence[PatientFolder], output: Path, report: Path | None) -> None:
    """Refuse to write where the scans are; derivatives of a BIDS dataset may lie in its folder for those.

    Raises:
        InputError: output or report lies there, or the report in the output.
    """
    for folder in (output, report) if report else (output,):
        kept = [patient.folder for patient in patients]
        if not any(patient.dataset for patient in patients) or not _among_derivatives(folder, scans):
            kept.append(scans)
        for one in kept:
            check_apart(folder, one)
    if report:
        check_apart(report, output)


def _among_derivatives(folder: Path, dataset: Path) -> bool:
    return folder.absolute().is_relative_to(dataset.absolute() / "derivatives")
