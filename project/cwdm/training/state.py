"""What a training run holds and where it stands, and the tensors that another run can go on from."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from pydantic_core import to_jsonable_python
from torch import Tensor, nn

from cwdm import __version__
from cwdm.checkpoint import Record
from cwdm.errors import SettingsError, listed
from cwdm.files import parse_json
from cwdm.training.cache import CachedSubject
from cwdm.training.data import Samples
from cwdm.training.log import TrainingLog
from cwdm.training.settings import TrainingSettings
from cwdm.training.writer import Writer
from cwdm.unet import UNet

RUNNING_MEAN, RAW = "running mean, the default for inference", "raw, as those of the published checkpoints"
_PLACES = {"path", "validation_path", "cache", "skip_bad"}
_MAY_CHANGE = {
    f"optimiser.{name}"
    for name in ("lr", "weight_decay", "accumulate", "warmup_steps", "final_lr", "ema_decay", "clip_norm", "sharded")
}
"""What a run may go on with changed, if its loss goes wrong or it has fewer devices; a state holds nothing of it."""


@dataclass
class Run:
    """A run under way.

    Attributes:
        samples: what is trained on.
        held_out: what is synthesised at a validation.
        model: the network's own parameters; `wrapped` is the same with gradients exchanged among processes.
        ema: running mean of the weights.
        step: steps done.
        best: PSNR of the best validation.
        validated: the step of the last one that came to its end.
        stopped_by: number of the signal that asked the run to stop, or 0.
        stage: `computing` losses and gradients, `updating` the weights with them, or `between` two steps, where
            all processes hear of it when one fails.
        begun: the step that the run started or was resumed at.
        passed_over: states that could not be read, and go when there is a new one.
        copied_at: when the newest state was copied, in seconds of `time.monotonic`.
    """

    settings: TrainingSettings
    fabric: Fabric
    log: TrainingLog
    samples: Samples
    held_out: list[CachedSubject]
    model: UNet
    wrapped: nn.Module
    ema: UNet
    optimiser: Any
    step: int = 0
    best: float = -math.inf
    validated: int = 0
    stopped_by: int = 0
    stage: Literal["between", "computing", "updating"] = "between"
    begun: int = 0
    passed_over: tuple[Path, ...] = ()
    copied_at: float = field(default_factory=time.monotonic)
    writer: Writer = field(default_factory=Writer)


def describe(run: Run, weights: str = RUNNING_MEAN) -> Record:
    """What the weights say about themselves."""
    best = {"best_psnr_db": round(run.best, 2)} if math.isfinite(run.best) else {}
    training = {
        "program": f"cwdm {__version__}",
        "steps": run.step,
        "cases": len(run.samples.subjects),
        "weights": weights,
        **best,
        "settings": run.settings.model_dump(mode="json", exclude={"data": _PLACES, "out": True}),
    }
    return run.settings.to_record().model_copy(update={"training": training})


def state_tensors(run: Run, moments: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """All that changes with the steps: weights, AdamW's moments, running means."""
    tensors: dict[str, Tensor] = {}
    for number, (name, parameter) in enumerate(run.model.named_parameters()):
        tensors[f"model.{name}"] = parameter
        for key, value in moments.get(number, {}).items():
            tensors[f"optimiser.{key}.{name}"] = value
    tensors.update({f"ema.{name}": value for name, value in run.ema.named_parameters()})
    return tensors


@torch.no_grad()
def load_state(run: Run, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `state_tensors`."""
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


def identity(run: Run) -> dict[str, Any]:
    """What must not change between a state and the run that goes on from it, but for `_MAY_CHANGE`."""
    keep = run.settings.model_dump(
        mode="json", include={"network", "optimiser", "loss", "seed", "value_range", "precision"}
    )
    data = run.settings.data.model_dump(mode="json", exclude={*_PLACES, "workers"})
    return {"settings": {**keep, "data": data}, "cases": [subject.name for subject in run.samples.subjects]}


def validation(run: Run) -> dict[str, Any]:
    """What the score of a validation hangs on beside the weights: two are comparable where it is the same."""
    sampler, steps = run.settings.validation_plan
    return {"cases": [list(subject.digests) for subject in run.held_out], "sampler": sampler, "steps": steps}


def check_identity(run: Run, path: Path, header: Mapping[str, Any]) -> None:
    """Say what a run does in another way than the state that it goes on from.

    Raises:
        SettingsError: the state belongs to another run.
    """
    mine = parse_json(json.dumps(identity(run)))
    changed = _changes(_flat(header["settings"]), _flat(mine["settings"]), _flat(_defaults(run.settings)))
    if refused := [what for name, what in changed.items() if name not in _MAY_CHANGE]:
        raise SettingsError(
            f"{path} belongs to other settings: {'; '.join(refused)}. Go on with the same ones, or train into another "
            "folder"
        )
    for what in changed.values():
        run.log.say(f"going on with {what}")
    before, now = set(header["cases"]), set(mine["cases"])
    if before != now:
        found = {"gone": sorted(before - now), "new": sorted(now - before)}
        told = "; ".join(listed(names, f"cases are {how}") for how, names in found.items() if names)
        raise SettingsError(
            f"{path} belongs to other cases: {told}. Go on with the same ones, or train into another folder"
        )


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, str]:
    """Settings by name that differ, in words; what a state from before there was such a setting had is its default."""
    changes = {}
    for name in {**new, **old}:
        before, now = old.get(name, defaults.get(name)), new.get(name, defaults.get(name))
        if before != now:
            changes[name] = f"{name}={json.dumps(now)} instead of {json.dumps(before)}"
    return changes


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in sections.items():
        flat |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _defaults(settings: TrainingSettings) -> dict[str, Any]:
    """What the settings of each section are where nobody says anything."""
    sections = {name: type(getattr(settings, name)) for name in ("network", "optimiser", "loss", "data")}
    return {
        name: {
            key: to_jsonable_python(field.get_default(call_default_factory=True))
            for key, field in section.model_fields.items()
            if not field.is_required()
        }
        for name, section in sections.items()
    }
