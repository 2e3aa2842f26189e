"""Architectures, search spaces and their labels, formats included."""

import pytest

from puzzle_nas.architecture import Architecture, plain
from puzzle_nas.recipe import SearchSpaceSettings, search_space_of
from puzzle_nas.recipe_text import parse_recipe
from puzzle_nas.search_space import SearchSpace, build_search_space, in_formats
from puzzle_nas.specs import GatedFFN, GroupedAttention, Head, NoOp, round_width

BLOCK = {"attention": GroupedAttention(2), "ffn": GatedFFN(64)}
PARENT = Architecture((BLOCK, BLOCK))
ASKED = SearchSpaceSettings(kv_heads=[1], width_fractions=[0.5], formats=["q8_0", "q4_0"])
SPACE = build_search_space(PARENT, ASKED, {"ffn"}, {"ffn"}, {1: ["ffn.w32"]})


def test_ids_name_the_format():
    assert GatedFFN(64).stored("q4_0").id == "ffn.w64@q4_0" and GroupedAttention(2).id == "attention.kv2"
    assert Head().id == "head" and Head(format="q8_0").id == "head@q8_0"
    assert GatedFFN(64, format="q4_0").plain == GatedFFN(64)


def test_json_keeps_formats_and_leaves_out_what_has_none():
    mixed = PARENT.replaced(1, GatedFFN(32, format="q8_0")).replaced(2, Head(format="q4_0"))
    assert Architecture.from_list(mixed.to_list()) == mixed and mixed.formats == ("q4_0", "q8_0")
    assert mixed.plain == PARENT.replaced(1, GatedFFN(32))
    assert "format" not in str(PARENT.to_list()) and Architecture.from_list(PARENT.to_list()) == PARENT
    stored = PARENT.without([0]).stored("q8_0")
    assert stored.layers[0] == {slot: NoOp(slot) for slot in BLOCK} and stored.formats == ("q8_0",)


def test_every_variant_comes_in_every_format_but_what_is_empty():
    ids = [spec.id for spec in SPACE.options[0]["ffn"]]
    assert ids == [
        *("ffn.w64", "ffn.w64@q8_0", "ffn.w64@q4_0", "ffn.w32", "ffn.w32@q8_0", "ffn.w32@q4_0"),
        *("ffn.linear", "ffn.linear@q8_0", "ffn.linear@q4_0", "ffn.no_op"),
    ]
    assert [head.id for head in SPACE.heads] == ["head", "head@q8_0", "head@q4_0"]
    # A layer that may become little may still do it in any format; so may its own sub-blocks.
    assert [spec.id for spec in SPACE.options[1]["ffn"]] == ids[:6]
    assert len(SPACE.options[1]["attention"]) == 3


def test_the_library_holds_what_is_not_put_together_of_the_rest():
    made = {spec.id for spec in SPACE.variants(0)}
    own = {"attention.kv2@q8_0", "attention.kv2@q4_0", "ffn.w64@q8_0", "ffn.w64@q4_0"}
    assert made == {"attention.kv1", "ffn.w32", "ffn.linear", "ffn.no_op", *own}
    scored = [(layer, specs[0].id) for layer, specs in SPACE.scored()]
    assert {name for layer, name in scored if layer == 0} == made and len(set(scored)) == len(scored)
    assert {name for layer, name in scored if layer == 2} == {"head@q8_0", "head@q4_0"}
    by_block = [specs for layer, specs in SPACE.scored(by_block=True) if layer == 0]
    assert {spec.id for specs in by_block if len(specs) == 1 for spec in specs} == own
    assert all(spec.format is None for specs in by_block if len(specs) == 2 for spec in specs)
    assert {plain(choice) for choice in SPACE.choices()} >= {(2, (Head(),)), (0, (GatedFFN(32),))}


def test_without_formats_the_head_is_no_choice():
    bare = build_search_space(PARENT, SearchSpaceSettings(formats=[]), (), (), {})
    assert {layer for layer, _ in bare.choices()} == {0, 1} and bare.parent == PARENT
    assert list(in_formats([NoOp("ffn")], ["q8_0"])) == [NoOp("ffn")]
    assert SearchSpace(bare.options).heads == (Head(),)


@pytest.mark.parametrize(
    ("width", "fraction", "rounded"),
    [(1536, 0.75, 1152), (1536, 0.1, 160), (341, 0.5, 160), (256, 0.01, 32), (255, 0.1, 32), (64, 0.1, 8), (7, 0.5, 4)],
)
def test_widths_are_multiples_of_32_and_of_less_only_in_narrow_parents(width, fraction, rounded):
    assert round_width(fraction, width) == rounded


def test_matrices_and_gaps_are_offered_where_a_recipe_says():
    settings = "search_space: {linear: [attention], no_op: [ffn]}"
    recipe = parse_recipe(f"{{parent: p, data: {{sources: [{{source: s}}]}}, {settings}}}")
    offered = {spec.id for specs in search_space_of(recipe, PARENT).options[0].values() for spec in specs}
    assert {"attention.linear", "ffn.no_op"} < offered and offered.isdisjoint({"ffn.linear", "attention.no_op"})
