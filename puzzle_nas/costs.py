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

LIMITS = {
    "speedup": "at least this many times the parent's speed on the mix of scenarios",
    "throughput_tokens_per_second": "at least this many generated tokens per second in every scenario",
    "latency_ms": "at most this long for a whole request batch in every scenario",
    "memory_bytes": "at most this much for parameters and the full KV cache in every scenario",
    "parameters": "at most this many",
}


@dataclass(frozen=True)
class CostTable:
    """What each variant costs, and what the parts that every child has cost."""

    data: Mapping[str, Any]
    scenarios: Sequence[Scenario]

    @classmethod
    def load(cls, run: RunFolder, recipe: Recipe, engine: str = "torch") -> CostTable:
        """The run's table."""
        data = read_json(run.costs(engine), "measure-costs")
        return cls(data, [s.scenario() for s in recipe.scenarios])

    def variant_ms(self, spec: Spec, scenario: Scenario) -> float:
        """Milliseconds that one sub-block adds to one request batch."""
        return _request_ms(self.data["scenarios"][scenario.name]["variants"][spec.id], scenario)

    def fixed_ms(self, scenario: Scenario) -> float:
        """Milliseconds of embeddings, final norm and LM head for one request batch."""
        return _request_ms(self.data["scenarios"][scenario.name]["fixed"], scenario)

    def parent_measured_ms(self, scenario: Scenario) -> float:
        """Milliseconds of the parent as a whole for one request batch, measured with the table."""
        return _request_ms(self.data["scenarios"][scenario.name]["parent_measured"], scenario)

    def request_ms(self, architecture: Architecture, scenario: Scenario) -> float:
        """Predicted milliseconds of one request batch."""
        return self.fixed_ms(scenario) + sum(self.variant_ms(spec, scenario) for _, _, spec in architecture)

    def mix_ms(self, architecture: Architecture) -> float:
        """Predicted milliseconds of the weighted mix of scenarios."""
        return sum(s.weight * self.request_ms(architecture, s) for s in self.scenarios)

    def memory_bytes(self, architecture: Architecture) -> int:
        """Parameters plus the full KV cache of the largest scenario."""
        return max(
            self._total(self.columns_of, self.fixed, f"memory_bytes.{s.name}", architecture) for s in self.scenarios
        )

    def parameters(self, architecture: Architecture) -> int:
        """Parameters, tied embeddings once."""
        return self._total(self.columns_of, self.fixed, "parameters", architecture)

    @staticmethod
    def _total(columns_of, fixed, column: str, architecture: Architecture) -> int:
        return int(fixed[column] + sum(columns_of(spec)[column] for _, _, spec in architecture))

    def columns_of(self, spec: Spec) -> dict[str, float]:
        """The search table's cost columns of one sub-block."""
        weights = self.data["bytes"]["variants"][spec.id]
        columns = {
            "runtime_ms": sum(s.weight * self.variant_ms(spec, s) for s in self.scenarios),
            "parameters": weights["parameters"],
        }
        for s in self.scenarios:
            columns[f"runtime_ms.{s.name}"] = self.variant_ms(spec, s)
            cached = s.batch_size * s.total_tokens * weights["kv_bytes_per_token"]
            columns[f"memory_bytes.{s.name}"] = weights["parameter_bytes"] + cached
        return columns

    @property
    def fixed(self) -> dict[str, float]:
        """The same columns of what every child has."""
        weights = self.data["bytes"]["fixed"]
        columns = {
            "runtime_ms": sum(s.weight * self.fixed_ms(s) for s in self.scenarios),
            "parameters": weights["parameters"],
        }
        for s in self.scenarios:
            columns[f"runtime_ms.{s.name}"] = self.fixed_ms(s)
            columns[f"memory_bytes.{s.name}"] = weights["parameter_bytes"]
        return columns

    def limits(self, asked: Mapping[str, float], parent: Architecture) -> list[Limit]:
        """The user's limits as bounds on columns.

        Raises:
            RecipeError: a limit that is not known, or not positive.
        """
        result: list[Limit] = []
        for name, value in asked.items():
            if name not in LIMITS:
                raise RecipeError(f"'{name}' is not a limit; known: {', '.join(LIMITS)}.")
            if not value > 0:
                raise RecipeError(f"The limit {name}={value:g} must be positive.")
            if name == "speedup":
                result.append(Limit("runtime_ms", maximum=self.mix_ms(parent) / value))
            elif name == "parameters":
                result.append(Limit("parameters", maximum=value))
            else:
                result += [self._scenario_limit(name, value, s) for s in self.scenarios]
        return result

    @staticmethod
    def _scenario_limit(name: str, value: float, s: Scenario) -> Limit:
        if name == "memory_bytes":
            return Limit(f"memory_bytes.{s.name}", maximum=value)
        if name == "latency_ms":
            return Limit(f"runtime_ms.{s.name}", maximum=value)
        return Limit(f"runtime_ms.{s.name}", maximum=1e3 * s.batch_size * s.decode_tokens / value)

    def reachable(self, name: str, column_value: float, parent: Architecture, column: str) -> float:
        """A column's tightest total in the user's own terms: the inverse of `limits`."""
        if name == "speedup":
            return self.mix_ms(parent) / column_value
        if name == "throughput_tokens_per_second":
            scenario = next(s for s in self.scenarios if column.endswith(f".{s.name}"))
            return 1e3 * scenario.batch_size * scenario.decode_tokens / column_value
        return column_value


def _request_ms(times: Mapping[str, float], scenario: Scenario) -> float:
    return times["prefill_ms"] + scenario.decode_steps * times["decode_step_ms"]
