"""What is to be synthesised: the tasks of a cohort, and whether the weights can tell them apart."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from cwdm.checkpoint import read_record
from cwdm.errors import CwdmError, WeightsError
from cwdm.files import is_file, matching, sha256
from cwdm.images import MODALITIES, Case, CaseFolder, read_case
from cwdm.inference.provenance import read_provenance, short
from cwdm.weights import find, modality_of


@dataclass(frozen=True)
class Task:
    """One volume to be made.

    Attributes:
        folder: of the case.
        target: its modality; empty where that cannot be told or the case cannot be used, which `read` then says.
    """

    folder: CaseFolder
    target: str

    @property
    def name(self) -> str:
        """The case's."""
        return self.folder.name

    def read(self) -> Case:
        """The case, as `read_case`; raises CaseError."""
        return read_case(replace(self.folder, chosen=self.target))


def plan_tasks(folders: Iterable[CaseFolder], weights: Path) -> list[Task]:
    """A task for each volume to be made; one for a case that misses more than the weights know, to be reported."""
    return [Task(folder, target) for folder in folders for target in _targets(folder, weights)]


def _targets(folder: CaseFolder, weights: Path) -> tuple[str, ...]:
    if folder.problem is not None or folder.chosen or len(folder.missing) < 2:
        return (folder.target,)
    try:
        known = min(read_record(find(weights, modality)).most_missing for modality in folder.missing)
    except CwdmError:  # weights that cannot be used fail later, each with its cases
        return folder.missing
    return folder.missing if len(folder.missing) <= known else ("",)


def check_labels(tasks: Iterable[Task], weights: Path, output: Path) -> None:
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
    for image in matching(output, f"*-{modality}.nii.gz"):
        made = read_provenance(image) if is_file(image) else None
        if made and made.weights == checksum:
            return image
    return None


def _unclear(path: Path, found: str) -> WeightsError:
    return WeightsError(
        f"{path} does not record which modality it synthesises, and {found}; put each modality's file into a folder "
        "named after the modality, or convert it with 'cwdm weights convert --modality'"
    )
