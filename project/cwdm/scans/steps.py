"""The way of a patient: plain functions between values that cannot change.

read_patient ─► bring_into, which strips, registers and judges ─► synthesise_missing, which brings back ─► write
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cwdm.arrays import Volume
from cwdm.checkpoint import read_record
from cwdm.device import choose_device
from cwdm.errors import CaseError, InputError
from cwdm.files import is_file
from cwdm.images import MODALITIES, Image, read_grid
from cwdm.inference import Provenance as Digest
from cwdm.inference import Synthesis, describe, provenance_of
from cwdm.pipeline import Callback, Pipeline
from cwdm.scans.align import Aligned, Head, align
from cwdm.scans.back import bring_back
from cwdm.scans.derivatives import Provenance
from cwdm.scans.judge import VERDICTS, Judgement, Verdict, judge
from cwdm.scans.patient import Patient
from cwdm.scans.strip import How, strip
from cwdm.scans.volume import read_scan
from cwdm.settings import Settings
from cwdm.weights import find

if TYPE_CHECKING:
    from cwdm.inference import Synthesizer

OF_IMAGES: dict[str, Verdict] = {"ok": "ok", "look": "review", "reject": "reject"}
"""What the check of synthesised images says, in the words of the check of registrations."""


@dataclass(frozen=True)
class InSpace:
    """A patient's scans in one space.

    Attributes:
        masked_by: modality -> where its brain mask comes from.
        judgement: what the check says of the registrations.
    """

    patient: Patient
    aligned: Aligned
    masked_by: Mapping[str, How]
    judgement: Judgement

    @property
    def volumes(self) -> dict[str, Volume]:
        """Modality -> (X, Y, Z) in the space, interpolated once, 0 outside the brain."""
        return {modality: self.aligned.volume(modality) for modality in MODALITIES if modality in self.aligned.heads}


@dataclass(frozen=True)
class Synthetic:
    """A synthesised image of a patient.

    Attributes:
        synthesis: in the space.
        image: on the grid of one of the patient's scans.
        std: standard deviation on the same grid and in the same numbers, where the weights or several samples give it.
        like: modality of that scan.
        provenance: how it came to be, with the graver of the verdicts on registration and image.
    """

    modality: str
    synthesis: Synthesis
    image: Image
    std: Image | None
    like: str
    provenance: Provenance

    @property
    def findings(self) -> list[str]:
        """What the check of the image says, a line each."""
        quality = self.synthesis.quality
        return [f"{self.modality} {quality.verdict}: {reason}" for reason in quality.reasons]

    @property
    def warnings(self) -> list[str]:
        """What else a person should know of it."""
        return [f"{self.modality}: {warning}" for warning in self.synthesis.warnings]


def bring_into(
    patient: Patient,
    space: str = "sri24",
    device: str = "auto",
    brain_mask: str = "",
    reference: str = "",
    on_image: Callable[[], None] = lambda: None,
) -> InSpace:
    """Strip a patient's scans, register them, and judge that.

    Args:
        space: sri24, mni152 or native; see `Space`.
        device: for HD-BET; see `cwdm.device.choose_device`.
        brain_mask: path of masks of one's own, see `masks_of`; empty: each image is stripped.
        reference: modality that the others are registered to; empty: the best-resolved one.
        on_image: called when an image has its mask.

    Raises:
        CaseError: a scan cannot be stripped or registered, or no mask fits.
    """
    masks, on = masks_of(patient, brain_mask), choose_device(device)
    heads, masked_by = {}, {}
    for modality, scan in patient.scans.items():
        image = read_scan(patient.name, scan.source, scan.path)
        with _told_of(patient, modality):
            mask, masked_by[modality] = strip(image, on, masks.get(modality), modality)
        heads[modality] = Head(image, mask)
        on_image()
    with _told_of(patient):
        aligned = align(heads, space, reference, patient.name)
    return InSpace(patient, aligned, masked_by, judge(aligned))


def synthesise_missing(
    scans: InSpace,
    synthesizer: "Synthesizer",
    grid: str = "",
    on_start: Callable[[str, Pipeline], None] = lambda modality, pipeline: None,
    callback: Callback | None = None,
) -> tuple[Synthetic, ...]:
    """Synthesise what a patient lacks, and bring it back onto the grid of one of the scans.

    Args:
        grid: modality of that scan; empty: the one that the others were registered to.
        on_start: told of each modality before the network begins.
        callback: called after each evaluation of the network; see `cwdm.pipeline.Callback`.

    Raises:
        CaseError: nothing is missing, too much is, or the result is empty.
        WeightsError: there are no usable weights for what is missing.
    """
    patient, aligned, made = scans.patient, scans.aligned, []
    volumes = scans.volumes
    for modality in missing_of(patient, synthesizer.weights):
        pipeline = synthesizer.pipeline(modality)
        on_start(modality, pipeline)
        with _told_of(patient, modality):
            synthesis = synthesizer.from_arrays(volumes, aligned.space.affine, callback, modality)
        like = grid or aligned.reference
        std = None if synthesis.std is None else bring_back(synthesis.std, aligned, like)
        image = bring_back(synthesis.volume, aligned, like)
        if not image.volume.any():
            reason = f"the synthesised {modality} does not reach the grid of {like}; choose another --grid"
            raise CaseError(patient.name, reason)
        provenance = _provenance(scans, synthesis, pipeline, synthesizer.settings, grid)
        made.append(Synthetic(modality, synthesis, image, std, like, provenance))
    return tuple(made)


def missing_of(patient: Patient, weights: Path) -> tuple[str, ...]:
    """The modalities that a patient lacks, if the weights can make them from the others.

    Args:
        weights: file or folder.

    Raises:
        CaseError: nothing is missing, or more than the weights were trained for.
        WeightsError: there are none for what is missing.
    """
    there = ", ".join(patient.scans)
    missing = tuple(modality for modality in MODALITIES if modality not in patient.scans)
    if not missing:
        raise CaseError(patient.name, f"nothing is missing: {there} are there")
    for modality in missing:
        most = read_record(find(weights, modality)).most_missing
        if len(missing) > most:
            raise CaseError(
                patient.name,
                f"only {there} there, and the weights for {modality} need {len(MODALITIES) - most} modalities; "
                "give the others, or weights that take fewer (--weights)",
            )
    return missing


def made_with(pipeline: Pipeline, settings: Settings, space: str, grid: str) -> Digest:
    """What decides an image beside the scans, for its header.

    Args:
        grid: as asked for; the empty one is whatever is resolved best.
    """
    return provenance_of(pipeline, settings, space=space, grid=grid)


def masks_of(patient: Patient, brain_mask: str) -> dict[str, Image]:
    """Modality -> a brain mask of one's own.

    Args:
        brain_mask: a path in which `{patient}` and `{modality}` stand for names. Where it names no modality, all scans
            have one grid and one mask. Where it does, scans without such a file are stripped as if none were given.

    Raises:
        CaseError: there is no such file, or it cannot be read.
    """
    if not brain_mask:
        return {}
    of_patient = brain_mask.replace("{patient}", patient.name)
    paths = {modality: Path(of_patient.replace("{modality}", modality)) for modality in patient.scans}
    there = {modality: path for modality, path in paths.items() if is_file(path)}
    if not there:
        looked = ", ".join(sorted(set(map(str, paths.values()))))
        raise CaseError(patient.name, f"no brain mask found, looked for {looked}; check --brain-mask")
    try:
        images = {path: read_grid(path) for path in set(there.values())}
    except InputError as error:
        raise CaseError(patient.name, str(error)) from error
    return {modality: images[path] for modality, path in there.items()}


@contextmanager
def _told_of(patient: Patient, what: str = "") -> Iterator[None]:
    """Errors of stages that know no patients become errors of this one, with what they are about."""
    try:
        yield
    except CaseError as error:
        about = what or error.case.removeprefix(patient.name).removeprefix(", ")
        raise CaseError(patient.name, f"{about}: {error.reason}" if about else error.reason) from error


def _provenance(scans: InSpace, synthesis: Synthesis, pipeline: Pipeline, settings: Settings, grid: str) -> Provenance:
    checkpoint, quality, judgement = pipeline.checkpoint, synthesis.quality, scans.judgement
    verdict = max(judgement.verdict, OF_IMAGES[quality.verdict], key=VERDICTS.index)
    remarks = (*scans.patient.remarks, *judgement.reasons, *quality.reasons, *synthesis.warnings)
    told = describe(pipeline, settings)
    how = {name: told[name] for name in ("sampler", "timesteps", "precision", "settings")}
    space = scans.aligned.space.name
    made = str(made_with(pipeline, settings, space, grid))
    how |= {"space": space, "masks": dict(scans.masked_by), "made_with": made}
    weights = f"{checkpoint.path.name} (sha256 {checkpoint.sha256[:12]})"
    return Provenance(weights, scans.patient.scans, verdict, tuple(dict.fromkeys(remarks)), how)
