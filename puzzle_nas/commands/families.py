"""The command that says which parents are known."""

from __future__ import annotations

from puzzle_nas.commands.app import app


@app.command("families")
def families_command() -> None:
    """Families of parents, what the slots of their layers may become, and the engines that serve their children."""
    from transformers import AutoConfig

    from puzzle_nas.exporters.served import engines_of, kinds_by_slot, lacking
    from puzzle_nas.families import FAMILIES, architecture_of

    alike: dict[tuple[str, ...], list[str]] = {}
    for name in FAMILIES:
        kinds = kinds_by_slot(architecture_of(AutoConfig.for_model(name)))
        slots = [f"  {slot:<10} {', '.join(found)}" for slot, found in kinds.items()]
        served = [engine + lacking(kinds_it_lacks) for engine, kinds_it_lacks in engines_of(name, kinds).items()]
        alike.setdefault((*slots, f"  {'served by':<10} {', '.join(served)}"), []).append(name)
    for lines, names in alike.items():
        print(", ".join(names), *lines, sep="\n")
