"""Many cases: reading, computing and writing overlap, failures stay apart, a second run does what is left."""

import json
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, cast

from cwdm import __version__
from cwdm.brats import CaseFolder, output_name, read_case, write_volume
from cwdm.errors import CaseError, OutputError, WeightsError
from cwdm.files import check_writable, remove_stale, write_atomically
from cwdm.progress import CohortProgress
from cwdm.synthesis import Prepared, Synthesis, Synthesizer

PROGRAM = f"cwdm {__version__}"

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        modality: what was missing; empty where that could not be told.
        reason: why it failed.
        seconds: time spent sampling.
    """

    case: str
    modality: str
    status: Literal["written", "skipped", "failed"]
    reason: str = ""
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()


def synthesise_cohort(
    folders: Sequence[CaseFolder],
    synthesizer: Synthesizer,
    output: Path,
    *,
    overwrite: bool = False,
    report: Path | None = None,
    progress: CohortProgress | None = None,
) -> list[Outcome]:
    """Synthesise what is missing in each case and write it to `output`, nothing else.

    Cases are grouped by what is missing, so that each contrast's weights are loaded once. A case whose output
    is there already is skipped, unless `overwrite`. A case that cannot be used is reported and passed over.

    Args:
        report: folder for a JSON record a case, `run.json` and, with several samples, the spread.

    Returns:
        One outcome a case.

    Raises:
        OutputError: an output folder cannot be written or is full; cases already written stay.
    """
    progress = progress or CohortProgress(len(folders))
    for folder in (output, report) if report else (output,):
        check_writable(folder)
        remove_stale(folder)
    run = _Run(synthesizer, output, report, overwrite, progress)
    outcomes: list[Outcome] = []
    started = time.time()
    with progress:
        for modality, group in groupby(sorted(folders, key=_group), key=_group):
            for outcome in run.group(modality, list(group)):
                outcomes.append(outcome)
                progress.end_case(f"[{len(outcomes)}/{len(folders)}] {_line(outcome)}")
    if report:
        record = {
            "program": PROGRAM,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": round(time.time() - started, 3),
            "settings": synthesizer.settings.model_dump(),
            "cases": [asdict(outcome) for outcome in outcomes],
        }
        _write_json(report / "run.json", record)
    return outcomes


@dataclass(frozen=True)
class _Run:
    synthesizer: Synthesizer
    output: Path
    report: Path | None
    overwrite: bool
    progress: CohortProgress

    def group(self, modality: str, folders: list[CaseFolder]) -> Iterator[Outcome]:
        """Outcomes of the cases that miss one modality, as they come."""
        todo = []
        for folder in folders:
            if not modality:
                yield self.unusable(folder)
            elif not self.overwrite and (self.output / output_name(folder.name, modality)).exists():
                yield Outcome(folder.name, modality, "skipped")
            else:
                todo.append(folder)
        if not todo:
            return
        try:
            self.synthesizer.load(modality)
        except WeightsError as error:
            self.progress.log(f"error: {error}")
            yield from (
                Outcome(folder.name, modality, "failed", f"no usable weights for {modality}") for folder in todo
            )
            return
        yield from self.pipeline(todo)

    def unusable(self, folder: CaseFolder) -> Outcome:
        try:
            read_case(folder)
        except CaseError as error:
            return Outcome(folder.name, "", "failed", error.reason)
        raise AssertionError(f"{folder.name} is usable")

    def pipeline(self, folders: list[CaseFolder]) -> Iterator[Outcome]:
        """Read the next case and write the last one while the network works on this one."""
        with ThreadPoolExecutor(1, "reader") as reader, ThreadPoolExecutor(1, "writer") as writer:
            reading = _one_ahead((folder, reader.submit(self.read, folder)) for folder in folders)
            writing = _one_ahead((folder, self.compute(folder, future, writer)) for folder, future in reading)
            for folder, future in writing:
                yield self.settled(folder, future)

    def read(self, folder: CaseFolder) -> Prepared:
        return self.synthesizer.prepare(read_case(folder))

    def compute(self, folder: CaseFolder, reading: Future[Prepared], writer: ThreadPoolExecutor) -> Future[Outcome]:
        try:
            prepared = reading.result()
            self.progress.start_case(folder.name, self.synthesizer.evaluations(prepared.case.target))
            samples, seconds = self.synthesizer.sample(prepared, self.progress.step)
        except Exception as error:
            failed: Future[Outcome] = Future()
            failed.set_exception(error)
            return failed
        return writer.submit(lambda: self.write(self.synthesizer.finish(prepared, samples, seconds)))

    def write(self, result: Synthesis) -> Outcome:
        case, modality = result.case, result.case.target
        seconds = round(result.seconds, 3)
        outcome = Outcome(case.name, modality, "written", seconds=seconds, warnings=result.warnings)
        if self.report:
            _write_json(
                self.report / f"{case.name}-{modality}.json",
                {"program": PROGRAM, "synthesised": True, **asdict(outcome), **self.synthesizer.describe(modality)},
            )
            if result.spread is not None:
                write_volume(self.report / f"{case.name}-{modality}-spread.nii.gz", result.spread, case, native=False)
        # Last, because its being there says that the case is finished.
        native = self.synthesizer.settings.output.intensity == "native"
        write_volume(self.output / output_name(case.name, modality), result.volume, case, native)
        return outcome

    def settled(self, folder: CaseFolder, future: Future[Outcome]) -> Outcome:
        try:
            return future.result()
        except OutputError:
            raise  # a full or read-only disk is no fault of this case, and the next one would meet it too
        except CaseError as error:
            reason = error.reason
        except MemoryError:
            reason = "not enough memory"
        except Exception as error:  # whatever it is, it must not take the other cases down
            self.progress.log("".join(traceback.format_exception(error)))
            reason = f"unexpected {type(error).__name__}: {error}"
        return Outcome(folder.name, _group(folder), "failed", reason)


def _one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each given away only when the next one has been taken, so that its work has begun."""
    for item, _ in pairwise(chain(items, (None,))):
        yield cast(T, item)


def _group(folder: CaseFolder) -> str:
    """The missing modality; empty for a case that cannot be used."""
    return folder.missing[0] if folder.problem is None and len(folder.missing) == 1 else ""


def _line(outcome: Outcome) -> str:
    name = f"{outcome.case}: {outcome.modality}" if outcome.modality else outcome.case
    if outcome.status == "failed":
        return f"{name} FAILED: {outcome.reason}"
    if outcome.status == "skipped":
        return f"{name} is there already"
    warnings = "".join(f"\n    warning: {warning}" for warning in outcome.warnings)
    return f"{name} written after {outcome.seconds:.1f} s of sampling{warnings}"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    write_atomically(path, write)
