"""The command line: the only place that turns errors into messages and exit codes.

Exit codes: 0 everything done; 1 cases failed, each named, the others are written; 2 the run as a whole could not be
done or go on (arguments, input, weights, settings, disk); 3 a fault of the program; 4 the GPU no longer works for this
process; 130 and 143 stopped from outside. After 4, 130 and 143 run again to go on.
"""

import io
import logging
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cwdm import __version__
from cwdm.errors import CwdmError, DeviceLostError, SettingsError
from cwdm.progress import printable
from cwdm.signals import handled

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cwdm.evaluation import Evaluation
    from cwdm.images import CaseFolder
    from cwdm.inference import Outcome, Work
    from cwdm.progress import CohortProgress

app = typer.Typer(
    name="cwdm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="3D wavelet diffusion for medical images: synthesise the missing one of four MR contrasts.",
)
weights_app = typer.Typer(no_args_is_help=True, help="Download, list, convert and verify weights.")
app.add_typer(weights_app, name="weights")
prepare_app = typer.Typer(no_args_is_help=True, help="Bring other data into the form that training reads.")
app.add_typer(prepare_app, name="prepare")


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class StoredType(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Modality(StrEnum):
    t1n = "t1n"
    t1c = "t1c"
    t2w = "t2w"
    t2f = "t2f"


class LabelScheme(StrEnum):
    today = "2023"
    older = "2020"


def main() -> None:
    """Entry point of the `cwdm` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files can be any bytes
    if logging.lastResort:  # writes the warnings of a program that sets up no log
        logging.lastResort.setFormatter(_Printable())
    try:
        with handled(_stopped):
            app()
    except DeviceLostError as error:
        _fail(f"{error}; run the same command again to go on, or with --devices, which replaces the process", 4)
    except CwdmError as error:
        _fail(str(error), 2)
    except Exception:
        print(printable(traceback.format_exc()), file=sys.stderr)
        _fail("a fault of the program, not of your data; please report it with the lines above", 3)


def _stopped(number: int, _: object) -> NoReturn:
    _fail("stopped from outside; what is finished is kept, run the same command again to go on", 128 + number)


def _fail(message: str, code: int) -> NoReturn:
    _stderr().print(f"error: {printable(message)}", markup=False, soft_wrap=True)
    sys.exit(code)


def _say(line: object) -> None:
    print(printable(str(line)))


class _Printable(logging.Formatter):
    """Log lines for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _stderr() -> Console:
    return Console(stderr=True, highlight=False)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"cwdm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def infer(
    data_path: Annotated[
        Path, typer.Option("--data_path", "--data-path", help="Folder with one folder a case; only read.")
    ],
    output_path: Annotated[
        Path,
        typer.Option("--output_path", "--output-path", help="Folder for <case>-<missing modality>.nii.gz, flat."),
    ],
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Folder or file of weights, or 'bundled'. Default: $CWDM_WEIGHTS, or what 'weights download' fetched."
        ),
    ] = None,
    parameters_file: Annotated[
        Path | None,
        typer.Option("--parameters_file", "--parameters-file", help="YAML with settings; may be empty."),
    ] = None,
    device: Annotated[Device, typer.Option(help="'cuda' fails without a GPU, 'auto' falls back.")] = Device.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Redo cases whose output is there.")] = False,
    shard: Annotated[
        str, typer.Option(help="This job's share of the cases: i/n, i from 0, or 'auto' under Slurm or Kubernetes.")
    ] = "0/1",
    devices: Annotated[
        str | None,
        typer.Option(help="Worker processes, a GPU each: a number or 'all'. On the CPU they share the cores."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Spread the cases over a Ray cluster: its address, or 'local'."),
    ] = None,
    report_path: Annotated[
        Path | None,
        typer.Option("--report_path", "--report-path", help="Folder for report.html and JSON records."),
    ] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", hidden=True, help="Write report.html at the end.")] = True,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override the file, as sampler.steps=10."),
    ] = None,
) -> None:
    """Synthesise the missing modality of every case.

    Each case is a folder with three of <case>-t1n, -t1c, -t2w, -t2f (.nii.gz or .nii); fewer, if the weights were
    trained for that. Cases that are done already
    are skipped, so a stopped run goes on where it was.
    """
    from cwdm.images import find_cases
    from cwdm.inference import Work, check_labels, plan_tasks, share
    from cwdm.progress import CohortProgress
    from cwdm.settings import load_settings
    from cwdm.weights import check_usable, folder_of

    loaded = load_settings(parameters_file, settings or ())
    # A cluster's workers are not in this folder.
    folders = find_cases(data_path if ray is None else data_path.absolute())
    _check_places(data_path, folders, output_path, report_path)
    # Before sharing: no worker sees what the others' cases miss.
    check_labels(plan_tasks(folders, folder_of(weights)), folder_of(weights), output_path)
    missing = {modality for folder in folders if folder.problem is None for modality in folder.missing}
    folders = share(folders, [folder.name for folder in folders], shard)
    progress = CohortProgress(len(folders))
    if loaded.samples > 1 and not report_path:
        progress.log("warning: the spread over the samples is written only with --report_path")
    work = Work(weights, loaded, device.value, output_path, overwrite, report_path)
    outcomes = _synthesise(folders, work, progress, devices, ray)
    _sum_up(outcomes, output_path, progress.log)
    if report_path and page:
        _report_on_run(report_path, data_path, output_path, progress.log)
    if any(outcome.status == "failed" for outcome in outcomes):
        if not any(outcome.status == "written" for outcome in outcomes):
            # Of the whole cohort, not of this share, so that every worker says the same.
            check_usable(folder_of(weights), sorted(missing))
        raise typer.Exit(1)


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
    try:
        from cwdm.inference import count_workers, synthesise_on_ray
    except ModuleNotFoundError as error:
        raise CwdmError(f"{error.name} is missing; pip install 'cwdm[ray]' brings what --ray needs") from error
    count = None if devices in (None, "all") else count_workers(str(devices), "cpu")  # not this machine's GPUs
    return synthesise_on_ray(folders, work.anywhere(), progress, None if address == "local" else address, count)


