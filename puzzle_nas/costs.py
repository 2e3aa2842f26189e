"""Predicted costs of an architecture from a cost table, and what a limit means in its columns. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from puzzle_nas.architecture import Architecture, Scenario, Spec
from puzzle_nas.artifacts import RunFolder, read_json
from puzzle_nas.errors import RecipeError
from puzzle_nas.recipe import Recipe
from puzzle_nas.search import Limit

TIMES = ("runtime_ms", "prefill_ms", "decode_step_ms")
"""Of a whole request batch, of its prompts, and of one token for every request."""
LIMITS = {
    "speedup": "at least this many times the parent's speed on the mix of scenarios",
    "throughput_tokens_per_second": "at least this many generated tokens per second",
    "latency_ms": "at most this long for a whole request batch",
    "time_to_first_token_ms": "at most this long for the prompts of a request batch",
    "time_per_output_token_ms": "at most this long for each further token of a request batch",
    "memory_bytes": "at most this much for parameters, the full KV cache and working space",
    "parameters": "at most this many",
}
"""The last two and `speedup` hold for the child; the others in every scenario, or in the one named after an @, or,
after @mix, on the weighted mean."""
LIMITED_TIMES = {
    "throughput_tokens_per_second": "runtime_ms",
    "latency_ms": "runtime_ms",
    "time_to_first_token_ms": "prefill_ms",
    "time_per_output_token_ms": "decode_step_ms",
}
MIX = "mix"


@dataclass(frozen=True)
class CostTable:
    """What each variant costs, and what the parts that every child has cost."""

    data: Mapping[str, Any]
    scenarios: Sequence[Scenario]

    @classmethod
    def load(cls, run: RunFolder, recipe: Recipe) -> CostTable:
        """The run's table, for the batch sizes that the search chose where the recipe sweeps them."""
        every = cls.load_mixes(run, recipe)
        if len(every) == 1:
            return every[0]
        chosen = read_json(run.architecture(), "search")["scenarios"]
        return next(table for table in every if [s.name for s in table.scenarios] == chosen)

    @classmethod
    def load_mixes(cls, run: RunFolder, recipe: Recipe) -> list[CostTable]:
        """The run's table for each choice of swept batch sizes that was measured."""
        data = read_json(run.costs(recipe.engine), "measure-costs")
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
        return self.fixed[column] + sum(self.columns_of(spec)[column] for _, _, spec in architecture)

    def columns_of(self, spec: Spec) -> dict[str, float]:
        """The search table's cost columns of one sub-block."""
        weights = self.data["bytes"]["variants"][spec.id]
        return self._columns(
            {s.name: self.data["scenarios"][s.name]["variants"][spec.id] for s in self.scenarios},
            weights["parameters"],
            {
                s.name: weights["parameter_bytes"] + s.batch_size * s.total_tokens * weights["kv_bytes_per_token"]
                for s in self.scenarios
            },
        )

    @property
    def fixed(self) -> dict[str, float]:
        """The same columns of what every child has: embeddings, final norm, LM head, working space."""
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
        quantity, _, place = name.partition("@")
        if quantity not in LIMITS:
            raise RecipeError(f"'{name}' is not a limit; known: {', '.join(LIMITS)}.")
        if not value > 0:
            raise RecipeError(f"The limit {name}={value:g} must be positive.")
        places = [s.name for s in self.scenarios]
        if place and quantity not in LIMITED_TIMES:
            raise RecipeError(f"The limit {quantity} holds for all scenarios together; leave out @{place}.")
        if place and place not in (*places, MIX):
            raise RecipeError(f"'{name}': there is no scenario {place}; known: {', '.join((*places, MIX))}.")
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
