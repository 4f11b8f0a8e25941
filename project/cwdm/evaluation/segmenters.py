"""What a segmenter makes of a completed case: against what it makes of the true one, and against the reference."""

import os
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from cwdm.errors import CaseError, InputError, SettingsError
from cwdm.images import MODALITIES, Image, Volume, bounding_box, case_folder, output_name, read_grid

Labels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Segmenter = Callable[[str, Path], Image]
"""(case, folder with its four modalities) -> label of each voxel. Called once at a time for one case."""

REGIONS = {"wt": "whole tumour", "tc": "tumour core", "et": "enhancing tumour", "rc": "resection cavity"}

Scheme = Mapping[str, tuple[int, ...]]
"""What the labels of a segmentation mean: region -> its labels."""

TODAY = "2023"
SCHEMES: dict[str, Scheme] = {
    # 1 necrotic or non-enhancing core, 2 oedema, 3 enhancing tumour, and in treated patients 4 resection cavity,
    # which is no part of the tumour.
    TODAY: {"wt": (1, 2, 3), "tc": (1, 3), "et": (3,), "rc": (4,)},
    # Up to 2022 the enhancing tumour was 4, and there was no 3.
    "2020": {"wt": (1, 2, 4), "tc": (1, 4), "et": (4,)},
}
"""Label schemes of the BraTS challenges by the first year or one that they were used in."""

PENALTY_MM = 374.0
"""HD95 of a lesion that is missed or added: the diagonal of a BraTS volume, rounded."""

_GROWTH = 3  # voxels: lesions of the reference that are nearer than twice this count as one
_SMALLEST_MM3 = 50.0  # lesions of the reference up to this are not scored
_GROWN = ndimage.generate_binary_structure(3, 2)  # by the 18 neighbours

_BUNDLE_ORDER = ("t1c", "t1n", "t2w", "t2f")  # of MONAI's bundles for BraTS
_TOUCHING = np.ones((3, 3, 3), np.bool_)  # 26 neighbours


def program_files(template: str | None, bundle: Path | None) -> list[Path]:
    """Files that a segmenter consists of, as far as its command names them, or its bundle holds them."""
    words = [shutil.which(word) or word for word in shlex.split(template or "")]
    files = [Path(word) for word in words if os.path.isfile(word)]  # noqa: PTH113  # a word may be very long
    return files + [path for path in (bundle.rglob("*") if bundle else ()) if path.is_file()]


def command_segmenter(template: str) -> Segmenter:
    """A segmenter that is a program, run without a shell.

    Args:
        template: the command. {input} becomes the folder of a case, named after it, with four files
            <case>-<modality>.nii.gz; {output} the file <case>-seg.nii.gz that the program must write.

    Raises:
        SettingsError: a placeholder is missing, quotes do not match, or there is no such program.
    """
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise SettingsError(f"the segmenter's command {template!r} cannot be read: {error}") from error
    for placeholder in ("{input}", "{output}"):
        if not any(placeholder in word for word in words):
            raise SettingsError(
                f"the segmenter's command {template!r} has no {placeholder}; put it where the path goes"
            )
    if not shutil.which(words[0]):
        raise SettingsError(f"the segmenter's program {words[0]!r} was not found; check its path")

    def segment(case: str, folder: Path) -> Image:
        with tempfile.TemporaryDirectory(prefix="cwdm-") as made:
            output = Path(made) / output_name(case, "seg")
            paths = {"{input}": str(folder), "{output}": str(output)}
            # In one pass: a case may be called anything, even {output}.
            _run([re.sub(r"{input}|{output}", lambda place: paths[place[0]], word) for word in words], case)
            if not output.is_file():
                raise CaseError(case, f"the segmenter ended well and wrote no file; it should write {output.name}")
            try:
                return read_grid(output)
            except InputError as error:
                raise CaseError(case, f"what the segmenter wrote cannot be read: {error}") from error

    return segment


