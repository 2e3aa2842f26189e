"""A tiny but trained parent (glassllm: 4 layers, 0.8M parameters) as an ordinary Llama checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TINY_SETTINGS = {
    "seed": 0,
    "precision": "float32",
    "threads": 1,
    "device": "cpu",
    "data": {
        "sources": [{"source": "python-stdlib"}],
        "sequence_length": 32,
        "train_tokens": 16384,
        "calibration_tokens": 4096,
        "scoring_tokens": 1024,
        "selection_tokens": 1024,
        "validation_tokens": 1024,
    },
    "search_space": {"width_fractions": [0.5, 0.25]},
    "scenarios": [{"name": "chat", "batch_size": 2, "prefill_tokens": 16, "decode_tokens": 8}],
    "costs": {"mixtures": 6},
    "bld": {"tokens": 4096, "batch_tokens": 256, "learning_rate": 1e-3},
    "search": {"limits": {"speedup": 1.2}, "effort": "fast"},
    "gkd": {"tokens": 8192, "batch_tokens": 256, "learning_rate": 1e-3},
}


def glassllm_as_llama():
    """(model, tokenizer): the same function as glassllm's own, in transformers' classes."""
    import glassllm
    import numpy as np
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = Path(glassllm.__file__).parent / "weights"
    arrays = np.load(folder / "en.npz")
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=341,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    model = LlamaForCausalLM(config)

    def matrix(name):
        return torch.tensor(arrays[name].astype(np.float32)).T.contiguous()

    def halves(weight):
        # glassllm rotates neighbouring pairs, Llama rotates halves.
        heads = weight.view(-1, 16, 2, weight.shape[1])
        return heads.transpose(1, 2).reshape(weight.shape).contiguous()

    weights = {
        "model.embed_tokens.weight": torch.tensor(arrays["E"].astype(np.float32)),
        "model.norm.weight": torch.tensor(arrays["norm_f.gamma"].astype(np.float32)),
    }
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    names = {"attn.W_V": "self_attn.v_proj", "attn.W_O": "self_attn.o_proj", "ffn.W1": "mlp.gate_proj"}
    names |= {"ffn.W3": "mlp.up_proj", "ffn.W2": "mlp.down_proj"}
    for layer in range(4):
        ours, theirs = f"model.layers.{layer}", f"blocks.{layer}"
        weights[f"{ours}.self_attn.q_proj.weight"] = halves(matrix(f"{theirs}.attn.W_Q"))
        weights[f"{ours}.self_attn.k_proj.weight"] = halves(matrix(f"{theirs}.attn.W_K"))
        for name, target in names.items():
            weights[f"{ours}.{target}.weight"] = matrix(f"{theirs}.{name}")
        for number, target in (("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm")):
            gamma = arrays[f"{theirs}.{number}.gamma"].astype(np.float32)
            weights[f"{ours}.{target}.weight"] = torch.tensor(gamma)
    model.load_state_dict(weights)

    data = json.loads((folder / "en.tokenizer.json").read_text())
    merges = [tuple(pair) for pair in data["merges"]]
    vocab = ["<pad>", "<unk>", "<bos>", "<eos>", *data["alphabet"], *(a + b for a, b in merges)]
    ids = {token: i for i, token in enumerate(vocab)}
    raw = Tokenizer(models.BPE(ids, merges, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|▁*[^▁\n]+|▁+"), "isolated")
    raw.decoder = decoders.Replace("▁", " ")
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return model.eval(), PreTrainedTokenizerFast(tokenizer_object=raw, **special)


@pytest.fixture(scope="session")
def tiny_parent(tmp_path_factory):
    """A checkpoint folder."""
    folder = tmp_path_factory.mktemp("tiny-parent")
    model, tokenizer = glassllm_as_llama()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_settings(tiny_parent):
    """A recipe for the tiny parent, as a dictionary."""
    return {"parent": str(tiny_parent), **TINY_SETTINGS}


def puzzle(*arguments, check=True, cwd=None, env=None):
    """Run the real command line in a process of its own."""
    command = [sys.executable, "-P", Path(__file__).with_name("command_line.py"), *map(str, arguments)]
    # As wide as it is, unless asked; where pytest has imported readline, C's environment has a COLUMNS of its own.
    environment = {**{name: value for name, value in os.environ.items() if name != "COLUMNS"}, **(env or {})}
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=600, env=environment)
    if check and result.returncode:
        raise AssertionError(f"{' '.join(map(str, command))} -> {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_settings):
    """A finished run on the tiny parent, made through the command line. Tests must not change it."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = folder / "tiny.yaml"
    recipe.write_text(json.dumps(tiny_settings))
    result = puzzle("run", recipe, "--run-dir", folder / "tiny")
    (folder / "tiny.out").write_text(result.stdout)
    return folder / "tiny"


class OneByOne:
    """In place of a CUDA graph: does the step whenever it is asked for."""

    made = 0

    def __init__(self, compute, inputs):
        self.compute = compute
        OneByOne.made += 1

    def step(self, rate, inputs):
        return self.compute(torch.tensor(rate, dtype=torch.float64), *inputs)
