"""Many cases: reading, computing and writing overlap, failures stay apart, a second run does what is left."""

import gc
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch

from cwdm import __version__
from cwdm.checkpoint import read_record
from cwdm.errors import CaseError, CwdmError, DeviceLostError, NameInUseError, OutputError, WeightsError
from cwdm.files import check_writable, output_errors, remove_stale, sha256, write_json
from cwdm.images import MARK, MODALITIES, CaseFolder, output_name, read_case, read_description, write_volume
from cwdm.inference.provenance import provenance, read_provenance, short
from cwdm.inference.quality import Quality
from cwdm.inference.synthesizer import Prepared, Samples, Synthesizer
from cwdm.pipeline import is_out_of_memory
from cwdm.progress import CohortProgress
from cwdm.settings import Settings
from cwdm.weights import find, modality_of

PROGRAM = f"cwdm {__version__}"

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        modality: what was missing; empty where that could not be told.
        reason: why it failed.
        seconds: time spent sampling.
        quality: what the automatic check says of an output written in this run.
    """

    case: str
    modality: str
    status: Literal["written", "skipped", "failed"]
    reason: str = ""
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    quality: Quality | None = None


def device_works(device: torch.device) -> bool:
    """Whether a tiny computation succeeds: after some errors nothing does any more in the process that met them."""
    try:
        return device.type == "cpu" or (torch.ones(8, device=device) * 2).sum().item() == 16
    except Exception:  # what a driver in trouble can raise has no end
        return False


def synthesise_cohort(
    folders: Sequence[CaseFolder],
    synthesizer: Synthesizer,
    output: Path,
    *,
    overwrite: bool = False,
    report: Path | None = None,
    progress: CohortProgress | None = None,
    works: Callable[[torch.device], bool] = device_works,
) -> list[Outcome]:
    """Synthesise what is missing in each case and write it to `output`, nothing else.

    Where several modalities are missing, each is made from the contrasts that are there, if the weights were trained
    for that. Cases are grouped by what is missing, so that each contrast's weights are loaded once. A case whose output
    is there already is skipped, unless `overwrite`. A case that cannot be used is reported and passed over.

    Args:
        report: folder for a JSON record of each case and of the run and, with several samples, the spread.
        works: asked after an error that no one expected, whether the device can still be used.

    Returns:
        One outcome a case and modality.

    Raises:
        OutputError: an output folder cannot be written or is full; cases already written stay.
        DeviceLostError: the device no longer works; cases already written stay.
    """
    tasks = plan_tasks(folders, synthesizer.weights)
    progress = progress or CohortProgress(len(tasks))
    with cohort_run(len(tasks), output, report, synthesizer.settings, progress) as tally:
        Runner(synthesizer, output, report, overwrite, progress, tally.end, works).run(tasks)
    return tally.outcomes


def plan_tasks(folders: Iterable[CaseFolder], weights: Path) -> list[CaseFolder]:
    """Each case once for each volume to be made; once, to be reported, if the weights do not know so many missing."""
    return [task for folder in folders for task in _tasks(folder, weights)]


def _tasks(folder: CaseFolder, weights: Path) -> list[CaseFolder]:
    each = [replace(folder, chosen=modality) for modality in folder.missing]
    if folder.problem is not None or folder.chosen or len(each) < 2:
        return [folder]
    try:
        known = [read_record(find(weights, modality)).most_missing for modality in folder.missing]
    except CwdmError:  # weights that cannot be used fail later, each with its cases
        return each
    return each if len(each) <= min(known) else [folder]


def check_labels(tasks: Iterable[CaseFolder], weights: Path, output: Path) -> None:
    """Refuse a file of weights that does not record its modality if it would have to serve for more than one.

    Args:
        tasks: of the whole cohort, before it is shared among workers, finished ones included.
        output: images that are there already count too.

    Raises:
        WeightsError: it would.
    """
    served: dict[Path, list[str]] = {}
    for modality in sorted({task.target for task in tasks} - {""}, key=MODALITIES.index):
        if path := _unlabelled(weights, modality):
            served.setdefault(path, []).append(modality)
    for path, modalities in served.items():
        if len(modalities) > 1:
            raise _unclear(path, f"cases miss {' and '.join(modalities)}")
        for other in MODALITIES:
            made = _made_by(path, output, other) if other not in modalities else None
            if made:
                raise _unclear(path, f"cases miss {modalities[0]}, and it has made {made}")


def _unlabelled(weights: Path, modality: str) -> Path | None:
    """The file that would synthesise a modality, if neither its name nor what is in it says so."""
    try:
        path = find(weights, modality)
        return None if modality_of(path) or read_record(path).modality else path
    except CwdmError:  # unusable weights fail later, each with its cases
        return None


def _made_by(weights: Path, output: Path, modality: str) -> Path | None:
    """An image of a modality in `output` that was made with a file of weights."""
    checksum = short(sha256(weights))
    for image in sorted(output.glob(f"*-{modality}.nii.gz")):
        made = read_provenance(image) if image.is_file() else None
        if made and made.weights == checksum:
            return image
    return None


def _unclear(path: Path, found: str) -> WeightsError:
    return WeightsError(
        f"{path} does not record which modality it synthesises, and {found}; put each modality's file into a folder "
        "named after the modality, or convert it with 'cwdm weights convert --modality'"
    )


@dataclass
class Tally:
    """What has become of the cases so far; each is said as it comes to its end."""

    progress: CohortProgress
    total: int
    outcomes: list[Outcome] = field(default_factory=list)

    def end(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.progress.end_case(f"[{len(self.outcomes)}/{self.total}] {outcome_line(outcome)}")


@contextmanager
def cohort_run(
    total: int, output: Path, report: Path | None, settings: Settings, progress: CohortProgress
) -> Iterator[Tally]:
    """What happens once a run, whoever computes: the folders are checked and cleaned up, and a record ends it.

    Raises:
        OutputError: a folder cannot be written.
    """
    for folder in (output, report) if report else (output,):
        check_writable(folder)
        remove_stale(folder)
    progress.expect(total)
    tally, started = Tally(progress, total), time.time()
    try:
        with progress:
            yield tally
    finally:
        if report:
            _write_record(report, started, settings, tally.outcomes)


def _write_record(report: Path, started: float, settings: Settings, outcomes: Sequence[Outcome]) -> None:
    """What this run did, under a name of its own, so that the next run's does not replace it."""
    moment = datetime.fromtimestamp(started, UTC)
    record = {
        "program": PROGRAM,
        "started": moment.isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 3),
        "settings": settings.model_dump(mode="json"),
        "cases": [asdict(outcome) for outcome in outcomes],
    }
    write_json(report / f"run-{moment:%Y%m%dT%H%M%S.%f}-{os.getpid()}.json", record)


