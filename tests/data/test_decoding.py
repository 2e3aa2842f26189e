"""Written token by token, a model says what it says of the whole row."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from puzzle_nas.data.decoding import decoding


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}],
)
def test_logits_are_those_of_the_whole_row(changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 97}
    config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, **changes)
    model = Qwen2ForCausalLM(config).eval()
    tokens, before = torch.randint(1, 97, (3, 12)), model.config._attn_implementation
    with torch.inference_mode():
        with decoding(model, 12) as cache:
            steps = [model(tokens[:, i : i + 1], cache=cache).logits for i in range(12)]
        assert model.config._attn_implementation == before
        torch.testing.assert_close(torch.cat(steps, 1), model(tokens).logits, rtol=1e-5, atol=1e-5)
