"""One case in, one volume out."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cwdm.brats import NEAREST, Case, CaseFolder, case_folder, read_case
from cwdm.checkpoint import Checkpoint
from cwdm.config import Settings
from cwdm.errors import CaseError, SettingsError, WeightsError
from cwdm.preprocess import (
    ClipRange,
    Orientation,
    Window,
    brain_mask,
    choose_window,
    denormalise,
    foreground,
    normalise,
)
from cwdm.samplers import SAMPLERS, Denoise, spaced_timesteps
from cwdm.wavelet import dwt, idwt
from cwdm.weights import default_folder, load_for

ORIENTATION = "LPS"
"""Voxel order that the weights know: that of BraTS files."""

Volume = npt.NDArray[np.float32]
DeviceName = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Prepared:
    """A case ready for the network, with what it takes to come back.

    Attributes:
        unit: conditions (1, 3, X, Y, Z) in [0, 1], inside the window, float32 on the CPU.
        mask: brain of the conditions (X, Y, Z), in the order of the file.
        clip_range: of the nearest contrast, whose intensities the result will have.
    """

    case: Case
    unit: Tensor
    mask: npt.NDArray[np.bool_]
    window: Window
    orientation: Orientation
    clip_range: ClipRange
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Synthesis:
    """A synthesised volume.

    Attributes:
        volume: (X, Y, Z) float32 in the order of the case's files; scanner-like numbers, or [0, 1] if the
            settings ask for `unit` intensities.
        spread: standard deviation over the samples, in the same numbers; None for a single sample.
        seconds: time spent sampling.
    """

    case: Case
    volume: Volume
    spread: Volume | None
    warnings: tuple[str, ...]
    seconds: float


class Synthesizer:
    """Synthesises the missing contrast of a case.

    >>> synthesizer = Synthesizer("weights/")                       # doctest: +SKIP
    >>> result = synthesizer("input/BraTS-GLI-00001-000")           # doctest: +SKIP
    >>> result.volume.shape                                         # doctest: +SKIP
    (240, 240, 155)

    Args:
        weights: folder or file; None for `$CWDM_WEIGHTS` or what `cwdm weights download` fetched.
        settings: see `cwdm.config.Settings`.
        device: "cuda" demands a GPU, "auto" takes one if there is one.

    Raises:
        SettingsError: no GPU where one was demanded, or no bf16 where it was.
        WeightsError: the weights' folder does not exist.
    """

    def __init__(
        self,
        weights: Path | str | None = None,
        settings: Settings | None = None,
        device: DeviceName = "auto",
    ) -> None:
        self.weights = Path(weights) if weights is not None else default_folder()
        if not self.weights.exists():
            raise WeightsError(f"no weights at {self.weights}; 'cwdm weights download {self.weights}' fetches them")
        self.settings = settings or Settings()
        self.device = choose_device(device)
        self.dtype = choose_dtype(self.settings.precision, self.device)
        self._loaded: tuple[str, Checkpoint] | None = None

    def __call__(self, case: CaseFolder | Path | str, on_step: Callable[[], None] = lambda: None) -> Synthesis:
        """Read a case folder and synthesise what is missing; `on_step` is called after every network evaluation.

        Raises:
            CaseError: the case cannot be used.
            WeightsError: there are no usable weights for the missing contrast.
        """
        folder = case if isinstance(case, CaseFolder) else case_folder(Path(case))
        prepared = self.prepare(read_case(folder))
        samples, seconds = self.sample(prepared, on_step)
        return self.finish(prepared, samples, seconds)

    def load(self, modality: str) -> Checkpoint:
        """The checkpoint that synthesises `modality`, ready on the device; only the last one stays in memory."""
        if self._loaded is None or self._loaded[0] != modality:
            self._loaded = None  # frees its memory before the next one comes
            checkpoint = load_for(self.weights, modality)
            checkpoint.model.to(self.device, self.dtype)
            self._loaded = modality, checkpoint
        return self._loaded[1]

    def plan(self, checkpoint: Checkpoint) -> tuple[str, list[int]]:
        """Name of the sampler and the falling timesteps: the checkpoint's unless the settings say otherwise."""
        sampler, record = self.settings.sampler, checkpoint.record
        timesteps = sampler.timesteps or spaced_timesteps(sampler.steps or record.steps)
        return sampler.name or record.sampler, timesteps

    def evaluations(self, modality: str) -> int:
        """How often the network runs for one case."""
        return len(self.plan(self.load(modality))[1]) * self.settings.samples

    def describe(self, modality: str) -> dict[str, Any]:
        """What decides the result beside the case itself, for the record."""
        checkpoint = self.load(modality)
        sampler, timesteps = self.plan(checkpoint)
        return {
            "weights": {"file": str(checkpoint.path), "sha256": checkpoint.sha256},
            "weights_record": checkpoint.record.model_dump(mode="json"),
            "sampler": sampler,
            "timesteps": timesteps,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "precision": str(self.dtype).removeprefix("torch."),
            "settings": self.settings.model_dump(mode="json"),
        }

    def prepare(self, case: Case) -> Prepared:
        """Bring a case into the network's orientation, window and range.

        Raises:
            CaseError: a contrast is constant between its percentiles.
            WeightsError: there are no usable weights for the missing contrast.
        """
        checkpoint = self.load(case.target)
        orient = self.settings.output.orient and case.has_orientation
        orientation = Orientation.to(ORIENTATION, case.affine) if orient else Orientation.identity()
        mask = brain_mask(list(case.volumes.values()))
        # 32 is the published network's, and smaller ones keep its window.
        multiple = max(32, 2 * checkpoint.model.config.size_multiple)
        window, window_warnings = choose_window(orientation.apply(mask), multiple)
        units, clip_ranges = [], {}
        for modality, volume in case.volumes.items():
            try:
                unit, clip_ranges[modality] = normalise(volume)
            except ValueError as error:
                raise CaseError(case.name, f"{modality}: {error}") from error
            units.append(window.crop(orientation.apply(unit)))
        warnings = (*case.warnings, *window_warnings, *checkpoint.warnings)
        if orientation != Orientation.identity():
            warnings = (*warnings, f"stored in another orientation; brought to {ORIENTATION} and back")
        return Prepared(
            case=case,
            unit=torch.from_numpy(np.stack(units))[None],
            mask=mask,
            window=window,
            orientation=orientation,
            clip_range=clip_ranges[NEAREST[case.target]],
            warnings=warnings,
        )

    @torch.inference_mode()
    def sample(self, prepared: Prepared, on_step: Callable[[], None] = lambda: None) -> tuple[Tensor, float]:
        """Draw the settings' number of samples, one after the other.

        Returns:
            (N, X, Y, Z) inside the window, in [0, 1], float32 on the CPU; and the seconds it took.
        """
        start = time.perf_counter()
        checkpoint = self.load(prepared.case.target)
        low, high = checkpoint.record.value_range
        wavelet = checkpoint.record.wavelet
        condition = dwt(prepared.unit.to(self.device) * (high - low) + low, wavelet)
        denoise = clamped_denoiser(checkpoint, condition, self.dtype, on_step)
        sampler, timesteps = self.plan(checkpoint)
        shape = (1, checkpoint.model.config.out_channels, *condition.shape[2:])
        samples = []
        for index in range(self.settings.samples):
            generator = torch.Generator(self.device).manual_seed(self.settings.seed + index)
            noise = torch.randn(shape, generator=generator, device=self.device)
            volume = idwt(SAMPLERS[sampler](denoise, noise, timesteps, generator=generator), wavelet)
            samples.append(((volume - low) / (high - low)).squeeze(1).cpu())
        return torch.cat(samples), time.perf_counter() - start

    def finish(self, prepared: Prepared, samples: Tensor, seconds: float) -> Synthesis:
        """Bring samples (N, X, Y, Z) back to the grid, orientation and intensities of the case.

        Raises:
            CaseError: nothing but background came out.
        """
        output = self.settings.output
        unit = self._restore(prepared, samples.mean(0))
        keep = foreground(unit, output.background, prepared.mask, output.threshold)
        low, high = prepared.clip_range if output.intensity == "native" else (0.0, 1.0)
        volume = np.where(keep, denormalise(unit, ClipRange(low, high)), np.float32(0))
        if not volume.any():
            raise CaseError(prepared.case.name, f"the synthesised {prepared.case.target} is empty; check the weights")
        spread = None
        if len(samples) > 1:
            spread = np.where(keep, self._restore(prepared, samples.std(0)) * np.float32(high - low), np.float32(0))
        return Synthesis(prepared.case, volume, spread, prepared.warnings, seconds)

    @staticmethod
    def _restore(prepared: Prepared, inside: Tensor) -> Volume:
        return prepared.orientation.invert(prepared.window.restore(inside.numpy()))