def bundle_segmenter(bundle: Path, scheme: Scheme = SCHEMES[TODAY]) -> Segmenter:
    """A segmenter that is a MONAI bundle in a local folder, such as `brats_mri_segmentation`.

    Of configs/inference.json (or .yaml) it takes `preprocessing`, `network_def` (or `network`) and `inferer`; of
    models/model.pt the weights, as tensors only. The images go in as t1c, t1n, t2w, t2f. Three channels of logits
    come out as tumour core, whole tumour and enhancing tumour, each present above 0; any other number of channels
    as labels, of which the highest counts.

    A bundle's configuration can name any code to be run: use only those whose origin you trust.

    Raises:
        SettingsError: MONAI is not installed, or the folder is no such bundle.
    """
    try:
        import torch
        from monai.bundle import ConfigParser
    except ModuleNotFoundError as error:
        raise SettingsError(f"{error.name} is missing; pip install 'cwdm[eval]' brings what bundles need") from error
    configs = [bundle / "configs" / f"inference{ending}" for ending in (".json", ".yaml", ".yml")]
    config = next((path for path in configs if path.is_file()), None)
    weights = bundle / "models" / "model.pt"
    if config is None or not weights.is_file():
        raise SettingsError(f"{bundle}: expected a MONAI bundle with configs/inference.json and models/model.pt")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = ConfigParser()
    try:
        parser.read_config(str(config))
        parser["bundle_root"], parser["device"] = str(bundle), device
        network = parser.get_parsed_content("network_def" if "network_def" in parser else "network")
        network.load_state_dict(torch.load(weights, map_location=device, weights_only=True))
        preprocessing, inferer = (parser.get_parsed_content(name) for name in ("preprocessing", "inferer"))
    except Exception as error:  # the bundle's own code can raise anything
        raise SettingsError(f"{bundle}: the bundle cannot be loaded ({type(error).__name__}: {error})") from error
    network.to(device).eval()

    @torch.inference_mode()
    def segment(case: str, folder: Path) -> Image:
        files = case_folder(folder).files
        original = read_grid(files["t1c"])
        try:
            image = preprocessing({"image": [str(files[name]) for name in _BUNDLE_ORDER]})["image"]
            logits = inferer(image[None].to(device), network)[0].float().cpu().numpy()
        except Exception as error:
            raise CaseError(case, f"the bundle failed ({type(error).__name__}: {error})") from error
        if logits.shape[1:] != (shape := original.volume.shape):
            raise CaseError(case, f"the bundle made {logits.shape[1:]} voxels of {shape}; it should keep them")
        return original._replace(volume=_labels_from(logits, scheme))

    return segment


def one_at_a_time(segmenter: Segmenter) -> Segmenter:
    """The same for use in several threads: a network in a graphics processor's memory is there once."""
    lock = threading.Lock()

    def segment(case: str, folder: Path) -> Image:
        with lock:
            return segmenter(case, folder)

    return segment


def labels_of(volume: Volume, source: str, scheme: Scheme = SCHEMES[TODAY]) -> Labels:
    """Check that a volume holds labels of a scheme.

    Raises:
        InputError: it holds anything else.
    """
    known = sorted({0, *(label for labels in scheme.values() for label in labels)})
    if strange := [value for value in np.unique(volume).tolist() if value not in known]:
        found = ", ".join(f"{value:g}" for value in strange[:5])
        raise InputError(
            f"{source}: expected labels {', '.join(map(str, known))}, found {found}; give a segmentation with BraTS "
            f"labels, or the scheme that it follows (--labels)"
        )
    return volume.astype(np.uint8)


def label_doubt(volume: npt.NDArray[np.generic], source: str, scheme: Scheme) -> str:
    """What to know of labels that may follow the older scheme; empty where there is nothing."""
    present = set(np.unique(volume).tolist())
    if scheme != SCHEMES[TODAY] or 4 not in present or 3 in present:
        return ""
    return f"{source}: label 4 and no 3; 4 counts as resection cavity, if it is enhancing tumour give --labels 2020"


class SegmentedPair(NamedTuple):
    """Labels that a segmenter gave to the true case, and to the one with a synthesised image in its place."""

    true: Image
    completed: Image


def segment_pair(
    segmenter: Segmenter,
    case: str,
    files: Mapping[str, Path],
    modality: str,
    synthesised: Path,
    scheme: Scheme = SCHEMES[TODAY],
) -> SegmentedPair:
    """Segment the true case and the completed one.

    Args:
        files: the four true images, modality -> file.

    Raises:
        CaseError: the true case is not complete, or the segmenter failed.
    """
    if missing := ", ".join(name for name in MODALITIES if name not in files):
        raise CaseError(case, f"a segmenter needs the four true images, {missing} missing; add the case folder")
    true = _segment(segmenter, case, files, "true", scheme)
    completed = _segment(segmenter, case, {**files, modality: synthesised}, "completed", scheme)
    if true.volume.shape != completed.volume.shape:
        shapes = f"{true.volume.shape} and {completed.volume.shape}"
        raise CaseError(case, f"expected segmentations of one shape, found {shapes}")
    return SegmentedPair(true, completed)


