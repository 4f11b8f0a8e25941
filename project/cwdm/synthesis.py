"""One case in, one volume out."""

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cwdm.brats import MODALITIES, Case, CaseFolder, case_folder, read_case, write_volume
from cwdm.checkpoint import ANY, Checkpoint, read_record
from cwdm.config import Settings
from cwdm.errors import CaseError, SettingsError, WeightsError
from cwdm.preprocess import (
    ORIENTATION,
    ClipRange,
    Orientation,
    Window,
    brain_mask,
    choose_window,
    denormalise,
    foreground,
    normalise,
    tight_window,
)
from cwdm.quality import Quality, assess
from cwdm.samplers import SAMPLERS, Denoise, Sampler, spaced_timesteps
from cwdm.wavelet import dwt, idwt
from cwdm.weights import find, folder_of, load_for, modality_of

Volume = npt.NDArray[np.float32]
DeviceName = Literal["auto", "cpu", "cuda"]

MOST_AT_ONCE = 4
"""Samples in a batch on a GPU; halved for the rest of the run where they do not fit."""


@dataclass(frozen=True)
class Prepared:
    """A case ready for the network, with what it takes to come back.

    Attributes:
        unit: conditions (1, 3, X, Y, Z) in [0, 1], inside the window, float32 on the CPU; for a network that makes
            any contrast (1, 4, X, Y, Z), with zeros in place of those that are not there.
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
        native: whether the numbers are scanner-like.
        quality: what the automatic check says.
        seconds: time spent sampling.
    """

    case: Case
    volume: Volume
    spread: Volume | None
    native: bool
    quality: Quality
    warnings: tuple[str, ...]
    seconds: float

    def save(self, path: Path | str) -> None:
        """Write the volume as .nii.gz with the geometry of the case, whole or not at all.

        Raises:
            OutputError: the file cannot be written.
        """
        write_volume(Path(path), self.volume, self.case, self.native)


@dataclass(frozen=True)
class Samples:
    """What the network made of a case, inside the window and in [0, 1], float32 on the CPU.

    Attributes:
        mean: over the samples, (X, Y, Z).
        spread: standard deviation over them, (X, Y, Z); None for a single sample.
        seconds: what it took.
    """

    mean: Tensor
    spread: Tensor | None
    seconds: float


