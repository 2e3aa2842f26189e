"""What the documentation tells people to type: it parses, the files it names exist, and what is cheap is run."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from benchmarks.__main__ import benchmarks
from puzzle_nas.cli import app
from puzzle_nas.recipe_text import load_recipe, parse_recipe
from tests.conftest import puzzle

ROOT = Path(__file__).parents[2]
PAGES = {page.name: page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
OTHER_PROGRAMS = {"make", "cp", "open", "source", "python"}
ON_AN_ENGINE = {"engine", "serve", "bench", "export"}
"""Commands that need an engine installed: the suites of engines and exporters run them."""
TABLE = "\n".join(
    ["layer,variant,loss,runtime_ms,memory"]
    + [f"{layer},{row}" for layer in range(24) for row in ("full,0,10,1.5e8", f"half,{1 + layer},4,1e8", "none,99,0,0")]
)


def blocks(text: str, *languages: str) -> list[str]:
    """The contents of fenced blocks."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for language, content in found if language in languages]


def commands(text: str) -> list[list[str]]:
    """Every command of a page as words, comments left out."""
    lines = "\n".join(blocks(text, "bash", "console", "sh")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [_called(line) for line in words if line]


def headings(text: str) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


def _called(words: list[str]) -> list[str]:
    """A command as it is without its environment or torchrun."""
    if words[0] == "torchrun":
        return ["puzzle", *words[words.index("puzzle_nas") + 1 :]]
    return [words[0].removeprefix(".venv/bin/"), *words[1:]]


PUZZLE = [(page, command[1:]) for page, text in PAGES.items() for command in commands(text) if command[0] == "puzzle"]


def test_pages_hold_commands():
    assert len(PUZZLE) > 30
    assert {"README.md", "tutorial.md", "own-model.md", "own-data.md", "serving.md"} <= {page for page, _ in PUZZLE}


@pytest.mark.parametrize(("page", "words"), PUZZLE, ids=[f"{page} {' '.join(words)}" for page, words in PUZZLE])
def test_every_puzzle_command_parses(page, words):
    command, words = get_command(app), list(words)
    name = "puzzle"
    while hasattr(command, "commands"):
        name = words.pop(0)
        assert name in command.commands
        command = command.commands[name]
    context = command.make_context(name, words)
    overrides = context.params.get("overrides") or []
    recipe = str(context.params.get("recipe", ""))
    load_recipe(ROOT / (recipe if recipe.startswith("recipes/") else "recipes/torch.yaml"), list(overrides))


@pytest.mark.parametrize("page", PAGES)
def test_other_commands_and_every_file_that_is_named_exist(page):
    text = PAGES[page]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for program, *words in commands(text):
        assert program in {"puzzle", *OTHER_PROGRAMS}, f"{page} uses {program}: say here how it is checked"
        if program == "make":
            assert words[0] in targets
        if program == "python":
            files = words[2:] if words[:2] == ["-m", "pytest"] else words[:1]
            files = itertools.takewhile(lambda word: not word.startswith("-"), files)
            assert all((ROOT / file).exists() for file in files)
    for name in re.findall(r"python\s+-m\s+benchmarks\s+([a-z]\w*)", text):
        assert name in benchmarks(), f"{page} uses the benchmark {name}"
    # What a page says that a command writes may not be there yet, and what runs at an old commit no longer.
    present = re.sub(r"`[^`]*`\s+at\s+[0-9a-f]{7}\b", "", text)
    assert not re.search(r"\bpython\s+benchmarks/", present), f"{page}: benchmarks are started by python -m benchmarks"
    for path in re.findall(r"(?<!writes `)\b(?:puzzle_nas|benchmarks|recipes|docs|tests)/[\w/.-]*\w", present):
        assert (ROOT / path).exists(), f"{page} names {path}"
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for link, heading in re.findall(r"\]\(([^)#:]*)(#[\w-]*)?\)", text):
        target = folder / link if link else folder / page
        assert target.exists(), f"{page} links to {link}"
        assert not heading or heading[1:] in headings(target.read_text()), f"{page} links to {link}{heading}"


@pytest.mark.parametrize("page", PAGES)
def test_yaml_is_part_of_a_recipe_and_python_is_python(page):
    whole = yaml.safe_load((ROOT / "recipes/torch.yaml").read_text())
    for part in blocks(PAGES[page], "yaml"):
        parse_recipe(yaml.safe_dump(whole | yaml.safe_load(part)))
    for code in blocks(PAGES[page], "python"):
        compile(code, page, "exec")


def is_cheap(words: list[str]) -> bool:
    """Whether it runs on the tiny model, on any machine, without an engine and without files that only a user has."""
    on_this_machine = not any(word.startswith(("engine=", "costs.file=")) for word in words)
    return words[0] not in ON_AN_ENGINE and on_this_machine and not {"--data", "--questions"} & set(words)


RUN = {
    page: [c for c in commands(text) if c[0] == "cp" or (c[0] == "puzzle" and is_cheap(c[1:]))]
    for page, text in PAGES.items()
}


@pytest.mark.parametrize("page", [page for page, found in RUN.items() if any(c[0] == "puzzle" for c in found)])
def test_cheap_commands_run_in_order_on_the_tiny_model(page, tmp_path, tiny_run, tiny_parent, tiny_settings):
    """In a folder in which every recipe is the tiny one, and every run that a page starts with is finished."""
    for run in ("quickstart", "another", "mine"):
        shutil.copytree(tiny_run, tmp_path / "runs" / run)
    # A run folder knows its parent by a relative path.
    (tmp_path / tiny_parent.name).symlink_to(tiny_parent)
    (tmp_path / "recipes").mkdir()
    for recipe in ("recipes/quickstart.yaml", "recipes/torch.yaml", "my.yaml"):
        (tmp_path / recipe).write_text(json.dumps(tiny_settings))
    own_table = re.search(r"^```\n(layer,.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)
    (tmp_path / "costs.csv").write_text(own_table[1] if own_table else TABLE)
    for program, *words in RUN[page]:
        if program == "puzzle":
            puzzle(*words, cwd=tmp_path)
        elif words[0] == "-r":
            shutil.copytree(tmp_path / words[1], tmp_path / words[2])
