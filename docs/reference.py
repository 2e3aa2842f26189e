"""Writes docs/reference-recipe.md and docs/reference-cli.md from the recipe's models and the command line.

Run it after changing either: python docs/reference.py
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo
from typer.main import get_command

from puzzle_nas.cli import app
from puzzle_nas.recipe import Recipe, Settings
from puzzle_nas.recipe_text import settings_in

FOLDER = Path(__file__).parent
NOTE = "<!-- Written by docs/reference.py; do not edit. -->\n"


def recipe_reference() -> str:
    """One table for each part of a recipe."""
    lines = [
        "# Which settings does a recipe have?",
        "",
        NOTE,
        "A recipe is YAML. `puzzle run RECIPE key.subkey=value` overrides single settings. Required ones must "
        "be given. `puzzle recipe` prints the same as a recipe with comments.",
    ]
    for path, model in _parts("", Recipe):
        lines += ["", f"## {path or 'The recipe itself'}", "", inspect.cleandoc(model.__doc__ or ""), ""]
        lines += ["| setting | default | range | meaning |", "|---|---|---|---|"]
        for name, field in model.model_fields.items():
            inner = settings_in(field.annotation)
            if inner is not None:
                name_below = f"{path}.{name}".lstrip(".") + ("[]" if inner[1] else "")
                below = f"see [{name_below}](#{_anchor(name_below)})"
                lines.append(_row(f"`{name}`", "" if not field.is_required() else "required", "", below))
            else:
                lines.append(_row(f"`{name}`", _default(field), _range(field), field.description or ""))
    return "\n".join(lines) + "\n"


def _parts(path: str, model: type[Settings]) -> Iterator[tuple[str, type[Settings]]]:
    yield path, model
    for name, field in model.model_fields.items():
        inner = settings_in(field.annotation)
        if inner is not None:
            yield from _parts(f"{path}.{name}".lstrip(".") + ("[]" if inner[1] else ""), inner[0])


def _anchor(title: str) -> str:
    """The name that a heading gets on the usual sites."""
    return "".join(letter for letter in title.lower() if letter.isalnum() or letter in "-_")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    text = yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("...").strip()
    return f"`{text}`"


def _range(field: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        f"{sign} {getattr(part, name):g}"
        for part in field.metadata
        for name, sign in signs.items()
        if getattr(part, name, None) is not None
    ]
    choices = [f"`{value}`" for value in _literals(field.annotation)]
    return ", ".join(bounds + choices)


def _literals(annotation: Any) -> list[str]:
    arguments = getattr(annotation, "__args__", ())
    return [a for a in arguments if isinstance(a, str)] + [t for a in arguments for t in _literals(a)]


def _row(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def cli_reference() -> str:
    """Every command with its arguments and options."""
    lines = ["# Which commands are there?", "", NOTE]
    lines.append("`puzzle COMMAND --help` prints the same. Mistakes end with one sentence and exit code 2.")
    for name, command in _commands("puzzle", get_command(app)):
        arguments = [p for p in command.params if not p.opts[0].startswith("-")]
        usage = " ".join([name, *(_argument(p) for p in arguments), "[OPTIONS]"])
        lines += ["", f"## {name}", "", f"`{usage}`", "", inspect.cleandoc(command.help or "")]
        rows = []
        for parameter in command.params:
            if parameter in arguments:
                rows.append(_row(f"`{_argument(parameter)}`", "", parameter.help or ""))
            elif parameter.name != "help":
                value = "" if parameter.is_flag else " " + (parameter.metavar or parameter.name.upper())
                rows.append(_row(f"`{', '.join(parameter.opts)}{value}`", _given(parameter), parameter.help or ""))
        if rows:
            lines += ["", "| argument or option | default | meaning |", "|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield name, command
        return
    for below, inner in command.commands.items():
        yield from _commands(f"{name} {below}", inner)


def _argument(parameter: Any) -> str:
    return parameter.metavar or parameter.name.upper()


def _given(option: Any) -> str:
    if option.required:
        return "required"
    return "" if option.is_flag or option.default is None else f"`{option.default}`"


REFERENCES = {"reference-recipe.md": recipe_reference, "reference-cli.md": cli_reference}

if __name__ == "__main__":
    for file, content in REFERENCES.items():
        (FOLDER / file).write_text(content())
        print(f"Written: {FOLDER / file}")