def _sum_up(outcomes: "Sequence[Outcome]", output: Path, log: "Callable[[str], None]") -> None:
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    skipped = sum(outcome.status == "skipped" for outcome in outcomes)
    done = len(outcomes) - len(failed)
    several = len(outcomes) > len({outcome.case for outcome in outcomes})  # of a case
    counts = [f"{done} of {len(outcomes)} {'volumes' if several else 'cases'} are in {output}"]
    counts += [f"{skipped} of them from before (--overwrite makes them again)"] if skipped else []
    counts += [f"{len(failed)} FAILED"] if failed else []
    log(", ".join(counts))
    for outcome in failed:
        log(f"  {outcome.case}{f' {outcome.modality}' if several else ''}: {outcome.reason}")


@app.command()
def drop(
    data_path: Annotated[Path, typer.Argument(metavar="IN", help="Folder of complete cases; only read.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the cases with one modality less.")],
    seed: Annotated[int, typer.Option(help="123456 gives the published script's choice.")] = 123456,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the files instead of linking to them.")] = False,
) -> None:
    """Take one modality away from every complete case, to test against the truth."""
    from cwdm.prepare import drop_modalities

    for case, modality in drop_modalities(data_path, out, seed, copy):
        _say(f"{case}: {modality} taken away")


@app.command()
def complete(
    data_path: Annotated[
        Path, typer.Argument(metavar="IN", help="Folder of cases with modalities missing; only read.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the cases with all four.")],
    synthesised: Annotated[Path, typer.Option(help="Output folder of 'cwdm infer' on IN; only read.")],
    copy: Annotated[bool, typer.Option("--copy", help="Copy the files instead of linking to them.")] = False,
) -> None:
    """Put original and synthesised images together for a segmenter, with a record of which is which."""
    from cwdm.prepare import complete_cases
    from cwdm.progress import CohortProgress

    failed = 0
    progress = CohortProgress(0)
    for done in complete_cases(data_path, synthesised, out, copy):
        failed += bool(done.reason)
        line = (
            f"FAILED: {done.reason}" if done.reason else f"complete, with a synthesised {' and '.join(done.modalities)}"
        )
        progress.log(f"{done.case}: {line}")
    if failed:
        raise typer.Exit(1)


