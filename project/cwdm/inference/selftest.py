"""A check of a set of weights before anyone depends on it: load, and synthesise each modality of a tiny phantom."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cwdm.errors import WeightsError
from cwdm.images import MODALITIES, case_folder
from cwdm.inference.synthesizer import Synthesizer
from cwdm.phantoms import write_phantoms
from cwdm.settings import load_settings
from cwdm.temporary import temporary_folder

SHAPE, SPACING_MM = (44, 52, 40), 4.5


def self_test(
    weights: Path | str | None,
    modalities: Sequence[str] = MODALITIES,
    on_modality: Callable[[str], None] = lambda line: None,
) -> None:
    """Synthesise each modality of a phantom of a few voxels with one step, on the device that is there.

    Args:
        weights: as for `Synthesizer`.
        on_modality: is told about each modality that works.

    Raises:
        WeightsError: weights for a modality are missing, damaged or give no image.
        OutputError: there is no folder for temporary files.
    """
    with temporary_folder() as folder:
        path = write_phantoms(folder, 1, seed=0, shape=SHAPE, spacing_mm=SPACING_MM)[0]
        case = case_folder(path)
        synthesizer = Synthesizer(weights, load_settings(None, ["sampler.steps=1", "output.intensity=unit"]))
        for modality in modalities:
            files = {name: file for name, file in case.files.items() if name != modality}
            result = synthesizer(replace(case, files=files))
            loaded = synthesizer.pipeline(modality).checkpoint
            if not np.isfinite(result.volume).all():
                raise WeightsError(f"{loaded.path}: the {modality} it makes is not finite")
            on_modality("; ".join((f"{modality}: {loaded.path} works", *loaded.warnings)))
