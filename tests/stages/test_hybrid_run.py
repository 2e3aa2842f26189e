"""A whole run on a streamed parent that has everything: delta nets, attention, mixtures, shared experts, an FFN."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3NextConfig

import puzzle_nas.modeling  # noqa: F401
from puzzle_nas.families import architecture_of
from tests.conftest import TINY_SETTINGS, glassllm_as_llama, puzzle
from tests.families.parents import PARENTS, SIZES, random_parent

LIMIT_BYTES = 700_000


@pytest.fixture(scope="module")
def hybrid_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    _, tokenizer = glassllm_as_llama()
    sizes = {"hidden_size": 32, "vocab_size": 1024, "max_position_embeddings": 128}
    random_parent(Qwen3NextConfig(**SIZES | PARENTS["qwen3_next"] | sizes)).save_pretrained(folder / "parent")
    tokenizer.save_pretrained(folder / "parent")
    settings = copy.deepcopy(TINY_SETTINGS) | {
        "parent": str(folder / "parent"),
        "memory": "stream",
        "search_space": {
            "width_fractions": [0.5],
            "expert_counts": [0.5],
            "experts_per_token": [0.5],
        },
        "scenarios": [{"name": "chat", "batch_size": 1, "prefill_tokens": 8, "decode_tokens": 4}],
        "costs": {"mixtures": 2},
        "search": {"limits": {"memory_bytes": LIMIT_BYTES}, "effort": "fast"},
    }
    tokens = {"calibration": 1024, "scoring": 256, "selection": 256, "validation": 256, "train": 2048}
    settings["data"] |= {f"{split}_tokens": number for split, number in tokens.items()}
    settings["bld"] |= {"tokens": 256, "batch_tokens": 128}
    settings["gkd"] |= {"tokens": 512, "batch_tokens": 128}
    (folder / "recipe.yaml").write_text(json.dumps(settings))
    puzzle("run", folder / "recipe.yaml", "--run-dir", folder / "run")
    return folder / "run"


def test_the_child_meets_its_memory_limit_and_generates_with_and_without_cache(hybrid_run):
    summary = json.loads((hybrid_run / "summary.json").read_text())
    assert summary["child"]["memory_bytes"] <= LIMIT_BYTES < summary["parent"]["memory_bytes"]
    child = AutoModelForCausalLM.from_pretrained(hybrid_run / "child").eval()
    assert set(architecture_of(child.config).slots) == {"linear_attention", "attention", "experts", "ffn"}
    arguments = {"max_new_tokens": 6, "do_sample": False}
    tokens = torch.randint(4, 1024, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(child.generate(tokens, **arguments), child.generate(tokens, use_cache=False, **arguments))


def test_another_limit_is_searched_and_shows_every_slot(hybrid_run):
    output = puzzle("search", hybrid_run, "--limit", "memory_bytes=800000").stdout
    assert "linear_attention.own" in output and "experts." in output
