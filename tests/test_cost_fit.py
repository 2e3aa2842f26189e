"""Costs of single variants from times of whole models."""

import random

import pytest

from puzzle_nas.architecture import GatedFFN, LinearAttention, NoOpAttention, NoOpFFN, ParentShape
from puzzle_nas.cost_fit import fit, random_mixtures, uniform_models

SHAPE = ParentShape(
    num_hidden_layers=6,
    hidden_size=64,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
SPECS = [SHAPE.parent_spec("attention"), LinearAttention(), NoOpAttention()]
SPECS += [SHAPE.parent_spec("ffn"), GatedFFN(128), NoOpFFN()]
TRUE = {"attention.kv2": 3.0, "attention.linear": 1.0, "attention.no_op": 0.0}
TRUE |= {"ffn.w256": 4.0, "ffn.w128": 2.5, "ffn.no_op": 0.0}


def models():
    return uniform_models(SHAPE, SPECS) | random_mixtures(SHAPE, SPECS, 20, seed=1)


def true_time(architecture):
    return 7.0 + sum(TRUE[spec.id] for _, _, spec in architecture)


def test_additive_times_give_their_parts_back():
    architectures = models()
    found = fit(architectures, {name: true_time(a) for name, a in architectures.items()})
    assert found.fixed == pytest.approx(7.0)
    assert found.variants == pytest.approx(TRUE, abs=1e-9)
    assert max(map(abs, found.relative_errors.values())) < 1e-9


def test_errors_are_those_of_a_fit_that_has_not_seen_the_model():
    architectures, draw = models(), random.Random(2)
    times = {name: true_time(a) * draw.gauss(1, 0.05) for name, a in architectures.items()}
    found = fit(architectures, times)
    for left_out in ("parent", "mixture 3"):
        others = {name: a for name, a in architectures.items() if name != left_out}
        without = fit(others, {name: times[name] for name in others})
        predicted = without.fixed + sum(without.variants[spec.id] for _, _, spec in architectures[left_out])
        assert found.relative_errors[left_out] == pytest.approx(predicted / times[left_out] - 1, rel=1e-6)


def test_no_variant_costs_less_than_nothing():
    architectures = models()
    # The linear variant makes a model faster than leaving attention out: noise, as far as costs go.
    times = {
        name: true_time(a) - 1.5 * sum(spec.id == "attention.linear" for _, _, spec in a)
        for name, a in architectures.items()
    }
    found = fit(architectures, times)
    assert found.variants["attention.linear"] == 0.0
    assert min(found.variants.values()) >= 0


def test_a_time_that_does_not_occur_costs_nothing():
    architectures = models()
    found = fit(architectures, dict.fromkeys(architectures, 0.0))
    assert found.fixed == 0 and not any(found.variants.values())


def test_mixtures_reach_from_the_parent_to_the_emptiest_and_repeat():
    mixtures = random_mixtures(SHAPE, SPECS, 30, seed=1)
    assert mixtures == random_mixtures(SHAPE, SPECS, 30, seed=1)
    kept = [sum(spec == SHAPE.parent_spec(spec.slot) for _, _, spec in a) for a in mixtures.values()]
    assert min(kept) <= 2 and max(kept) >= 10
