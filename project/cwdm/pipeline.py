"""A network ready to sample with: from conditions and seeds to wavelet coefficients.

>>> pipeline = Pipeline.load("bundled", modality="t2f")                             # doctest: +SKIP
>>> condition = pipeline.encode(unit)             # (1, 3, X, Y, Z) in [0, 1]         # doctest: +SKIP
>>> coefficients = pipeline.sample(condition, seeds=[1, 2])                         # doctest: +SKIP
>>> volumes = pipeline.decode(coefficients)       # (2, 1, X, Y, Z) in [0, 1]         # doctest: +SKIP

A network of one pass makes no samples, but their mean and standard deviation:

>>> mean, std = pipeline.predict(condition)       # (1, 1, X, Y, Z) each              # doctest: +SKIP
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cwdm import checkpoint as checkpoints
from cwdm.checkpoint import Checkpoint, Record
from cwdm.device import choose_device, device_name
from cwdm.errors import SettingsError, WeightsError
from cwdm.files import is_folder
from cwdm.images import MODALITIES
from cwdm.precision import choose_dtype, exact_float32
from cwdm.settings import SamplerSettings, Settings
from cwdm.wavelet import dwt, idwt
from cwdm.weights import folder_of, load_for

if TYPE_CHECKING:
    from cwdm.samplers import Sampler

GPU_BATCH = 4
"""Samples in a network pass on a GPU. On a CPU a batch is no faster and rounds differently."""

Callback = Callable[[int, int, Tensor], object]
"""Called after each evaluation of the network with its number from 1, how many steps there are, and the x0 of the
samples of this pass (B, 8, X/2, Y/2, Z/2); what it raises ends the sampling."""


@dataclass(frozen=True)
class Pipeline:
    """A network with all that decides its samples but their seeds; it cannot change, so threads may share it.

    Attributes:
        checkpoint: the network, on `device` and in `dtype`, with its record.
        sampler: one of `cwdm.samplers` or a function of one's own, called as `sampler(denoise, noise, timesteps,
            generator=g)`; where the network was trained with another noise schedule than the published one, it is
            given `schedule=` too.
        timesteps: falling; of a flow rising thousandths of the way.
        target: number of the volume to make, for a network of several.
        batch: samples in a network pass, halved where they do not fit into memory. `generator` is one
            `torch.Generator` for a batch of 1, and a list with one a sample for more, which a sampler of one's own
            must be ready for before it is given a `batch`.
        noise_device: where random numbers are drawn. A CPU's are the same for a seed whatever the device.
    """

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    sampler: "Sampler"
    timesteps: tuple[int, ...]
    target: int = 0
    batch: int = 1
    noise_device: torch.device = torch.device("cpu")  # noqa: RUF009  # cannot change

    @classmethod
    def load(
        cls,
        weights: Path | str | None = None,
        modality: str | None = None,
        settings: Settings | None = None,
        device: str = "auto",
        sampler: "Sampler | None" = None,
    ) -> "Pipeline":
        """The pipeline of a file of weights, or of the file for a modality in a folder.

        Args:
            weights: file or folder, or "bundled" for the small ones that come with cwdm; None for `$CWDM_WEIGHTS` or
                what `cwdm weights download` fetched.
            modality: t1n, t1c, t2w or t2f; None for a file whose network makes one kind of volume.
            settings: precision, noise and sampler are used; see `cwdm.settings.Settings`.
            device: see `cwdm.device.choose_device`.
            sampler: in place of the one that settings or weights name.

        Raises:
            WeightsError: no usable weights, or a modality must be chosen.
            SettingsError: no such modality or device.
        """
        if modality not in (None, *MODALITIES):
            raise SettingsError(f"modality {modality!r}: expected one of {', '.join(MODALITIES)}")
        chosen = choose_device(device)
        return cls.of(_load(folder_of(weights), modality), settings or Settings(), chosen, modality, sampler)

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        settings: Settings,
        device: torch.device,
        modality: str | None = None,
        sampler: "Sampler | None" = None,
    ) -> "Pipeline":
        """The pipeline of a loaded checkpoint, whose network is moved to the device and given the precision."""
        dtype, gpu = choose_dtype(settings.precision, device), device.type == "cuda"
        made_by, timesteps = _plan(checkpoint, settings, sampler)
        # On a GPU the layout of cuDNN's fast kernels; the network keeps it from end to end.
        layout = torch.channels_last_3d if gpu else torch.contiguous_format
        checkpoint.model.to(device, dtype, memory_format=layout)  # type: ignore[call-overload]
        return cls(
            checkpoint=checkpoint,
            device=device,
            dtype=dtype,
            sampler=made_by,
            timesteps=timesteps,
            target=MODALITIES.index(modality) if modality and checkpoint.model.config.targets else 0,
            batch=GPU_BATCH if gpu and (sampler is None or sampler in _sampling().OF_DIFFUSION.values()) else 1,
            noise_device=device if settings.noise == "device" else torch.device("cpu"),
        )

    @property
    def sampler_name(self) -> str:
        """Name of the sampler's function."""
        return "one-pass" if self.checkpoint.record.one_pass else _sampling().name_of(self.sampler)

    def describe(self) -> dict[str, Any]:
        """What decides the samples beside conditions, seeds and weights, for a record."""
        return {
            "sampler": self.sampler_name,
            "timesteps": list(self.timesteps),
            "device": device_name(self.device),
            "precision": str(self.dtype).removeprefix("torch."),
        }

    @torch.inference_mode()
    def encode(self, unit: Tensor) -> Tensor:
        """Coefficients (B, 8 N, X/2, Y/2, Z/2) on the device of volumes (B, N, X, Y, Z) in [0, 1]."""
        record = self.checkpoint.record
        with exact_float32():
            return dwt(record.to_range(unit.to(self.device)), record.wavelet)

    @torch.inference_mode()
    def decode(self, coefficients: Tensor) -> Tensor:
        """Volumes (B, N, X, Y, Z) in [0, 1] of coefficients (B, 8 N, X/2, Y/2, Z/2); the inverse of `encode`."""
        record = self.checkpoint.record
        with exact_float32():
            return record.from_range(idwt(coefficients, record.wavelet))

    def sample(
        self,
        condition: Tensor | None = None,
        size: Sequence[int] | None = None,
        seeds: Sequence[int] = (0,),
        callback: Callback | None = None,
    ) -> Tensor:
        """One sample for each seed, which depends on neither the other seeds nor how many share a network pass.

        The sharing may round differently in the network, nowhere else.

        Args:
            condition: coefficients (1, 8 N, X/2, Y/2, Z/2) of what it is made from; None for an unconditional network.
            size: voxels (X, Y, Z) of the volume; None for those of the condition.
            callback: see `Callback`.

        Returns:
            Coefficients (len(seeds), 8, X/2, Y/2, Z/2), float32 on the device.
        """
        return torch.cat(list(self.sample_batches(condition, size, seeds, callback)))

    def sample_batches(
        self,
        condition: Tensor | None = None,
        size: Sequence[int] | None = None,
        seeds: Sequence[int] = (0,),
        callback: Callback | None = None,
    ) -> Iterator[Tensor]:
        """`sample`, each network pass's samples as they come, for more than there is memory for."""
        if condition is None and size is None:
            raise ValueError("how large a sample? Give a condition or a size")
        sizes = condition.shape[2:] if size is None and condition is not None else [n // 2 for n in size or ()]
        return _batches(self, condition, sizes, seeds, callback)

    def predict(self, condition: Tensor, given: Sequence[bool] | None = None) -> tuple[Tensor, Tensor]:
        """Mean and calibrated standard deviation of each voxel, by one pass: (1, 1, X, Y, Z) each, units of [0, 1].

        Args:
            condition: coefficients (1, 8 N, X/2, Y/2, Z/2) of what it is made from, 0 where that is not given.
            given: which of the N images are; None: those that are not 0 everywhere.
        """
        return _predict(self, condition, given)


def evaluations(pipeline: Pipeline) -> int:
    """How often the network is asked for a sample."""
    if pipeline.checkpoint.record.one_pass:
        return 1
    count: int = _sampling().evaluations(pipeline.sampler, pipeline.timesteps)
    return count


def _sampling() -> ModuleType:
    """How samples are drawn; loaded only where they are, as networks of one pass need none of it."""
    from cwdm import sampling

    return sampling


def _load(path: Path, modality: str | None) -> Checkpoint:
    """The checkpoint for a modality, or of a file whose network makes one kind of volume."""
    if modality is None and is_folder(path):
        raise WeightsError(f"{path} is a folder: say which modality, one of {', '.join(MODALITIES)}, or give a file")
    loaded = load_for(path, modality) if modality else checkpoints.load(path)
    if modality is None and loaded.model.config.targets:
        raise WeightsError(f"{path}: makes any of {', '.join(MODALITIES)}; say which modality")
    return loaded


def _plan(checkpoint: Checkpoint, settings: Settings, sampler: "Sampler | None") -> tuple["Sampler", tuple[int, ...]]:
    """Sampler and timesteps; a network of one pass is evaluated once, whatever the settings say of samplers."""
    record = checkpoint.record
    if sampler and record.one_pass:
        raise SettingsError(f"{checkpoint.path} predicts in one pass, so that there is nothing for a sampler to do")
    if record.objective != "diffusion" and settings.samples > 1:
        raise SettingsError(
            f"samples={settings.samples}: {checkpoint.path} was trained by {record.objective}, which gives one image, "
            "so that there is nothing to average; leave samples at 1"
        )
    named, timesteps = plan_sampling(record, settings.sampler)
    return sampler or named, timesteps


def plan_sampling(record: Record, told: SamplerSettings) -> tuple["Sampler", tuple[int, ...]]:
    """Sampler and timesteps by the settings, and where these say nothing as the record recommends.

    Raises:
        SettingsError: the sampler is none of the record's objective.
    """
    if record.one_pass:
        return _no_samples, (0,)
    planned: tuple[Sampler, tuple[int, ...]] = _sampling().planned(record, told)
    return planned


def _no_samples(*_: object, **__: object) -> Tensor:
    """The sampler of a network of one pass."""
    raise ValueError("a network of one pass makes no samples: predict gives their mean and standard deviation")


@torch.inference_mode()
def _predict(pipeline: Pipeline, condition: Tensor, given: Sequence[bool] | None) -> tuple[Tensor, Tensor]:
    from cwdm.onepass import voxel_std  # here, as networks that denoise need none of it

    record = pipeline.checkpoint.record
    if not record.one_pass:
        raise ValueError(f"a network trained by {record.objective} makes samples: use sample")
    condition = condition.to(pipeline.device)
    shown = condition.unflatten(1, (-1, 8)).flatten(2).any(2)
    if given is not None:
        shown = torch.tensor([given], device=pipeline.device)
    number = torch.tensor([pipeline.target], device=pipeline.device)
    with exact_float32():
        found = pipeline.checkpoint.model(condition, shown, number)
    low, high = record.value_range
    factor = record.calibration.get(MODALITIES[pipeline.target], 1.0) / (high - low)
    std = factor * voxel_std(found.variance * condition.any(1, keepdim=True))
    return pipeline.decode(found.mean).clamp_(0, 1), std


def _batches(
    pipeline: Pipeline,
    condition: Tensor | None,
    sizes: Sequence[int],
    seeds: Sequence[int],
    callback: Callback | None,
) -> Iterator[Tensor]:
    """What `Pipeline.sample_batches` gives; `sizes` are those of coefficients."""
    loaded, device = pipeline.checkpoint, pipeline.device
    condition = None if condition is None else condition.to(device)
    network = loaded, pipeline.dtype, pipeline.target
    drawing = _sampling().Drawing(*network, condition, pipeline.sampler, pipeline.timesteps, callback)
    batches: Iterator[Tensor] = _sampling().halving(
        lambda some: drawing.of(some, sizes, device, pipeline.noise_device), seeds, pipeline.batch
    )
    return batches