def compare_with_true_case(pair: SegmentedPair, scheme: Scheme = SCHEMES[TODAY]) -> dict[str, float]:
    """What the synthesised image changed for the segmenter.

    Returns:
        dice_R, hd95_R (mm), lesions_true_R, lesions_missed_R and lesions_added_R for each region R of the scheme.
    """
    spacing_mm = np.linalg.norm(pair.true.affine[:3, :3], axis=0)
    figures: dict[str, float] = {}
    for region, labels in scheme.items():
        masks = np.isin(pair.completed.volume, labels), np.isin(pair.true.volume, labels)
        missed, added, lesions = count_lesions(*masks)
        figures |= {
            f"dice_{region}": dice(*masks),
            f"hd95_{region}": hd95(*masks, spacing_mm),
            f"lesions_true_{region}": lesions,
            f"lesions_missed_{region}": missed,
            f"lesions_added_{region}": added,
        }
    return figures


def compare_with_reference(
    completed: npt.NDArray[np.generic],
    reference: npt.NDArray[np.generic],
    spacing_mm: npt.ArrayLike,
    scheme: Scheme = SCHEMES[TODAY],
) -> dict[str, float]:
    """The segmentation of the completed case against the reference, as participants are scored.

    Args:
        completed, reference: labels (X, Y, Z) of one grid and voxel order.

    Returns:
        reference_dice_R, reference_lesionwise_dice_R, reference_lesionwise_hd95_R (mm), reference_lesions_R,
        reference_lesions_missed_R and reference_lesions_false_R for each region R of the scheme.
    """
    figures: dict[str, float] = {}
    for region, labels in scheme.items():
        masks = np.isin(completed, labels), np.isin(reference, labels)
        lesions = lesionwise(*masks, spacing_mm)
        figures |= {
            f"reference_dice_{region}": dice(*masks),
            f"reference_lesionwise_dice_{region}": lesions.dice,
            f"reference_lesionwise_hd95_{region}": lesions.hd95_mm,
            f"reference_lesions_{region}": lesions.scored,
            f"reference_lesions_missed_{region}": lesions.missed,
            f"reference_lesions_false_{region}": lesions.false,
        }
    return figures


class Lesionwise(NamedTuple):
    """Means over the lesions of a reference and those that a segmentation adds.

    Attributes:
        dice: 1 where there is neither.
        hd95_mm: 0 where there is neither.
        scored: lesions of the reference that are large enough.
        missed: of those, how many no lesion of the segmentation comes near.
        false: lesions of the segmentation that come near none of the reference, however small.
    """

    dice: float
    hd95_mm: float
    scored: int
    missed: int
    false: int


def lesionwise(prediction: Mask, truth: Mask, spacing_mm: npt.ArrayLike) -> Lesionwise:
    """Lesion-wise Dice and HD95 as the BraTS challenges describe them since 2023, with their numbers for glioma.

    Lesions are 26-connected components. Those of the truth that grow into each other when they are dilated by three
    voxels are one lesion. All lesions of the prediction that touch its dilated shape are held against it together;
    a lesion that is met by none has Dice 0 and HD95 PENALTY_MM, and so has each lesion of the prediction that meets
    none. Lesions of the truth of 50 mm³ or less are left out, and so is what meets only them.
    """
    spacing = np.asarray(spacing_mm, np.float64)
    box = bounding_box(prediction | truth, _GROWTH)
    prediction, truth = prediction[box], truth[box]
    grown, count = ndimage.label(ndimage.binary_dilation(truth, _GROWN, _GROWTH), _TOUCHING)
    predicted, predicted_count = ndimage.label(prediction, _TOUCHING)
    volumes_mm3 = np.bincount(grown[truth], minlength=count + 1) * spacing.prod()
    met = np.zeros(predicted_count + 1, np.bool_)
    scores: list[tuple[float, float]] = []
    missed = 0
    for number in range(1, count + 1):
        near = grown == number
        matches = np.zeros_like(met)
        matches[predicted[near]] = True
        matches[0] = False
        met |= matches
        if volumes_mm3[number] <= _SMALLEST_MM3:
            continue
        found, lesion = matches[predicted], truth & near
        missed += not matches.any()
        scores.append((dice(found, lesion), hd95(found, lesion, spacing) if matches.any() else PENALTY_MM))
    false = predicted_count - int(np.count_nonzero(met))
    scores += [(0.0, PENALTY_MM)] * false
    mean_dice, mean_hd95 = np.mean(scores, axis=0) if scores else (1.0, 0.0)
    return Lesionwise(float(mean_dice), float(mean_hd95), len(scores) - false, missed, false)


