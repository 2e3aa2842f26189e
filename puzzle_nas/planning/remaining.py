"""How long the rest of a run will take: the plan, corrected by what its finished stages took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.families import architecture_of, parent_checkpoint
from puzzle_nas.parents.config import read_config
from puzzle_nas.planning.measuring import this_machine
from puzzle_nas.planning.plan import duration, make_plan
from puzzle_nas.planning.shapes import meta_model, model_size
from puzzle_nas.recipe import Recipe, search_space_of


class Remaining:
    """Plans a run once, when it is first asked; nothing is measured for a run that is done.

    Args:
        stages: names of those that will run, in order.
        processes: of the run.
        to_the_end: whether the last of `stages` is the run's last.
    """

    def __init__(
        self, recipe: Recipe, run: RunFolder, stages: Sequence[str], processes: int = 1, to_the_end: bool = True
    ):
        self.recipe, self.run, self.stages, self.processes = recipe, run, stages, processes
        self.to_the_end = to_the_end
        self._planned: dict[str, float] | None = None

    def seconds(self, stage: str) -> float | None:
        """From the beginning of a stage to the end; None until the parent is prepared."""
        if not self.run.parent.is_file():
            return None
        if self._planned is None:
            self._planned = self._plan(parent_checkpoint(self.run))
        to_come, taken = self.stages[self.stages.index(stage) :], self.run.seconds()
        left = sum(self._planned[name] for name in to_come)
        done = [name for name in self._planned if name in taken and name not in to_come]
        return left * corrected(sum(taken[name] for name in done), sum(self._planned[name] for name in done), left)

    def text(self, stage: str) -> str:
        """What a stage's line says of it; nothing where nothing is known."""
        seconds, end = self.seconds(stage), "for the whole run" if self.to_the_end else "for the stages asked for"
        return "" if seconds is None else f" (about {duration(seconds)} left {end})"

    def _plan(self, checkpoint: Path) -> dict[str, float]:
        config = read_config(checkpoint)
        size = model_size(meta_model(config), search_space_of(self.recipe, architecture_of(config)))
        machine = this_machine(self.recipe, size, self.run.path, self.processes)
        return {stage.stage: stage.seconds for stage in make_plan(self.recipe, size, machine).stages}


def corrected(taken: float, planned: float, left: float) -> float:
    """How much longer than planned the rest will take: as much as what is done took, the more there is of that.

    Args:
        left: seconds planned for the rest, a quarter of which count as if they took what was planned. A machine that is
            slower than its rates, measured in a second, is so in all stages.
    """
    doubted = left / 4
    return (taken + doubted) / (planned + doubted) if planned + left else 1.0
