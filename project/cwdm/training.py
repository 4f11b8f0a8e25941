"""The training loop: the published loss, AdamW, a running mean of the weights, and nothing lost when it is stopped.

The state after a step is a function of the settings, the data and the step's number alone, so a resumed run ends with
the same weights, bit for bit on the CPU, as one that was never stopped, and several processes with the same global
batch see the same losses as one.
"""

import copy
import json
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader

from cwdm import __version__, checkpoint
from cwdm.checkpoint import ANY, Checkpoint, Record
from cwdm.datasets import Cache, Samples, Sampling, Subject, find_subjects
from cwdm.diffusion import PUBLISHED, SCHEDULES, subband_losses
from cwdm.errors import CwdmError, SettingsError
from cwdm.files import check_apart, check_writable, remove_stale, write_atomically, write_json
from cwdm.metrics import psnr, ssim
from cwdm.pipeline import Pipeline
from cwdm.preprocess import PUBLISHED_WINDOW
from cwdm.progress import bars
from cwdm.samplers import SAMPLERS, spaced_timesteps
from cwdm.train_config import DataSettings, TrainingSettings
from cwdm.training_log import TrainingLog
from cwdm.unet import ResBlock, UNet
from cwdm.wavelet import LLL_DIVISOR, dwt

T = TypeVar("T")

KEPT_STATES = 2
REGRESSION_SAMPLES = 480
MOST_BAD_STEPS = 20
"""Steps in a row whose loss or gradient is not finite before the run gives up."""


class TrainingError(CwdmError):
    """The run cannot go on."""


class _Stopped(Exception):
    """A signal came in the middle of a validation."""


def train(settings: TrainingSettings, resume: bool = False) -> Path:
    """Train a network and keep its newest and best weights, ready for `cwdm infer`,
    `cwdm sample` or `cwdm translate`.

    In the run's folder: `newest/` and `best/` (weights), `states/` (what `resume` needs), `settings.json`, and
    TensorBoard's files in `log/`.

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
    fabric = _launch(settings)
    run = _prepare(settings, fabric, resume)
    run.loop()
    return run.newest


def _launch(settings: TrainingSettings) -> Fabric:
    """Devices and processes; under `torchrun` or Slurm Fabric takes its place among those that are there."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device=cuda, but PyTorch finds no GPU; check the driver, or train with device=cpu")
    device = "cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu"
    devices, nodes = _processes(settings)
    _check_shares(settings, devices * nodes)
    # Ranks wait for each other while one decodes, validates or saves.
    strategy: Any = DDPStrategy(timeout=timedelta(days=1)) if devices * nodes > 1 else "auto"
    precision: Any = {"fp32": "32-true", "bf16": "bf16-mixed"}[settings.precision]
    # In a batch script Slurm's variables are there too, and Fabric would wait for tasks that no one started.
    alone: Any = LightningEnvironment() if "SLURM_NTASKS" in os.environ and not _is_task_of_slurm() else None
    try:
        fabric = Fabric(
            accelerator=device, strategy=strategy, devices=devices, num_nodes=nodes, precision=precision, plugins=alone
        )
        fabric.launch()
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise SettingsError(f"{devices} devices on each of {nodes} machines cannot be used: {error}") from error
    if fabric.world_size != devices * nodes:
        raise SettingsError(
            f"{devices} devices on each of {nodes} machines were asked for, and {fabric.world_size} processes run; "
            "under Slurm start a task for each device with srun"
        )
    return fabric


def _check_shares(settings: TrainingSettings, processes: int) -> None:
    """Every process gets as many volumes of a step as the others, in equal parts."""
    batch, parts = settings.optimiser.batch_size, processes * settings.optimiser.accumulate
    if batch % parts:
        raise SettingsError(
            f"optimiser.batch_size {batch} cannot be shared evenly among {processes} devices in "
            f"{settings.optimiser.accumulate} parts each; give optimiser.batch_size={-(-batch // parts) * parts}"
        )


def _check_shapes(settings: TrainingSettings, processes: int, subjects: Sequence[Subject], cache: Cache) -> None:
    """Windows follow the brain, and volumes that are computed together must be of one size."""
    share = settings.optimiser.batch_size // processes
    if settings.data.crop or share == settings.optimiser.accumulate:
        return
    shapes = {cache.load(subject).stack.shape[1:] for subject in subjects}
    if len(shapes) > 1:
        raise SettingsError(
            f"the volumes differ in size ({min(shapes)} to {max(shapes)}), so that whole ones cannot be computed "
            f"together; give data.crop, or optimiser.accumulate={share}"
        )