@dataclass
class Runner:
    """Synthesises the tasks that it is given, one after the other, in folders that are ready.

    Attributes:
        end: told what became of each task, on whichever thread.
        stop: what the writer met that makes going on pointless.
    """

    synthesizer: Synthesizer
    output: Path
    report: Path | None
    overwrite: bool
    progress: CohortProgress
    end: Callable[[Outcome], None]
    works: Callable[[torch.device], bool] = device_works
    stop: OutputError | None = None

    def run(self, tasks: Iterable[CaseFolder]) -> None:
        """Each task to its end.

        Raises:
            OutputError: an output folder cannot be written or is full.
            DeviceLostError: the device no longer works; the tasks that have not come to their end are as they were.
        """
        for modality, group in groupby(sorted(tasks, key=_target), key=_target):
            self.group(modality, list(group))

    def group(self, modality: str, folders: list[CaseFolder]) -> None:
        """The cases that miss one modality."""
        todo = [folder for folder in folders if not self.settled(folder, modality)]
        if not todo:
            return
        try:
            self.synthesizer.load(modality)
        except Exception as error:
            reason = self.explain(error)
            self.progress.log(f"error: {reason}")
            for folder in todo:
                self.end(Outcome(folder.name, modality, "failed", reason))
            return
        self.pipeline(todo)

    def settled(self, folder: CaseFolder, modality: str) -> bool:
        """Whether nothing is left to do: the case is unusable, or its file is there already."""
        if not modality:
            try:
                read_case(folder)
            except CaseError as error:
                self.end(Outcome(folder.name, "", "failed", error.reason))
            return True
        path = self.output / output_name(folder.name, modality)
        if path.is_dir() or (self.overwrite and _is_foreign(path)):
            reason = f"{path} is there and was not made by cwdm; move it away or choose another output folder"
            self.end(Outcome(folder.name, modality, "failed", reason))
            return True
        if self.overwrite or not (path.is_file() and path.stat().st_size):
            return False
        self.end(Outcome(folder.name, modality, "skipped", warnings=self.changes(modality, path)))
        return True

    def changes(self, modality: str, image: Path) -> tuple[str, ...]:
        """A warning if a finished image was not made with today's weights and settings."""
        made = read_provenance(image)
        if made is None:
            return ("its header does not say what it was made with; --overwrite makes it again",)
        try:
            today = provenance(self.synthesizer.describe(modality))
        except Exception as error:
            return (f"cannot tell whether it was made with these weights: {self.explain(error)}",)
        if made.weights != today.weights:
            return (f"made with other weights ({made.weights}…, not {today.weights}…); --overwrite makes it again",)
        return () if made == today else ("made with other settings; --overwrite makes it again",)

    def pipeline(self, folders: list[CaseFolder]) -> None:
        """Read the next case and write the last one while the network works on this one."""
        with ThreadPoolExecutor(1, "reader") as reader, ThreadPoolExecutor(1, "writer") as writer:
            writing: Future[None] | None = None
            for folder, reading in _one_ahead((folder, reader.submit(self.read, folder)) for folder in folders):
                drawn = self.draw(folder, reading)
                if writing:
                    writing.result()  # at most one volume waits to be written
                self.raise_if_stopped()
                writing = writer.submit(self.write, folder, *drawn) if drawn else None
        self.raise_if_stopped()

    def read(self, folder: CaseFolder) -> Prepared:
        return self.synthesizer.prepare(read_case(folder))

    def draw(self, folder: CaseFolder, reading: Future[Prepared]) -> tuple[Prepared, Samples] | None:
        """The network's part; None if the case failed."""
        try:
            prepared = reading.result()
            self.progress.start_case(folder.name, self.synthesizer.evaluations(prepared.case.target))
            return prepared, self.synthesizer.sample(prepared, self.step)
        except OutputError:
            raise
        except Exception as error:  # whatever it is, it must not take the other cases down
            self.fail(folder.name, folder.target, error)
            return None

    def step(self) -> None:
        self.raise_if_stopped()
        self.progress.step()

    def raise_if_stopped(self) -> None:
        if self.stop:
            raise self.stop

    def write(self, folder: CaseFolder, prepared: Prepared, samples: Samples) -> None:
        """The writer thread's part; the volume comes last, because its being there says that the case is finished."""
        case, modality = prepared.case, prepared.case.target
        name, path = f"{case.name}-{modality}", self.output / output_name(case.name, modality)
        try:
            result = self.synthesizer.finish(prepared, samples)
            seconds = round(result.seconds, 3)
            outcome = Outcome(case.name, modality, "written", "", seconds, result.warnings, result.quality)
            if self.report:
                places = {"input": str(folder.folder.absolute()), "output": str(path.absolute())}
                whole = asdict(outcome) | places | {"given": list(case.volumes)} | self.synthesizer.describe(modality)
                write_json(self.report / f"{name}.json", {"program": PROGRAM, "synthesised": True, **whole})
                spread = self.report / f"{name}-spread.nii.gz"
                if result.spread is not None:
                    write_volume(spread, result.spread, case, native=False)
                else:  # that of an earlier run says nothing about this image
                    with output_errors(self.report):
                        spread.unlink(missing_ok=True)
            result.save(path)
            self.end(outcome)
        except NameInUseError as error:
            self.fail(case.name, modality, error)
        except OutputError as error:
            self.stop = error  # a full or read-only disk is no fault of this case, and the next one would meet it too
        except Exception as error:
            self.fail(case.name, modality, error)

    def fail(self, case: str, modality: str, error: Exception) -> None:
        self.end(
            Outcome(case, modality, "failed", error.reason if isinstance(error, CaseError) else self.explain(error))
        )

    def explain(self, error: Exception) -> str:
        """One line about an error; the memory it holds on to is let go."""
        if isinstance(error, CwdmError):
            return str(error)
        if is_out_of_memory(error):
            error.__traceback__ = None  # its frames keep the network's tensors alive
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return "not enough memory"
        self.progress.log("".join(traceback.format_exception(error)))
        error.__traceback__ = None
        reason = f"unexpected {type(error).__name__}: {error}"
        if not self.works(self.synthesizer.device):
            raise DeviceLostError(f"the GPU no longer works: {reason}")
        return reason


def _one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each given away only when the next one has been taken, so that its work has begun."""
    for item, _ in pairwise(chain(items, (None,))):
        yield cast(T, item)


def _is_foreign(path: Path) -> bool:
    """Whether a file holds something that cwdm did not synthesise."""
    return path.is_file() and path.stat().st_size > 0 and not read_description(path).startswith(MARK)


def _target(folder: CaseFolder) -> str:
    return folder.target


def outcome_line(outcome: Outcome) -> str:
    """What a person is told about a case that has come to its end."""
    name = f"{outcome.case}: {outcome.modality}" if outcome.modality else outcome.case
    if outcome.status == "failed":
        return f"{name} FAILED: {outcome.reason}"
    warnings = "".join(f"\n    warning: {warning}" for warning in outcome.warnings)
    if outcome.status == "skipped":
        return f"{name} is there already{warnings}"
    return f"{name} written after {outcome.seconds:.1f} s of sampling{warnings}{_findings(outcome.quality)}"


def _findings(quality: Quality | None) -> str:
    return "".join(f"\n    {quality.verdict}: {reason}" for reason in quality.reasons) if quality else ""
