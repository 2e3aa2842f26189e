"""Models timed in turns, and those of a serving engine loaded in turns."""

import numpy as np
import pytest
import torch

from puzzle_nas.engines import RequestTime, interleaved_times, relative_standard_error
from puzzle_nas.engines.base import Engine
from puzzle_nas.engines.llama_cpp import LlamaCppEngine
from puzzle_nas.errors import ExportError
from puzzle_nas.scenario import Scenario
from tests.exporters.children import EVERY_KIND, LINEAR_ATTENTION, child_of

SCENARIOS = {"chat": Scenario("chat", 1, 8, 4), "long": Scenario("long", 1, 64, 4)}
TRUE_MS = {"parent": 4.0, "half": 2.0, "tenth": 0.4}


def on_a_machine_that_slows_down(decode_step_ms=1.0):
    """Slower with every model that starts, cold, in a scenario."""
    slowness, warm = 1.0, None

    def measure(model, scenario):
        nonlocal slowness, warm
        coldness = 1.0
        if model != "parent" and warm != (model, scenario):
            slowness, coldness, warm = 1.3 * slowness, 5.0, (model, scenario)
        time = TRUE_MS[model] * scenario.prefill_tokens * slowness * coldness
        return RequestTime(time, decode_step_ms * time)

    return measure


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_model_timed_beside_every_other_divides_drift_out(scenario):
    times = interleaved_times(list(TRUE_MS), SCENARIOS, on_a_machine_that_slows_down(), 3, beside="parent")
    for model, ms in TRUE_MS.items():
        for part in ("prefill_ms", "decode_step_ms"):
            ratio = getattr(times[model][scenario], part) / getattr(times["parent"][scenario], part)
            assert ratio == pytest.approx(ms / TRUE_MS["parent"])
    without = interleaved_times(list(TRUE_MS), SCENARIOS, on_a_machine_that_slows_down(), 3)
    assert without["half"][scenario].prefill_ms > 0.6 * without["parent"][scenario].prefill_ms


def test_requests_without_decode_steps():
    times = interleaved_times(list(TRUE_MS), SCENARIOS, on_a_machine_that_slows_down(0.0), 1, beside="parent")
    assert times["half"]["chat"].decode_step_ms == 0 < times["half"]["chat"].prefill_ms


@pytest.mark.parametrize(("noise", "rounds"), [(0.001, 3), (0.3, 9)])
def test_more_repeats_where_they_differ(noise, rounds):
    rng, more = np.random.default_rng(0), []

    def measure(model, scenario):
        return RequestTime(TRUE_MS[model] * rng.uniform(1 - noise, 1 + noise), 1.0)

    many = {"chat": Scenario("chat", 1, 8, 0)}
    asked = interleaved_times(list(TRUE_MS), many, measure, 3, on_more=more.append)
    assert more == [3] * (rounds - 3)
    assert asked["half"]["chat"].prefill_ms == pytest.approx(2.0, rel=noise)


def test_what_slows_a_repeat_down_does_not_count():
    slow = iter([1.0, 1.0, 9.0])
    alone = {"chat": Scenario("chat", 1, 8, 0)}
    times = interleaved_times(["parent"], alone, lambda *_: RequestTime(4.0 * next(slow), 1.0), 3)
    assert times["parent"]["chat"].prefill_ms == 4.0


def test_standard_error_of_a_median_is_that_of_many_medians():
    drawn = np.random.default_rng(0).normal(1.3, 0.05, (4000, 15))
    estimated = np.mean([relative_standard_error(row) for row in drawn])
    assert estimated == pytest.approx(np.median(drawn, axis=1).std() / 1.3, rel=0.1)


class CountsLoads(LlamaCppEngine):
    """Weights stay as they are, so that what it computes can be compared."""

    weights_dtype = Engine.weights_dtype

    def __init__(self):
        self.num_loads = 0

    def load_into(self, *arguments, **named):
        self.num_loads += 1
        super().load_into(*arguments, **named)


def test_the_first_model_stays_and_the_others_take_turns(tmp_path):
    tokens = list(range(3, 40))
    models = {"parent": child_of().model, "every kind": child_of(EVERY_KIND).model}
    models["linear"] = child_of({i: [LINEAR_ATTENTION] for i in range(8)}).model
    engine = CountsLoads()
    with engine.loaded(models, tmp_path / "scratch") as loaded:
        # Each loads what it asks for, and computes it: without tokenizer, from a file that is gone by now.
        for asked, num_loads in (("parent", 1), ("every kind", 2), ("parent", 2), ("every kind", 2), ("linear", 3)):
            (given,) = engine.log_probabilities(loaded[asked], [tokens])
            ours = models[asked](torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
            ours = ours.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
            assert engine.num_loads == num_loads
            torch.testing.assert_close(torch.tensor(given), ours, atol=0.02, rtol=0.0)
            time = engine.time_parts(loaded[asked], SCENARIOS["chat"], 2)
            assert min(time.prefill_ms, time.decode_step_ms) > 0
        assert list(loaded) == list(models)
    assert not list((tmp_path / "scratch").iterdir())


def test_a_model_that_the_format_cannot_hold_is_refused(tmp_path):
    models = {"parent": child_of(family="olmo3").model}
    with pytest.raises(ExportError, match="no layers of olmo3"), LlamaCppEngine().loaded(models, tmp_path):
        pass
