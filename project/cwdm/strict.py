"""Settings of which every key must be known and of the right type, with messages that say what was meant."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

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
        from cwdm.refused import explain  # here, as most settings are right

        # A default that follows from a value of which the fault is told already is none of its own.
        faults = [fault for fault in error.errors() if fault["type"] != "default_factory_not_called"]
        raise SettingsError(*(f"{source}: {explain(model, fault)}" for fault in faults)) from error


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """A key without a value means its default, so a file may keep its keys and comment their values out."""
    return {
        key: _without_nulls(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }
