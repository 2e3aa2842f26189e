"""What a parent's sizes rule out."""

import json

import pytest
from transformers import LlamaConfig, Qwen3Config

from puzzle_nas.errors import RecipeError
from puzzle_nas.planning.refusals import check_shapes
from puzzle_nas.planning.shapes import meta_model
from puzzle_nas.recipe_text import parse_recipe
from tests.conftest import TINY_SETTINGS


def test_quantised_caches_need_heads_that_divide_into_blocks():
    sizes = dict(hidden_size=160, intermediate_size=320, num_hidden_layers=1, num_attention_heads=4, vocab_size=32)
    parent = meta_model(LlamaConfig(num_key_value_heads=2, **sizes))

    def check(kv_format, engine="llama.cpp"):
        settings = {"parent": "./parent", **TINY_SETTINGS, "engine": engine, "kv_format": kv_format}
        check_shapes(parse_recipe(json.dumps(settings)), parent)

    with pytest.raises(RecipeError, match="heads of 40 numbers do not divide into q5_1's blocks of 32; set kv_format"):
        check("q5_1")
    check("bf16")
    with pytest.raises(
        RecipeError, match="heads of 40 numbers do not divide into fp8's blocks of 32; leave kv_format out"
    ):
        check("fp8", "vllm")


@pytest.mark.parametrize(
    ("config", "settings", "reason"),
    [
        (LlamaConfig, {"windows": [8]}, r"llama\.cpp has no attention\.window8\. Set search_space\.windows=\[\]\."),
        (
            Qwen3Config,
            {"width_fractions": [0.5], "linear": ["ffn"]},
            r"layers of qwen3 in the parent's sizes only, and no attention\.kv1, and so on \(4 more\)\. Set "
            r"search_space\.kv_heads=\[\] search_space\.no_op=\[\] search_space\.width_fractions=\[\] "
            r"search_space\.linear=\[\]\.",
        ),
        (Qwen3Config, {"kv_heads": [], "width_fractions": [], "linear": [], "no_op": []}, None),
    ],
)
def test_variants_that_the_engine_does_not_serve_are_refused_before_they_are_made(config, settings, reason):
    sizes = dict(hidden_size=64, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4, vocab_size=32)
    parent = meta_model(config(num_key_value_heads=2, **sizes))
    space = {**settings, "formats": ["q8_0"]}
    asked = {"parent": "./parent", **TINY_SETTINGS, "engine": "llama.cpp", "search_space": space}
    recipe = parse_recipe(json.dumps(asked))
    if reason is None:
        check_shapes(recipe, parent)
        return
    with pytest.raises(RecipeError, match=reason):
        check_shapes(recipe, parent)
