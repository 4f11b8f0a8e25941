"""Segmenters of other people: a command or a MONAI bundle, given the true case and the completed one."""

import os
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from cwdm.arrays import Volume
from cwdm.errors import CaseError, InputError, SettingsError
from cwdm.evaluation.labels import SCHEMES, TODAY, Scheme, labels_of
from cwdm.files import files_below, is_file
from cwdm.images import MODALITIES, Image, case_folder, output_name, read_grid
from cwdm.temporary import temporary_folder

Segmenter = Callable[[str, Path], Image]
"""(case, folder with its four modalities) -> label of each voxel. Called once at a time for one case."""

_BUNDLE_ORDER = ("t1c", "t1n", "t2w", "t2f")  # of MONAI's bundles for BraTS


def program_files(template: str | None, bundle: Path | None) -> list[Path]:
    """The files of a segmenter, as far as its command names them or its bundle holds them."""
    words = [shutil.which(word) or word for word in shlex.split(template or "")]
    files = [Path(word) for word in words if is_file(Path(word))]
    return files + (files_below(bundle) if bundle else [])


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
        with temporary_folder() as made:
            output = made / output_name(case, "seg")
            paths = {"{input}": str(folder), "{output}": str(output)}
            # In one pass: a case may be called anything, even {output}.
            _run([re.sub(r"{input}|{output}", lambda place: paths[place[0]], word) for word in words], case)
            if not is_file(output):
                raise CaseError(case, f"the segmenter succeeded but wrote no file; it should write {output.name}")
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
    config = next((path for path in configs if is_file(path)), None)
    weights = bundle / "models" / "model.pt"
    if config is None or not is_file(weights):
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


def segment_pair(
    segmenter: Segmenter,
    case: str,
    files: Mapping[str, Path],
    modality: str,
    synthesised: Path,
    scheme: Scheme = SCHEMES[TODAY],
) -> tuple[Image, Image]:
    """Labels that a segmenter gives to the true case, and to the one with a synthesised image in its place.

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
    return true, completed


def _segment(segmenter: Segmenter, case: str, files: Mapping[str, Path], which: str, scheme: Scheme) -> Image:
    with temporary_folder() as made:
        # Links of its own: a segmenter that writes beside its input harms nothing, and finds no reference segmentation.
        folder = made / case
        folder.mkdir()
        for modality, path in files.items():
            ending = ".nii.gz" if path.name.lower().endswith(".gz") else ".nii"
            (folder / f"{case}-{modality}{ending}").symlink_to(os.path.realpath(path))
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
