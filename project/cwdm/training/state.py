"""What a training run holds, and how none of it gets lost: weights for inference and states to go on from."""

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import safetensors
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from cwdm import __version__, checkpoint
from cwdm.checkpoint import ANY, Record, write_tensors
from cwdm.diffusion import PUBLISHED
from cwdm.errors import SettingsError
from cwdm.images import PUBLISHED_WINDOW
from cwdm.training.launch import together
from cwdm.training.log import TrainingLog
from cwdm.training.settings import DataSettings, TrainingSettings
from cwdm.training.volume_cache import Cache, CachedSubject
from cwdm.unet import UNet

KEPT_STATES = 2
RUNNING_MEAN, RAW = "running mean, the default for inference", "raw, as those of the published checkpoints"


class Writer:
    """A thread that writes one thing after the other; what went wrong is heard at the next call."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "writer")
        self._job: Future[None] | None = None

    def write(self, job: Callable[[], None]) -> None:
        """Begin with a job, once the one before is done."""
        self.wait()
        self._job = self._thread.submit(job)

    def check(self) -> None:
        """Raise what went wrong, if the job has come to its end."""
        if self._job and self._job.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the job's end; raise what went wrong."""
        job, self._job = self._job, None
        if job:
            job.result()


@dataclass
class Run:
    """A run under way.

    Attributes:
        model: the network's own parameters; `wrapped` is the same with gradients exchanged among processes.
        ema: running mean of the weights.
        step: steps done.
        best: PSNR of the best validation.
        validated: the step of the last one that came to its end.
        stage: `computing` losses and gradients, `updating` the weights with them, or `between` two steps, where
            all processes hear of it when one fails.
        begun: the step that the run started or was resumed at.
        copied_at: when the newest state was copied, in seconds of `time.monotonic`.
        passed_over: states that could not be read, and go when there is a new one.
    """

    settings: TrainingSettings
    fabric: Fabric
    log: TrainingLog
    model: UNet
    wrapped: nn.Module
    ema: UNet
    optimiser: Any
    cache: Cache
    subjects: list[CachedSubject]
    held_out: list[CachedSubject]
    step: int = 0
    best: float = -math.inf
    validated: int = 0
    stopped_by: int = 0
    stage: Literal["between", "computing", "updating"] = "between"
    begun: int = 0
    passed_over: tuple[Path, ...] = ()
    writer: Writer = field(default_factory=Writer)
    copied_at: float = field(default_factory=time.monotonic)

    @property
    def newest(self) -> Path:
        """The newest weights for inference."""
        return self.settings.out / "newest" / weights_name(self.settings)


def describe(run: Run) -> Record:
    """What the weights say about themselves."""
    settings = run.settings
    data, (low, high) = settings.data, settings.value_range
    best = {"best_psnr_db": round(run.best, 2)} if math.isfinite(run.best) else {}
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
            "steps": run.step,
            "cases": len(run.subjects),
            "weights": RUNNING_MEAN,
            **best,
            "settings": settings.model_dump(
                mode="json", exclude={"data": {"path", "validation_path", "cache", "skip_bad"}, "out": True}
            ),
        },
    )


def save_weights(run: Run, folder: Path) -> None:
    """Have the running mean of the weights written, as it is now, while training goes on."""
    if run.fabric.is_global_zero:
        means = _copied(dict(run.ema.named_parameters()))
        path, config, record = folder / weights_name(run.settings), run.model.config, describe(run)
        run.writer.write(lambda: checkpoint.save_tensors(path, means, config, record))


def is_late(run: Run) -> bool:
    """Whether so much time has gone by since the last state that the next is due."""
    return time.monotonic() - run.copied_at > 60 * run.settings.save_minutes


