"""Times of several models, interleaved. Of any engine."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from puzzle_nas.engines.base import Engine, RequestTime
from puzzle_nas.scenario import Scenario

STEADY = 0.01
"""Standard error of a median, over the median, up to which it is believed."""
TURNS = 2
"""How often a model and the one beside it are timed alternately each time that it is loaded."""
MOST_TIMES = 3
"""How many times as many repeats as asked for are made at most, while their median is not to be believed."""


def relative_standard_error(values: Sequence[float]) -> float:
    """Of the median of repeats, over the median: from their median absolute deviation, as of a normal distribution."""
    median = statistics.median(values)
    deviation = statistics.median(abs(value - median) for value in values)
    return 1.2533 * 1.4826 * deviation / (median * math.sqrt(len(values)))


def _goes_on(made: int, repeats: int, series: Iterable[Sequence[float]]) -> bool:
    """Whether another repeat is wanted after those `made`, whose values are in `series`."""
    if made < repeats:
        return True
    return made < MOST_TIMES * repeats and statistics.median(map(relative_standard_error, series)) > STEADY


def interleaved_times(
    models: Sequence[str],
    scenarios: Mapping[str, Scenario],
    measure: Callable[[str, Scenario], RequestTime],
    repeats: int,
    on_model: Callable[[], None] = lambda: None,
    beside: str | None = None,
    on_more: Callable[[int], None] = lambda models: None,
) -> dict[str, dict[str, RequestTime]]:
    """Times by model, then scenario; every repeat measures every model, so that drift hits all alike.

    A model's time is the mean of the fastest two thirds of its repeats: what else a machine does only ever slows it
    down, and their median varies more (docs/results.md).

    There are more repeats, up to MOST_TIMES as many, while most models' times differ too much from one to the next;
    `on_more` is told how many models each adds.

    Where every repeat must load models again, it takes so long that drift within it counts, and a model's first request
    of a kind is slow. Then each model does such a request, and TURNS times the model `beside`, which stays loaded, is
    timed, and then the model, so that either finds the caches as the other left them. The model's time is that of
    `beside` times the median of its ratios to it, and there are no more repeats than asked for.
    """
    samples: dict[tuple[str, str], list[RequestTime]] = {}
    ratios: dict[tuple[str, str], list[RequestTime]] = {}
    totals_ms: dict[str, list[float]] = {}
    made = 0
    while made < repeats or (beside is None and _goes_on(made, repeats, totals_ms.values())):
        if made >= repeats:
            on_more(len(models))
        made += 1
        for model in models:
            totals_ms.setdefault(model, []).append(0.0)
            for name, scenario in scenarios.items():
                if beside is None or model == beside:
                    time = measure(model, scenario)
                    samples.setdefault((model, name), []).append(time)
                    totals_ms[model][-1] += time.total_ms(scenario)
                    continue
                measure(model, scenario)
                for _ in range(TURNS):
                    reference = measure(beside, scenario)
                    samples.setdefault((beside, name), []).append(reference)
                    ratio = _combined(_ratio, measure(model, scenario), reference)
                    ratios.setdefault((model, name), []).append(ratio)
            on_model()

    def result(model: str, name: str) -> RequestTime:
        if (model, name) not in ratios:
            return _of_each_part(undisturbed, samples[model, name])
        assert beside is not None
        times = _of_each_part(statistics.median, ratios[model, name]), _of_each_part(undisturbed, samples[beside, name])
        return _combined(lambda a, b: a * b, *times)

    return {model: {name: result(model, name) for name in scenarios} for model in models}


def undisturbed(values: Iterable[float]) -> float:
    """Mean of the smallest two thirds."""
    ordered = sorted(values)
    return statistics.fmean(ordered[: max(1, round(len(ordered) * 2 / 3))])


def _of_each_part(statistic: Callable[[Iterable[float]], float], times: Sequence[RequestTime]) -> RequestTime:
    return RequestTime(statistic(t.prefill_ms for t in times), statistic(t.decode_step_ms for t in times))


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

    There are more repeats, up to MOST_TIMES as many, while these differ too much. Of the decode only some steps around
    its middle are timed, as for the cost table. `models` is what `engine.loaded` gave.
    """
    ratios: list[float] = []
    while _goes_on(len(ratios), repeats, [ratios]):
        parent, child = (
            sum(s.weight * engine.time_parts(models[name], s, decode_steps_measured).total_ms(s) for s in scenarios)
            for name in ("parent", "child")
        )
        ratios.append(parent / child)
    return ratios