def dice(prediction: Mask, truth: Mask) -> float:
    """Dice coefficient 2|A∩B| / (|A| + |B|) of two masks; 1 if both are empty."""
    voxels = int(np.count_nonzero(prediction) + np.count_nonzero(truth))
    return 2 * int(np.count_nonzero(prediction & truth)) / voxels if voxels else 1.0


def hd95(prediction: Mask, truth: Mask, spacing_mm: npt.ArrayLike) -> float:
    """Hausdorff distance at the 95th percentile in mm: the larger of the two directed percentiles.

    Distances go from each voxel of one surface (mask without its erosion by the 6 neighbours) to the nearest of
    the other. 0 if both masks are empty; if one is, the diagonal of the volume, the largest distance there could be.
    """
    spacing = np.asarray(spacing_mm, np.float64)
    if not (prediction.any() and truth.any()):
        diagonal = float(np.linalg.norm((np.array(truth.shape) - 1) * spacing))
        return 0.0 if prediction.any() == truth.any() else diagonal
    box = bounding_box(prediction | truth)
    surfaces = [_surface(np.pad(mask[box], 1)) for mask in (prediction, truth)]
    directed = (_distances(a, b, spacing) for a, b in (surfaces, reversed(surfaces)))
    return max(float(np.percentile(distances, 95)) for distances in directed)


def count_lesions(prediction: Mask, truth: Mask) -> tuple[int, int, int]:
    """How many lesions of the truth are missed, how many of the prediction are added, and how many the truth has.

    A lesion is a component of voxels that share a face, an edge or a corner; one voxel in common makes two match.
    """
    true_lesions, count = ndimage.label(truth, _TOUCHING)
    found = np.unique(true_lesions[prediction & truth]).size
    predicted, predicted_count = ndimage.label(prediction, _TOUCHING)
    matched = np.unique(predicted[prediction & truth]).size
    return count - found, predicted_count - matched, count


def _segment(segmenter: Segmenter, case: str, files: Mapping[str, Path], which: str, scheme: Scheme) -> Image:
    with tempfile.TemporaryDirectory(prefix="cwdm-") as made:
        # Links of its own: a segmenter that writes beside its input harms nothing, and finds no reference segmentation.
        folder = Path(made) / case
        folder.mkdir()
        for modality, path in files.items():
            ending = ".nii.gz" if path.name.lower().endswith(".gz") else ".nii"
            (folder / f"{case}-{modality}{ending}").symlink_to(path.resolve())
        segmentation = segmenter(case, folder)
    try:
        labels_of(segmentation.volume, f"segmentation of the {which} case", scheme)
    except InputError as error:
        raise CaseError(case, str(error)) from error
    return segmentation


def _labels_from(logits: Volume, scheme: Scheme) -> Volume:
    """Labels (X, Y, Z) out of logits (C, X, Y, Z)."""
    if len(logits) != 3:
        return logits.argmax(axis=0).astype(np.float32)
    core, whole, enhancing = logits > 0
    # From the outermost region inwards: what is core or enhancing is so whatever the outer channels say.
    labels = np.where(whole, 2, 0)
    labels[core] = 1
    labels[enhancing] = scheme["et"][0]
    return labels.astype(np.float32)


def _run(command: list[str], case: str) -> None:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError as error:
        raise SettingsError(f"the segmenter {command[0]} cannot be started: {error.strerror}") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).decode(errors="backslashreplace").splitlines()
        last = said[-1] if said else "it said nothing"
        raise CaseError(case, f"the segmenter ended with exit code {done.returncode}: {last}")


def _surface(mask: Mask) -> Mask:
    surface: Mask = mask & ~ndimage.binary_erosion(mask)
    return surface


def _distances(of: Mask, to: Mask, spacing: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    distances: npt.NDArray[np.float64] = ndimage.distance_transform_edt(~to, sampling=spacing)[of]
    return distances
