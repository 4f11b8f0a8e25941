"""Many cases: reading, computing and writing overlap, failures stay apart, a second run does what is left."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, groupby, pairwise
from operator import attrgetter
from pathlib import Path
from typing import TypeVar, cast

import torch

from cwdm.errors import CaseError, DeviceLostError, InputError, NameInUseError, OutputError
from cwdm.files import check_writable, remove_stale
from cwdm.images import MARK, CaseFolder, is_made, output_name
from cwdm.inference.outcome import Outcome
from cwdm.inference.plan import Task, plan_tasks
from cwdm.inference.provenance import describe, provenance, read_provenance
from cwdm.inference.steps import PreparedCase, Samples, draw, postprocess, prepare
from cwdm.inference.synthesizer import Synthesizer
from cwdm.pipeline import Pipeline, evaluations
from cwdm.progress import CohortProgress
from cwdm.settings import Settings
from cwdm.weights import BUNDLED, folder_of

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """What is done with every case, by whatever worker; the arguments of `Synthesizer` and `synthesise_cohort`."""

    weights: Path | str | None
    settings: Settings
    device: str
    output: Path
    overwrite: bool = False
    report: Path | None = None

    def anywhere(self) -> "Work":
        """The same in another folder and under another environment."""
        weights = BUNDLED if str(self.weights) == BUNDLED else folder_of(self.weights).absolute()
        report = self.report.absolute() if self.report else None
        return replace(self, weights=weights, output=self.output.absolute(), report=report)


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

    Where several modalities are missing, each is made from those that are there, if the weights were trained for that.
    Cases are grouped by what is missing, so that each modality's weights are loaded once. A case whose output is there
    already is skipped, unless `overwrite`. A case that cannot be used is reported and passed over.

    Args:
        report: folder for a JSON record of each case and of the run and, of several samples or one pass, the std.
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


@dataclass
class Tally:
    """What has become of the cases so far; each is said as it comes to its end."""

    progress: CohortProgress
    total: int
    outcomes: list[Outcome] = field(default_factory=list)

    def end(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.progress.end_case(f"[{len(self.outcomes)}/{self.total}] {outcome.line}")


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
            from cwdm.inference.records import write_run_record  # here and below, as others leave no records

            write_run_record(report, started, settings.model_dump(mode="json"), tally.outcomes)


# What the reader and the writer do, on threads of their own


def read(task: Task, pipeline: Pipeline, settings: Settings) -> PreparedCase:
    """A case ready for the network; raises CaseError."""
    return prepare(task.read(), pipeline, settings)


def write(
    folder: Path,
    prepared: PreparedCase,
    samples: Samples,
    pipeline: Pipeline,
    settings: Settings,
    output: Path,
    report: Path | None,
) -> Outcome:
    """Write a volume; it comes last, because its being there says that the case is finished.

    Raises:
        CaseError: it is empty.
        OutputError: it or its record cannot be written.
    """
    case, described = prepared.case, describe(pipeline, settings)
    path = output / output_name(case.name, case.target)
    result = postprocess(prepared, samples, settings.output, str(provenance(described)))
    seconds = round(result.seconds, 3)
    outcome = Outcome(case.name, case.target, "written", "", seconds, result.warnings, result.quality)
    if report:
        from cwdm.inference.reported import write_report

        write_report(report, outcome, folder, path, result, described)
    result.save(path)
    return outcome


@dataclass
class Runner:
    """Synthesises the tasks that it is given, one after the other, in folders that are ready.

    It stays on one thread; reader and writer have none of it.

    Attributes:
        end: told what became of each task.
    """

    synthesizer: Synthesizer
    output: Path
    report: Path | None
    overwrite: bool
    progress: CohortProgress
    end: Callable[[Outcome], None]
    works: Callable[[torch.device], bool] = device_works
    _writing: tuple[Task, Future[Outcome]] | None = None

    def run(self, tasks: Iterable[Task]) -> None:
        """Each task to its end.

        Raises:
            OutputError: an output folder cannot be written or is full.
            DeviceLostError: the device no longer works; the tasks that have not come to their end are as they were.
        """
        for modality, group in groupby(sorted(tasks, key=attrgetter("target")), key=attrgetter("target")):
            todo = [task for task in group if not self._is_settled(task)]
            if not todo:
                continue
            try:
                pipeline = self.synthesizer.pipeline(modality)
            except Exception as error:
                reason = self._explain(error)
                self.progress.log(f"error: {reason}")
                for task in todo:
                    self._fail(task, reason)
                continue
            self._run_group(todo, pipeline)

    def _is_settled(self, task: Task) -> bool:
        """Whether nothing is left to do: the case is unusable, or its file or another in its place is there already."""
        if not task.target:
            try:
                task.read()
            except CaseError as error:
                self._fail(task, error.reason)
            return True
        path = self.output / output_name(task.name, task.target)
        try:
            if not is_made(path, MARK) or self.overwrite:
                if self.report:
                    from cwdm.inference.reported import check_report_replaceable

                    check_report_replaceable(self.report, task.name, task.target)
                return False
        except InputError as error:
            self._fail(task, str(error))
            return True
        self.end(Outcome(task.name, task.target, "skipped", warnings=self._changes(task.target, path)))
        return True

    def _changes(self, modality: str, image: Path) -> tuple[str, ...]:
        """A warning if a finished image was not made with today's weights and settings."""
        from cwdm.inference.kept import changes, provenance_of  # most runs meet no finished image

        one = self.synthesizer
        return changes(
            read_provenance(image), lambda: provenance_of(one.pipeline(modality), one.settings), self._explain
        )

    def _run_group(self, tasks: Sequence[Task], pipeline: Pipeline) -> None:
        """Read the next case and write the last one while the network works on this one."""
        settings = self.synthesizer.settings
        with ThreadPoolExecutor(1, "reader") as reader, ThreadPoolExecutor(1, "writer") as writer:
            try:
                for task, reading in _one_ahead(
                    (task, reader.submit(read, task, pipeline, settings)) for task in tasks
                ):
                    drawn = self._draw(task, reading, pipeline)
                    self._collect(wait=True)  # at most one volume waits to be written
                    if drawn:
                        work = partial(write, task.folder.folder, *drawn, pipeline, settings, self.output, self.report)
                        self._writing = task, writer.submit(work)
            finally:
                self._collect(wait=True)

    def _draw(
        self, task: Task, reading: Future[PreparedCase], pipeline: Pipeline
    ) -> tuple[PreparedCase, Samples] | None:
        """The network's part; None if the case failed."""

        def after_step(step: int, total: int, x0: torch.Tensor) -> None:
            self._collect(wait=False)
            for _ in range(len(x0)):
                self.progress.step()

        try:
            prepared, settings = reading.result(), self.synthesizer.settings
            self.progress.start_case(task.name, evaluations(pipeline) * settings.samples)
            return prepared, draw(prepared, pipeline, settings, after_step)
        except (OutputError, DeviceLostError):
            raise
        except Exception as error:  # whatever it is, it must not take the other cases down
            self._fail(task, self._explain(error))
            return None

    def _collect(self, wait: bool) -> None:
        """Tell what became of the volume that is being written, if it is written by now or is waited for."""
        if not self._writing or not (wait or self._writing[1].done()):
            return
        task, future = self._writing
        try:
            outcome = future.result()
        except Exception as error:
            self._writing = None
            if isinstance(error, OutputError) and not isinstance(error, NameInUseError):
                raise  # a full or read-only disk is no fault of this case, and the next one would meet it too
            self._fail(task, self._explain(error))
        else:
            self._writing = None
            self.end(outcome)

    def _fail(self, task: Task, reason: str) -> None:
        self.end(Outcome(task.name, task.target, "failed", reason))

    def _explain(self, error: Exception) -> str:
        from cwdm.inference.faults import explain  # here, as most runs have no faults

        return explain(error, lambda: self.works(self.synthesizer.device), self.progress.log)


def _one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each given away only when the next one has been taken, so that its work has begun."""
    for item, _ in pairwise(chain(items, (None,))):
        yield cast(T, item)
