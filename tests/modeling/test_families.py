"""Every family: a child of parent variants only has exactly the parent's logits."""

import platform
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen3Config,
)

from puzzle_nas.architecture import Architecture
from puzzle_nas.errors import CheckpointError
from puzzle_nas.families import child_config, to_puzzle
from puzzle_nas.families.loading import build, open_parent, shape_of

SIZES = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
PARENTS = {
    "llama": LlamaConfig(**SIZES),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama, tied, wide heads": LlamaConfig(**SIZES, tie_word_embeddings=True, head_dim=16),
    "llama 3 rope": LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral, window": MistralConfig(**SIZES, sliding_window=5, head_dim=12),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, windows in half of the layers": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=2
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen3, biases, tied": Qwen3Config(**SIZES, head_dim=16, attention_bias=True, tie_word_embeddings=True),
}


def randomised(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Biases start at zero and norms at one: a family that dropped them would pass unnoticed.
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", PARENTS)
def test_a_child_of_parent_variants_has_exactly_the_parents_logits(name):
    parent = randomised(PARENTS[name])
    puzzle = to_puzzle(parent)
    architecture = Architecture.of_parent(shape_of(puzzle.config))
    child = build(child_config(puzzle.config, architecture), puzzle.state_dict())
    tokens = torch.randint(0, 199, (3, 21))
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    with torch.no_grad():
        assert torch.equal(parent(tokens).logits, child(tokens).logits)
        assert torch.equal(
            parent(tokens, attention_mask=mask).logits[:, -1],
            child(tokens, attention_mask=mask).logits[:, -1],
        )
    assert torch.equal(
        parent.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0),
        child.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0),
    )


def test_unknown_families_are_refused_with_the_known_ones(tmp_path):
    OPTForCausalLM(
        OPTConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16)
    ).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"'opt'.*llama, mistral, qwen2, qwen3"):
        open_parent(tmp_path)


FAULTS = """
import resource, torch
{call}
def step():
    # 64 MB: glibc learns by itself to keep what is below 32.
    return torch.ones(2**24).exp()
# Where the heap begins is random, and it grows for some steps.
for _ in range(20):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is meant")
def test_tensors_take_the_memory_that_earlier_ones_freed():
    keep = "from puzzle_nas.families.loading import keep_freed_memory; keep_freed_memory()"
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", FAULTS.format(call=call)], capture_output=True, check=True).stdout)
        for call in (keep, "")
    )
    assert kept < given_back / 4 and given_back > 10_000
