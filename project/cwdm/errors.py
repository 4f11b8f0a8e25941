"""Errors meant for the person at the keyboard: what was wrong, where, and what to do about it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class CwdmError(Exception):
    """Base of every error that the command line turns into a message instead of a traceback, a line an argument."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class CaseError(CwdmError):
    """One case cannot be used; the others go on.

    Args:
        case: name of the case.
        reason: what was expected and what was found, then what to do.
    """

    def __init__(self, case: str, reason: str) -> None:
        super().__init__(f"{case}: {reason}")
        self.case = case
        self.reason = reason

    def __reduce__(self) -> tuple[type["CaseError"], tuple[str, str]]:
        # Between processes, exceptions are made again from the arguments of Exception, which are others.
        return type(self), (self.case, self.reason)


class InputError(CwdmError):
    """The input folder as a whole cannot be used."""


class OutputError(CwdmError):
    """The output folder cannot take the result (not writable, full); no point in going on."""


class NameInUseError(OutputError):
    """One file cannot be written under its name, which another one can."""


class WeightsError(CwdmError):
    """Weights are missing, damaged, of the wrong architecture, or hold code."""


class SettingsError(CwdmError):
    """A setting has an unknown name, a wrong type or an impossible value."""


class DeviceLostError(CwdmError):
    """The GPU no longer works for this process, though it may for a new one; no point in going on in this one."""


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """A block of imports that an installation without an extra lacks.

    Args:
        extra: its name; several are separated by commas.
        what: what it brings, in words.

    Raises:
        CwdmError: a module is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise CwdmError(f"{error.name} is missing; pip install 'cwdm[{extra}]' brings {what}") from error


def listed(names: Sequence[str], kind: str = "tensors", most: int = 8) -> str:
    """How many there are and their names, for a message: those of a file are of any length, with any character."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    shown = [name[:80].encode("unicode_escape").decode() for name in names[:most]]
    return f"{len(names)} {kind} ({', '.join(shown)}{more})"
