"""Times of several models, taken in turns. Of any engine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from puzzle_nas.architecture import Scenario
from puzzle_nas.engines.base import Engine, RequestTime


def interleaved_medians(
    models: Sequence[str],
    scenarios: Mapping[str, Scenario],
    measure: Callable[[str, Scenario], RequestTime],
    repeats: int,
    on_model: Callable[[], None] = lambda: None,
    beside: str | None = None,
) -> dict[str, dict[str, RequestTime]]:
    """Median times by model, then scenario; every repeat measures every model, so that drift hits all alike.

    Where every repeat must load models anew, it takes so long that drift within it counts, and a model's first request
    of a kind is slow. Then each model does such a request, the model `beside`, which stays loaded, is timed, and then
    the model, so that either finds the caches as the other left them. The model's time is the median of `beside`
    times the median of its ratios to it.
    """
    samples: dict[tuple[str, str], list[RequestTime]] = {}
    ratios: dict[tuple[str, str], list[RequestTime]] = {}
    for _ in range(repeats):
        for model in models:
            for name, scenario in scenarios.items():
                if beside is None or model == beside:
                    samples.setdefault((model, name), []).append(measure(model, scenario))
                    continue
                measure(model, scenario)
                reference = measure(beside, scenario)
                samples.setdefault((beside, name), []).append(reference)
                ratio = _combined(_ratio, measure(model, scenario), reference)
                ratios.setdefault((model, name), []).append(ratio)
            on_model()

    def result(model: str, name: str) -> RequestTime:
        if (model, name) not in ratios:
            return _median(samples[model, name])
        assert beside is not None
        return _combined(lambda a, b: a * b, _median(ratios[model, name]), _median(samples[beside, name]))

    return {model: {name: result(model, name) for name in scenarios} for model in models}


def _median(times: Sequence[RequestTime]) -> RequestTime:
    return RequestTime(
        statistics.median(t.prefill_ms for t in times), statistics.median(t.decode_step_ms for t in times)
    )


def _combined(operation: Callable[[float, float], float], one: RequestTime, other: RequestTime) -> RequestTime:
    return RequestTime(operation(one.prefill_ms, other.prefill_ms), operation(one.decode_step_ms, other.decode_step_ms))


def _ratio(one: float, other: float) -> float:
    """0 where nothing was timed: requests without decode steps."""
    return one / other if other else 0.0


def speedups(
    engine: Engine,
    models: Mapping[str, Any],
    scenarios: Sequence[Scenario],
    repeats: int,
    decode_steps_measured: int,
) -> list[float]:
    """`parent`'s time over `child`'s on the weighted mix of request batches, for each interleaved repeat.

    Of the decode only some steps around its middle are timed, as for the cost table. `models` is what `engine.loaded`
    gave.
    """
    ratios = []
    for _ in range(repeats):
        parent, child = (
            sum(s.weight * engine.time_parts(models[name], s, decode_steps_measured).total_ms(s) for s in scenarios)
            for name in ("parent", "child")
        )
        ratios.append(parent / child)
    return ratios
