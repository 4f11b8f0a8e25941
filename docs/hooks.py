"""What mkdocs does beside its plugins: the page of commands is written from the command line itself."""

import re
import subprocess
import sys
from typing import Any

PLACE = "<!-- commands: written by docs/hooks.py from the command line itself -->"
WRITE = [sys.executable, "-m", "typer", "cwdm.cli.app", "utils", "docs", "--name", "cwdm"]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page, with the help of every command where it is asked for."""
    return markdown.replace(PLACE, commands()) if PLACE in markdown else markdown


def commands() -> str:
    """Markdown with a heading a command, one level below the page's own."""
    written = subprocess.run(WRITE, capture_output=True, text=True, check=True).stdout
    return re.sub(r"^#", "##", written, flags=re.MULTILINE)
