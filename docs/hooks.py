"""What mkdocs does beside its plugins: the page of commands is written from the command line itself."""

from typing import Any

import click
from typer.cli import get_docs_for_click
from typer.main import get_command

from cwdm.cli.app import app

PLACE = "<!-- commands: written by docs/hooks.py from the command line itself -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page, with the help of every command where it is asked for."""
    return markdown.replace(PLACE, commands()) if PLACE in markdown else markdown


def commands() -> str:
    command = get_command(app)
    return get_docs_for_click(obj=command, ctx=click.Context(command, info_name="cwdm"), name="cwdm", indent=1)
