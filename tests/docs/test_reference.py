"""The reference pages are what the code says today."""

import runpy

import pytest

from puzzle_nas.recipe import Recipe, settings_in


@pytest.fixture(scope="module")
def reference(pytestconfig):
    return runpy.run_path(str(pytestconfig.rootpath / "docs/reference.py"))


@pytest.mark.parametrize("name", ["reference-recipe.md", "reference-cli.md"])
def test_the_committed_page_is_what_the_code_generates(reference, pytestconfig, name):
    page = (pytestconfig.rootpath / "docs" / name).read_text()
    assert page == reference["REFERENCES"][name](), "Write it anew with: python docs/reference.py"


def test_every_setting_and_every_command_has_a_row(reference):
    def settings(model):
        for name, field in model.model_fields.items():
            inner = settings_in(field.annotation)
            yield from settings(inner[0]) if inner else [(name, field.description)]

    page = reference["recipe_reference"]()
    for name, meaning in settings(Recipe):
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert meaning and not row.endswith("|  |")
    commands = reference["cli_reference"]()
    for name in ("run", "search", "compare", "engine install"):
        assert f"\n## puzzle {name}\n" in commands
    assert "| `--limit NAME=VALUE` |" in commands and "| `--port PORT` | `8000` |" in commands
