"""Requests that the parent has no positions for are refused before anything is measured."""

import json

import pytest

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.errors import RecipeError
from puzzle_nas.recipe_text import parse_recipe
from puzzle_nas.stages import measure_costs, prepare_parent


def test_a_scenario_beyond_the_positions(tiny_settings, tmp_path):
    scenario = {"name": "long", "prefill_tokens": 120, "decode_tokens": 9}
    recipe = parse_recipe(json.dumps({**tiny_settings, "scenarios": [scenario]}))
    run = RunFolder(tmp_path)
    message = r"The scenario long takes 129 tokens, but the parent has 128 positions; lower its prefill_tokens"
    with pytest.raises(RecipeError, match=message):
        prepare_parent.run(recipe, run)
    # It is noticed as well where only the scenario changes afterwards.
    prepare_parent.run(parse_recipe(json.dumps(tiny_settings)), run)
    with pytest.raises(RecipeError, match=message):
        measure_costs.run(recipe, run)
    assert not run.costs("torch").exists()
