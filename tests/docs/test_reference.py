"""The reference pages are what the code says today."""

import runpy

import pytest

from puzzle_nas.engines.llama_cpp import LlamaCppEngine
from puzzle_nas.recipe import Recipe
from puzzle_nas.recipe_text import settings_in


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


def test_the_tolerances_that_serving_md_names_are_those_of_the_engine(pytestconfig):
    lines = (pytestconfig.rootpath / "docs/serving.md").read_text().splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("| llama.cpp | float32"))
    kinds, _, means, mosts = ([cell.strip() for cell in line.split("|")[2:-1]] for line in lines[start : start + 4])
    tolerances = LlamaCppEngine.tolerances
    assert kinds == list(tolerances)
    assert [float(cell) for cell in means] == [t.mean_nats for t in tolerances.values()]
    assert [float(cell) for cell in mosts] == [t.max_nats for t in tolerances.values()]
