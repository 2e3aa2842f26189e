"""Predicted costs of an architecture from a cost table, and what a limit means in its columns. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, read_json, written_by_this_version
from puzzle_nas.limits import LIMITED_TIMES, MIX, check_limit
from puzzle_nas.recipe import Recipe
from puzzle_nas.scenario import Scenario
from puzzle_nas.search import Limit
from puzzle_nas.specs import Spec

TIMES = ("runtime_ms", "prefill_ms", "decode_step_ms")
"""Of a whole request batch, of its prompts, and of one token for every request."""


REPEATS = 3
"""How often a model is timed for costs, interleaved; more often where times differ too much. Where the engine loads
models again for each, once less, and twice each time."""


def timed_steps(engine: str) -> int:
    """Decode steps that are timed, around the middle of the decode, at most those of the scenario.

    Steps of engines that serve are short.
    """
    return 8 if engine == "torch" else 16


def group_name(layer: int, groups: Sequence[int]) -> str:
    """What a cost table calls the layers that are like `layer`, or the head, which is behind the last layer."""
    return f"layers like {groups[layer]}" if layer < len(groups) else "head"


@dataclass(frozen=True)
class CostTable:
    """What each variant costs, and what the parts that every child has cost."""

    data: Mapping[str, Any]
    scenarios: Sequence[Scenario]

    @classmethod
    def load(cls, run: RunFolder, recipe: Recipe) -> CostTable:
        """The run's table, for the batch sizes that the search chose where the recipe has several."""
        every = cls.load_mixes(run, recipe)
        if len(every) == 1:
            return every[0]
        chosen = read_json(run.architecture(), "search-architecture")["scenarios"]
        return next(table for table in every if [s.name for s in table.scenarios] == chosen)

    @classmethod
    def load_mixes(cls, run: RunFolder, recipe: Recipe) -> list[CostTable]:
        """The run's table for each choice of batch sizes that was measured."""
        path = run.costs(recipe.engine)
        data = read_json(path, "measure-costs")
        with written_by_this_version(path, "measure-costs"):
            _ = data["bytes"]["variants"][group_name(len(data["groups"]), data["groups"])]
        return [cls(data, mix) for mix in recipe.mixes() if all(s.name in data["scenarios"] for s in mix)]

    def parent_measured_ms(self, scenario: Scenario) -> float:
        """Milliseconds of the parent as a whole for one request batch, measured with the table."""
        return _times_ms(self.data["scenarios"][scenario.name]["parent_measured"], scenario)["runtime_ms"]

    def request_ms(self, architecture: Architecture, scenario: Scenario) -> float:
        """Predicted milliseconds of one request batch."""
        return self.total(f"runtime_ms.{scenario.name}", architecture)

    def mix_ms(self, architecture: Architecture) -> float:
        """Predicted milliseconds of the weighted mix of scenarios."""
        return self.total("runtime_ms", architecture)

    def memory_bytes(self, architecture: Architecture) -> int:
        """Parameters, the full KV cache and working space in the largest scenario."""
        return int(max(self.total(f"memory_bytes.{s.name}", architecture) for s in self.scenarios))

    def parameters(self, architecture: Architecture) -> int:
        """Parameters, tied embeddings once."""
        return int(self.total("parameters", architecture))

    def total(self, column: str, architecture: Architecture) -> float:
        """A column's sum over an architecture, fixed part included."""
        parts = [(layer, spec) for layer, _, spec in architecture]
        parts.append((len(architecture.layers), architecture.head))
        return self.fixed[column] + sum(self.columns_of(layer, spec)[column] for layer, spec in parts)

    def columns_of(self, layer: int, spec: Spec) -> dict[str, float]:
        """The search table's cost columns of one sub-block, or of the head."""
        group = group_name(layer, self.data["groups"])
        weights = self.data["bytes"]["variants"][group][spec.id]
        head_dim, itemsize = self.data["bytes"]["head_dim"], self.data["bytes"]["cache_itemsize"]
        return self._columns(
            {s.name: self.data["scenarios"][s.name]["variants"][group][spec.id] for s in self.scenarios},
            weights["parameters"],
            {
                s.name: weights["parameter_bytes"]
                + s.batch_size * (weights["state_bytes"] + spec.cache_bytes(s.total_tokens, head_dim, itemsize))
                for s in self.scenarios
            },
        )

    def knows(self, layer: int, spec: Spec) -> bool:
        """Whether the table holds a variant of that layer."""
        return spec.id in self.data["bytes"]["variants"][group_name(layer, self.data["groups"])]

    @property
    def fixed(self) -> dict[str, float]:
        """The same columns of what every child has: final norm, working space, time of the fastest head."""
        weights = self.data["bytes"]["fixed"]
        of_scenario = {s.name: self.data["scenarios"][s.name] for s in self.scenarios}
        return self._columns(
            {name: facts["fixed"] for name, facts in of_scenario.items()},
            weights["parameters"],
            {name: weights["parameter_bytes"] + facts["working_bytes"] for name, facts in of_scenario.items()},
        )

    def _columns(
        self, times: Mapping[str, Mapping[str, float]], parameters: int, memory_bytes: Mapping[str, float]
    ) -> dict[str, float]:
        columns = {"parameters": float(parameters), **dict.fromkeys(TIMES, 0.0)}
        for s in self.scenarios:
            for name, value in _times_ms(times[s.name], s).items():
                columns[f"{name}.{s.name}"] = value
                columns[name] += s.weight * value
            columns[f"memory_bytes.{s.name}"] = memory_bytes[s.name]
        return columns

    def limits(self, asked: Mapping[str, float], parent: Architecture) -> list[Limit]:
        """The user's limits as bounds on columns.

        Raises:
            RecipeError: a limit or scenario that is not known, or a value that is not positive.
        """
        return [
            Limit(column, maximum=self.converted(name, value, parent, column))
            for name, value in asked.items()
            for column in self._limited_columns(name, value)
        ]

    def _limited_columns(self, name: str, value: float) -> list[str]:
        places = [s.name for s in self.scenarios]
        check_limit(name, value, places)
        quantity, _, place = name.partition("@")
        if quantity == "speedup":
            return ["runtime_ms"]
        if quantity == "parameters":
            return ["parameters"]
        column = LIMITED_TIMES.get(quantity, quantity)
        if place == MIX:
            return [column]
        return [f"{column}.{p}" for p in ([place] if place else places)]

    def converted(self, name: str, value: float, parent: Architecture, column: str) -> float:
        """A value of the limit `name` as a total of its column; and, since every case is its own inverse, back."""
        quantity = name.partition("@")[0]
        if quantity == "speedup":
            return self.mix_ms(parent) / value
        if quantity == "throughput_tokens_per_second":
            of_mix = column == "runtime_ms"
            tokens = sum(
                (s.weight if of_mix else 1.0) * s.batch_size * s.decode_tokens
                for s in self.scenarios
                if of_mix or column == f"runtime_ms.{s.name}"
            )
            return 1e3 * tokens / value
        return value


def _times_ms(parts: Mapping[str, float], scenario: Scenario) -> dict[str, float]:
    prefill, step = parts["prefill_ms"], parts["decode_step_ms"]
    return dict(zip(TIMES, (prefill + scenario.decode_steps * step, prefill, step), strict=True))