def _is_task_of_slurm() -> bool:
    """Whether `srun` started this process as one of several; batch scripts and salloc's shell count one task a step."""
    return "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def _processes(settings: TrainingSettings) -> tuple[int, int]:
    """Devices of each machine, and machines: as `torchrun` or Slurm started them, else as the settings say."""
    environment = os.environ
    if torch.distributed.is_torchelastic_launched():
        devices = int(environment["LOCAL_WORLD_SIZE"])
        return devices, int(environment["WORLD_SIZE"]) // devices
    if _is_task_of_slurm():
        nodes = int(environment["SLURM_NNODES"])
        return int(environment["SLURM_NTASKS"]) // nodes, nodes
    return settings.devices, settings.nodes


def _together(fabric: Fabric, work: Callable[[], T]) -> T:
    """Do something in every process; if it fails in one, the others stop too instead of waiting for ever."""
    fault: Exception | None = None
    try:
        done = work()
    except Exception as error:
        fault = error
    failed = fault is not None
    if fabric.world_size > 1:
        failed = bool(fabric.all_reduce(torch.tensor(int(failed), device=fabric.device), reduce_op="max"))
    if fault:
        raise fault
    if failed:
        raise TrainingError("another process failed; its message says why")
    return done


def _find_data(settings: TrainingSettings) -> tuple[list[Subject], list[Subject]]:
    """What is trained on and what is held out, when the run's folder can be written."""
    data, out = settings.data, settings.out
    for folder in filter(None, (data.path, data.validation_path)):
        check_apart(out, folder)
    for folder in (out, out / "states", out / "newest", out / "best"):
        check_writable(folder)
        remove_stale(folder)
    held_out = find_subjects(data.validation_path, data)[: settings.validation_cases] if data.validation_path else []
    return find_subjects(data.path, data), held_out


def _prepare(settings: TrainingSettings, fabric: Fabric, resume: bool) -> "_Run":
    data, out = settings.data, settings.out
    subjects, held_out = _together(fabric, lambda: _find_data(settings))
    cache = Cache(data.cache or out / "cache", data, 2 * settings.unet().size_multiple)
    # Each machine may have a cache of its own; its processes share the work.
    mine = [*subjects, *held_out][fabric.local_rank :: _processes(settings)[0]]
    _together(fabric, lambda: _decode_all(cache, mine, fabric.is_global_zero))
    _check_shapes(settings, fabric.world_size, subjects, cache)
    if not resume and _states(out):
        raise SettingsError(f"{out} holds a run already; give --resume to go on with it, or another folder")
    log = TrainingLog(out / "log", fabric.is_global_zero)
    state = _newest_whole_state(out, log.say) if resume else None
    torch.manual_seed(settings.seed)
    model = UNet(settings.unet(), SCHEDULES[settings.loss.schedule])
    if model.config.regression and state is None:
        model.regression.fit(_examples(_samples(settings, subjects, cache), settings))
    ema = copy.deepcopy(model).requires_grad_(False).eval().to(fabric.device)
    layout = torch.channels_last_3d if fabric.device.type == "cuda" else torch.contiguous_format
    # Before the optimiser: a sharded one takes the device of its processes' messages from its parameters.
    model.to(fabric.device, memory_format=layout)  # type: ignore[call-overload]
    if settings.recompute:
        for block in model.modules():
            if isinstance(block, ResBlock):
                block.forward = partial(recompute, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    wrapped, wrapped_optimiser = fabric.setup(model, _optimiser(settings, model, fabric.world_size))
    run = _Run(settings, fabric, log, model, wrapped, ema, wrapped_optimiser, cache, subjects, held_out)
    if resume:
        run.resume(state)
    if fabric.is_global_zero:
        write_json(out / "settings.json", settings.model_dump(mode="json"))
    return run


def _optimiser(settings: TrainingSettings, model: UNet, processes: int) -> torch.optim.Optimizer:
    """AdamW, whose moments each process keeps whole or, `sharded`, its part of."""
    options: dict[str, Any] = {"lr": settings.optimiser.lr, "weight_decay": settings.optimiser.weight_decay}
    if settings.optimiser.sharded and processes > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # compiles optimisers when imported

        return ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **options)
    return torch.optim.AdamW(model.parameters(), **options)


