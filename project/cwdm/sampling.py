"""Samples of a network: which sampler and timesteps, and what the network says at each of them."""

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from cwdm.checkpoint import Checkpoint, Record
from cwdm.diffusion import PUBLISHED
from cwdm.errors import SettingsError
from cwdm.precision import exact_float32
from cwdm.samplers import (
    FLOW_SAMPLERS,
    OF_DIFFUSION,
    Denoise,
    Sampler,
    evaluations,
    flow_timesteps,
    normal_noise,
    planned_timesteps,
    texture,
)
from cwdm.settings import TAU, TEXTURE_STEPS, SamplerSettings
from cwdm.wavelet import dwt, idwt


def planned(record: Record, told: SamplerSettings) -> tuple[Sampler, tuple[int, ...]]:
    """Sampler and timesteps by the settings, and where these say nothing as the record recommends.

    Raises:
        SettingsError: the sampler is none of the record's objective.
    """
    usable, name = FLOW_SAMPLERS if record.objective == "flow" else OF_DIFFUSION, told.name or record.sampler
    if name not in usable or (told.timesteps and usable is FLOW_SAMPLERS):
        raise SettingsError(
            f"sampler {name}: weights that were trained by {record.objective} take {', '.join(usable)}"
            + (", and steps instead of timesteps" if usable is FLOW_SAMPLERS else "")
        )
    steps = told.steps or (TEXTURE_STEPS if told.name == "texture" else record.steps)
    if usable is FLOW_SAMPLERS:
        return usable[name], tuple(flow_timesteps(steps))
    timesteps = tuple(told.timesteps or planned_timesteps(name, steps, told.tau or TAU))
    return (usable[name] if told.bands is None else partial(texture, bands=tuple(told.bands))), timesteps


def name_of(sampler: Sampler) -> str:
    """What a record calls a sampler."""
    if isinstance(sampler, partial):
        return f"{name_of(sampler.func)} of {', '.join(sampler.keywords['bands'])}"
    names = {function: name for name, function in (OF_DIFFUSION | FLOW_SAMPLERS).items()}
    return names.get(sampler, getattr(sampler, "__name__", "own"))


@dataclass(frozen=True)
class Drawing:
    """What samples are drawn with; see `cwdm.pipeline.Pipeline`.

    Attributes:
        condition: coefficients (1, 8 N, X, Y, Z) on the device; None for an unconditional network.
    """

    checkpoint: Checkpoint
    dtype: torch.dtype
    target: int
    condition: Tensor | None
    sampler: Sampler
    timesteps: tuple[int, ...]
    callback: Callable[[int, int, Tensor], object] | None

    @torch.inference_mode()
    def of(
        self, seeds: Sequence[int], sizes: Sequence[int], device: torch.device, noise_device: torch.device
    ) -> Tensor:
        """A sample (8, X, Y, Z) of these sizes for each seed, in one network pass a step."""
        record = self.checkpoint.record
        if record.objective == "flow" and self.condition is not None:
            return self._end_of_flow(self.condition).expand(len(seeds), -1, -1, -1, -1)
        generators = [torch.Generator(noise_device).manual_seed(seed) for seed in seeds]
        noise = normal_noise((len(seeds), self.checkpoint.model.config.out_channels, *sizes), generators, device)
        denoise = self._telling(clamped_denoiser(self.checkpoint, self.condition, self.dtype, self.target))
        schedule = record.noise_schedule
        options = {} if schedule is PUBLISHED else {"schedule": schedule}
        generator = generators if len(generators) > 1 else generators[0]
        with exact_float32():
            return self.sampler(denoise, noise, list(self.timesteps), generator=generator, **options)

    def _end_of_flow(self, condition: Tensor) -> Tensor:
        """The end of a flow from the conditions, clamped to the value range: the same for every seed."""
        from cwdm.flow import source  # here, as networks that denoise need none of it

        velocity = network_of(self.checkpoint, condition, self.dtype, self.target)
        with exact_float32():
            end = self.sampler(self._telling(velocity), source(condition), list(self.timesteps))
            return clamped(end, self.checkpoint.record)

    def _telling(self, denoise: Denoise) -> Denoise:
        """The same, with the callback after each evaluation."""
        if (callback := self.callback) is None:
            return denoise
        steps, total = itertools.count(1), evaluations(self.sampler, self.timesteps)

        def denoise_and_tell(x: Tensor, t: int) -> Tensor:
            x0 = denoise(x, t)
            callback(next(steps), total, x0)
            return x0

        return denoise_and_tell


def halving(draw: Callable[[list[int]], Tensor], seeds: Sequence[int], batch: int) -> Iterator[Tensor]:
    """What is drawn for the seeds, `batch` at a time, and half as many from where they do not fit into memory."""
    rest = list(seeds)
    while rest:
        drawn, together = None, rest[:batch]
        try:
            drawn = draw(together)
        except (RuntimeError, MemoryError) as error:
            from cwdm.out_of_memory import is_out_of_memory  # here, as it seldom comes to this

            if len(together) == 1 or not is_out_of_memory(error):
                raise
            batch = len(together) // 2
        if drawn is None:  # only here is the error gone, whose frames keep the network's tensors alive
            gc.collect()
            torch.cuda.empty_cache()
            continue
        del rest[: len(together)]
        yield drawn


def clamped_denoiser(
    checkpoint: Checkpoint, condition: Tensor | None, dtype: torch.dtype = torch.float32, target: int = 0
) -> Denoise:
    """`denoise(x, t)` of a network: the predicted volume is clamped to the value range at every step, as published.

    Args:
        condition: coefficients (B, 8 N, X, Y, Z) that go beside the noisy ones; None for an unconditional network.
        target: number of the volume to make, for a network of several.
    """
    network = network_of(checkpoint, condition, dtype, target)
    return lambda x, t: clamped(network(x, t), checkpoint.record)


def network_of(checkpoint: Checkpoint, condition: Tensor | None, dtype: torch.dtype, target: int) -> Denoise:
    """What a network itself says of x at t."""
    model = checkpoint.model

    def network(x: Tensor, t: int) -> Tensor:
        inputs = x if condition is None else torch.cat((x, condition.expand(x.shape[0], -1, -1, -1, -1)), dim=1)
        steps = torch.full((x.shape[0],), t, device=x.device)
        targets = (torch.full_like(steps, target),) if model.config.targets else ()
        return cast(Tensor, model(inputs.to(dtype), steps, *targets)).float()

    return network


def clamped(coefficients: Tensor, record: Record) -> Tensor:
    """Coefficients of a volume that stays in the value range."""
    return dwt(idwt(coefficients, record.wavelet).clamp_(*record.value_range), record.wavelet)
