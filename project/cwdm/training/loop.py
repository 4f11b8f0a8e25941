"""The training loop: the published loss, AdamW, a running mean of the weights, and nothing lost when it is stopped.

The state after a step is a function of the settings, the data and the step's number alone, so a resumed run ends with
the same weights, bit for bit on the CPU, as one that was never stopped, and several processes with the same global
batch see the same losses as one.
"""

import copy
import math
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint as recompute

from cwdm.diffusion import SCHEDULES, subband_losses
from cwdm.errors import SettingsError
from cwdm.files import write_json
from cwdm.progress import bars
from cwdm.training import data, state, validate
from cwdm.training.datasets import STOPPING, assemble
from cwdm.training.launch import TrainingError, largest, launch, together
from cwdm.training.log import TrainingLog
from cwdm.training.settings import TrainingSettings
from cwdm.training.state import Run
from cwdm.unet import ResBlock, UNet
from cwdm.wavelet import LLL_DIVISOR

MOST_BAD_STEPS = 20
"""Steps in a row whose loss or gradient is not finite before the run gives up."""


def train(settings: TrainingSettings, resume: bool = False) -> Path:
    """Train a network and keep its newest and best weights, ready for `cwdm infer`,
    `cwdm sample` or `cwdm translate`.

    In the run's folder: `newest/` and `best/` (running means of the weights, which inference takes), `raw/` (the newest
    weights themselves, which is what the published checkpoints are), `states/` (what `resume` needs), `settings.json`,
    and TensorBoard's files in `log/`.

    Args:
        resume: go on from the newest whole state; without one, from the start.

    Returns:
        The newest weights.

    Raises:
        SettingsError: settings that do not fit the machine or the run's folder.
        InputError, CaseError: no usable data.
        TrainingError: the loss stayed without a finite value.
        OutputError: the disk is full or not writable; the states that were written stay whole.
    """
    fabric = launch(settings)
    run = _prepare(settings, fabric, resume)
    _loop(run)
    return run.newest


def _prepare(settings: TrainingSettings, fabric: Fabric, resume: bool) -> Run:
    out = settings.out
    there = together(fabric, lambda: data.find_data(settings))
    if not resume and state.states(out):
        raise SettingsError(f"{out} holds a run already; give --resume to go on with it, or another folder")
    cache, subjects, held_out = data.load_data(settings, fabric, *there)
    log = TrainingLog(out / "log", fabric.is_global_zero)
    found = state.newest_whole_state(out, log.say) if resume else None
    torch.manual_seed(settings.seed)
    model = UNet(settings.unet(), SCHEDULES[settings.loss.schedule])
    if model.config.regression and found is None:
        model.regression.fit(data.examples(data.samples(settings, subjects, cache), settings))
    layout = torch.channels_last_3d if fabric.device.type == "cuda" else torch.contiguous_format
    # Before the optimiser: a sharded one takes the device of its processes' messages from its parameters.
    model.to(fabric.device, memory_format=layout)  # type: ignore[call-overload]
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    if settings.recompute:
        for block in model.modules():
            if isinstance(block, ResBlock):
                block.forward = partial(recompute, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    wrapped, wrapped_optimiser = fabric.setup(model, _optimiser(settings, model, fabric.world_size))
    run = Run(settings, fabric, log, model, wrapped, ema, wrapped_optimiser, cache, subjects, held_out)
    if resume:
        state.resume(run, found)
    if fabric.is_global_zero:
        write_json(out / "settings.json", settings.model_dump(mode="json"))
    return run


def _optimiser(settings: TrainingSettings, model: UNet, processes: int) -> torch.optim.Optimizer:
    """AdamW, whose moments each process keeps whole or, `sharded`, its part of."""
    options: dict[str, Any] = {"lr": settings.optimiser.lr, "weight_decay": settings.optimiser.weight_decay}
    if next(model.parameters()).device.type == "cuda":
        options["fused"] = True  # one pass over the memory; not on the CPU, where runs keep their bits
    if settings.optimiser.sharded and processes > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # compiles optimisers when imported

        return ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **options)
    return torch.optim.AdamW(model.parameters(), **options)


def _loop(run: Run) -> None:
    """Train to the last step; when stopped or failing, save and leave."""
    with _tuned_convolutions(run.settings), _heeding_signals(run), closing(run.log):
        try:
            _take_steps(run)
        except Exception:
            state.rescue(run)
            raise


def _take_steps(run: Run) -> None:
    with bars(shown=run.fabric.is_global_zero) as bar:
        task = bar.add_task("training", total=run.settings.steps, completed=run.step)
        if validate.is_due(run):  # the one that the run was stopped in
            _settle(run)
        batches = data.batches(run)
        while run.step < run.settings.steps:
            _step(run, together(run.fabric, lambda: _next(run, batches)))
            bar.update(task, completed=run.step, description=run.log.line or "training")
            _settle(run)