def _samples(settings: TrainingSettings, subjects: Sequence[Subject], cache: Cache) -> Samples:
    low, high = settings.value_range
    return Samples(subjects, cache, Sampling(settings.data, settings.seed, (low, high), settings.loss.timestep_power))


def _examples(samples: Samples, settings: TrainingSettings) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Coefficients of conditions and target of the run's first samples, for `Regression.fit`.

    Learned from are those whose eight voxels all lie in the brain: at its rim every contrast falls to 0 at once, which
    says much of the rim and nothing of how one contrast follows from the others.
    """
    wavelet, background = settings.network.wavelet, settings.value_range[0]
    for n in range(REGRESSION_SAMPLES):
        sample = samples[n]
        conditions = sample["conditions"][None]
        outside = (conditions == background).all(1).float()
        inside = F.max_pool3d(outside, 2)[0] == 0
        yield dwt(conditions, wavelet)[0], dwt(sample["volume"][None], wavelet)[0], inside, int(sample["target"])


def _decode_all(cache: Cache, subjects: Sequence[Subject], shown: bool) -> None:
    with bars(shown=shown) as bar:
        for subject in bar.track(subjects, description="decoding"):
            cache.load(subject)


@dataclass
class _Run:
    """A run under way.

    Attributes:
        model: the network's own parameters; `wrapped` is the same with gradients exchanged among processes.
        ema: running mean of the weights.
        step: steps done.
        best: PSNR of the best validation.
        validated: the step of the last one that came to its end.
    """

    settings: TrainingSettings
    fabric: Fabric
    log: TrainingLog
    model: UNet
    wrapped: nn.Module
    ema: UNet
    optimiser: Any
    cache: Cache
    subjects: list[Subject]
    held_out: list[Subject]
    step: int = 0
    best: float = -math.inf
    validated: int = 0
    stopped_by: int = 0

    # ------------------------------------------------------------------------------------------------- the loop

    def loop(self) -> None:
        """Train to the last step; on SIGTERM or SIGINT save and leave."""
        settings = self.settings
        heard = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]
        handlers = {number: signal.signal(number, self._stop) for number in heard}
        try:
            with bars(shown=self.fabric.is_global_zero) as bar:
                task = bar.add_task("training", total=settings.steps, completed=self.step)
                if self._is_validation_due():  # the one that the run was stopped in
                    self._settle()
                for batches in self._batches():
                    self._one_step(batches)
                    bar.update(task, completed=self.step, description=self.log.line or "training")
                    self._settle()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.log.close()

    def _settle(self) -> None:
        """What a step ends with, where it is due: a validation, a state on the disk, the end of a stopped run."""
        if self._is_validation_due():
            self._validate()
        stopped = self._any_stopped()
        if stopped or self.step == self.settings.steps or self.step % self.settings.save_every == 0:
            _together(self.fabric, self.save)
        if stopped:
            raise SystemExit(128 + stopped)

    def _is_validation_due(self) -> bool:
        due = self.step == self.settings.steps or self.step % self.settings.validate_every == 0
        return due and bool(self.held_out) and self.validated != self.step

    def _stop(self, number: int, _: object) -> None:
        self.stopped_by = number

    def _any_stopped(self) -> int:
        """The signal that any of the processes was stopped by, the same answer in all of them."""
        if self.fabric.world_size == 1:
            return self.stopped_by
        stopped = torch.tensor(self.stopped_by, device=self.fabric.device)
        return int(cast(Tensor, self.fabric.all_reduce(stopped, reduce_op="max")))

    def _batches(self) -> Iterator[list[dict[str, Tensor]]]:
        """What this process computes in each step that is left, in parts."""
        optimiser, fabric = self.settings.optimiser, self.fabric
        share = optimiser.batch_size // fabric.world_size
        numbers = [
            step * optimiser.batch_size + fabric.global_rank * share + i
            for step in range(self.step, self.settings.steps)
            for i in range(share)
        ]
        workers = self.settings.data.workers
        loader = DataLoader(
            _samples(self.settings, self.subjects, self.cache),
            batch_size=share // optimiser.accumulate,
            sampler=numbers,
            num_workers=workers,
            pin_memory=fabric.device.type == "cuda",
            worker_init_fn=_ignore_interrupts,
            persistent_workers=workers > 0,
        )
        batches = iter(loader)
        while self.step < self.settings.steps:
            start = time.perf_counter()
            parts = [next(batches) for _ in range(optimiser.accumulate)]
            self.log.waited += time.perf_counter() - start
            yield parts

    def _one_step(self, parts: list[dict[str, Tensor]]) -> None:
        optimiser = self.settings.optimiser
        lr = optimiser.lr * _schedule(self.step, self.settings)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        losses, timesteps = [], []
        for i, batch in enumerate(parts):
            with self.fabric.no_backward_sync(self.wrapped, enabled=i < len(parts) - 1):  # type: ignore[arg-type]
                bands = self._losses(batch)
                self.fabric.backward(self._total(bands) / len(parts))
            losses.append(bands.detach())
            timesteps.append(batch["t"])
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), optimiser.clip_norm or math.inf)
        finite = bool(torch.isfinite(norm))
        if finite:
            self.optimiser.step()
            self._average()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        bands, t = torch.cat(losses).float(), torch.cat(timesteps)
        if self.fabric.world_size > 1:
            bands = cast(Tensor, self.fabric.all_gather(bands)).flatten(0, 1)
            t = cast(Tensor, self.fabric.all_gather(t.to(self.fabric.device))).flatten(0, 1)
        self.log.add(bands.cpu(), t.cpu(), finite)
        if self.log.bad_in_a_row >= MOST_BAD_STEPS:
            raise TrainingError(
                f"loss or gradient not finite for {MOST_BAD_STEPS} steps before step {self.step}; the states in "
                f"{self.settings.out / 'states'}, if any, are from before; a lower optimiser.lr may help"
            )
        if self.step % self.settings.log_every == 0:
            self.log.write(self.step, lr)

    def _losses(self, batch: dict[str, Tensor]) -> Tensor:
        batch = {name: tensor.to(self.fabric.device, non_blocking=True) for name, tensor in batch.items()}
        targets = (batch["target"],) if self.model.config.targets else ()
        conditions = batch["conditions"] if batch["conditions"].shape[1] else None
        wavelet = self.settings.network.wavelet
        return subband_losses(
            lambda x, t: self.wrapped(x, t, *targets),
            batch["volume"],
            conditions,
            batch["t"],
            batch["noise"],
            wavelet,
            SCHEDULES[self.settings.loss.schedule],
        )

    def _total(self, bands: Tensor) -> Tensor:
        """The loss of (B, 8) subband errors."""
        if self.settings.loss.over == "coefficients":
            return bands.mean()
        return bands[:, 0].mean() * LLL_DIVISOR**2 / 8 + bands[:, 1:].mean() * 7 / 8

    @torch.no_grad()
    def _average(self) -> None:
        """Running mean of the weights; at first over fewer steps, so that the start is soon forgotten."""
        decay = min(self.settings.optimiser.ema_decay, (1 + self.step) / (10 + self.step))
        for mean, value in zip(self.ema.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)

    # ----------------------------------------------------------------------------------------------- validation

    def record(self) -> Record:
        """What the weights say about themselves."""
        settings = self.settings
        data, (low, high) = settings.data, settings.value_range
        best = {"best_psnr_db": round(self.best, 2)} if math.isfinite(self.best) else {}
        return Record(
            modality=ANY if data.condition_on == "any" else data.target,
            window=_window(data),
            wavelet=settings.network.wavelet,
            value_range=(low, high),
            schedule=settings.loss.schedule,
            sampler=settings.record.sampler,
            steps=settings.record.steps,
            notice=settings.record.notice,
            most_missing=data.most_missing,
            training={
                "program": f"cwdm {__version__}",
                "steps": self.step,
                "cases": len(self.subjects),
                **best,
                "settings": settings.model_dump(
                    mode="json", exclude={"data": {"path", "validation_path", "cache"}, "out": True}
                ),
            },
        )

    @torch.no_grad()
    def _validate(self) -> None:
        """Synthesise the held-out cases, each process its share; nothing counts if the run is stopped meanwhile.

        Without conditions there is no right answer: then a sample is drawn beside each case, for the eye.
        """
        scores = torch.zeros(3, dtype=torch.float64, device=self.fabric.device)
        _together(self.fabric, lambda: self._score_share(scores))
        if self.fabric.world_size > 1:
            scores = cast(Tensor, self.fabric.all_reduce(scores, reduce_op="sum"))
        if self._any_stopped():
            return
        self.validated = self.step
        if not self.settings.channels:
            return
        mean_psnr, mean_ssim = (float(value / scores[2]) for value in scores[:2])
        self.log.scores(self.step, mean_psnr, mean_ssim)
        if mean_psnr > self.best:
            self.best = mean_psnr
            _together(self.fabric, lambda: self._save_weights(self.settings.out / "best"))

    def _score_share(self, scores: Tensor) -> None:
        """Add up PSNR, SSIM and number of this process's cases."""
        with suppress(_Stopped):
            for number, subject in list(enumerate(self.held_out))[self.fabric.global_rank :: self.fabric.world_size]:
                truth, synthesis, mask = self._synthesise(subject, number)
                self.log.picture(self.step, subject.name, truth, synthesis)
                if self.settings.channels:
                    figures = psnr(synthesis, truth, mask), ssim(synthesis, truth, mask)
                    scores += torch.tensor([*figures, 1.0], dtype=torch.float64, device=scores.device)

    def _synthesise(self, subject: Subject, number: int) -> tuple[Any, Any, Any]:
        """Truth, synthesis and mask of a held-out case, (X, Y, Z) in [0, 1]."""
        settings, record = self.settings, self.record()
        unit = self.cache.load(subject).unit()
        target = number % len(unit) if settings.data.condition_on == "any" else 0
        conditions = unit.copy() if settings.data.condition_on == "any" else unit[1:]
        if settings.data.condition_on == "any":
            conditions[target] = 0
        # Contrasts of a head without its skull show where the brain is; other images count everywhere.
        brains = settings.data.layout == "brats" and len(conditions) > 0
        mask = conditions.any(axis=0) if brains else np.ones(unit.shape[1:], np.bool_)
        pipeline = Pipeline(
            checkpoint=Checkpoint(self.ema, record),
            device=self.fabric.device,
            dtype=torch.float32,
            sampler=SAMPLERS[record.sampler],
            timesteps=tuple(spaced_timesteps(record.steps)),
            target=target,
        )
        condition = pipeline.encode(torch.from_numpy(conditions)[None]) if len(conditions) else None
        made = pipeline.sample(condition, unit.shape[1:], [settings.seed], lambda *_: self._raise_if_stopped())
        volume = pipeline.decode(made)[0, 0].cpu().numpy()
        return unit[target], np.where(mask, volume, np.float32(0)), mask

    def _raise_if_stopped(self) -> None:
        if self.stopped_by:
            raise _Stopped

    # -------------------------------------------------------------------------------------- nothing gets lost

    @property
    def newest(self) -> Path:
        """The newest weights for inference."""
        return self.settings.out / "newest" / self._weights_name()

    def _weights_name(self) -> str:
        data = self.settings.data
        kind = ANY if data.condition_on == "any" else data.target or "weights"
        return f"{kind}.safetensors" if data.condition_on != "nothing" else "unconditional.safetensors"

    def _save_weights(self, folder: Path) -> None:
        if self.fabric.is_global_zero:
            checkpoint.save(folder / self._weights_name(), self.ema, self.record())

    def save(self) -> None:
        """Write the newest weights and the state, whole or not at all; older states go once it is there.

        Weights that are not finite are not worth keeping, and would push out those that are.
        """
        finite = all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters())
        last = self.step == self.settings.steps
        if not finite or (self.log.bad_in_a_row and not last):
            self.log.say(f"warning: weights or gradient not finite at step {self.step}, nothing saved")
            return
        # Sharded moments are brought together from all processes, so nothing may fail in one of them before.
        moments = self.optimiser.state_dict().get("state", {})
        self._save_weights(self.settings.out / "newest")
        if not self.fabric.is_global_zero:
            return
        folder = self.settings.out / "states"
        best = self.best if math.isfinite(self.best) else None
        header = {"step": self.step, "best": best, "validated": self.validated, **self._identity()}
        data = safetensors.torch.save(self._state(moments), {"cwdm": json.dumps(header)})
        write_atomically(folder / f"{self.step:09d}.safetensors", lambda file: file.write(data))
        states = _states(self.settings.out)
        # Later ones than this can only be damaged, or `resume` would have taken them.
        later = [path for path in states if int(path.stem) > self.step]
        for old in [*later, *[path for path in states if path not in later][:-KEPT_STATES]]:
            old.unlink()

    def _identity(self) -> dict[str, Any]:
        """What must not change between a state and the run that goes on from it."""
        keep = self.settings.model_dump(
            mode="json", include={"network", "optimiser", "loss", "seed", "value_range", "precision"}
        )
        if self.settings.loss.schedule == PUBLISHED.name:
            del keep["loss"]["schedule"]  # states from before there was a choice do not say
        del keep["optimiser"]["sharded"]  # states are whole, and whoever runs out of memory may switch it on
        data = self.settings.data.model_dump(mode="json", exclude={"path", "validation_path", "cache", "workers"})
        return {"settings": {**keep, "data": data}, "cases": [subject.name for subject in self.subjects]}

    def _state(self, moments: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for number, (name, parameter) in enumerate(self.model.named_parameters()):
            tensors[f"model.{name}"] = parameter
            for key, value in moments.get(number, {}).items():
                tensors[f"optimiser.{key}.{name}"] = value
        tensors.update({f"ema.{name}": value for name, value in self.ema.named_parameters()})
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def resume(self, state: "_State | None") -> None:
        """Go on from a state.

        Raises:
            SettingsError: it belongs to other settings or other cases.
        """
        if state is None:
            self.log.say("no state to go on from; starting at the first step")
        else:
            header = state.header
            self._check_identity(state.path, header)
            self._take(state.tensors)
            self.step, self.best = int(header["step"]), header["best"] or -math.inf
            self.validated = int(header.get("validated", self.step))
            self.log.say(f"going on after step {self.step} from {state.path}")
        steps = cast(Tensor, self.fabric.all_gather(torch.tensor(self.step, device=self.fabric.device)))
        if int(steps.min()) != int(steps.max()):
            raise SettingsError(
                f"the processes see different states in {self.settings.out}; it must be one shared folder"
            )

    def _check_identity(self, path: Path, header: Mapping[str, Any]) -> None:
        mine = self._identity()
        for key in ("settings", "cases"):
            if header[key] != json.loads(json.dumps(mine[key])):
                raise SettingsError(
                    f"{path} belongs to other {key}; go on with the same ones, or train into another folder"
                )

    @torch.no_grad()
    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        for name, mean in self.ema.named_parameters():
            mean.copy_(tensors[f"ema.{name}"])
        moments = {}
        for number, (name, parameter) in enumerate(self.model.named_parameters()):
            parameter.copy_(tensors[f"model.{name}"])
            found = {key: tensors.get(f"optimiser.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            moments[number] = {key: tensor for key, tensor in found.items() if tensor is not None}
        groups = [{**group, "params": list(moments)} for group in self.optimiser.param_groups]
        self.optimiser.load_state_dict({"state": moments, "param_groups": groups})


def _states(out: Path) -> list[Path]:
    """A run's saved states, oldest first; copies under other names are the user's own."""
    return sorted(path for path in (out / "states").glob("*.safetensors") if re.fullmatch(r"\d{9}", path.stem))


@dataclass(frozen=True)
class _State:
    """What a run goes on from, as it stood in a file."""

    path: Path
    header: dict[str, Any]
    tensors: dict[str, Tensor]


def _newest_whole_state(out: Path, say: Callable[[str], None]) -> _State | None:
    for path in reversed(_states(out)):
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["cwdm"])
                return _State(path, header, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
            say(f"warning: {path} is not whole ({error}); trying the one before")
    return None


def _window(data: DataSettings) -> Literal["published", "brain"] | tuple[int, int, int]:
    """What inference has to give a network that was trained on these data."""
    if data.window == "brain":
        return "brain"
    x, y, z = data.window
    return "published" if (x, y, z) == PUBLISHED_WINDOW else (x, y, z)


def _ignore_interrupts(_: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of a group; the loop alone decides when to stop."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def _schedule(step: int, settings: TrainingSettings) -> float:
    """Factor of the learning rate: a linear rise, then a cosine down to `final_lr`."""
    optimiser = settings.optimiser
    rise = min(1.0, (step + 1) / (optimiser.warmup_steps + 1))
    fall = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return rise * (optimiser.final_lr + (1 - optimiser.final_lr) * fall)