def clamped_denoiser(
    checkpoint: Checkpoint, condition: Tensor | None, dtype: torch.dtype, on_step: Callable[[], None] = lambda: None
) -> Denoise:
    """`denoise(x, t)` of a network: the predicted volume is clamped to the value range at every step, as published.

    Args:
        condition: coefficients (B, 8 N, X, Y, Z) that go beside the noisy ones; None for an unconditional network.
    """
    model, record = checkpoint.model, checkpoint.record

    def denoise(x: Tensor, t: int) -> Tensor:
        inputs = x if condition is None else torch.cat((x, condition), dim=1)
        steps = torch.full((x.shape[0],), t, device=x.device)
        prediction = model(inputs.to(dtype), steps).float()
        x0 = dwt(idwt(prediction, record.wavelet).clamp_(*record.value_range), record.wavelet)
        on_step()
        return x0

    return denoise


def choose_device(name: DeviceName) -> torch.device:
    """The device for a name; raises SettingsError if a GPU is demanded and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError(
            "a GPU was demanded (--device cuda), but PyTorch finds none; check the driver and, in a container, "
            "--gpus all; or use --device cpu"
        )
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def choose_dtype(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> torch.dtype:
    """float32, or bfloat16 where asked for or (auto) where the hardware multiplies it natively."""
    if precision == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively: Ampere and later, AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