@contextmanager
def _tuned_convolutions(settings: TrainingSettings) -> Iterator[None]:
    """cuDNN times its algorithms once a shape; not where every whole brain has a shape of its own."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or settings.data.crop is not None or settings.data.window != "brain"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def _heeding_signals(run: Run) -> Iterator[None]:
    """Signals that ask the run to stop are noted instead of obeyed at once, unless whoever started it ignores them."""

    def note(number: int, _: object) -> None:
        run.stopped_by = number

    heard = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, note) for number in heard}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _settle(run: Run) -> None:
    """What a step ends with, where it is due: a validation, a state on the disk, the end of a stopped run."""
    if validate.is_due(run):
        validate.validate(run)
    settings = run.settings
    stopped, late = largest(run.fabric, run.stopped_by, state.is_late(run))
    ends = stopped > 0 or run.step == settings.steps
    if ends or late or (settings.save_every is not None and run.step % settings.save_every == 0):
        together(run.fabric, lambda: state.save(run))
    if ends:
        together(run.fabric, run.writer.wait)
    if stopped:
        raise SystemExit(128 + stopped)


def _next(run: Run, batches: Iterator[list[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
    run.writer.check()
    return next(batches)


def _step(run: Run, parts: list[dict[str, Tensor]]) -> None:
    """One step: losses and gradients of all parts, and, where they are finite, new weights."""
    optimiser = run.settings.optimiser
    run.stage = "computing"
    lr = optimiser.lr * _schedule(run.step, run.settings)
    for group in run.optimiser.param_groups:
        group["lr"] = lr
    losses, timesteps = [], []
    for i, batch in enumerate(parts):
        with run.fabric.no_backward_sync(run.wrapped, enabled=i < len(parts) - 1):  # type: ignore[arg-type]
            bands = _losses(run, batch)
            run.fabric.backward(_total(run.settings, bands) / len(parts))
        losses.append(bands.detach())
        timesteps.append(batch["t"])
    norm = float(nn.utils.clip_grad_norm_(run.model.parameters(), optimiser.clip_norm or math.inf))
    bands, t = _gathered(run.fabric, torch.cat(losses).float()), _gathered(run.fabric, torch.cat(timesteps))
    finite = math.isfinite(norm) and bool(bands.isfinite().all())
    if finite:
        run.stage = "updating"
        run.optimiser.step()
        _average(run)
    run.optimiser.zero_grad(set_to_none=True)
    run.step += 1
    run.stage = "computing"  # of the log's means
    run.log.add(bands, t, norm, finite)
    if not finite:
        _tell_of_bad_step(run, bands)
    if run.step % run.settings.log_every == 0:
        run.log.write(run.step, lr)
    run.stage = "between"


def _gathered(fabric: Fabric, tensor: Tensor) -> Tensor:
    """What the processes have of a batch, put together in the order of the samples; on the CPU."""
    if fabric.world_size > 1:
        tensor = cast(Tensor, fabric.all_gather(tensor.to(fabric.device))).flatten(0, 1)
    return tensor.cpu()


def _tell_of_bad_step(run: Run, bands: Tensor) -> None:
    """Name the cases of a step that changed nothing; raises TrainingError when there have been too many in a row."""
    bad = ~bands.isfinite().all(1)  # none where only the gradient overflowed: then it may be any
    names = data.names(run, run.step - 1, bad if bad.any() else ~bad)
    if run.log.bad_in_a_row < MOST_BAD_STEPS:
        run.log.say(f"warning: step {run.step} passed over, loss or gradient not finite; its cases: {names}")
        return
    raise TrainingError(
        f"loss or gradient not finite for {MOST_BAD_STEPS} steps before step {run.step}, the last with {names}; the "
        f"states in {run.settings.out / 'states'}, if any, are from before; a lower optimiser.lr may help"
    )


def _losses(run: Run, batch: dict[str, Tensor]) -> Tensor:
    batch = assemble(batch, data.sampling(run.settings), run.fabric.device)
    targets = (batch["target"],) if run.model.config.targets else ()
    conditions = batch["conditions"] if batch["conditions"].shape[1] else None
    wavelet = run.settings.network.wavelet
    return subband_losses(
        lambda x, t: run.wrapped(x, t, *targets),
        batch["volume"],
        conditions,
        batch["t"],
        batch["noise"],
        wavelet,
        SCHEDULES[run.settings.loss.schedule],
    )


def _total(settings: TrainingSettings, bands: Tensor) -> Tensor:
    """The loss of (B, 8) subband errors."""
    if settings.loss.over == "coefficients":
        return bands.mean()
    return bands[:, 0].mean() * LLL_DIVISOR**2 / 8 + bands[:, 1:].mean() * 7 / 8


def _average(run: Run) -> None:
    """Running mean of the weights; at first over fewer steps, so that the start is soon forgotten."""
    decay = min(run.settings.optimiser.ema_decay, (1 + run.step) / (10 + run.step))
    get_ema_multi_avg_fn(decay)(tuple(run.ema.parameters()), tuple(run.model.parameters()), None)


def _schedule(step: int, settings: TrainingSettings) -> float:
    """Factor of the learning rate: a linear rise, then a cosine down to `final_lr`."""
    optimiser = settings.optimiser
    rise = min(1.0, (step + 1) / (optimiser.warmup_steps + 1))
    fall = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return rise * (optimiser.final_lr + (1 - optimiser.final_lr) * fall)
