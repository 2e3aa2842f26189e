"""What is counted from configurations, against real models of every family."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from puzzle_nas.choosing.cost_fit import parts_of
from puzzle_nas.errors import CheckpointError
from puzzle_nas.families import architecture_of, child_config, head_dim_of
from puzzle_nas.planning.counting import Counts
from puzzle_nas.planning.shapes import meta_model, model_size, read_parent_config
from puzzle_nas.recipe import SearchSpaceSettings
from puzzle_nas.recipe_text import parse_recipe
from puzzle_nas.search_space import build_search_space
from puzzle_nas.specs import Head, ParentsOwn
from tests.families.parents import PARENTS, config_of

CONFIGS = {name: config_of(name) for name in PARENTS}
OPAQUE = ("qwen3_next", "qwen3_5_text", "lfm2")
"""Families with mixers of which only the matrices are counted."""
LENGTH, ROWS = 12, 2


def space_of(config):
    architecture = architecture_of(config)
    asked = SearchSpaceSettings(windows=[3], width_fractions=[0.5])
    linear = {slot for _, slot, spec in architecture if not isinstance(spec, ParentsOwn)}
    return build_search_space(architecture, asked, linear, architecture.slots, {})


def counts_of(config, **settings):
    data = {"sources": [{"source": "python-stdlib"}], "sequence_length": LENGTH, **settings.pop("data", {})}
    recipe = parse_recipe(json.dumps({"parent": "./parent", "data": data, **settings}))
    space = space_of(config)
    return Counts(recipe, space, model_size(meta_model(config), space), itemsize=4)


def numbers_in(model):
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_model_and_of_children_with_each_variant(name):
    config = CONFIGS[name]
    space = space_of(config)
    size = model_size(meta_model(config), space)
    whole = numbers_in(AutoModelForCausalLM.from_config(config))
    assert size.parameters == whole
    for part in parts_of(space):
        if isinstance(part.spec, Head):
            continue
        own = space.own(part.group, part.spec.slot)
        if part.spec == own:
            continue
        with torch.device("meta"):
            child = AutoModelForCausalLM.from_config(child_config(config, space.parent.replaced(part.group, part.spec)))
        difference = size.of(part.group, part.spec).parameters - size.of(part.group, own).parameters
        assert numbers_in(child) - whole == difference, part


@pytest.mark.parametrize("name", [name for name in PARENTS if name not in OPAQUE])
def test_flops_of_a_forward_pass_are_those_that_torch_counts(name):
    config = CONFIGS[name]
    counts = counts_of(config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    tokens = torch.randint(3, config.vocab_size, (ROWS, LENGTH))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens, use_cache=False)
    # Rotary positions are products as well, of a few numbers; they lie outside the layers.
    found = {module: sum(flops.values()) for module, flops in counter.get_flop_counts().items()}
    layers = sum(flops for module, flops in found.items() if module.split(".")[-2:-1] == ["layers"])
    assert layers == counts.forward(ROWS * LENGTH).flops
    head = next(flops for module, flops in found.items() if module.endswith("lm_head"))
    assert head == counts.head(ROWS * LENGTH).flops


def test_flops_of_children_with_each_variant_are_those_that_torch_counts():
    config = CONFIGS["llama, biases"]
    counts, space = counts_of(config), space_of(config)
    tokens = torch.randint(3, config.vocab_size, (ROWS, LENGTH))
    for spec in space.variants(1):
        made = child_config(config, space.parent.replaced(1, spec))
        made._attn_implementation = "eager"
        child = AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            child(tokens, use_cache=False)
        found = {module: sum(flops.values()) for module, flops in counter.get_flop_counts().items()}
        above = sum(flops for module, flops in found.items() if module.endswith(("layers.1", "layers.2", "lm_head")))
        assert above == counts.replacement(ROWS * LENGTH, 1, (spec,)).flops, spec


def test_the_cache_of_a_token_is_counted_for_every_layer_that_has_one():
    counts = counts_of(CONFIGS["llama"])
    # 3 layers, keys and values of 2 heads of 12.
    assert counts.size.body.cached == 3 * 2 * 2 * 12
    config = CONFIGS["lfm2"]
    attending = config.layer_types.count("full_attention")
    assert counts_of(config).size.body.cached == attending * 2 * config.num_key_value_heads * head_dim_of(config)


def test_a_configuration_is_read_from_a_folder_or_from_a_file_of_any_name(tmp_path, tiny_parent):
    config = read_parent_config(str(tiny_parent))
    assert (config.hidden_size, config.num_hidden_layers) == (128, 4)
    (tmp_path / "big.json").write_text((tiny_parent / "config.json").read_text())
    assert read_parent_config("someone/elsewhere", tmp_path / "big.json").hidden_size == 128


@pytest.mark.parametrize("content", ["no JSON", "[]", '{"hidden_size": 8}', '{"model_type": "none"}'])
def test_a_file_that_is_no_configuration_is_named(tmp_path, content):
    (tmp_path / "big.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"big\.json is not a config\.json"):
        read_parent_config("someone/elsewhere", tmp_path / "big.json")


def test_a_family_without_an_adapter_is_refused(tmp_path):
    (tmp_path / "big.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match="no adapter"):
        read_parent_config("someone/elsewhere", tmp_path / "big.json")


def test_a_configuration_that_contradicts_itself_is_one_sentence(tmp_path):
    (tmp_path / "big.json").write_text('{"model_type": "llama", "hidden_act": "none"}')
    config = read_parent_config("someone/elsewhere", tmp_path / "big.json")
    with pytest.raises(CheckpointError, match="transformers builds no model of the parent's config"):
        model_size(meta_model(config), space_of(config))
