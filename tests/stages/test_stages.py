"""What stages read of the recipe is what they declare, and their names are one."""

import importlib
import mmap
from pathlib import Path

import pytest

import puzzle_nas.stages
from puzzle_nas import pipeline
from puzzle_nas.artifacts import RunFolder, read_json
from puzzle_nas.recipe import Recipe, Settings
from puzzle_nas.recipe_text import parse_recipe
from puzzle_nas.stages import EVERYTHING, STAGES, WITHOUT_EFFECT, Stage

WHOLE = {"model_dump", "model_dump_json", "model_copy", "__dict__", "__iter__"}
"""What gives every field of a part at once."""
EVERY_STAGE = {
    "search": {"limits": {"speedup": 1.1}, "effort": "normal"},
    "bld": {"tokens": 256, "batch_tokens": 256, "coupled_tokens": 256, "coupled_solutions": 2},
    "gkd": {"tokens": 256, "batch_tokens": 256},
    "costs": {"mixtures": 1},
    "library": {"initialisation": "random"},
}
"""Short, and nothing left out. Random starts are the only ones that need a seed."""


def parts_of(recipe):
    """(dotted name, part) of a recipe and the parts within it; lists of parts count as values."""
    yield "", recipe
    for name in type(recipe).model_fields:
        if isinstance(part := getattr(recipe, name), Settings):
            yield name, part


class Reading:
    """Notes the dotted names of fields while a stage runs."""

    def __init__(self, recipe, monkeypatch):
        names = {id(part): name for name, part in parts_of(recipe)}
        self.names = set()
        look = Settings.__getattribute__

        def noting(part, attribute):
            value = look(part, attribute)
            if (name := names.get(id(part))) is not None:
                self._note(name, type(part), attribute, value)
            return value

        monkeypatch.setattr(Settings, "__getattribute__", noting)

    def _note(self, name, kind, attribute, value):
        if attribute in WHOLE:
            self.names |= {f"{name}.{field}".lstrip(".") for field in kind.model_fields}
        elif attribute in kind.model_fields and not isinstance(value, Settings):
            self.names.add(f"{name}.{attribute}".lstrip("."))


def covers(declared, name):
    return name == declared or name.startswith(f"{declared}.") or declared in EVERYTHING


@pytest.fixture(scope="module")
def read(tiny_settings, tmp_path_factory):
    """What each stage of a run read, by its name."""
    folder = tmp_path_factory.mktemp("reading")
    (folder / "text.txt").write_text("Once upon a time there was a cat. " * 2000)
    data = tiny_settings["data"] | {"train_tokens": 512, "calibration_tokens": 512}
    data["sources"] = [{"source": str(folder / "text.txt")}, {"source": "parent-samples", "weight": 0.1}]
    recipe = Recipe.model_validate(tiny_settings | EVERY_STAGE | {"data": data})
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        reading = Reading(recipe, patch)
        run = Stage.run

        def noted(stage, recipe, folder):
            reading.names = set()
            run(stage, recipe, folder)
            found[stage.name] = set(reading.names)

        patch.setattr(Stage, "run", noted)
        pipeline.run_stages(recipe, RunFolder(folder / "run"))
    return found


every_stage = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)


@every_stage
def test_no_stage_reads_what_it_does_not_declare(stage, read):
    declared = (*stage.reads, *stage.checks, *WITHOUT_EFFECT)
    assert [name for name in sorted(read[stage.name]) if not any(covers(d, name) for d in declared)] == []


@every_stage
def test_no_stage_declares_what_it_does_not_read(stage, read):
    declared = (*stage.reads, *stage.checks)
    assert [name for name in declared if not any(covers(name, found) for found in read[stage.name])] == []


def test_a_reading_that_is_not_declared_is_noticed(tiny_settings, monkeypatch):
    recipe = parse_recipe(str(tiny_settings))
    reading = Reading(recipe, monkeypatch)
    assert recipe.search.limits and recipe.seed == 0 and recipe.final_library == "main"
    assert reading.names == {"search.limits", "seed", "bld.coupled_tokens"}
    recipe.bld.model_dump()
    assert {"bld.tokens", "bld.shard_tokens"} < reading.names
    reading.names = set()
    recipe.to_yaml()
    assert reading.names >= {*Recipe.model_fields, "gkd.tokens", "data.separator"}


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ("memory=stream", []),
        ("threads=3", ["measure_costs", "search_architecture", "evaluate_child"]),
        ("search.effort=thorough", ["search_architecture"]),
        ("search.limits.speedup=1.3", ["couple_blocks", "search_architecture"]),
        ("bld.coupled_solutions=3", ["couple_blocks"]),
    ],
)
def test_a_changed_setting_changes_what_depends_on_it_and_the_report_that_shows_it(change, again, tiny_settings):
    before, after = (parse_recipe(str(tiny_settings), overrides) for overrides in ([], [change]))
    changed = [s.name for s in STAGES if pipeline.settings_read(s, before) != pipeline.settings_read(s, after)]
    assert changed == [*again, "write_report"]


def test_every_stage_is_the_file_of_its_name_and_comes_after_what_it_needs():
    names = [stage.name for stage in STAGES]
    files = {path.stem for path in Path(puzzle_nas.stages.__file__).parent.glob("*.py")}
    assert set(names) <= files and len(set(names)) == len(names)
    for number, stage in enumerate(STAGES):
        assert set(stage.needs) <= set(names[:number])
        assert callable(importlib.import_module(f"puzzle_nas.stages.{stage.name}").run)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's way to forget a peak")
def test_a_stage_is_not_charged_for_the_memory_of_those_before(tiny_settings, tmp_path, monkeypatch):
    run, folder = Stage.run, RunFolder(tmp_path / "run")

    def first_takes_more(stage, recipe, folder):
        # Given back at once, which what Python frees need not be.
        with mmap.mmap(-1, 512 << 20) as room:
            for _ in range(512 if stage.name == "prepare_parent" else 0):
                room.write(b"1" * (1 << 20))
            run(stage, recipe, folder)

    monkeypatch.setattr(Stage, "run", first_takes_more)
    pipeline.run_stages(Recipe.model_validate(tiny_settings), folder, last="prepare-data")
    first, second = (read_json(folder / f"seconds/{n}.json") for n in ("prepare_parent", "prepare_data"))
    assert first["peak_memory_bytes"] - second["peak_memory_bytes"] > 256 << 20
