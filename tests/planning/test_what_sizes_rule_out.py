"""What a parent's sizes rule out."""

import json

import pytest
from transformers import LlamaConfig

from puzzle_nas.errors import RecipeError
from puzzle_nas.planning.refusals import check_shapes
from puzzle_nas.planning.shapes import meta_model
from puzzle_nas.recipe_text import parse_recipe
from tests.conftest import TINY_SETTINGS


def test_quantised_caches_need_heads_that_divide_into_blocks():
    sizes = dict(hidden_size=160, intermediate_size=320, num_hidden_layers=1, num_attention_heads=4, vocab_size=32)
    parent = meta_model(LlamaConfig(num_key_value_heads=2, **sizes))

    def check(kv_format):
        settings = {"parent": "./parent", **TINY_SETTINGS, "engine": "llama.cpp", "kv_format": kv_format}
        check_shapes(parse_recipe(json.dumps(settings)), parent)

    with pytest.raises(RecipeError, match="heads of 40 numbers do not divide into q5_1's blocks of 32; set kv_format"):
        check("q5_1")
    check("bf16")
