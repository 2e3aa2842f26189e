"""A child with every kind of layer behaves as an ordinary transformers model."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config, StaticCache

from puzzle_nas.families import architecture_of, child_config
from puzzle_nas.modeling import CACHE, PuzzleForCausalLM
from puzzle_nas.specs import GatedFFN, GroupedAttention, Linear, NoOp, WindowAttention

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
NO_ATTENTION, NO_FFN, LINEAR = NoOp("attention"), NoOp("ffn"), Linear("attention")
EVERY_KIND = {
    0: [NO_ATTENTION, NO_FFN],
    1: [GroupedAttention(2)],
    2: [LINEAR, GatedFFN(16)],
    3: [NO_ATTENTION, Linear("ffn")],
    4: [GroupedAttention(1), NO_FFN],
}
CHILDREN = {
    "every kind, empty layer 0": EVERY_KIND,
    "no attention in layer 0": {0: [NO_ATTENTION]},
    "no attention at all": {i: [NO_ATTENTION] for i in range(6)},
    "linear attention everywhere": {i: [LINEAR] for i in range(6)},
    "nothing at all": {i: [NO_ATTENTION, NO_FFN] for i in range(6)},
    "last layer empty": {5: [NO_ATTENTION, NO_FFN]},
    "two windows": {0: [NO_ATTENTION], 1: [WindowAttention(3, 4)], 3: [WindowAttention(2, 4)], 5: [LINEAR]},
    "windows everywhere": {i: [WindowAttention(2 + i % 2, 4)] for i in range(6)},
}


def child_of(per_layer, window=None):
    """Of a Llama, or, with `window`, of a Qwen2 of which every second layer has that one."""
    torch.manual_seed(0)
    parent = LlamaConfig(**BASE)
    if window:
        types = ["sliding_attention", "full_attention"] * 3
        parent = Qwen2Config(**BASE, use_sliding_window=True, sliding_window=window, layer_types=types)
    architecture = architecture_of(parent)
    for layer, specs in per_layer.items():
        for spec in specs:
            if isinstance(spec, GroupedAttention):
                spec = replace(spec, window=architecture.layers[layer]["attention"].window)
            architecture = architecture.replaced(layer, spec)
    return AutoModelForCausalLM.from_config(child_config(parent, architecture)).eval()


@pytest.mark.parametrize("name", CHILDREN)
@pytest.mark.parametrize("window", [None, 4])
def test_generation_with_cache_equals_without(name, window):
    model = child_of(CHILDREN[name], window)
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
    assert "model.layers.2.self_attn.linear.weight" in names
    assert "model.layers.3.mlp.linear.weight" in names
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
    assert isinstance(again, PuzzleForCausalLM)
    tokens = torch.randint(1, 97, (1, 8))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.puzzle_layers[1]["attention"]["changes"] == {"num_key_value_heads": 2}


def test_a_window_sees_that_many_tokens_and_the_cache_holds_no_more():
    model = child_of({i: [WindowAttention(3, 4)] for i in range(6)})
    tokens = torch.randint(1, 97, (1, 24))
    changed = tokens.clone()
    changed[0, 4] = tokens[0, 4] % 96 + 1
    with torch.no_grad():
        differs = (model(tokens).logits != model(changed).logits).any(-1)[0]
    # Each of six layers hands on what is two tokens further back.
    assert differs[4:17].any() and not differs[:4].any() and not differs[17:].any()
    cache = model(tokens, use_cache=True)[CACHE]
    assert {tuple(layer.keys.shape) for layer in cache.layers} == {(1, 4, 2, 8)}


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_windows_beside_the_parents_own_see_no_padding(family):
    own = {"sliding_window": 9} if family == "mistral" else {"use_sliding_window": True, "sliding_window": 9}
    torch.manual_seed(0)
    parent = AutoConfig.for_model(family, **BASE, **own, **({} if family == "mistral" else {"max_window_layers": 0}))
    architecture = architecture_of(parent)
    assert {spec.window for _, slot, spec in architecture if slot == "attention"} == {9}
    child = AutoModelForCausalLM.from_config(child_config(parent, architecture.replaced(0, WindowAttention(2, 4))))
    child.eval()
    text = torch.randint(1, 97, (1, 5))
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), text], 1)
    mask = (torch.arange(14) >= 9).long().unsqueeze(0)
    arguments = {"max_new_tokens": 8, "do_sample": False}
    expected = child.generate(text, use_cache=False, **arguments)[:, 5:]
    assert torch.equal(child.generate(padded, attention_mask=mask, **arguments)[:, 14:], expected)


def test_a_window_as_long_as_the_text_changes_nothing():
    tokens = torch.randint(1, 97, (2, 12))
    plain, windowed = child_of({}), child_of({i: [WindowAttention(12, 4)] for i in range(6)})
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, windowed(tokens).logits)


def test_an_older_childs_checkpoint_says_what_to_do(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "puzzle", "hidden_size": 8}')
    with pytest.raises(ValueError, match="make it again"):
        AutoConfig.from_pretrained(tmp_path)
