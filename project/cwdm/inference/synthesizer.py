"""The face of inference: a case in, a synthesised volume out."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy.typing as npt

from cwdm.arrays import Affine
from cwdm.checkpoint import ANY, Checkpoint
from cwdm.device import choose_device, device_name
from cwdm.errors import WeightsError
from cwdm.files import exists
from cwdm.images import Case, CaseFolder
from cwdm.inference.plan import Task
from cwdm.inference.provenance import describe, provenance
from cwdm.inference.steps import Synthesis, draw, postprocess, prepare
from cwdm.pipeline import Callback, Pipeline
from cwdm.precision import choose_dtype
from cwdm.settings import Settings
from cwdm.weights import find, folder_of, load_for, modality_of

if TYPE_CHECKING:
    from cwdm.samplers import Sampler


class Synthesizer:
    """Synthesises the missing modality of a case.

    >>> synthesizer = Synthesizer("weights/")                       # doctest: +SKIP
    >>> result = synthesizer("input/BraTS-GLI-00001-000")           # doctest: +SKIP
    >>> result.volume.shape                                         # doctest: +SKIP
    (240, 240, 155)

    Args:
        weights: folder or file, or "bundled" for the small ones that come with cwdm; None for `$CWDM_WEIGHTS` or
            what `cwdm weights download` fetched.
        settings: see `cwdm.settings.Settings`.
        device: "cuda" or "cuda:1" demands a GPU, "auto" takes one if there is one; see `cwdm.device.choose_device`.
        sampler: a function like those of `cwdm.samplers`, in place of the one that settings or weights name.

    An instance is for one thread at a time; a `pipeline` of it is for any number.

    Raises:
        SettingsError: no such device, or no GPU where one was demanded.
        WeightsError: the weights' folder does not exist.
    """

    def __init__(
        self,
        weights: Path | str | None = None,
        settings: Settings | None = None,
        device: str = "auto",
        sampler: "Sampler | None" = None,
    ) -> None:
        self.weights = folder_of(weights)
        if not exists(self.weights):
            raise WeightsError(
                f"no weights at {self.weights}; 'cwdm weights download FOLDER' fetches the published ones, "
                "--weights bundled takes the small ones that come with cwdm"
            )
        self.sampler = sampler
        self.settings = settings or Settings()
        self.device = choose_device(device)
        self.dtype = choose_dtype(self.settings.precision, self.device)
        self._served: dict[Path, str] = {}
        self._pipeline: Pipeline | None = None
        self._modality = ""

    def __call__(self, case: CaseFolder | Path | str, callback: Callback | None = None, target: str = "") -> Synthesis:
        """Read a case folder and synthesise what is missing.

        Args:
            callback: called after each evaluation of the network; see `cwdm.pipeline.Callback`.
            target: which modality, where several are missing.

        Raises:
            CaseError: the case cannot be used.
            WeightsError: there are no usable weights for the missing modality.
        """
        from cwdm.images import case_folder  # here, as cohorts find their own

        folder = case if isinstance(case, CaseFolder) else case_folder(Path(case))
        return self._synthesise(Task(folder, target or folder.target).read(), callback)

    def from_arrays(
        self,
        volumes: Mapping[str, npt.ArrayLike],
        affine: Affine | None = None,
        callback: Callback | None = None,
        target: str = "",
    ) -> Synthesis:
        """Synthesise what is missing of volumes in memory, without files.

        >>> result = synthesizer.from_arrays({"t1n": a, "t1c": b, "t2w": c}, affine)   # doctest: +SKIP

        Args:
            volumes: modality -> (X, Y, Z) skull-stripped intensities, 0 outside the brain.
            affine: (4, 4), voxel indices to RAS mm, as nibabel's; None for volumes stored like those of BraTS.
            callback, target: as for a case in a folder.

        Raises:
            CaseError, WeightsError: as for a case in a folder.
        """
        from cwdm.images import case_of_arrays  # here, as cases that are files need none of it

        return self._synthesise(case_of_arrays(volumes, affine, target), callback)

    def _synthesise(self, case: Case, callback: Callback | None) -> Synthesis:
        pipeline = self.pipeline(case.target)
        prepared = prepare(case, pipeline, self.settings)
        samples = draw(prepared, pipeline, self.settings, callback)
        made_with = str(provenance(describe(pipeline, self.settings)))
        return postprocess(prepared, samples, self.settings.output, made_with)

    def pipeline(self, modality: str) -> Pipeline:
        """What samples `modality`; only the last one stays in memory."""
        if self._pipeline is None or self._modality != modality:
            checkpoint = self._for_any(modality) or self._fresh(modality)
            self._pipeline = Pipeline.of(checkpoint, self.settings, self.device, modality, self.sampler)
            self._modality = modality
        return self._pipeline

    def _for_any(self, modality: str) -> Checkpoint | None:
        """The loaded checkpoint if its file is also the one for another modality."""
        loaded = self._pipeline.checkpoint if self._pipeline else None
        self._pipeline = None  # frees its memory before the next one comes
        same = loaded and loaded.record.modality == ANY and find(self.weights, modality) == loaded.path
        return loaded if same else None

    def _fresh(self, modality: str) -> Checkpoint:
        """The checkpoint; a file that does not record its modality may serve only one modality."""
        checkpoint = load_for(self.weights, modality)
        if checkpoint.record.modality or modality_of(checkpoint.path):
            return checkpoint
        other = self._served.setdefault(checkpoint.path, modality)
        if other != modality:
            raise WeightsError(
                f"{checkpoint.path} does not say which contrast it synthesises and was taken for {other} in this run, "
                f"so not for {modality}; put it into a folder named {other}"
            )
        return checkpoint

    def summary(self) -> str:
        """One line about how cases will be computed."""
        sampler = self.settings.sampler
        steps = len(sampler.timesteps) if sampler.timesteps else sampler.steps
        where = device_name(self.device) if self.device.type == "cuda" else "the CPU"
        how = f"{sampler.name or 'recommended sampler'}, {steps or 'recommended'} steps"
        return f"{how}, {str(self.dtype).removeprefix('torch.')} on {where}, weights {self.weights}"
