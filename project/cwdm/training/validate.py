"""Validation: held-out cases, synthesised with the running mean of the weights and scored."""

import copy
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cwdm.checkpoint import Checkpoint
from cwdm.metrics import psnr, ssim
from cwdm.pipeline import Pipeline, plan_sampling
from cwdm.settings import SamplerSettings
from cwdm.training.cache import CachedSubject
from cwdm.training.launch import largest, on_all_ranks, results_of_all
from cwdm.training.saving import save_best
from cwdm.training.state import Run, describe


class _Stopped(Exception):
    """A signal came in the middle of a validation."""


def is_due(run: Run) -> bool:
    """Whether this step ends with a validation that has not been done."""
    due = run.step == run.settings.steps or run.step % run.settings.validate_every == 0
    return due and bool(run.held_out) and run.validated != run.step


@torch.no_grad()
def validate(run: Run) -> None:
    """Synthesise the held-out cases, each process its share; nothing counts if the run is stopped meanwhile.

    Without conditions there is no right answer: then a sample is drawn beside each case, for the eye.
    """
    shares = results_of_all(run.fabric, _scores_of_share(run))
    scores = torch.tensor([(0.0, 0.0, 0.0), *shares], dtype=torch.float64, device=run.fabric.device).sum(0)
    if run.fabric.world_size > 1:
        scores = cast(Tensor, run.fabric.all_reduce(scores, reduce_op="sum"))
    if any(largest(run.fabric, run.stopped_by)):
        return
    run.validated = run.step
    if not run.settings.channels:
        return
    mean_psnr, mean_ssim = (float(value / scores[2]) for value in scores[:2])
    on_all_ranks(run.fabric, lambda: run.log.scores(run.step, mean_psnr, mean_ssim))
    if mean_psnr > run.best:
        run.best = mean_psnr
        on_all_ranks(run.fabric, lambda: save_best(run))


def _network(run: Run) -> Checkpoint:
    """The running mean of the weights, in the type that training multiplies in."""
    dtype = run.settings.dtype
    model = run.ema if dtype == torch.float32 else copy.deepcopy(run.ema).to(dtype)
    return Checkpoint(model, describe(run))


def _scores_of_share(run: Run) -> Iterator[tuple[float, float, float]]:
    """PSNR, SSIM and the number 1 of each of this process's cases."""
    network = _network(run)
    with suppress(_Stopped):
        for number, subject in list(enumerate(run.held_out))[run.fabric.global_rank :: run.fabric.world_size]:
            truth, synthesis, mask = _synthesise(run, network, subject, number)
            run.log.picture(run.step, subject.name, truth, synthesis)
            if run.settings.channels:
                yield psnr(synthesis, truth, mask), ssim(synthesis, truth, mask), 1.0


def _synthesise(run: Run, network: Checkpoint, subject: CachedSubject, number: int) -> tuple[Any, Any, Any]:
    """Truth, synthesis and mask of a held-out case, (X, Y, Z) in [0, 1]."""
    settings, (name, steps) = run.settings, run.settings.validation_plan
    unit = run.samples.cache.load(subject).unit()
    there = [channel for channel in range(len(unit)) if channel not in subject.absent]
    target = there[number % len(there)] if settings.data.condition_on == "any" else 0
    conditions = unit.copy() if settings.data.condition_on == "any" else unit[1:]
    if settings.data.condition_on == "any":
        conditions[target] = 0
    # Modalities of a head without its skull show where the brain is; other images count everywhere.
    brains = settings.data.layout == "brats" and len(conditions) > 0
    mask = conditions.any(axis=0) if brains else np.ones(unit.shape[1:], np.bool_)
    sampler, timesteps = plan_sampling(network.record, SamplerSettings(name=name, steps=steps))
    pipeline = Pipeline(
        checkpoint=network,
        device=run.fabric.device,
        dtype=settings.dtype,
        sampler=sampler,
        timesteps=timesteps,
        target=target,
    )
    condition = pipeline.encode(torch.from_numpy(conditions)[None]) if len(conditions) else None
    if network.record.one_pass:
        assert condition is not None
        made, _ = pipeline.predict(condition, [name != target for name in range(len(unit))])
    else:
        coefficients = pipeline.sample(condition, unit.shape[1:], [settings.seed], lambda *_: _raise_if_stopped(run))
        made = pipeline.decode(coefficients)
    volume = made[0, 0].cpu().numpy()
    return unit[target], np.where(mask, volume, np.float32(0)), mask


def _raise_if_stopped(run: Run) -> None:
    if run.stopped_by:
        raise _Stopped
