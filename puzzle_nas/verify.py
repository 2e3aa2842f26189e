"""Is a run folder what its records say? Every file against its checksum, every stage against what it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from puzzle_nas.artifacts import RunFolder, file_checksum
from puzzle_nas.errors import PuzzleError, puzzle_command
from puzzle_nas.pipeline import made_from, needs, open_run
from puzzle_nas.stages import STAGES

BOOKKEEPING = ("recipe.yaml", ".lock", "stages/", "seconds/")
"""What no stage records as an artifact."""


@dataclass
class StageCheck:
    """One stage's record against its files, by relative name."""

    command: str
    finished: bool = False
    problem: str | None = None
    """What is wrong with the record itself."""
    stale: bool = False
    """Made from something else than the recipe and the earlier stages are now."""
    fine: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Nothing is wrong, as far as the stage has come."""
        return not (self.problem or self.stale or self.missing or self.changed)

    @property
    def state(self) -> str:
        """One word."""
        if not self.sound:
            return "stale" if self.stale and not (self.problem or self.missing or self.changed) else "damaged"
        return "fine" if self.finished else "unfinished"


@dataclass
class RunCheck:
    """A whole run folder, checked."""

    run: RunFolder
    stages: dict[str, StageCheck]
    unrecorded: list[str]
    """Files that no finished stage has made: searches, exports, and what an interrupted stage has so far."""

    @property
    def sound(self) -> bool:
        """Nothing is missing, changed or stale."""
        return all(check.sound for check in self.stages.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        stages = {name: asdict(check) | {"state": check.state} for name, check in self.stages.items()}
        return {"run": str(self.run), "sound": self.sound, "stages": stages, "unrecorded": self.unrecorded}

    def to_text(self) -> str:
        """A line for each stage and each fault, and the way out."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for check in self.stages.values():
            files = f"{len(check.fine)} files fine" if check.finished else ""
            yield f"{check.command:15s} {check.state:10s} {files}".rstrip()
            if check.problem:
                yield f"  {check.problem}"
            for state in ("missing", "changed"):
                yield from (f"  {state}: {name}" for name in getattr(check, state))
            if check.stale:
                yield "  stale: made from another recipe, other settings or other inputs than are there now"
        yield from (f"unrecorded: {name}" for name in self.unrecorded)
        damaged = [check.command for check in self.stages.values() if check.missing or check.changed]
        if damaged:
            yield f"Make what is damaged again with: {puzzle_command(damaged[0], self.run, '--again')}"
        elif any(check.stale for check in self.stages.values()):
            yield "The next puzzle run with this folder makes what is stale again."
        elif self.sound:
            yield "Everything that is recorded is there and unchanged."


def verify_run(run: RunFolder) -> RunCheck:
    """Read every recorded file; nothing is written.

    Raises:
        ArtifactError: the folder is no run.
        RecipeError: its recipe cannot be read.
    """
    recipe = open_run(run)
    checks: dict[str, StageCheck] = {}
    recorded: set[str] = set()
    for stage in STAGES:
        if stage.why_left_out(recipe) and not run.record_path(stage.name).exists():
            continue
        check = checks[stage.name] = StageCheck(stage.command)
        try:
            record = run.record(stage.name)
        except PuzzleError as error:
            check.problem = str(error)
            continue
        if record is None:
            continue
        check.finished = True
        recorded |= set(record["outputs"])
        for name, checksum in record["outputs"].items():
            path = run / name
            if not path.is_file():
                check.missing.append(name)
            else:
                (check.fine if file_checksum(path) == checksum else check.changed).append(name)
        try:
            check.stale = record["made_from"] != made_from(stage, recipe, run)
        except PuzzleError:
            # An earlier stage has no record that could be read: this one's inputs will be made again.
            check.stale = True
    # An input that is stale itself has not been made again yet: its record still fits what was made from it.
    for stage in (stage for stage in STAGES if stage.name in checks):
        if checks[stage.name].finished and any(checks[before.name].stale for before in needs(stage, recipe)):
            checks[stage.name].stale = True
    names = (str(path.relative_to(run.path)) for path in sorted(run.path.rglob("*")) if path.is_file())
    unrecorded = [name for name in names if name not in recorded and not name.startswith(BOOKKEEPING)]
    return RunCheck(run, checks, unrecorded)
