"""The command that describes a parent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from puzzle_nas.commands.app import app


@app.command("inspect")
def inspect_command(
    parent: Annotated[
        str,
        typer.Argument(metavar="PARENT", help="A checkpoint folder, a .gguf file, a hub id or package:NAME==VERSION."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Describe a parent from its files' headers: sizes, tokenizer, formats, what is unusual, what cannot be loaded."""
    from puzzle_nas.exporters.served import may_become
    from puzzle_nas.families import find_checkpoint
    from puzzle_nas.parents import describe, examine

    with TemporaryDirectory() as folder:
        examined = examine(find_checkpoint(parent, Path(folder)))
        found = {**describe(examined), **may_become(examined)}
    print(json.dumps(found, indent=1, ensure_ascii=False) if as_json else "\n".join(_lines(found)))


def _lines(found: Mapping[str, Any]) -> list[str]:
    """What was found, one fact a line."""
    from puzzle_nas.exporters.served import lacking

    sizes, tokenizer = found["sizes"], found["tokenizer"]
    types = ", ".join(f"{count} {name}" for name, count in found["types"].items())
    slots = [f"{slot} of {of['layers']} layers: {', '.join(of['may_become'])}" for slot, of in found["slots"].items()]
    facts = {
        "parent": found["path"],
        "family": found["family"],
        "parameters": f"{found['parameters'] / 1e6:,.1f} M, head {'' if found['tied_embeddings'] else 'not '}tied",
        "sizes": ", ".join(f"{name.removeprefix('num_')} {value}" for name, value in sizes.items()),
        "files": f"{found['files']} {found['format']}, {found['size_bytes'] / 1e6:,.1f} MB; tensors: {types}",
        "quantisation": found["quantisation"] or "none",
        "rope": _below(_rope(found["rope"] or {})) or "none",
        "tokenizer": f"{tokenizer['entries']} entries" + (f", split as {tokenizer['pre']}" if tokenizer["pre"] else ""),
        "before text": _token(found["bos"]) or "nothing",
        "between documents": _token(found["document_separator"]) or "nothing",
        "end tokens": ", ".join(filter(None, map(_token, found["end_tokens"]))) or "none",
        "chat template": found["chat_template"],
        "slots may become": _below(slots) or f"unknown: {found['family']} has no adapter (docs/new-family.md)",
        "served by": ", ".join(engine + lacking(kinds) for engine, kinds in found["served_by"].items()) or "nothing",
        "not served by": _below([f"{name}: {'; '.join(why)}" for name, why in found["not_served_by"].items()]),
        "unusual": _below(found["unusual"]) or "nothing",
    }
    return [f"{name:20}{value}" for name, value in facts.items() if value]


def _rope(parameters: Mapping[str, Any]) -> list[str]:
    """Rotary positions, those of each kind of layer where they differ."""
    apart = {kind: value for kind, value in parameters.items() if isinstance(value, Mapping)}
    if apart:
        return [f"{kind}: {', '.join(_rope(value))}" for kind, value in apart.items()]
    return [", ".join(f"{name} {value}" for name, value in parameters.items() if value is not None)]


def _below(lines: list[str]) -> str:
    """Several values of one fact, each on a line of its own."""
    return f"\n{'':20}".join(lines)


def _token(token: Mapping[str, Any] | None) -> str | None:
    return None if token is None else f"{token['text']} ({token['id']})"
