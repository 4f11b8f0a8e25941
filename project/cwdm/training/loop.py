"""The training loop: the published loss, AdamW, a running mean of the weights, and nothing lost when it is stopped.

It reads downwards: `train` starts a run, `_take_steps` goes from batches to weights, `step` is what a step does,
`after_step` what follows where it is due. The state after a step is a function of the settings, the data and the step's
number alone, so a resumed run ends with the same weights, bit for bit on the CPU, as one that was never stopped, and
several processes with the same global batch see the same losses as one.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cwdm.precision import exact_float32
from cwdm.progress import bars
from cwdm.signals import handled
from cwdm.training import saving, validate
from cwdm.training.data import assemble
from cwdm.training.folder import held
from cwdm.training.launch import LostProcessError, TrainingError, largest, launch, lost_processes_told, on_all_ranks
from cwdm.training.loader import STOPPING, batches_of_steps
from cwdm.training.losses import losses as subbands
from cwdm.training.losses import total
from cwdm.training.settings import TrainingSettings
from cwdm.training.start import start
from cwdm.training.state import Run

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
        TrainingError: the loss stayed without a finite value, or another process of the run is lost.
        OutputError: the disk is full or not writable; the states that were written stay whole.
    """
    fabric = launch(settings)
    with lost_processes_told(), ExitStack() as stack:
        data = filter(None, (settings.data.path, settings.data.validation_path))
        if_first = held(settings.out, data) if fabric.is_global_zero else nullcontext()
        on_all_ranks(fabric, lambda: stack.enter_context(if_first))
        go_on(start(settings, fabric, resume))
    return saving.weights_path(settings, "newest")


def go_on(run: Run) -> None:
    """Train to the last step; when stopped or failing, save and leave."""

    def stop(number: int, _: object) -> None:
        run.stopped_by = number

    with _arithmetic(run.settings), handled(stop, STOPPING), closing(run.log):
        try:
            with lost_processes_told():
                _take_steps(run)
        except Exception as error:
            saving.rescue(run, isinstance(error, LostProcessError))
            raise


def _take_steps(run: Run) -> None:
    settings = run.settings
    batches = batches_of_steps(run.samples, run.fabric, range(run.step, settings.steps))
    with bars(shown=run.fabric.is_global_zero) as bar:
        task = bar.add_task("training", total=settings.steps, completed=run.step)
        # The validation that the run was stopped in, or the last weights, if it was killed between them and the state.
        if validate.is_due(run) or run.step == settings.steps:
            after_step(run)
        while run.step < settings.steps:
            step(run, on_all_ranks(run.fabric, lambda: next_parts(run, batches)))
            bar.update(task, completed=run.step, description=run.log.line or "training")
            after_step(run)


def next_parts(run: Run, batches: Iterator[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The parts of a step; raises what went wrong with reading or, since the last one, with writing."""
    run.writer.check()
    with run.log.waiting():
        return [next(batches) for _ in range(run.settings.optimiser.accumulate)]


def step(run: Run, parts: list[dict[str, Tensor]]) -> None:
    """One step: losses and gradients of all parts, and, where they are finite, new weights."""
    run.stage = "computing"
    lr = _set_learning_rate(run)
    losses = []
    for i, batch in enumerate(parts):
        with run.fabric.no_backward_sync(run.wrapped, enabled=i < len(parts) - 1):  # type: ignore[arg-type]
            given = assemble(batch, run.settings, run.fabric.device)
            losses.append(subbands(run.wrapped, given, run.settings))
            run.fabric.backward(total(run.settings, losses[i]) / len(parts))
    norm = float(nn.utils.clip_grad_norm_(run.model.parameters(), run.settings.optimiser.clip_norm or math.inf))
    bands = _gathered(run.fabric, torch.cat([part.detach() for part in losses]).float())
    finite = math.isfinite(norm) and bool(bands.isfinite().all())
    if finite:
        run.stage = "updating"
        run.optimiser.step()
        _average_weights(run)
    run.optimiser.zero_grad(set_to_none=True)
    run.step += 1
    run.stage = "computing"  # of the log's means
    run.log.add(bands, _gathered(run.fabric, torch.cat([batch["t"] for batch in parts])), norm, finite)
    if not finite:
        _tell_of_bad_step(run, bands)
    if run.step % run.settings.log_every == 0:
        run.log.write(run.step, run.settings.steps, lr)
    run.stage = "between"


def after_step(run: Run) -> None:
    """What follows a step where it is due: a validation, a state on the disk, the end of a stopped run."""
    if validate.is_due(run):
        validate.validate(run)
    settings = run.settings
    stopped, late = largest(run.fabric, run.stopped_by, saving.is_late(run))
    ends = stopped > 0 or run.step == settings.steps
    if ends or late or (settings.save_every is not None and run.step % settings.save_every == 0):
        on_all_ranks(run.fabric, lambda: saving.save(run))
    if ends:
        on_all_ranks(run.fabric, run.writer.wait)
    if stopped:
        raise SystemExit(128 + stopped)


def _set_learning_rate(run: Run) -> float:
    """A linear rise, then a cosine down to `final_lr`."""
    optimiser = run.settings.optimiser
    rise = min(1.0, (run.step + 1) / (optimiser.warmup_steps + 1))
    fall = 0.5 * (1 + math.cos(math.pi * run.step / run.settings.steps))
    lr = optimiser.lr * (rise * (optimiser.final_lr + (1 - optimiser.final_lr) * fall))
    for group in run.optimiser.param_groups:
        group["lr"] = lr
    return lr


def _average_weights(run: Run) -> None:
    """Running mean of the weights; at first over fewer steps, so that the start is soon forgotten."""
    decay = min(run.settings.optimiser.ema_decay, (1 + run.step) / (10 + run.step))
    get_ema_multi_avg_fn(decay)(tuple(run.ema.parameters()), tuple(run.model.parameters()), None)


def _gathered(fabric: Fabric, tensor: Tensor) -> Tensor:
    """What the processes have of a batch, put together in the order of the samples; on the CPU."""
    if fabric.world_size > 1:
        tensor = cast(Tensor, fabric.all_gather(tensor.to(fabric.device))).flatten(0, 1)
    return tensor.cpu()


def _tell_of_bad_step(run: Run, bands: Tensor) -> None:
    """Name the cases of a step that changed nothing; raises TrainingError when there have been too many in a row."""
    bad = ~bands.isfinite().all(1)  # none where only the gradient overflowed: then it may be any
    first = (run.step - 1) * len(bands)
    names = ", ".join(run.samples.subject(first + int(i)).name for i in (bad if bad.any() else ~bad).nonzero())
    if run.log.bad_in_a_row < MOST_BAD_STEPS:
        run.log.say(f"warning: step {run.step} passed over, loss or gradient not finite; its cases: {names}")
        return
    raise TrainingError(
        f"loss or gradient not finite for {MOST_BAD_STEPS} steps before step {run.step}, the last with {names}; the "
        f"states in {run.settings.out / 'states'}, if any, are from before; a lower optimiser.lr may help"
    )


@contextmanager
def _arithmetic(settings: TrainingSettings) -> Iterator[None]:
    """How PyTorch computes: see `TrainingSettings.precision`; and cuDNN times its algorithms once a shape.

    The latter not where every whole brain has a shape of its own.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or settings.data.crop is not None or settings.data.window != "brain"
    try:
        with nullcontext() if settings.precision == "tf32" else exact_float32():
            yield
    finally:
        torch.backends.cudnn.benchmark = before
