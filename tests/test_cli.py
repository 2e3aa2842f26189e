"""The command line on its own: help, settings, and the search on anybody's table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from puzzle_nas import __version__
from puzzle_nas.recipe import Recipe
from puzzle_nas.recipe_text import load_recipe, parse_recipe
from tests.conftest import puzzle

TABLE = """layer,variant,loss,ms
0,full,0,10
0,half,1,6
0,none,5,0
1,full,0,10
1,half,2,6
1,none,9,0
"""


def test_search_on_a_table(tmp_path):
    (tmp_path / "table.csv").write_text(TABLE)
    arguments = ["search", "--table", tmp_path / "table.csv", "--minimize", "loss", "--limit", "ms=17"]
    found = json.loads(puzzle(*arguments, "--json").stdout)
    (best,) = found["solutions"]
    assert best["choices"] == {"0": "half", "1": "full"}
    assert (best["score"], best["costs"]["ms"], best["status"]) == (1, 16, "optimal")
    two = json.loads(puzzle(*arguments, "--solutions", 2, "--min-different", 2, "--json").stdout)["solutions"]
    assert [s["choices"] for s in two] == [{"0": "half", "1": "full"}, {"0": "full", "1": "half"}]
    assert "0: half" in puzzle(*arguments).stdout
    refused = puzzle("search", "--table", tmp_path / "table.csv", "--minimize", "loss", "--limit", "ms=-1", check=False)
    assert refused.returncode == 2 and "ms" in refused.stderr
    band = puzzle("search", "--table", tmp_path / "table.csv", "--maximize", "loss", "--limit", "ms=10:12", "--json")
    assert json.loads(band.stdout)["solutions"][0]["costs"]["ms"] in (10, 12)


def test_search_on_a_table_with_fused_layers_and_a_fixed_cost(tmp_path):
    rows = ["embeddings,fixed,1,0,30", "0,full,1,0,10", "0,half,1,1,6", "0,fused,2,2.5,8", "1,full,1,0,10"]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["layer,variant,span,loss,ms", *rows]))
    arguments = ["search", "--table", table, "--minimize", "loss", "--gap", 0, "--json"]
    (best,) = json.loads(puzzle(*arguments, "--limit", "ms=40").stdout)["solutions"]
    assert best == {
        "choices": {"embeddings": "fixed", "0": "fused"},
        "score": 2.5,
        "bound": 2.5,
        "gap": 0,
        "costs": {"loss": 2.5, "ms": 38},
        "status": "optimal",
    }
    refused = puzzle(*arguments, "--limit", "ms=30", check=False)
    assert refused.returncode == 2 and "ms <= 30 can come to 38 (8 above the limit)" in refused.stderr


def test_the_example_of_the_documentation(tmp_path, pytestconfig):
    text = (pytestconfig.rootpath / "docs/search.md").read_text()
    table, command, answer = text.split("```")[1:6:2]
    (tmp_path / "costs.csv").write_text(table.lstrip())
    found = json.loads(puzzle(*command.split()[2:], cwd=tmp_path).stdout)
    said = json.loads(answer.removeprefix("json"))
    assert found["solutions"] == said["solutions"]
    impossible = ["--minimize", "loss", "--limit", "runtime_ms=5"]
    refused = puzzle("search", "--table", "costs.csv", *impossible, cwd=tmp_path, check=False)
    assert refused.stderr.removeprefix("puzzle: ").strip() in " ".join(text.split())


def test_search_says_what_it_cannot_combine(tmp_path):
    (tmp_path / "table.csv").write_text(TABLE)
    for arguments, message in (
        ([], "either a run folder or a table"),
        ([tmp_path, "--table", tmp_path / "table.csv"], "either a run folder or a table"),
        ([tmp_path, "--solutions", 2], "are for a table"),
        ([tmp_path, "--gap", 0], "Name a limit"),
        (["--table", tmp_path / "table.csv", "--minimize", "loss", "--limit", "ms"], "write COLUMN=MAX"),
    ):
        refused = puzzle("search", *arguments, check=False)
        assert refused.returncode == 2 and message in refused.stderr


@pytest.mark.parametrize("arguments", [["-h"], [], ["--help"]])
def test_help_by_every_name_and_of_nothing(arguments):
    text = puzzle(*arguments).stdout
    assert "Usage:" in text and "evaluate-child" in text and "--version" in text and "--install-completion" in text
    assert "Usage:" in puzzle("engine", *arguments).stdout


def test_version():
    assert puzzle("--version").stdout == f"puzzle-nas {__version__}\n"


def test_shell_completion():
    complete = {"_PUZZLE_COMPLETE": "complete_bash", "COMP_WORDS": "puzzle distill-", "COMP_CWORD": "1"}
    command = [sys.executable, "-c", "import sys; sys.argv[0] = 'puzzle'; from puzzle_nas.cli import main; main()"]
    out = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **complete}).stdout
    assert out.split() == ["distill-blocks", "distill-child"]


@pytest.mark.parametrize("command", ["run", "search", "show", "generate", "score-blocks"])
def test_every_command_explains_itself(command):
    text = puzzle(command, "--help").stdout
    assert "Usage:" in text and "Options:" in text


def test_the_recipe_command_names_every_setting_and_its_meaning():
    text = puzzle("recipe").stdout

    def names(model):
        for name, field in model.model_fields.items():
            yield name, field.description
            inner = getattr(field.annotation, "__args__", [field.annotation])[0]
            if hasattr(inner, "model_fields"):
                yield from names(inner)

    for name, description in names(Recipe):
        assert f"{name}:" in text
        assert description is None or description.splitlines()[0] in text


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_in_the_repository_are_valid_and_survive_yaml(path):
    recipe = load_recipe(path)
    assert parse_recipe(recipe.to_yaml()) == recipe
