"""Values in YAML, numbers as version 1.2 writes them, from files and texts that nobody has checked."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from cwdm.errors import SettingsError
from cwdm.files import exists, is_file

_MOST_BYTES = 1 << 20

_MOST_DIGITS = 100

_BOOL, _INT, _FLOAT, _TIMESTAMP = (f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp"))


def read_yaml(path: Path) -> dict[str, Any]:
    """Keys and values of a file, which may be empty.

    Raises:
        SettingsError: not readable, too large, not YAML, or no keys and values.
    """
    try:
        if exists(path) and not is_file(path):  # opening a pipe would wait for ever
            raise SettingsError(f"{path}: is not a file")
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise SettingsError(f"{path}: larger than 1 MiB, which no settings file is")
        if "&" in text and "*" in text:  # aliases, with which a few lines can expand to gigabytes
            _refuse_aliases(path, text)
        values = parse(text)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: the settings cannot be read ({error})") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: !!int text
        raise SettingsError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: expected 'key: value' lines, found a {type(values).__name__}")
    return values


def parse(text: str) -> Any:
    """The value of a text; raises yaml.YAMLError, RecursionError or ValueError."""
    return yaml.load(text, _Loader)


def set_value(values: dict[str, Any], override: str) -> None:
    """Take over an override such as `sampler.steps=10`; raises SettingsError where it is none."""
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
        values[name] = parse(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise SettingsError(f"'{override}': the value is not valid YAML") from error


class _Loader(yaml.SafeLoader):
    """Numbers as in YAML 1.2's core schema; a key that stands twice is refused.

    PyYAML follows YAML 1.1, in which 010 is 8, 1:30 is 90, 4e-2 is text and 2024-01-15 a date. Of a key that stands
    twice, which YAML forbids, it would take the last without a word.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  # PyYAML's name for it
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT, _TIMESTAMP)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    # Those of version 1.2 alone; of !!timestamp, !!binary, !!set, !!omap and !!pairs, PyYAML's raise what they like.
    yaml_constructors = {  # noqa: RUF012  # PyYAML's name for it
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
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
    if len(text) > _MOST_DIGITS:  # Python prints no number of thousands of digits
        raise yaml.MarkedYAMLError(problem=f"a number of {len(text)} digits", problem_mark=node.start_mark)
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _tagged(kind: str, construct: Callable[[Any, yaml.ScalarNode], Any]) -> Callable[[Any, yaml.ScalarNode], Any]:
    """PyYAML's constructor, for texts that are tagged with what they are not."""

    def checked(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
        try:
            return construct(loader, node)
        except (LookupError, ValueError) as error:
            raise yaml.MarkedYAMLError(problem=f"{node.value!r} is no {kind}", problem_mark=node.start_mark) from error

    return checked


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
_Loader.add_constructor(_INT, _tagged("int", _integer))
_Loader.add_constructor(_FLOAT, _tagged("float", yaml.SafeLoader.construct_yaml_float))
_Loader.add_constructor(_BOOL, _tagged("bool", yaml.SafeLoader.construct_yaml_bool))


def _refuse_aliases(path: Path, text: str) -> None:
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
        raise SettingsError(f"{path}: YAML aliases (*name) are not supported")
