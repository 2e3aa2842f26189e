"""The baselines: by hand where they are defined by steps, against brute force where by an optimum."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_tables import every_choice, meets, table_of

from puzzle_nas.errors import InfeasibleError, RecipeError
from puzzle_nas.search import (
    Limit,
    Problem,
    Table,
    greedy,
    homogeneous,
    max_params,
    no_op_only,
    random_architecture,
    solve,
)


def test_greedy_by_hand():
    # Budget 12: 4 a layer. Layer 1 (mean 1) first: takes c (cost 3) and leaves 1. Layer 2 (mean 2) has 5
    # and takes b (cost 5). Layer 0 (mean 3) has 4 and takes b.
    table = table_of(
        {
            "score": [[0.0, 3.0, 6.0], [0.0, 2.0, 1.0], [0.0, 1.0, 5.0]],
            "memory": [[8.0, 4.0, 0.0], [5.0, 2.0, 3.0], [6.0, 5.0, 1.0]],
        }
    )
    solution = greedy(Problem(table, "score", limits=(Limit("memory", maximum=22.0),), fixed={"memory": 10.0}))
    assert solution.choices == {0: "b", 1: "c", 2: "b"}
    assert solution.score == 5.0 and solution.costs["memory"] == 22.0
    assert solution.bound is None and solution.gap is None


def test_greedy_pays_an_overshoot_later():
    # Budget 6: 3 a layer. Layer 0 first; nothing fits, b overshoots least (by 1); layer 1 then has 2 left.
    table = table_of({"score": [[0.0, 1.0], [0.0, 9.0]], "memory": [[7.0, 4.0], [3.0, 2.0]]})
    assert greedy(Problem(table, "score", limits=(Limit("memory", maximum=6.0),))).choices == {0: "b", 1: "b"}
    with pytest.raises(InfeasibleError, match="greedy baseline ends outside the limits on memory"):
        greedy(Problem(table, "score", limits=(Limit("memory", maximum=5.0),)))


def test_greedy_breaks_ties_by_variant_id():
    table = Table((0,), (("b", "a"),), {"score": (np.zeros(2),)})
    assert greedy(Problem(table, "score")).choices == {0: "a"}


def block_table(num_layers: int = 8, seed: int = 0) -> tuple[Table, dict, dict]:
    """Attention and FFN of every layer as positions, with the layer and the slot of each."""
    rng = np.random.default_rng(seed)
    rows, groups, slots = [], {}, {}
    sizes = {
        "attention": {"kv4": 4.0, "kv1": 2.5, "no_op": 0.0},
        "ffn": {"w4": 8.0, "w2": 4.0, "w1": 2.0, "no_op": 0.0},
    }
    for layer in range(num_layers):
        for slot, variants in sizes.items():
            label = f"{layer:02d}.{slot}"
            groups[label], slots[label] = layer, slot
            largest = max(variants.values())
            for variant, size in variants.items():
                runtime = size * (1 + 0.02 * rng.random())
                score = (1 - size / largest) ** 2 * (0.5 + rng.random())
                rows.append(
                    {
                        "layer": label,
                        "variant": variant,
                        "score": score,
                        "runtime": runtime,
                        "parameters": size,
                    }
                )
    return Table.from_rows(rows), groups, slots


def test_greedy_by_block_takes_combinations():
    rows = [
        {"layer": "0.attention", "variant": "big", "score": 0.0, "memory": 3.0},
        {"layer": "0.attention", "variant": "small", "score": 1.0, "memory": 1.0},
        {"layer": "0.ffn", "variant": "big", "score": 0.0, "memory": 5.0},
        {"layer": "0.ffn", "variant": "small", "score": 5.0, "memory": 1.0},
    ]
    problem = Problem(Table.from_rows(rows), "score", limits=(Limit("memory", maximum=6.0),))
    groups = {"0.attention": 0, "0.ffn": 0}
    assert greedy(problem, groups).choices == {"0.attention": "small", "0.ffn": "big"}
    with pytest.raises(RecipeError, match=r"Position 0\.ffn of the table has no layer"):
        greedy(problem, {"0.attention": 0})


def test_greedy_is_no_better_than_the_search():
    table, groups, _ = block_table()
    problem = Problem(table, "score", limits=(Limit("runtime", maximum=60.0),))
    found = greedy(problem, groups)
    assert found.costs["runtime"] <= 60.0
    assert solve(problem, gap=0.0)[0].score <= found.score


def test_max_params_equals_brute_force():
    table, _, _ = block_table(2)
    problem = Problem(table, "score", limits=(Limit("runtime", maximum=13.0),))
    best = max(c.totals["parameters"] for c in every_choice(problem) if meets(problem, c))
    solution = max_params(problem, "parameters", gap=0.0)
    assert solution.score == solution.costs["parameters"] == float(best)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.floats(0.35, 0.95), st.integers(0, 5))
def test_homogeneous_is_within_one_percent_below(share, seed):
    table, groups, slots = block_table(16, seed)
    dearest = sum(float(values.max()) for values in table.column("runtime"))
    problem = Problem(table, "score", fixed={"runtime": 2.0})
    target = 2.0 + share * dearest
    solution = homogeneous(problem, "runtime", target, groups, slots)
    assert 0.99 * target <= solution.costs["runtime"] <= target
    for slot, most in (("attention", 2), ("ffn", 2)):
        assert len({v for p, v in solution.choices.items() if slots[p] == slot}) <= most


def test_homogeneous_by_hand():
    # Four layers, one slot: costs 4, 2, 1 each. Two 4s and two 2s make 12, spread evenly.
    table = table_of({"score": [[0.0, 1.0, 9.0]] * 4, "runtime": [[4.0, 2.0, 1.0]] * 4})
    problem = Problem(table, "score")
    assert homogeneous(problem, "runtime", 12.0).choices == {0: "a", 1: "b", 2: "a", 3: "b"}
    assert homogeneous(problem, "runtime", 8.0).choices == dict.fromkeys(range(4), "b")
    # Nothing lies within 1 % below 7.9: the dearest below is taken.
    assert homogeneous(problem, "runtime", 7.9).costs["runtime"] == 7.0
    with pytest.raises(InfeasibleError, match="raise the target"):
        homogeneous(problem, "runtime", 3.9)


def test_homogeneous_keeps_to_the_limits_and_takes_the_best_score():
    columns = {
        "score": [[0.0, 2.0, 1.0]] * 2,
        "runtime": [[4.0, 4.0, 4.0]] * 2,
        "memory": [[9.0, 1.0, 2.0]] * 2,
    }
    problem = Problem(table_of(columns), "score", limits=(Limit("memory", maximum=5.0),))
    assert homogeneous(problem, "runtime", 8.0).choices == {0: "c", 1: "c"}


def test_homogeneous_has_one_choice_for_a_slot_that_some_layers_lack():
    columns = {"score": [[0.0, 1.0, 3.0], [0.0, 2.0, 3.0], [0.0, 1.0, 3.0]], "runtime": [[4.0, 2.0, 1.0]] * 3}
    problem = Problem(table_of(columns), "score")
    found = homogeneous(problem, "runtime", 8.0, {0: 0, 1: 1, 2: 2}, {0: "attention", 1: "conv", 2: "attention"})
    assert found.choices == {0: "b", 1: "a", 2: "b"}


def test_homogeneous_needs_shared_slots_and_variants():
    table = Table((0, 1), (("a",), ("b",)), {"score": (np.zeros(1), np.zeros(1))})
    with pytest.raises(RecipeError, match="a variant that all layers share"):
        homogeneous(Problem(table, "score"), "score", 1.0)
    with pytest.raises(RecipeError, match="every slot at most once"):
        homogeneous(Problem(table, "score"), "score", 1.0, {0: 0, 1: 0})
    with pytest.raises(RecipeError, match="must be a positive number"):
        homogeneous(Problem(table, "score"), "score", 0.0)


def test_baselines_refuse_spans():
    table = table_of({"score": [[0.0, 1.0], [0.0]]}, [[1, 2], [1]])
    with pytest.raises(RecipeError, match="one variant for each layer"):
        greedy(Problem(table, "score"))


def test_no_op_only_keeps_parent_and_no_op():
    table, _, _ = block_table(3)
    problem = no_op_only(Problem(table, "score"), lambda position, variant: variant in ("kv4", "w4", "no_op"))
    assert set(sum(problem.table.variants, ())) == {"kv4", "w4", "no_op"}


def test_random_architectures_meet_limits_and_repeat():
    table, _, _ = block_table()
    problem = Problem(table, "score", limits=(Limit("runtime", maximum=60.0),))
    one = random_architecture(problem, np.random.default_rng(1))
    assert one.choices == random_architecture(problem, np.random.default_rng(1)).choices
    assert one.choices != random_architecture(problem, np.random.default_rng(2)).choices
    assert one.costs["runtime"] <= 60.0 and one.costs == problem.costs(one.choices)
