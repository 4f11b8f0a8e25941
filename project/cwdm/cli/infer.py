"""`cwdm infer`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cwdm.cli.options import DeviceOption, Overwrite, Settings, data, output
from cwdm.cli.outcomes import sum_up
from cwdm.errors import needs_extra

if TYPE_CHECKING:
    from cwdm.images import CaseFolder
    from cwdm.inference import Outcome, Work
    from cwdm.progress import CohortProgress

Weights = Annotated[
    Path | None,
    typer.Option(help="Folder or file, or 'bundled'. Default: $CWDM_WEIGHTS, or what 'weights download' fetched."),
]
ParametersFile = Annotated[Path | None, typer.Option("--parameters_file", help="YAML file of settings; may be empty.")]
Shard = Annotated[
    str, typer.Option(metavar="I/N", help="Share of the cases, I from 0; 'auto' under Slurm or Kubernetes.")
]
Devices = Annotated[
    str | None,
    typer.Option(metavar="N|all", help="Worker processes, a GPU each. On the CPU they share the cores."),
]
Ray = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="Spread the cases over a Ray cluster, or 'local' for one here.")
]
ReportPath = Annotated[Path | None, typer.Option("--report_path", help="Folder for report.html and JSON records.")]
Page = Annotated[bool, typer.Option("--page/--no-page", hidden=True, help="Write report.html at the end.")]


def infer(
    data_path: Annotated[Path, data("Folder with one folder a case. It is only read.")],
    output_path: Annotated[Path, output("Folder for <case>-<missing modality>.nii.gz, and nothing else.")],
    weights: Weights = None,
    parameters_file: ParametersFile = None,
    device: DeviceOption = "auto",
    overwrite: Overwrite = False,
    shard: Shard = "0/1",
    devices: Devices = None,
    ray: Ray = None,
    report_path: ReportPath = None,
    page: Page = True,
    settings: Settings = None,
) -> None:
    """Synthesise the missing modality of every case.

    A case is a folder with three of <case>-t1n, -t1c, -t2w and -t2f (.nii.gz or .nii).
    Weights that were trained for that make do with fewer.

    A case that is done already is skipped, so a stopped run goes on where it was.
    """
    from cwdm.images import find_cases
    from cwdm.inference import Work, check_labels, plan_tasks
    from cwdm.progress import CohortProgress
    from cwdm.settings import load_settings
    from cwdm.weights import folder_of

    loaded = load_settings(parameters_file, settings or ())
    # A cluster's workers are not in this folder.
    folders = find_cases(data_path if ray is None else data_path.absolute())
    _check_places(data_path, folders, output_path, report_path)
    # Before sharing: no worker sees what the others' cases miss.
    check_labels(plan_tasks(folders, folder_of(weights)), folder_of(weights), output_path)
    missing = {modality for folder in folders if folder.problem is None for modality in folder.missing}
    if shard != "0/1":
        from cwdm.inference import select_shard

        folders = select_shard(folders, [folder.name for folder in folders], shard)
    progress = CohortProgress(len(folders))
    if loaded.samples > 1 and not report_path:
        progress.log("warning: the standard deviation over the samples is written only with --report_path")
    work = Work(weights, loaded, device, output_path, overwrite, report_path)
    outcomes = _synthesise(folders, work, progress, devices, ray)
    code = _sum_up(outcomes, output_path, progress)
    if report_path and page:
        from cwdm.cli.report import report_on_run

        report_on_run(report_path, data_path, output_path, progress.log)
    if code and not any(outcome.status == "written" for outcome in outcomes):
        from cwdm.weights import check_usable

        # Of the whole cohort, not of this share, so that every worker says the same.
        check_usable(folder_of(weights), sorted(missing))
    raise typer.Exit(code)


def _check_places(data_path: Path, folders: "Sequence[CaseFolder]", output: Path, report: Path | None) -> None:
    from cwdm.files import check_apart, check_no_source_in

    written = [folder for folder in (output, report) if folder]
    for folder in written:
        for kept in (data_path, *(case.folder for case in folders)):
            check_apart(folder, kept)
    # An image in the output folder that the input links to would be taken for a finished one, or made again.
    check_no_source_in(written, (file for case in folders for file in case.files.values()))
    if report:
        check_apart(report, output)  # whoever scores the output folder opens every file in it


def _synthesise(
    folders: "Sequence[CaseFolder]", work: "Work", progress: "CohortProgress", devices: str | None, ray: str | None
) -> "list[Outcome]":
    """In this process, in others of this machine, or on a Ray cluster."""
    if ray is not None:
        return _synthesise_on_ray(folders, work, progress, devices, ray)
    if devices is not None:
        from cwdm.inference import count_workers, synthesise_on_workers

        count = min(count_workers(devices, work.device), max(1, len(folders)))
        progress.log(f"{len(folders)} cases; {count} workers")
        return synthesise_on_workers(folders, work, progress, count)
    from cwdm.inference import Synthesizer, synthesise_cohort
    from cwdm.precision import warn_of_precision

    synthesizer = Synthesizer(work.weights, work.settings, work.device)
    progress.log(f"{len(folders)} cases; {synthesizer.summary()}")
    warn_of_precision(synthesizer.dtype, synthesizer.device, progress.log)
    return synthesise_cohort(
        folders, synthesizer, work.output, overwrite=work.overwrite, report=work.report, progress=progress
    )


def _synthesise_on_ray(
    folders: "Sequence[CaseFolder]", work: "Work", progress: "CohortProgress", devices: str | None, address: str
) -> "list[Outcome]":
    with needs_extra("ray", "what --ray needs"):
        from cwdm.inference import count_workers, synthesise_on_ray
    count = None if devices in (None, "all") else count_workers(str(devices), "cpu")  # not this machine's GPUs
    return synthesise_on_ray(folders, work.anywhere(), progress, None if address == "local" else address, count)


def _sum_up(outcomes: "Sequence[Outcome]", output: Path, progress: "CohortProgress") -> int:
    several = len(outcomes) > len({outcome.case for outcome in outcomes})  # of a case
    if not several:
        return sum_up(outcomes, output, progress.log, "cases", "--overwrite", lambda one: one.case)
    return sum_up(outcomes, output, progress.log, "volumes", "--overwrite", lambda one: f"{one.case} {one.modality}")
