"""The import contracts of `make check` break when somebody breaks them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PLANTED = {
    "search imports torch": ("search/problem.py", "import torch", "Plans and search never import torch"),
    "a stage imports a stage": (
        "stages/search_architecture.py",
        "from puzzle_nas.stages import score_blocks",
        "Stages meet only through the run folder",
    ),
    "an engine imports a stage": (
        "engines/torch_engine.py",
        "import puzzle_nas.stages.refit_child",
        "Imports point down",
    ),
    "modelling code imports ours": (
        "modeling/modeling_puzzle.py",
        "import puzzle_nas.errors",
        "Modeling travels alone",
    ),
}


def lint(folder):
    code = (
        "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command; lint_imports_command()"
    )
    return subprocess.run([sys.executable, "-c", code, "--no-cache"], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def copy_of_package(tmp_path):
    shutil.copytree(ROOT / "puzzle_nas", tmp_path / "puzzle_nas", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_contracts_hold(copy_of_package):
    result = lint(copy_of_package)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_violation_breaks_its_contract(copy_of_package, what):
    file, line, contract = PLANTED[what]
    path = copy_of_package / "puzzle_nas" / file
    path.write_text(path.read_text() + f"\n{line}\n")
    result = lint(copy_of_package)
    assert result.returncode != 0
    assert f"{contract} BROKEN" in result.stdout


def test_light_modules_do_not_load_torch():
    names = "architecture, recipe, recipe_text, errors, artifacts, search, stages, estimates, cli"
    imports = f"import sys; from puzzle_nas import {names}; from puzzle_nas.choosing import costs, frontier"
    code = f"{imports}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
