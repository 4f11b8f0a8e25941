"""Settings of which every key must be known and of the right type, with messages that say what was meant."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cwdm.errors import SettingsError

Model = TypeVar("Model", bound=BaseModel)
Number = Annotated[float, Field(strict=False)]  # a quoted '1e-5' too


class StrictSettings(BaseModel):
    """Settings of which every key must be known and of the right type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def read_settings(model: type[Model], path: Path | None, overrides: Iterable[str]) -> Model:
    """Settings from a YAML file (may be empty), then overrides such as `sampler.steps=10`.

    Raises:
        SettingsError: not readable, not YAML, an unknown key, or a value of the wrong type or range.
    """
    values: dict[str, Any] = {}
    source = str(path) if path else "settings"
    if path or (overrides := list(overrides)):
        from cwdm import yaml12  # not loaded for settings that are all left as they are

        values = yaml12.read_yaml(path) if path else {}
        for override in overrides:
            yaml12.set_value(values, override)
    try:
        return model.model_validate(_without_nulls(values))
    except RecursionError as error:
        raise SettingsError(f"{source}: keys or values are nested too deeply") from error
    except ValidationError as error:
        # A default that follows from a value of which the fault is told already is none of its own.
        faults = [fault for fault in error.errors() if fault["type"] != "default_factory_not_called"]
        raise SettingsError(*(f"{source}: {_explain(model, fault)}" for fault in faults)) from error


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """A key without a value means its default, so a file may keep its keys and comment their values out."""
    return {
        key: _without_nulls(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }


def _explain(model: type[BaseModel], fault: Any) -> str:
    keys = [str(key) for key in fault["loc"]]
    where = ".".join(keys)
    if fault["type"] == "missing":
        return f"{where} is needed; give it in the file or as {where}=VALUE"
    if fault["type"] != "extra_forbidden":
        found = "" if isinstance(fault["input"], dict) else f", found {fault['input']!r}"
        return f"{where or 'settings'}: {fault['msg'].removeprefix('Value error, ')}{found}"
    known = list(_group(model, keys[:-1]).model_fields)
    guess = difflib.get_close_matches(keys[-1], known, n=1)
    hint = f"did you mean '{guess[0]}'?" if guess else f"known here: {', '.join(known)}"
    return f"unknown key '{where}'; {hint}"


def _group(model: type[BaseModel], keys: list[str]) -> type[BaseModel]:
    """The model of the settings under these keys, lists and unions passed through."""
    for key in keys:
        annotation = None if key.isdecimal() else model.model_fields[key].annotation
        models = [kind for kind in _leaves(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        model = models[0] if models else model
    return model


def _leaves(annotation: Any) -> list[Any]:
    inside = get_args(annotation)
    return [leaf for part in inside for leaf in _leaves(part)] if inside else [annotation]
