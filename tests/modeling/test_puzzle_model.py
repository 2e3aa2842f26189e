"""A child with every kind of layer behaves as an ordinary transformers model."""

import itertools
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from puzzle_nas.modeling import CACHE, PuzzleConfig, PuzzleForCausalLM

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
EVERY_KIND = {
    0: {"skip": ["attention", "mlp"]},
    1: {"num_key_value_heads": 2},
    2: {"attention_linear": True, "intermediate_size": 16},
    3: {"skip": ["attention"], "mlp_linear": True},
    4: {"num_key_value_heads": 1, "skip": ["mlp"]},
}
CHILDREN = {
    "every kind, empty layer 0": EVERY_KIND,
    "no attention in layer 0": {0: {"skip": ["attention"]}},
    "no attention at all": {i: {"skip": ["attention"]} for i in range(6)},
    "linear attention everywhere": {i: {"attention_linear": True} for i in range(6)},
    "nothing at all": {i: {"skip": ["attention", "mlp"]} for i in range(6)},
    "last layer empty": {5: {"skip": ["attention", "mlp"]}},
}


def child_of(per_layer, **changes):
    torch.manual_seed(0)
    return PuzzleForCausalLM(PuzzleConfig(**{**BASE, **changes}, per_layer_config=per_layer)).eval()


@pytest.mark.parametrize("name", CHILDREN)
@pytest.mark.parametrize("window", [None, 4])
def test_generation_with_cache_equals_without(name, window):
    changes = {}
    if window:
        kinds = itertools.cycle(["sliding_attention", "full_attention"])
        changes = {"sliding_window": window, "layer_types": list(itertools.islice(kinds, 6))}
    model = child_of(CHILDREN[name], **changes)
    tokens = torch.randint(1, 97, (2, 9))
    arguments = {"max_new_tokens": 10, "do_sample": False}
    without = model.generate(tokens, use_cache=False, **arguments)
    assert torch.equal(model.generate(tokens, use_cache=True, **arguments), without)
    assert torch.equal(
        model.generate(tokens, cache_implementation="static", disable_compile=True, **arguments), without
    )
    beams = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(tokens, **beams), model.generate(tokens, use_cache=False, **beams))


@pytest.mark.parametrize("name", CHILDREN)
def test_left_padding_changes_nothing(name):
    model = child_of(CHILDREN[name])
    short, long = torch.randint(1, 97, (1, 5)), torch.randint(1, 97, (1, 11))
    batch = torch.cat([torch.cat([torch.zeros(1, 6, dtype=torch.long), short], 1), long])
    mask = (torch.arange(11) >= torch.tensor([[6], [0]])).long()
    arguments = {"max_new_tokens": 8, "do_sample": False}
    together = model.generate(batch, attention_mask=mask, **arguments)
    assert torch.equal(together[:1, 11:], model.generate(short, **arguments)[:, 5:])
    assert torch.equal(together[1:, 11:], model.generate(long, **arguments)[:, 11:])


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_static_cache_given_by_the_user_works_step_by_step(name):
    model = child_of(EVERY_KIND)
    tokens = torch.randint(1, 97, (2, 12))
    cache = StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        steps = [model(tokens[:, :6], use_cache=True, **{name: cache}).logits]
        steps += [model(tokens[:, i : i + 1], use_cache=True, **{name: cache}).logits for i in range(6, 12)]
        torch.testing.assert_close(torch.cat(steps, 1), model(tokens).logits, rtol=1e-5, atol=1e-5)


def test_only_layers_with_attention_have_a_cache():
    model = child_of(EVERY_KIND)
    cache = model(torch.randint(1, 97, (1, 7)), use_cache=True)[CACHE]
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(1, 2, 7, 8), (1, 1, 7, 8), (1, 4, 7, 8)]


def test_skipped_sub_blocks_leave_no_weights_behind():
    names = child_of(EVERY_KIND).state_dict()
    assert not any(name.startswith("model.layers.0.") for name in names)
    assert "model.layers.2.self_attn.linear_attn.weight" in names
    assert "model.layers.3.mlp.linear_mlp.weight" in names
    assert not any(name.startswith(("model.layers.3.self_attn", "model.layers.3.input_layernorm")) for name in names)


def test_a_checkpoint_loads_without_our_package(tmp_path):
    model = child_of(EVERY_KIND)
    model.save_pretrained(tmp_path / "child")
    tokens = torch.randint(1, 97, (1, 8))
    with torch.no_grad():
        save_file({"tokens": tokens, "logits": model(tokens).logits}, tmp_path / "expected.safetensors")
    code = f"""
import sys
from safetensors.torch import load_file
sys.modules["puzzle_nas"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "child")!r}, trust_remote_code=True)
expected = load_file({str(tmp_path / "expected.safetensors")!r})
assert model(expected["tokens"]).logits.equal(expected["logits"])
assert model.generate(expected["tokens"], max_new_tokens=3).shape == (1, 11)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_with_our_package_no_remote_code_is_needed(tmp_path):
    model = child_of(EVERY_KIND)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is PuzzleForCausalLM
    tokens = torch.randint(1, 97, (1, 8))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.to_dict()["per_layer_config"]["1"] == {"num_key_value_heads": 2}