@app.command()
def evaluate(
    predictions: Annotated[
        Path, typer.Argument(metavar="PRED", help="Flat folder of <case>-<modality>.nii.gz, or <case>.nii.gz.")
    ],
    truth: Annotated[Path, typer.Argument(metavar="TRUTH", help="The true images: case folders, or flat like PRED.")],
    seg: Annotated[
        Path | None,
        typer.Option(help="Folder of <case>-seg.nii.gz, flat or in case folders, for the tumour's figures."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for evaluation.csv and .json, and images/ with a score each.")
    ] = None,
    segmenter: Annotated[
        str | None,
        typer.Option(help="Command with {input} (folder of a case) and {output} (its -seg.nii.gz), for Dice and HD95."),
    ] = None,
    segmenter_bundle: Annotated[
        Path | None,
        typer.Option(help="MONAI bundle instead of a command. It runs code of its own: know where it is from."),
    ] = None,
    labels: Annotated[
        LabelScheme | None,
        typer.Option(
            help="Of segmentations: 3 is enhancing tumour and 4 resection cavity (2023), or 4 enhancing tumour (2020). "
            "Default: 2023."
        ),
    ] = None,
    truth_file: Annotated[
        str | None,
        typer.Option(help="For images of 'cwdm translate': the true one inside TRUTH, such as {case}/ct.nii.gz."),
    ] = None,
    mask_file: Annotated[
        str | None,
        typer.Option(help="With --truth-file: such as {case}/mask.nii.gz, not 0 where to score. Default: the body."),
    ] = None,
    value_range: Annotated[
        tuple[float, float] | None,
        typer.Option("--range", help="With --truth-file: of PSNR and SSIM, -1024 3000 for CT. Default: the truth's."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Images at a time, 0.75 GB of memory each. Default: one a processor, at most 8."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Score again what --out holds scores of.")] = False,
) -> None:
    """Score synthesised images against the true ones: each image, and mean, deviation, median and worst.

    With --out, a stopped evaluation goes on where it was.
    """
    from cwdm.evaluation import contrasts, translations

    for_contrasts = (seg, segmenter, segmenter_bundle, labels)
    if truth_file and any(for_contrasts):
        raise SettingsError("--truth-file is for other images; it excludes --seg, --segmenter(-bundle) and --labels")
    if not truth_file and (mask_file or value_range):
        raise SettingsError("--mask-file and --range are for images of 'cwdm translate'; add --truth-file")
    if truth_file:
        evaluation = translations(predictions, truth, truth_file, mask_file, value_range)
    else:
        evaluation = contrasts(predictions, truth, seg, segmenter, segmenter_bundle, labels or LabelScheme.today)
    _evaluate(evaluation, out, workers, overwrite)


def _evaluate(evaluation: "Evaluation", out: Path | None, workers: int | None, overwrite: bool) -> None:
    from cwdm.evaluation import ScoreCache, score_pairs, tables, write_evaluation
    from cwdm.files import check_apart, check_writable, remove_stale
    from cwdm.progress import CohortProgress

    cache = None
    if out:
        for kept in evaluation.folders:
            check_apart(out, kept)
            check_apart(out / "images", kept)
        check_writable(out / "images")
        remove_stale(out / "images")
        cache = ScoreCache(out / "images", evaluation.score, evaluation.means, evaluation.programs, renew=overwrite)
    with CohortProgress(len(evaluation.pairs)) as progress:
        scorer = cache.score if cache else evaluation.score
        scores = score_pairs(evaluation.pairs, scorer, workers, lambda score: progress.end_case(score.line))
    if cache and cache.used:
        progress.log(f"{len(cache.used)} of {len(scores)} scores are from before (--overwrite makes them again)")
    for table in tables(scores):
        Console().print(table)
    if out:
        for path in write_evaluation(out, scores, evaluation.record):
            _say(path)
    if failed := [score for score in scores if score.reason]:
        progress.log(f"{len(failed)} of {len(scores)} FAILED and are in no mean")
        for score in failed:
            progress.log(f"  {score.line}")
        raise typer.Exit(1)


@app.command("evaluate-samples")
def evaluate_samples(
    generated: Annotated[Path, typer.Argument(metavar="GENERATED", help="Flat folder of .nii.gz from 'cwdm sample'.")],
    real: Annotated[Path, typer.Argument(metavar="REAL", help="Real volumes: flat, or case folders.")],
    features: Annotated[
        Path | None, typer.Option(help="resnet_50_23dataset.pth of MedicalNet, for FID; without it there is none.")
    ] = None,
    modality: Annotated[Modality, typer.Option(help="Which images of case folders.")] = Modality.t1n,
    pairs: Annotated[int, typer.Option(min=1, help="MS-SSIM: if there are more pairs, so many are drawn.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of that draw.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for samples-evaluation.json.")] = None,
) -> None:
    """Score generated volumes as a set: FID to the real ones, and MS-SSIM among themselves."""
    from dataclasses import asdict

    from cwdm.evaluation import evaluate_generated
    from cwdm.files import check_apart, check_writable, write_json
    from cwdm.progress import CohortProgress

    for kept in (generated, real):
        if out:
            check_apart(out, kept)
    if out:
        check_writable(out)
    progress = CohortProgress(0)
    score = evaluate_generated(generated, real, features, modality.value, pairs, seed, progress.log)
    table = Table("figure", "value", title=f"{score.generated} generated, {score.real} real", caption_justify="left")
    table.add_row("FID, lower is closer", "" if score.fid is None else f"{score.fid:.4f}")
    spread = "" if score.ms_ssim_sd is None else f" ± {score.ms_ssim_sd:.4f}"
    mean = "" if score.ms_ssim is None else f"{score.ms_ssim:.4f}{spread}"
    table.add_row(f"MS-SSIM of {score.pairs} pairs, lower is more diverse", mean)
    table.caption = "\n".join(f"{note}." for note in score.notes)
    Console().print(table)
    if out:
        record = {"program": f"cwdm {__version__}", "folders": [str(generated), str(real)], **asdict(score)}
        write_json(out / "samples-evaluation.json", record)
        _say(out / "samples-evaluation.json")
    if score.failed:
        progress.log(f"{len(score.failed)} volumes FAILED and are in no figure")
        raise typer.Exit(1)


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the case folders.")],
    cases: Annotated[int, typer.Option(min=1, help="How many synthetic patients.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same patients.")] = 0,
    wide: Annotated[bool, typer.Option("--wide", help="Let them differ more than patients do, for training.")] = False,
) -> None:
    """Make synthetic patients: four contrasts and a segmentation each, in the BraTS layout."""
    from cwdm.phantoms import WIDE, write_phantoms

    write_phantoms(out, cases, seed, variation=WIDE if wide else None, on_case=_say)


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for patients, results and the picture.")],
    cases: Annotated[int, typer.Option(min=1, max=16, help="How many synthetic patients.")] = 2,
    weights: Annotated[
        str, typer.Option(help="Folder or file of weights. Default: the small ones that come with cwdm.")
    ] = "bundled",
) -> None:
    """Try everything on synthetic patients: make, drop, synthesise, compare, and draw a picture."""
    try:
        from cwdm.cli.demo import run_demo
    except ModuleNotFoundError as error:
        raise CwdmError(
            f"{error.name} is missing; pip install 'cwdm[report,eval]' brings what the demo needs"
        ) from error

    _say(f"look at {run_demo(out, cases, weights, _say)}")


