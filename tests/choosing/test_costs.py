"""What limits mean: checked against sums made by hand."""

import pytest

from puzzle_nas.architecture import Architecture
from puzzle_nas.choosing.costs import CostTable, group_name
from puzzle_nas.errors import RecipeError
from puzzle_nas.recipe_text import parse_recipe
from puzzle_nas.scenario import Scenario
from puzzle_nas.specs import GatedFFN, GroupedAttention, NoOp

SCENARIOS = [Scenario("chat", 1, 100, 11, weight=0.75), Scenario("batch", 8, 200, 21, weight=0.25)]
PARENT = {"attention": GroupedAttention(2), "ffn": GatedFFN(64)}
CHILD = Architecture((PARENT, {**PARENT, "ffn": NoOp("ffn")}))
TIMES = {"attention.kv2": (2.0, 0.2), "ffn.w64": (3.0, 0.3), "ffn.no_op": (0.0, 0.0)}


@pytest.fixture
def table():
    def part(prefill_ms, decode_step_ms, factor):
        return {"prefill_ms": factor * prefill_ms, "decode_step_ms": factor * decode_step_ms}

    weights = {"attention.kv2": 100, "ffn.w64": 300, "ffn.no_op": 0}
    like = group_name(0, (0,))
    return CostTable(
        {
            "groups": [0, 0],
            "bytes": {
                # Keys and values of two heads take 4 bytes a token.
                "head_dim": 1,
                "cache_itemsize": 1,
                "fixed": {"parameters": 20, "parameter_bytes": 40},
                "variants": {
                    like: {
                        name: {"parameters": count, "parameter_bytes": 2 * count, "state_bytes": 0}
                        for name, count in weights.items()
                    },
                    "head": {"head": {"parameters": 30, "parameter_bytes": 60, "state_bytes": 0}},
                },
            },
            "scenarios": {
                s.name: {
                    "fixed": part(0.75, 0.075, factor),
                    "variants": {
                        like: {name: part(*times, factor) for name, times in TIMES.items()},
                        "head": {"head": part(0.25, 0.025, factor)},
                    },
                    "parent_measured": part(11.0, 1.1, factor),
                    "working_bytes": 1000 * s.batch_size,
                }
                for s, factor in zip(SCENARIOS, (1.0, 4.0), strict=True)
            },
        },
        SCENARIOS,
    )


# Of the child: prefill 1 + 2 + 3 + 2 = 8 ms, step 0.8 ms; in "batch" four times as much.
CHAT_MS, BATCH_MS = 8 + 10 * 0.8, 4 * (8 + 20 * 0.8)
REACHED = {
    "latency_ms@chat": CHAT_MS,
    "latency_ms@batch": BATCH_MS,
    "latency_ms@mix": 0.75 * CHAT_MS + 0.25 * BATCH_MS,
    "time_to_first_token_ms@batch": 32.0,
    "time_to_first_token_ms@mix": 0.75 * 8 + 0.25 * 32,
    "time_per_output_token_ms@chat": 0.8,
    "throughput_tokens_per_second@chat": 1e3 * 11 / CHAT_MS,
    "throughput_tokens_per_second@batch": 1e3 * 8 * 21 / BATCH_MS,
    "throughput_tokens_per_second@mix": 1e3 * (0.75 * 11 + 0.25 * 168) / (0.75 * CHAT_MS + 0.25 * BATCH_MS),
    "parameters": 50 + 100 + 300 + 100,
    "memory_bytes": 2 * 550 + 8 * 221 * 4 * 2 + 8000,
}


def excess(table, name, value):
    """By how much the child exceeds its limits, at most."""
    limits = table.limits({name: value}, Architecture((PARENT, PARENT)))
    return max(table.total(limit.column, CHILD) - limit.maximum for limit in limits)


@pytest.mark.parametrize("name", REACHED)
def test_a_limit_is_met_exactly_at_what_the_child_reaches(table, name):
    assert excess(table, name, REACHED[name]) == pytest.approx(0, abs=1e-9)
    worse = 1.01 if name.startswith("throughput") else 0.99
    assert excess(table, name, worse * REACHED[name]) > 0


def test_a_limit_without_a_place_holds_in_every_scenario(table):
    assert excess(table, "latency_ms", BATCH_MS) == pytest.approx(0)
    assert excess(table, "latency_ms", 0.99 * BATCH_MS) > 0
    slowest = min(REACHED["throughput_tokens_per_second@chat"], REACHED["throughput_tokens_per_second@batch"])
    assert excess(table, "throughput_tokens_per_second", slowest) == pytest.approx(0, abs=1e-9)


def test_speedup_is_of_the_mix(table):
    parent_ms = 0.75 * (11 + 10 * 1.1) + 0.25 * 4 * (11 + 20 * 1.1)
    assert excess(table, "speedup", parent_ms / REACHED["latency_ms@mix"]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", [*REACHED, "speedup"])
def test_conversion_is_its_own_inverse(table, name):
    parent = Architecture((PARENT, PARENT))
    (column, *_) = [limit.column for limit in table.limits({name: 5.0}, parent)]
    assert table.converted(name, table.converted(name, 5.0, parent, column), parent, column) == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("latency", 5.0, "Did you mean latency_ms"),
        ("latency_ms@night", 5.0, "no scenario night; known: chat, batch, mix"),
        ("speedup@chat", 1.5, "leave out @chat"),
        ("latency_ms", 0.0, "must be positive"),
    ],
)
def test_limits_that_mean_nothing(table, name, value, part):
    with pytest.raises(RecipeError, match=part):
        table.limits({name: value}, Architecture((PARENT, PARENT)))


def test_one_mix_for_each_batch_size():
    recipe = parse_recipe(
        "{parent: p, data: {sources: [{source: s}]}, scenarios: ["
        "{name: chat, batch_size: [4, 1, 2], weight: 3}, {name: long, batch_size: 2}]}"
    )
    mixes = recipe.mixes()
    assert [[s.name for s in mix] for mix in mixes] == [["chat-b1", "long"], ["chat-b2", "long"], ["chat-b4", "long"]]
    assert all([s.weight for s in mix] == [0.75, 0.25] for mix in mixes)
    assert [s.batch_size for mix in mixes for s in mix] == [1, 2, 2, 2, 4, 2]
    assert [s.name for s in recipe.traffic()] == ["chat-b1", "long", "chat-b2", "chat-b4"]