class Synthesizer:
    """Synthesises the missing contrast of a case.

    >>> synthesizer = Synthesizer("weights/")                       # doctest: +SKIP
    >>> result = synthesizer("input/BraTS-GLI-00001-000")           # doctest: +SKIP
    >>> result.volume.shape                                         # doctest: +SKIP
    (240, 240, 155)

    Args:
        weights: folder or file, or "bundled" for the small ones that come with cwdm; None for `$CWDM_WEIGHTS` or
            what `cwdm weights download` fetched.
        settings: see `cwdm.config.Settings`.
        device: "cuda" demands a GPU, "auto" takes one if there is one.
        sampler: a function like those of `cwdm.samplers`, in place of the one that settings or weights name.

    An instance is for one thread at a time; `at_once` is how many samples are drawn in a batch.

    Raises:
        SettingsError: no GPU where one was demanded.
        WeightsError: the weights' folder does not exist.
    """

    def __init__(
        self,
        weights: Path | str | None = None,
        settings: Settings | None = None,
        device: DeviceName = "auto",
        sampler: Sampler | None = None,
    ) -> None:
        self.weights = folder_of(weights)
        if not os.path.exists(self.weights):  # noqa: PTH110  # Path.exists raises where a folder may not be entered
            raise WeightsError(
                f"no weights at {self.weights}; 'cwdm weights download FOLDER' fetches the published ones, "
                "--weights bundled takes the small ones that come with cwdm"
            )
        self.sampler = sampler
        self.settings = settings or Settings()
        self.device = choose_device(device)
        self.dtype = choose_dtype(self.settings.precision, self.device)
        # A sampler handed over may ask as it likes, and on a CPU a batch is no faster and rounds differently.
        self.at_once = MOST_AT_ONCE if self.device.type == "cuda" and sampler is None else 1
        self._taken_for: dict[Path, str] = {}
        self._loaded: Checkpoint | None = None
        self._modality = ""

    def __call__(
        self, case: CaseFolder | Path | str, on_step: Callable[[], None] = lambda: None, target: str = ""
    ) -> Synthesis:
        """Read a case folder and synthesise what is missing.

        Args:
            on_step: called after every network evaluation.
            target: which modality, where several are missing.

        Raises:
            CaseError: the case cannot be used.
            WeightsError: there are no usable weights for the missing contrast.
        """
        folder = case if isinstance(case, CaseFolder) else case_folder(Path(case))
        prepared = self.prepare(read_case(replace(folder, chosen=target) if target else folder))
        return self.finish(prepared, self.sample(prepared, on_step))

    def tasks(self, folder: CaseFolder) -> list[CaseFolder]:
        """The case, or itself once for each missing modality if the weights were trained with so many missing."""
        several = folder.problem is None and not folder.chosen and len(folder.missing) > 1
        if not several:
            return [folder]
        known = [read_record(find(self.weights, modality)).most_missing for modality in folder.missing]
        enough = len(folder.missing) <= min(known)
        return [replace(folder, chosen=modality) for modality in folder.missing] if enough else [folder]

    def load(self, modality: str) -> Checkpoint:
        """The checkpoint that synthesises `modality`, ready on the device; only the last one stays in memory."""
        if self._loaded is None or self._modality != modality:
            self._loaded = self._for_any(modality) or self._fresh(modality)
            self._modality = modality
        return self._loaded

    def _for_any(self, modality: str) -> Checkpoint | None:
        """The loaded checkpoint if its file is also the one for another contrast."""
        loaded, self._loaded = self._loaded, None  # frees its memory before the next one comes
        same = loaded and loaded.record.modality == ANY and find(self.weights, modality) == loaded.path
        return loaded if same else None

    def _fresh(self, modality: str) -> Checkpoint:
        checkpoint = load_for(self.weights, modality)
        self._check_not_shared(modality, checkpoint)
        # On a GPU the layout of cuDNN's fast kernels; the network keeps it from end to end.
        layout = torch.channels_last_3d if self.device.type == "cuda" else torch.contiguous_format
        checkpoint.model.to(self.device, self.dtype, memory_format=layout)  # type: ignore[call-overload]
        return checkpoint

    def _check_not_shared(self, modality: str, checkpoint: Checkpoint) -> None:
        """Weights that do not say what they synthesise are believed once, not for one contrast after the other."""
        if checkpoint.record.modality or modality_of(checkpoint.path):
            return
        other = self._taken_for.setdefault(checkpoint.path, modality)
        if other != modality:
            raise WeightsError(
                f"{checkpoint.path} does not say which contrast it synthesises and was taken for {other} in this run, "
                f"so not for {modality}; put it into a folder named {other}"
            )

    def plan(self, checkpoint: Checkpoint) -> tuple[str, list[int]]:
        """Name of the sampler and the falling timesteps: the checkpoint's unless the settings say otherwise."""
        sampler, record = self.settings.sampler, checkpoint.record
        timesteps = sampler.timesteps or spaced_timesteps(sampler.steps or record.steps)
        name = getattr(self.sampler, "__name__", "own") if self.sampler else sampler.name or record.sampler
        return name, timesteps

    def summary(self) -> str:
        """One line about how cases will be computed."""
        sampler = self.settings.sampler
        steps = len(sampler.timesteps) if sampler.timesteps else sampler.steps
        where = torch.cuda.get_device_name() if self.device.type == "cuda" else "the CPU"
        how = f"{sampler.name or 'recommended sampler'}, {steps or 'recommended'} steps"
        return f"{how}, {str(self.dtype).removeprefix('torch.')} on {where}, weights {self.weights}"

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
            CaseError: a contrast is constant between its percentiles, the brain is too large, or more contrasts are
                missing than the network was trained for.
            WeightsError: there are no usable weights for the missing contrast.
        """
        checkpoint = self.load(case.target)
        missing = len(MODALITIES) - len(case.volumes)
        if missing > checkpoint.record.most_missing:
            raise CaseError(
                case.name,
                f"{missing} modalities are missing, the weights were trained for {checkpoint.record.most_missing}",
            )
        orient = self.settings.output.orient and case.has_orientation
        orientation = Orientation.to(ORIENTATION, case.affine) if orient else Orientation.identity()
        mask = brain_mask(list(case.volumes.values()))
        multiple = 2 * checkpoint.model.config.size_multiple
        window_warnings: tuple[str, ...] = ()
        try:
            if checkpoint.record.window == "brain":
                window = tight_window(orientation.apply(mask), multiple)
            elif checkpoint.record.window == "published":  # 32 is that network's multiple, and smaller ones keep it
                window, window_warnings = choose_window(orientation.apply(mask), max(32, multiple))
            else:
                window, window_warnings = choose_window(orientation.apply(mask), multiple, checkpoint.record.window)
        except ValueError as error:
            raise CaseError(case.name, str(error)) from error
        units, clip_ranges = [], {}
        for modality in MODALITIES if checkpoint.model.config.targets else case.volumes:
            if modality not in case.volumes:
                units.append(np.zeros(window.size, np.float32))
                continue
            volume = case.volumes[modality]
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
            clip_range=clip_ranges[case.nearest],
            warnings=warnings,
        )

    @torch.inference_mode()
    def sample(self, prepared: Prepared, on_step: Callable[[], None] = lambda: None) -> Samples:
        """Draw the settings' number of samples; sample i is what the seed + i alone would give.

        On a GPU several are drawn at once where its memory allows, which may round differently from one alone.
        """
        start = time.perf_counter()
        checkpoint = self.load(prepared.case.target)
        low, high = checkpoint.record.value_range
        condition = dwt(prepared.unit.to(self.device) * (high - low) + low, checkpoint.record.wavelet)
        target = MODALITIES.index(prepared.case.target)
        denoise = clamped_denoiser(checkpoint, condition, self.dtype, on_step, target)
        count, mean, squares = self.settings.samples, torch.zeros(()), torch.zeros(())
        # float32 means float32: cuDNN would round the factors of its products to TF32's 10 bits.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for index, volume in enumerate(self._draws(checkpoint, denoise, condition, count)):
                sample = ((volume - low) / (high - low))[0, 0].cpu()
                # Welford (1962): mean and spread without keeping the samples.
                difference = sample - mean
                mean = mean + difference / (index + 1)
                squares = squares + difference * (sample - mean)
        spread = (squares / (count - 1)).sqrt() if count > 1 else None
        return Samples(mean, spread, time.perf_counter() - start)

    def _draws(self, checkpoint: Checkpoint, denoise: Denoise, condition: Tensor, count: int) -> Iterator[Tensor]:
        """The sampled volumes, as many at once as memory has room for."""
        done = 0
        while done < count:
            at_once = min(self.at_once, count - done)
            volumes: list[Tensor] = []
            try:
                volumes = self._draw_together(checkpoint, denoise, condition, range(done, done + at_once))
            except torch.OutOfMemoryError:
                if at_once == 1:
                    raise
                self.at_once = at_once // 2
            if not volumes:  # only here is the error gone, whose frames keep the network's tensors alive
                gc.collect()
                torch.cuda.empty_cache()
            yield from volumes
            done += len(volumes)

    def _draw_together(
        self, checkpoint: Checkpoint, denoise: Denoise, condition: Tensor, indices: range
    ) -> list[Tensor]:
        """Samplers side by side, each with its own generator, that share each evaluation of the network."""
        if len(indices) == 1:
            return [self._draw(checkpoint, denoise, condition, self.settings.seed + indices[0])]
        lockstep = _Lockstep(denoise, len(indices))

        @torch.inference_mode()  # holds for one thread
        def draw(place: int, seed: int) -> Tensor:
            return self._draw(checkpoint, lockstep.of(place), condition, seed)

        with ThreadPoolExecutor(len(indices), "sampler") as threads:
            drawing = [threads.submit(draw, place, self.settings.seed + i) for place, i in enumerate(indices)]
            try:
                wait(drawing)
            except BaseException:  # stopped from outside: the threads would go on to their end
                lockstep.stop()
                raise
        faults = [fault for future in drawing if (fault := future.exception())]
        for fault in sorted(faults, key=lambda fault: isinstance(fault, BrokenBarrierError)):
            raise fault  # the one that broke the barrier for the others
        return [future.result() for future in drawing]

    def _draw(self, checkpoint: Checkpoint, denoise: Denoise, condition: Tensor, seed: int) -> Tensor:
        """One sampled volume (1, 1, X, Y, Z) in the checkpoint's value range."""
        name, timesteps = self.plan(checkpoint)
        sampler = self.sampler or SAMPLERS[name]
        return sample_volume(checkpoint, denoise, condition.shape[2:], sampler, timesteps, seed, self.device)

    def finish(self, prepared: Prepared, samples: Samples) -> Synthesis:
        """Bring the samples back to the grid, orientation and intensities of the case.

        Raises:
            CaseError: nothing but background came out.
        """
        output = self.settings.output
        native = output.intensity == "native"
        unit = self._restore(prepared, samples.mean)
        keep = foreground(unit, output.background, prepared.mask, output.threshold)
        low, high = prepared.clip_range if native else (0.0, 1.0)
        volume = np.where(keep, denormalise(unit, ClipRange(low, high)), np.float32(0))
        if not volume.any():
            raise CaseError(prepared.case.name, f"the synthesised {prepared.case.target} is empty; check the weights")
        unit_spread = spread = None
        if samples.spread is not None:
            unit_spread = np.where(keep, self._restore(prepared, samples.spread), np.float32(0))
            spread = unit_spread * np.float32(high - low)
        quality = self._quality(prepared, np.where(keep, unit, np.float32(0)), unit_spread)
        return Synthesis(prepared.case, volume, spread, native, quality, prepared.warnings, samples.seconds)

    def _quality(self, prepared: Prepared, unit: Volume, spread: Volume | None) -> Quality:
        """The check of a result in the order of the file, which it sees as stored LPS."""
        case = prepared.case
        known = case.has_orientation
        lps = Orientation.to(ORIENTATION, case.affine) if known else Orientation.identity()
        names = MODALITIES if prepared.unit.shape[1] == len(MODALITIES) else tuple(case.volumes)
        conditions = {
            name: lps.apply(self._restore(prepared, inside))
            for name, inside in zip(names, prepared.unit[0], strict=True)
            if name in case.volumes
        }
        turned_spread = None if spread is None else lps.apply(spread)
        return assess(lps.apply(unit), conditions, lps.apply(prepared.mask), case.target, turned_spread)

    @staticmethod
    def _restore(prepared: Prepared, inside: Tensor) -> Volume:
        return prepared.orientation.invert(prepared.window.restore(inside.numpy()))


