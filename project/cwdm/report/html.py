"""Pages that are one file each: they need nothing beside them, and let a browser fetch and run nothing else."""

import base64
import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from cwdm import __version__
from cwdm.errors import InputError
from cwdm.files import is_file, is_link, output_errors
from cwdm.progress import printable

if TYPE_CHECKING:
    import PIL.Image

GENERATOR = f"cwdm {__version__}"
_OWN_PAGE = re.compile(rb'<meta name="generator" content="cwdm [^"]*">')
_HEAD_BYTES = 4096  # of a page, in which that stands

_FOLDERS = re.compile(r"(?<![\w+/.:<…-])(?:/[^/\s]+)*/(?=[^/\s])")
"""What leads to a file's name; neither a URL, nor a fraction, nor the end of a tag."""


def check_replaceable(path: Path) -> None:
    """Refuse to replace a file that is no report; links are not what is lost.

    Raises:
        InputError: it is another file.
        OutputError: it cannot be read.
    """
    with output_errors(path.parent):
        if is_link(path) or not is_file(path):
            return
        with path.open("rb") as file:
            own = _OWN_PAGE.search(file.read(_HEAD_BYTES))
    if not own:
        raise InputError(f"{path} is there and is no report of cwdm; move it away, or choose another file with --out")


def write_page(file: IO[bytes], page: Iterable[str]) -> None:
    """Write a page, part by part."""
    for section in page:
        file.write(as_bytes(section))


def as_bytes(text: str) -> bytes:
    """Text as it is written."""
    return text.encode(errors="backslashreplace")  # names of files can be any bytes


def environment_for(folders: Sequence[str]) -> jinja2.Environment:
    """What makes pages of the templates.

    Args:
        folders: that pages say nothing of, each with a slash behind it.
    """
    return jinja2.Environment(
        loader=jinja2.PackageLoader("cwdm.report"),
        autoescape=True,
        undefined=_Absent,
        finalize=lambda value: _shareable(value, folders),
    )


class _Absent(jinja2.ChainableUndefined):
    """What a case without pictures leaves out."""


def _shareable(value: Any, folders: Sequence[str]) -> Any:
    """Text that can be shown to anyone: without what does not print, and without the folders that files lie in.

    A name may hold what turns the rest of the line around; where files lie tells of people and machines.
    """
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    for folder in folders:
        value = value.replace(folder, "…/")
    value = _FOLDERS.sub("…/", value)
    return printable(value, lines=True)


def webp_uri(picture: "PIL.Image.Image", **how: int) -> str:
    """A picture as a page holds it."""
    file = io.BytesIO()
    picture.save(file, "WEBP", **how)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def security_policy(scripts: Iterable[str]) -> str:
    """A content security policy under which nothing is fetched, and no script runs but these."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "connect-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def packaged(name: str) -> str:
    """The text of a file that comes with the report."""
    return resources.files("cwdm.report").joinpath(name).read_text(encoding="utf-8")
