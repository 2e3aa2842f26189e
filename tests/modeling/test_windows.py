"""Windows of the parent's own next to shorter ones."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, Qwen3Config

from puzzle_nas.families import architecture_of, child_config
from puzzle_nas.specs import GroupedAttention, WindowAttention

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "initializer_range": 0.3,
}
PARENTS = {
    "mistral": MistralConfig(**SIZES, sliding_window=12),
    "qwen3": Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=12, layer_types=["sliding_attention"] * 2),
}


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("family", PARENTS)
def test_left_padding_changes_nothing(family, layer):
    torch.manual_seed(0)
    config = PARENTS[family]
    architecture = architecture_of(config).replaced(layer, WindowAttention(5, 4))
    model = AutoModelForCausalLM.from_config(child_config(config, architecture)).eval()
    tokens = torch.randint(3, 97, (1, 8))
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), tokens], 1)
    mask = (torch.arange(15) >= 7).long()[None]
    arguments = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = model.generate(tokens, **arguments)
    assert torch.equal(model.generate(tokens, use_cache=False, **arguments), alone)
    assert torch.equal(model.generate(padded, attention_mask=mask, **arguments)[:, 7:], alone)


def test_a_window_that_the_parents_layer_does_not_have_is_refused():
    config = PARENTS["mistral"]
    architecture = architecture_of(config).replaced(1, GroupedAttention(2))
    with pytest.raises(ValueError, match="Layer 1 of the parent has a window of 12, not None"):
        child_config(config, architecture)
