"""Settings of a run, read from a `parameters.yaml` and `key=value` overrides, every key checked by name and type."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from cwdm.errors import SettingsError
from cwdm.samplers import falling_timesteps, known_sampler


class StrictSettings(BaseModel):
    """Settings of which every key must be known and of the right type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


PRESETS: dict[str, dict[str, Any]] = {
    "exact": {"name": "ddpm", "steps": 1000},  # what the published code does
    "balanced": {"name": "dpmpp", "steps": 20},
    "fast": {"name": "dpmpp", "steps": 5},
}


class SamplerSettings(StrictSettings):
    """How noise becomes an image; None leaves it to what the checkpoint recommends.

    In place of `name` and `steps`, `preset` may name one of `PRESETS`.

    Attributes:
        name: ddpm (published), ddim or dpmpp.
        steps: network evaluations, spread evenly over the schedule.
        timesteps: an explicit falling list within 999 to 0, overrides `steps`.
    """

    name: Annotated[str, AfterValidator(known_sampler)] | None = None
    steps: int | None = Field(default=None, ge=1, le=1000)
    timesteps: Annotated[list[int], AfterValidator(falling_timesteps)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "preset" not in values:
            return values
        preset, others = values["preset"], {key: value for key, value in values.items() if key != "preset"}
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}")
        if others:
            raise ValueError(f"preset {preset} says name and steps itself; leave out {', '.join(others)}")
        return PRESETS[preset]


class OutputSettings(StrictSettings):
    """What is written.

    Attributes:
        intensity: "native" maps the result onto the nearest contrast's clipping range; "unit" leaves [0, 1].
        background: "mask" zeroes what is outside the brain of the conditions, "threshold" what is at or below
            `threshold` (of the unit range), "none" nothing.
        orient: bring cases stored in another orientation to the one the weights know, and back.
    """

    intensity: Literal["native", "unit"] = "native"
    background: Literal["mask", "threshold", "none"] = "mask"
    threshold: float = Field(default=0.04, ge=0, le=1)
    orient: bool = True


class Settings(StrictSettings):
    """Everything that decides what a case's output looks like.

    Attributes:
        seed: of the one generator that each case gets, so results depend on neither order nor sharding.
        precision: auto is bf16 on a GPU that has it and float32 elsewhere.
        noise: "cpu" draws the same noise for a seed whatever the device; "device" draws it on the GPU, which saves time
            with ddpm, as that draws at every step, and gives other samples.
        samples: more than one writes their mean; the spread goes to the report folder.
    """

    seed: int = Field(default=42, ge=0, lt=2**63)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    noise: Literal["cpu", "device"] = "cpu"
    samples: int = Field(default=1, ge=1, le=1000)
    sampler: SamplerSettings = SamplerSettings()
    output: OutputSettings = OutputSettings()


_MOST_BYTES = 1 << 20

_INT, _FLOAT, _TIMESTAMP = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))

Model = TypeVar("Model", bound=BaseModel)


def load_settings(path: Path | None = None, overrides: Iterable[str] = ()) -> Settings:
    """Settings from a YAML file (may be empty, every key optional), then overrides such as `sampler.steps=10`.

    Raises:
        SettingsError: not readable, not YAML, an unknown key, or a value of the wrong type or range.
    """
    return read_settings(Settings, path, overrides)


def read_settings(model: type[Model], path: Path | None, overrides: Iterable[str]) -> Model:
    """Like `load_settings`, for any model of settings."""
    values = _read_yaml(path) if path else {}
    source = str(path) if path else "settings"
    for override in overrides:
        _set(values, override)
    try:
        return model.model_validate(_without_nulls(values))
    except ValidationError as error:
        # A default that follows from a value of which the fault is told already is none of its own.
        faults = [fault for fault in error.errors() if fault["type"] != "default_factory_not_called"]
        raise SettingsError("\n".join(f"{source}: {_explain(model, fault)}" for fault in faults)) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise SettingsError(f"{path}: is not a file")
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise SettingsError(f"{path}: larger than 1 MiB, which no settings file is")
        if "&" in text and "*" in text:  # aliases, with which a few lines can expand to gigabytes
            _refuse_aliases(path, text)
        values = yaml.load(text, _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: the settings cannot be read ({error})") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: !!int text
        raise SettingsError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: expected 'key: value' lines, found a {type(values).__name__}")
    return values


class _Loader(yaml.SafeLoader):
    """Numbers as in YAML 1.2's core schema; a key that stands twice is refused.

    PyYAML follows YAML 1.1, in which 010 is 8, 1:30 is 90, 4e-2 is text and 2024-01-15 a date. Of a key that stands
    twice, which YAML forbids, it would take the last without a word.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  # PyYAML's name for it
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT, _TIMESTAMP)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


# YAML 1.2.2, section 10.3.2. In the order given, the first match counts.
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?[0-9]+\Z|0o[0-7]+\Z|0x[0-9a-fA-F]+\Z"), [*"-+0123456789"])
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z"
        r"|[-+]?\.(?:inf|Inf|INF)\Z|\.(?:nan|NaN|NAN)\Z"
    ),
    [*"-+.0123456789"],
)
_Loader.add_constructor(_INT, _integer)


def _refuse_aliases(path: Path, text: str) -> None:
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
        raise SettingsError(f"{path}: YAML aliases (*name) are not supported")


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise SettingsError(f"'{override}': expected key=value, such as sampler.steps=10")
    *groups, name = key.split(".")
    for group in groups:
        if values.get(group) is None:
            values[group] = {}
        values = values[group]
        if not isinstance(values, dict):
            raise SettingsError(f"'{override}': {group} holds a value, not further keys")
    try:
        values[name] = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise SettingsError(f"'{override}': the value is not valid YAML") from error


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
