"""Settings of earlier versions: one sentence each, with what to do instead."""

import pytest

from puzzle_nas import removed_settings
from puzzle_nas.errors import RecipeError
from puzzle_nas.recipe import Recipe, Settings
from puzzle_nas.recipe_text import parse_recipe, settings_in

BASE = "parent: ./p\ndata: {sources: [{source: python-stdlib}]}\n"


def setting_names(model: type[Settings] = Recipe, section: str = ""):
    """Dotted names of all sections and settings of a recipe."""
    for name, field in model.model_fields.items():
        yield section + name
        if inner := settings_in(field.annotation):
            yield from setting_names(inner[0], f"{section}{name}.")


@pytest.fixture
def table(monkeypatch):
    """Settings as if they had been removed."""
    lines = {"gkd.speed": "set gkd.learning_rate", "old": "leave it out", "old.tokens": "set bld.tokens"}
    lines |= {"scenarios.size": "set batch_size", "memory=disk": "set memory: stream"}
    monkeypatch.setattr(removed_settings, "REMOVED", lines)


@pytest.mark.parametrize(
    ("text", "overrides", "sentence"),
    [
        ("gkd: {speed: 3}", (), "The recipe's gkd.speed is no longer a setting: set gkd.learning_rate."),
        ("", ["gkd.speed=3"], "The recipe's gkd.speed is no longer a setting: set gkd.learning_rate."),
        ("old: {a: 1, tokens: 3}", (), "The recipe's old.tokens is no longer a setting: set bld.tokens."),
        ("old: {a: 1}", (), "The recipe's old is no longer a setting: leave it out."),
        ("scenarios: [{size: 1}]", (), "The recipe's scenarios.0.size is no longer a setting: set batch_size."),
        ("memory: disk", (), "The recipe's memory: disk is no longer possible: set memory: stream."),
    ],
)
def test_what_is_said(table, text, overrides, sentence):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(BASE + text, overrides)
    assert str(caught.value) == sentence


def test_what_was_removed_is_gone():
    assert not set(removed_settings.REMOVED) & set(setting_names())


def test_lines_end_the_sentence_that_they_stand_in():
    assert not [line for line in removed_settings.REMOVED.values() if not line or line.endswith(".")]
