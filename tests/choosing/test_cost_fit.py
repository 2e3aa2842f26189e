"""Costs of single variants from times of whole models."""

import random

import pytest

from puzzle_nas.choosing.cost_fit import Part, fit, parts_of, random_mixtures, uniform_models
from puzzle_nas.search_space import SearchSpace, in_formats
from puzzle_nas.specs import GatedFFN, GroupedAttention, Head, Linear, NoOp

ATTENTION = (GroupedAttention(2), Linear("attention"), NoOp("attention"))
SPACE = SearchSpace(({"attention": ATTENTION, "ffn": (GatedFFN(256), GatedFFN(128), NoOp("ffn"))},) * 6)
TRUE = {"attention.kv2": 3.0, "attention.linear": 1.0, "attention.no_op": 0.0}
TRUE |= {"ffn.w256": 4.0, "ffn.w128": 2.5, "ffn.no_op": 0.0}


def models():
    return uniform_models(SPACE) | random_mixtures(SPACE, 20, seed=1)


def by_id(found):
    return {part.spec.id: value for part, value in found.parts.items()}


def true_time(architecture):
    return 7.0 + sum(TRUE[spec.id] for _, _, spec in architecture)


def test_additive_times_give_their_parts_back():
    architectures = models()
    found = fit(architectures, {name: true_time(a) for name, a in architectures.items()})
    assert found.fixed == pytest.approx(7.0)
    assert by_id(found) == pytest.approx(TRUE, abs=1e-9)
    assert max(map(abs, found.relative_errors.values())) < 1e-9


def test_errors_are_those_of_a_fit_that_has_not_seen_the_model():
    architectures, draw = models(), random.Random(2)
    times = {name: true_time(a) * draw.gauss(1, 0.05) for name, a in architectures.items()}
    found = fit(architectures, times)
    for left_out in ("0:ffn.w128", "mixture 3"):
        others = {name: a for name, a in architectures.items() if name != left_out}
        without = fit(others, {name: times[name] for name in others})
        predicted = without.fixed + sum(by_id(without)[spec.id] for _, _, spec in architectures[left_out])
        assert found.relative_errors[left_out] == pytest.approx(predicted / times[left_out] - 1, rel=1e-6)


def test_no_variant_costs_less_than_nothing():
    architectures = models()
    # The linear variant makes a model faster than leaving attention out: noise, as far as costs go.
    times = {
        name: true_time(a) - 1.5 * sum(spec.id == "attention.linear" for _, _, spec in a)
        for name, a in architectures.items()
    }
    found = fit(architectures, times)
    assert by_id(found)["attention.linear"] == 0.0
    assert min(found.parts.values()) >= 0


def test_a_time_that_does_not_occur_costs_nothing():
    architectures = models()
    found = fit(architectures, dict.fromkeys(architectures, 0.0))
    assert found.fixed == 0 and not any(found.parts.values())


def test_mixtures_reach_from_the_parent_to_the_emptiest_and_repeat():
    mixtures = random_mixtures(SPACE, 30, seed=1)
    assert mixtures == random_mixtures(SPACE, 30, seed=1)
    kept = [sum(SPACE.is_parents((layer, (spec,))) for layer, _, spec in a) for a in mixtures.values()]
    assert min(kept) <= 2 and max(kept) >= 10


def test_layers_that_differ_in_the_parent_have_costs_of_their_own():
    narrow = {"attention": ATTENTION, "ffn": (GatedFFN(128), NoOp("ffn"))}
    space = SearchSpace((SPACE.options[0], narrow) * 3)
    true = {0: TRUE, 1: {name: 2 * value for name, value in TRUE.items()}}
    architectures = uniform_models(space) | random_mixtures(space, 20, seed=1)
    times = {name: 7 + sum(true[layer % 2][s.id] for layer, _, s in a) for name, a in architectures.items()}
    found = fit(architectures, times)
    assert {part.group for part in found.parts} == {0, 1}
    assert all(value == pytest.approx(true[part.group][part.spec.id], abs=1e-9) for part, value in found.parts.items())


def test_what_a_format_saves_goes_with_the_weights_it_stores():
    formats = ("q8_0", "q4_0")
    options = {slot: tuple(in_formats(specs, formats)) for slot, specs in SPACE.options[0].items()}
    space = SearchSpace((options,) * 6, tuple(in_formats([Head()], formats)))
    shares = {"attention.linear": 0.4, "ffn.w128": 0.5}
    saved = {"attention": {"q8_0": 1.0, "q4_0": 1.5}, "ffn": {"q8_0": 1.2, "q4_0": 1.9}}
    heads = {"head": 0.0, "head@q8_0": -2.0, "head@q4_0": -3.0}
    share_of = {part: shares.get(part.spec.plain.id, 1.0) for part in parts_of(space)}

    def cost(spec):
        saving = saved[spec.slot][spec.format] if spec.format else 0.0
        return TRUE[spec.plain.id] - shares.get(spec.plain.id, 1.0) * saving

    architectures = uniform_models(space) | random_mixtures(space, 20, seed=1)
    timed_in_formats = {a.layers[0]["ffn"].id for name, a in architectures.items() if "mixture" not in name}
    assert "ffn.w256@q4_0" in timed_in_formats and "ffn.w128@q4_0" not in timed_in_formats
    times = {n: 7 + sum(cost(s) for _, _, s in a) + heads[a.head.id] for n, a in architectures.items()}
    found = fit(architectures, times, share_of)
    assert found.fixed == pytest.approx(7 - 3.0)
    for part, value in found.parts.items():
        is_head = isinstance(part.spec, Head)
        assert value == pytest.approx(heads[part.spec.id] + 3.0 if is_head else cost(part.spec), abs=1e-9)
    assert max(map(abs, found.relative_errors.values())) < 1e-9


def test_where_only_whole_layers_can_be_removed_formats_have_their_costs_all_the_same():
    """Attention and FFN are in all models together: what they cost is divided by their sizes."""
    slots = {"attention": [GroupedAttention(2)], "ffn": [GatedFFN(256)]}
    formats = ["q8_0", "q4_0"]
    options = {slot: tuple(in_formats(specs, formats)) for slot, specs in slots.items()}
    space = SearchSpace((options,) * 6, tuple(in_formats([Head()], formats)))
    architectures = uniform_models(space, whole_layers=True) | random_mixtures(space, 8, seed=1, whole_layers=True)
    for architecture in architectures.values():
        removed = [{spec.empty for spec in block.values()} for block in architecture.layers]
        assert removed == sorted(removed, key=max) and all(len(found) == 1 for found in removed)
    sizes = {part: {"attention": 1.0, "ffn": 3.0, "head": 2.0}[part.spec.slot] for part in parts_of(space)}
    sizes |= {part: 0.0 for part in sizes if part.spec.empty}
    per_weight = {None: 2.0, "q8_0": 1.2, "q4_0": 0.7}

    def time(architecture):
        every = [Part(0, spec) for _, _, spec in architecture] + [Part(6, architecture.head)]
        return 7 + sum(sizes[part] * per_weight[part.spec.format] for part in every)

    found = fit(architectures, {name: time(a) for name, a in architectures.items()}, sizes)
    head = 2 * per_weight["q4_0"]
    assert found.fixed == pytest.approx(7 + head)
    for part, cost in found.parts.items():
        expected = sizes[part] * per_weight[part.spec.format] - head * isinstance(part.spec, Head)
        assert cost == pytest.approx(expected, abs=1e-9), part
    assert max(map(abs, found.relative_errors.values())) < 1e-9