@app.command()
def report(
    records: Annotated[Path, typer.Argument(metavar="REPORT", help="Folder that 'cwdm infer --report_path' filled.")],
    data_path: Annotated[
        Path | None,
        typer.Option("--data_path", "--data-path", help="Folder with the case folders. Default: as recorded."),
    ] = None,
    output_path: Annotated[
        Path | None,
        typer.Option("--output_path", "--output-path", help="Folder with the outputs. Default: as recorded."),
    ] = None,
    truth: Annotated[
        Path | None, typer.Option(help="True images: complete case folders, or files named like the outputs.")
    ] = None,
    viewer: Annotated[
        list[str] | None, typer.Option(metavar="CASE", help="Case that gets a slice viewer; repeat for several.")
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="Folder that 'cwdm evaluate --out' filled. Default: --truth is scored.")
    ] = None,
    cases: Annotated[
        int, typer.Option(min=0, help="How many cases are pictured, the worst first; those that are marked always are.")
    ] = 60,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Images scored at a time, 0.75 GB each. Default: one a processor, at most 8."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The file. Default: report.html beside the records.")] = None,
) -> None:
    """Write one HTML file about a run: what to look at first, slices, histograms, settings, checksums."""
    from cwdm.progress import CohortProgress
    from cwdm.report import ReportPaths

    paths = ReportPaths(records, data_path, output_path, truth, scores)
    with CohortProgress(0) as progress:
        path = _write_report()(paths, viewer or (), cases, out, workers, progress)
    _say(f"look at {path}")


def _write_report() -> "Callable[..., Path]":
    try:
        from cwdm.report import write_report
    except ModuleNotFoundError as error:
        raise CwdmError(f"{error.name} is missing; pip install 'cwdm[report]' brings what the report needs") from error
    return write_report


def _report_on_run(report_path: Path, data_path: Path, output_path: Path, log: "Callable[[str], None]") -> None:
    """The report at the end of a run, whose exit code tells of the cases, not of this."""
    from cwdm.report import ReportPaths

    try:
        log(f"look at {_write_report()(ReportPaths(report_path, data_path, output_path))}")
    except Exception as error:
        log(f"warning: no report was written: {error}")