def clamped_denoiser(
    checkpoint: Checkpoint,
    condition: Tensor | None,
    dtype: torch.dtype,
    on_step: Callable[[], None] = lambda: None,
    target: int = 0,
) -> Denoise:
    """`denoise(x, t)` of a network: the predicted volume is clamped to the value range at every step, as published.

    Args:
        condition: coefficients (B, 8 N, X, Y, Z) that go beside the noisy ones; None for an unconditional network.
        target: number of the volume to make, for a network of several.
    """
    model, record = checkpoint.model, checkpoint.record

    def denoise(x: Tensor, t: int) -> Tensor:
        inputs = x if condition is None else torch.cat((x, condition.expand(x.shape[0], -1, -1, -1, -1)), dim=1)
        steps = torch.full((x.shape[0],), t, device=x.device)
        targets = (torch.full_like(steps, target),) if model.config.targets else ()
        prediction = model(inputs.to(dtype), steps, *targets).float()
        x0 = dwt(idwt(prediction, record.wavelet).clamp_(*record.value_range), record.wavelet)
        for _ in range(x.shape[0]):
            on_step()
        return x0

    return denoise


def sample_volume(
    checkpoint: Checkpoint,
    denoise: Denoise,
    size: Sequence[int],
    sampler: Sampler,
    timesteps: list[int],
    seed: int,
    device: torch.device,
) -> Tensor:
    """From noise to a volume (1, 1, X, Y, Z) in the checkpoint's value range; `size` is that of the coefficients."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (1, checkpoint.model.config.out_channels, *size)
    noise = torch.randn(shape, generator=generator, device=device)
    return idwt(sampler(denoise, noise, timesteps, generator=generator), checkpoint.record.wavelet)


class _Lockstep:
    """`denoise` for several samplers, each on a thread of its own, as one evaluation of the network over a batch.

    The samplers must call it equally often and at the same timesteps.
    """

    def __init__(self, denoise: Denoise, count: int) -> None:
        self._denoise = denoise
        self._asked: list[tuple[Tensor, int]] = [(torch.empty(0), 0)] * count
        self._clean: tuple[Tensor, ...] = ()
        self._barrier = Barrier(count, self._evaluate)

    def of(self, place: int) -> Denoise:
        """For the sampler at a place in the batch."""

        def denoise(x: Tensor, t: int) -> Tensor:
            self._asked[place] = x, t
            self._barrier.wait()  # all have asked; none asks again before all have read
            return self._clean[place]

        return denoise

    def stop(self) -> None:
        """Every sampler fails with BrokenBarrierError when it next asks."""
        self._barrier.abort()

    def _evaluate(self) -> None:
        (t,) = {t for _, t in self._asked}
        self._clean = self._denoise(torch.cat([x for x, _ in self._asked]), t).split(1)


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


def precision_warning(dtype: torch.dtype, device: torch.device) -> str:
    """What to do about numbers that the device computes slowly; empty where it does not."""
    if dtype != torch.bfloat16 or has_bf16(device):
        return ""
    name = "the GPU" if device.type == "cuda" else "the processor"
    return (
        f"{name} does not multiply bfloat16, and emulating it takes many times as long as float32; "
        "stop this run and set precision=auto or precision=fp32"
    )


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively: Ampere and later, AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
