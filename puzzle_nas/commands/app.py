"""The command line that commands add themselves to, and the arguments that several of them share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="puzzle",
    help="Turn a trained LLM into a smaller, faster child that meets your limits, measured on your machine.\n\n"
    "Start with: puzzle run recipes/quickstart.yaml",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as gkd.tokens=100000."),
]
Again = Annotated[bool, typer.Option("--again", help="Discard what this stage has made and make it anew.")]