def save(run: Run, alone: bool = False) -> None:
    """Have the newest weights and the state written, as they are now, while training goes on.

    Weights that are not finite are not worth keeping, and would push out those that are.

    Args:
        alone: the other processes know nothing of it.
    """
    run.copied_at = time.monotonic()
    finite = all(bool(torch.isfinite(parameter).all()) for parameter in run.model.parameters())
    last = run.step == run.settings.steps
    if not finite or (run.log.bad_in_a_row and not last):
        run.log.say(f"warning: weights or gradient not finite at step {run.step}, nothing saved")
        return
    # Sharded moments are brought together from all processes, so nothing may fail in one of them before.
    moments = run.optimiser.state_dict().get("state", {})
    if run.fabric.is_global_zero or alone:
        run.writer.write(_writing(run, moments))


def rescue(run: Run) -> None:
    """Save the steps that the run would lose by an exception; where that fails too, say so and no more."""
    alone = run.stage != "between"
    if run.step == run.begun:
        return
    if run.stage == "updating":
        reason = "the weights were being changed"
    elif alone and run.settings.optimiser.sharded and run.fabric.world_size > 1:
        reason = "the other processes hold a part of it"
    else:
        try:
            with suppress(Exception):  # an older state that could not be written
                run.writer.wait()
            run.optimiser.zero_grad(set_to_none=True)  # makes room, if it was that
            for work in (lambda: save(run, alone), run.writer.wait):
                # Processes that leave early would have the one that writes killed.
                work() if alone else together(run.fabric, work)
            return
        except Exception as error:
            reason = str(error)
    run.log.say(f"warning: step {run.step} could not be saved: {reason}; --resume goes on from the state before")


