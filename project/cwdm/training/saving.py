"""Weights for inference and states to go on from: saved while training goes on, so that nothing gets lost."""

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from torch import Tensor

from cwdm import checkpoint
from cwdm.checkpoint import ANY
from cwdm.errors import SettingsError
from cwdm.files import matching, open_file, parse_json
from cwdm.safetensors_file import write_tensors
from cwdm.training.launch import on_all_ranks
from cwdm.training.settings import TrainingSettings
from cwdm.training.state import RAW, Run, check_identity, describe, identity, load_state, state_tensors, validation

KEPT_STATES = 2


def weights_path(settings: TrainingSettings, folder: str) -> Path:
    """The file of weights in `newest`, `best` or `raw`; by its name `cwdm infer` knows what they are for."""
    data = settings.data
    kind = ANY if data.condition_on == "any" else data.target or "weights"
    name = kind if data.condition_on != "nothing" else "unconditional"
    return settings.out / folder / f"{name}.safetensors"


def save_best(run: Run) -> None:
    """Have the running mean of the weights written, as it is now, while training goes on."""
    if run.fabric.is_global_zero:
        means, path = _copied(dict(run.ema.named_parameters())), weights_path(run.settings, "best")
        config, record = run.model.config, describe(run)
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


def rescue(run: Run, lost_process: bool = False) -> None:
    """Save the steps that the run would lose by an exception; where that fails too, say so and no more.

    Args:
        lost_process: another one is gone. Those that are left have the same to save, so that one of them is enough.
    """
    alone = run.stage != "between" or lost_process
    if run.step == run.begun or (lost_process and not run.fabric.is_global_zero):
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
                work() if alone else on_all_ranks(run.fabric, work)
            return
        except Exception as error:
            reason = str(error)
    run.log.say(f"warning: step {run.step} could not be saved: {reason}; --resume goes on from the state before")


def _writing(run: Run, moments: Mapping[int, Mapping[str, Tensor]]) -> Callable[[], None]:
    """What writes the newest weights and the state, each whole or not at all; older states go once it is there."""
    tensors, settings, config = _copied(state_tensors(run, moments)), run.settings, run.model.config
    best = run.best if math.isfinite(run.best) else None
    header = json.dumps(
        {
            "step": run.step,
            "steps": settings.steps,
            "best": best,
            "validated": run.validated,
            "validation": validation(run),
            **identity(run),
        }
    )
    path, of_mean, of_raw = _state_path(settings.out, run.step), describe(run), describe(run, RAW)
    passed_over, run.passed_over = [other for other in run.passed_over if other != path], ()

    def write() -> None:
        write_tensors(path, tensors, {"cwdm": header})
        checkpoint.save_tensors(weights_path(settings, "newest"), _part(tensors, "ema."), config, of_mean)
        checkpoint.save_tensors(weights_path(settings, "raw"), _part(tensors, "model."), config, of_raw)
        kept = [other for other in states(settings.out) if other not in passed_over]
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
    else:
        header = state.header
        check_identity(run, state.path, header)
        load_state(run, state.tensors)
        run.step, run.best = int(header["step"]), header["best"] or -math.inf
        run.begun = run.step
        if run.step > run.settings.steps:
            raise SettingsError(
                f"{state.path} is from after the last step, {run.settings.steps}, that samples={run.settings.samples} "
                f"and the batch size come to; give steps=N to train up to step N"
            )
        run.passed_over = tuple(path for path in states(run.settings.out) if int(path.stem) > run.step)
        run.validated = int(header.get("validated", run.step))
        if (steps := header.get("steps", run.settings.steps)) != run.settings.steps:
            # The learning rate falls towards it, unless it is constant.
            run.log.say(f"going on with another end: the last step is {run.settings.steps} instead of {steps}")
        now = parse_json(json.dumps(validation(run)))
        if run.best > -math.inf and header.get("validation", now) != now:
            run.log.say(f"held-out cases or their sampler changed; the {run.best:.2f} dB before count no more")
            run.best = -math.inf
        run.log.go_on_after(run.step)
        run.log.say(f"going on after step {run.step} of {run.settings.steps} from {state.path}")
    steps = cast(Tensor, run.fabric.all_gather(torch.tensor(run.step, device=run.fabric.device)))
    if int(steps.min()) != int(steps.max()):
        raise SettingsError(f"the processes see different states in {run.settings.out}; it must be one shared folder")


def _state_path(out: Path, step: int) -> Path:
    return out / "states" / f"{step:09d}.safetensors"


def states(out: Path) -> list[Path]:
    """A run's saved states, oldest first; copies under other names are the user's own."""
    return [path for path in matching(out / "states", "*.safetensors") if re.fullmatch(r"\d{9}", path.stem)]


@dataclass(frozen=True)
class State:
    """What a run goes on from, as it stood in a file."""

    path: Path
    header: dict[str, Any]
    tensors: dict[str, Tensor]


def kept_weights(out: Path) -> Path | None:
    """Weights that a run left in its folder."""
    return next((path for kind in ("newest", "best", "raw") for path in matching(out / kind, "*.safetensors")), None)


def newest_whole_state(out: Path, say: Callable[[str], None]) -> State | None:
    """The newest state that is whole; those that are not are named. None where there is no state at all.

    Raises:
        SettingsError: one cannot be read, which is no damage, or none is whole: whoever went on without them would
            begin with the first step, and replace them and the weights beside them.
    """
    for path in reversed(states(out)):
        try:
            open_file(path).close()  # a pipe would make the library wait for ever
            with safetensors.safe_open(path, framework="pt") as file:
                header = parse_json((file.metadata() or {})["cwdm"])
                return State(path, header, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except OSError as error:
            raise SettingsError(f"{path} cannot be read ({error.strerror}); make it readable, then resume") from error
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            say(f"warning: {path} is not whole ({error}); trying the one before")
    if found := states(out):
        raise SettingsError(
            f"none of the states of {out} is whole ({', '.join(path.name for path in found)}), and from the first step "
            f"on a run would replace them and its weights; put a copy of one into {out / 'states'}, or move {out} away"
        )
    return None