@app.command("self-test")
def self_test(
    weights: Annotated[Path | None, typer.Option(help="Folder or file of weights, or 'bundled'.")] = None,
    modality: Annotated[list[Modality] | None, typer.Option(help="Repeat for several. Default: all four.")] = None,
) -> None:
    """Load the weights of every contrast and synthesise a tiny phantom: a minute that saves a submission."""
    from cwdm.images import MODALITIES
    from cwdm.inference import self_test as check

    check(weights, [m.value for m in modality] if modality else MODALITIES, print)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A ready configuration, such as cwdm-t1n, or a YAML file.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override it: data.path=DIR and out=DIR at least."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest state in the run's folder.")] = False,
) -> None:
    """Train a network. Ready: cwdm-t1n, -t1c, -t2w, -t2f, -any; wdm-unet-128, -256, wdm-wavunet-128, -256; bundled.

    Several GPUs: devices=8; several machines: start it with torchrun or Slurm. A stopped run goes on with --resume.
    """
    from cwdm.training import load_training_settings

    loaded = load_training_settings(config, settings or [])
    try:
        from cwdm.training import train as run
    except ModuleNotFoundError as error:
        raise CwdmError(f"{error.name} is missing; pip install 'cwdm[train]' brings what training needs") from error
    _say(run(loaded, resume))


@app.command()
def sample(
    weights: Annotated[Path, typer.Argument(help="Weights of an unconditional network.")],
    out: Annotated[Path, typer.Option(help="Folder for sample-00000.nii.gz and on.")],
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="How many volumes.")] = 1,
    size: Annotated[
        tuple[int, int, int] | None, typer.Option(help="Voxels. Default: what the network was trained on.")
    ] = None,
    device: Annotated[Device, typer.Option(help="'cuda' fails without a GPU, 'auto' falls back.")] = Device.auto,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As for infer: seed=1, sampler.steps=50.")
    ] = None,
) -> None:
    """Generate whole volumes. Those that are there already stay, so a stopped run goes on where it was."""
    from cwdm.inference import Generator, write_samples
    from cwdm.precision import warn_of_precision
    from cwdm.progress import CohortProgress
    from cwdm.settings import load_settings

    generator = Generator(weights, load_settings(None, settings or ()), size, device.value)
    with CohortProgress(count) as progress:
        warn_of_precision(generator.pipeline.dtype, generator.pipeline.device, progress.log)
        write_samples(
            generator,
            count,
            out,
            lambda path, new: progress.end_case(f"{path}: {'written' if new else 'there already'}"),
        )


@app.command()
def translate(
    weights: Annotated[Path, typer.Argument(help="Weights that 'cwdm train' with layout: files wrote.")],
    data_path: Annotated[
        Path, typer.Option("--data_path", "--data-path", help="Folder of the images, laid out as for training.")
    ],
    output_path: Annotated[
        Path, typer.Option("--output_path", "--output-path", help="Folder for <case>.nii.gz, flat.")
    ],
    device: Annotated[Device, typer.Option(help="'cuda' fails without a GPU, 'auto' falls back.")] = Device.auto,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As for infer: seed=1, sampler.steps=50.")
    ] = None,
) -> None:
    """Make CT from MR, or whatever else a network was trained on. A stopped run goes on where it was."""
    from cwdm.inference import Translator, translate
    from cwdm.precision import warn_of_precision
    from cwdm.progress import CohortProgress
    from cwdm.settings import load_settings

    translator = Translator(weights, load_settings(None, settings or ()), device.value)
    with CohortProgress(0) as progress:
        warn_of_precision(translator.pipeline.dtype, translator.pipeline.device, progress.log)
        failed = translate(translator, data_path, output_path, progress.end_case, progress.expect)
    if failed:
        progress.log(f"{len(failed)} FAILED: {', '.join(failed)}")
        raise typer.Exit(1)


@prepare_app.command()
def lidc(
    dicom: Annotated[Path, typer.Argument(metavar="DICOM_DIR", help="Folder of LIDC-IDRI or other CT; only read.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for one .nii.gz a series.")],
) -> None:
    """CT from DICOM: 1 mm, 256³ around the centre, -1000 HU to the 0.999 quantile as [0, 1]."""
    try:
        from cwdm.prepare import prepare_lidc
    except ModuleNotFoundError as error:
        raise CwdmError(f"{error.name} is missing; pip install 'cwdm[train]' brings what this needs") from error
    if prepare_lidc(dicom, out, _say):
        raise typer.Exit(1)


