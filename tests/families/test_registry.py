"""Which families there are."""

import pytest
from transformers import OPTConfig, OPTForCausalLM

from puzzle_nas.errors import CheckpointError
from puzzle_nas.families import open_parent


def test_unknown_families_are_refused_with_the_known_ones(tmp_path):
    OPTForCausalLM(
        OPTConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16)
    ).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"'opt'.*llama, mistral, qwen2, qwen3"):
        open_parent(tmp_path)