def _writing(run: Run, moments: Mapping[int, Mapping[str, Tensor]]) -> Callable[[], None]:
    """What writes the newest weights and the state, each whole or not at all; older states go once it is there."""
    tensors, step, record, out = _copied(_tensors(run, moments)), run.step, describe(run), run.settings.out
    best = run.best if math.isfinite(run.best) else None
    header = json.dumps({"step": step, "best": best, "validated": run.validated, **_identity(run)})
    newest, raw, config = run.newest, out / "raw" / run.newest.name, run.model.config
    record_of_raw = record.model_copy(update={"training": {**record.training, "weights": RAW}})
    passed_over, run.passed_over = [path for path in run.passed_over if path != _state_path(out, step)], ()

    def write() -> None:
        write_tensors(_state_path(out, step), tensors, {"cwdm": header})
        checkpoint.save_tensors(newest, _part(tensors, "ema."), config, record)
        checkpoint.save_tensors(raw, _part(tensors, "model."), config, record_of_raw)
        kept = [path for path in states(out) if path not in passed_over]
        for old in [*passed_over, *kept[:-KEPT_STATES]]:
            old.unlink(missing_ok=True)

    return write


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, which training does not change."""
    options: Any = {"copy": True, "memory_format": torch.contiguous_format}
    return {name: tensor.detach().to("cpu", **options) for name, tensor in tensors.items()}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def resume(run: Run, state: "State | None") -> None:
    """Go on from a state.

    Raises:
        SettingsError: it belongs to other settings or other cases.
    """
    if state is None:
        run.log.say("no state to go on from; starting at the first step")
        run.passed_over = tuple(states(run.settings.out))
    else:
        header = state.header
        _check_identity(run, state.path, header)
        _take(run, state.tensors)
        run.step, run.best = int(header["step"]), header["best"] or -math.inf
        run.begun = run.step
        if run.step > run.settings.steps:
            raise SettingsError(
                f"{state.path} is from after the last step, {run.settings.steps}, that samples={run.settings.samples} "
                f"and the batch size come to; give steps=N to train up to step N"
            )
        run.passed_over = tuple(path for path in states(run.settings.out) if int(path.stem) > run.step)
        run.validated = int(header.get("validated", run.step))
        run.log.say(f"going on after step {run.step} of {run.settings.steps} from {state.path}")
    steps = cast(Tensor, run.fabric.all_gather(torch.tensor(run.step, device=run.fabric.device)))
    if int(steps.min()) != int(steps.max()):
        raise SettingsError(f"the processes see different states in {run.settings.out}; it must be one shared folder")


def _check_identity(run: Run, path: Path, header: Mapping[str, Any]) -> None:
    mine = _identity(run)
    for key in ("settings", "cases"):
        if header[key] != json.loads(json.dumps(mine[key])):
            raise SettingsError(
                f"{path} belongs to other {key}; go on with the same ones, or train into another folder"
            )


@torch.no_grad()
def _take(run: Run, tensors: Mapping[str, Tensor]) -> None:
    for name, mean in run.ema.named_parameters():
        mean.copy_(tensors[f"ema.{name}"])
    moments: dict[int, dict[str, Tensor]] = {}
    for number, (name, parameter) in enumerate(run.model.named_parameters()):
        parameter.copy_(tensors[f"model.{name}"])
        moments[number] = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if (tensor := tensors.get(f"optimiser.{key}.{name}")) is not None:
                # In the layout of the parameter, as AdamW makes them: it is slow where the two differ.
                alike = tensor.shape == parameter.shape
                moments[number][key] = torch.empty_like(parameter).copy_(tensor) if alike else tensor
    groups = [{**group, "params": list(moments)} for group in run.optimiser.param_groups]
    run.optimiser.load_state_dict({"state": moments, "param_groups": groups})


def _tensors(run: Run, moments: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for number, (name, parameter) in enumerate(run.model.named_parameters()):
        tensors[f"model.{name}"] = parameter
        for key, value in moments.get(number, {}).items():
            tensors[f"optimiser.{key}.{name}"] = value
    tensors.update({f"ema.{name}": value for name, value in run.ema.named_parameters()})
    return tensors


def _identity(run: Run) -> dict[str, Any]:
    """What must not change between a state and the run that goes on from it."""
    keep = run.settings.model_dump(
        mode="json", include={"network", "optimiser", "loss", "seed", "value_range", "precision"}
    )
    if run.settings.loss.schedule == PUBLISHED.name:
        del keep["loss"]["schedule"]  # states from before there was a choice do not say
    del keep["optimiser"]["sharded"]  # states are whole, and whoever runs out of memory may switch it on
    places = {"path", "validation_path", "cache", "workers", "skip_bad"}
    data = run.settings.data.model_dump(mode="json", exclude=places)
    return {"settings": {**keep, "data": data}, "cases": [subject.name for subject in run.subjects]}


def weights_name(settings: TrainingSettings) -> str:
    """Name of the file of weights, by which `cwdm infer` knows what they are for."""
    data = settings.data
    kind = ANY if data.condition_on == "any" else data.target or "weights"
    return f"{kind}.safetensors" if data.condition_on != "nothing" else "unconditional.safetensors"


def _state_path(out: Path, step: int) -> Path:
    return out / "states" / f"{step:09d}.safetensors"


def states(out: Path) -> list[Path]:
    """A run's saved states, oldest first; copies under other names are the user's own."""
    return sorted(path for path in (out / "states").glob("*.safetensors") if re.fullmatch(r"\d{9}", path.stem))


@dataclass(frozen=True)
class State:
    """What a run goes on from, as it stood in a file."""

    path: Path
    header: dict[str, Any]
    tensors: dict[str, Tensor]


def newest_whole_state(out: Path, say: Callable[[str], None]) -> State | None:
    """The newest state that can be read; those that cannot are named."""
    for path in reversed(states(out)):
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["cwdm"])
                return State(path, header, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
            say(f"warning: {path} is not whole ({error}); trying the one before")
    return None


def _window(data: DataSettings) -> Literal["published", "brain"] | tuple[int, int, int]:
    """What inference has to give a network that was trained on these data."""
    if data.window == "brain":
        return "brain"
    x, y, z = data.window
    return "published" if (x, y, z) == PUBLISHED_WINDOW else (x, y, z)
