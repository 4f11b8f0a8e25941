"""Command lines as they used to be: what an option names now stood among the words."""

from pathlib import Path
from typing import Annotated

import typer

from cwdm.errors import SettingsError

REQUIRED = r"[dim red]\[required][/]"
"""At the end of a help text: of an option whose value may also stand where it used to."""

Word = Annotated[Path | None, typer.Argument(hidden=True)]
"""A place that an option names now."""


def either(named: Path | None, word: Path | None, option: str, default: Path | None = None) -> Path:
    """The value of an option that may stand among the words instead.

    Raises:
        SettingsError: it stands twice, or nowhere and there is no default.
    """
    if named and word:
        raise SettingsError(f"expected {option} once, found {named} and {word}")
    if not (found := named or word or default):
        raise SettingsError(f"expected {option}, found none; --help says what it is")
    return found


def first_of(named: Path | None, words: list[str] | None) -> tuple[Path, list[str]]:
    """The weights and the settings of a command whose first word is the weights unless an option names them.

    Raises:
        SettingsError: there are no weights.
    """
    if named:
        return named, words or []
    weights, *settings = words or [""]
    return either(None, Path(weights) if weights else None, "--weights"), settings