@weights_app.command()
def untrained(
    folder: Annotated[Path, typer.Argument(help="Where to put them.")],
    width: Annotated[int, typer.Option(min=32, help="Channels of the first level; 64 is the published network.")] = 64,
) -> None:
    """Write untrained weights for every contrast, to try a set-up or to time it: their images mean nothing."""
    from cwdm.checkpoint import Record
    from cwdm.unet import UNetConfig
    from cwdm.weights import write_untrained

    try:
        config = UNetConfig(in_channels=32, model_channels=width)
    except ValueError as error:
        raise SettingsError(f"--width {width}: {error}") from error
    for path in write_untrained(folder, config, Record()):
        _say(path)


@weights_app.command()
def download(
    folder: Annotated[Path | None, typer.Argument(help="Where to put them. Default: where infer looks.")] = None,
    repo: Annotated[str, typer.Option(help="Hugging Face repository.")] = "pfriedri/cwdm",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "main",
    file: Annotated[
        list[str] | None, typer.Option(help="File in the repository; repeat for several. Default: the four of cWDM.")
    ] = None,
) -> None:
    """Fetch the published weights (4 × 326 MB) and record their checksums; exit code 1 if a file of yours is kept."""
    from cwdm.weights import PUBLISHED_FILES, default_folder
    from cwdm.weights import download as fetch

    names, kept = tuple(file or PUBLISHED_FILES.values()), list[str]()
    for path in fetch(folder or default_folder(), repo, revision, names, kept.append):
        _say(path)
    for line in kept:
        _stderr().print(f"error: {printable(line)}", markup=False, soft_wrap=True)
    if kept:
        raise typer.Exit(1)


@weights_app.command("list")
def list_weights(
    weights: Annotated[Path | None, typer.Argument(help="Folder or file. Default: where infer looks.")] = None,
) -> None:
    """Show what is in a folder of weights; exit code 1 if a file is not usable."""
    if not _show_weights(weights):
        raise typer.Exit(1)


@weights_app.command()
def verify(
    weights: Annotated[Path | None, typer.Argument(help="Folder or file. Default: where infer looks.")] = None,
) -> None:
    """Load every file strictly and compare its recorded checksum; exit code 1 if one is not as it should be."""
    if not _show_weights(weights):
        raise typer.Exit(1)


@weights_app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Published .pt or our .safetensors.")],
    target: Annotated[Path, typer.Argument(help="File to write, such as weights/t2f.safetensors.")],
    modality: Annotated[Modality | None, typer.Option(help="What it synthesises, if the name does not tell.")] = None,
    dtype: Annotated[StoredType, typer.Option(help="float16 halves the file.")] = StoredType.float32,
) -> None:
    """Write a checkpoint as safetensors, with configuration, modality and recommended sampler in its header."""
    import torch

    from cwdm.weights import convert as write

    _say(write(source, target, modality and modality.value, getattr(torch, dtype.value)))


def _show_weights(weights: Path | None) -> bool:
    """Print a table of weights files; whether all of them are sound."""
    from cwdm.weights import folder_of, inspect, modality_of

    weights = folder_of(weights)
    marks: dict[bool | None, str] = {True: "as recorded", False: "DIFFERS", None: "none recorded"}
    table = Table("file", "synthesises", "network", "parameters", "checksum", title=Text(printable(str(weights))))
    faults = []
    for listed in inspect(weights):
        if listed.fault:
            faults.append(listed.fault)
        name = Text(printable(listed.path.name))
        if listed.loaded is None:
            table.add_row(name, "", "NOT USABLE", "", marks[listed.verified])
            continue
        config, entry = listed.loaded.model.config, listed.loaded.record
        kind = f"{config.skips} {config.model_channels}×{','.join(map(str, config.channel_mult))}"
        parameters = sum(tensor.numel() for tensor in listed.loaded.model.parameters())
        unconditional = config.in_channels == config.out_channels
        target = "volumes" if unconditional else entry.modality or modality_of(listed.path) or "not said"
        table.add_row(name, target, kind, f"{parameters:,}", marks[listed.verified])
    if not table.rows:
        faults.append(f"{weights}: no weights files (.pt, .safetensors)")
    Console().print(table)
    for fault in faults:
        _stderr().print(f"error: {printable(fault)}", markup=False, soft_wrap=True)
    return not faults
