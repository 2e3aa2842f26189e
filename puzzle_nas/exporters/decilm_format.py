"""A nemotron-nas checkpoint, which stock vLLM serves without any plugin.

Source: NVIDIA's released Puzzle checkpoints, and vLLM's model_executor/models/nemotron_nas.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedConfig

from puzzle_nas.artifacts import explained_disk_errors
from puzzle_nas.exporters.base import DTYPES, Child, Exporter
from puzzle_nas.exporters.llama_like import FAMILIES, has_bias, problems
from puzzle_nas.exporters.older_readers import spell_for_older_readers
from puzzle_nas.families import head_dim_of
from puzzle_nas.specs import GatedFFN, GroupedAttention, NoOp, Spec

CONFIGURATION_CODE = Path(__file__).parent / "configuration_decilm.py"


def _grouped_attention(spec: GroupedAttention, config: PreTrainedConfig) -> dict[str, Any]:
    group = config.num_attention_heads // spec.num_key_value_heads
    return {"n_heads_in_group": group, "no_op": False, "replace_with_linear": False}


def _gated_ffn(spec: GatedFFN, _: PreTrainedConfig) -> dict[str, Any]:
    # No ffn_mult: vLLM would take it over the width, and rounds it up to a multiple of 256.
    return {"intermediate_size": spec.intermediate_size, "no_op": False, "replace_with_linear": False}


def _nothing(spec: NoOp, _: PreTrainedConfig) -> dict[str, Any]:
    heads = {"n_heads_in_group": None} if spec.slot == "attention" else {}
    return {**heads, "no_op": True, "replace_with_linear": False}


class DeciLMExporter(Exporter):
    """Children without linear variants whose first layer keeps attention."""

    name = "decilm"
    server = "vllm-stock"
    engine = "vllm-stock"
    families = FAMILIES
    writers: dict[type[Spec], Callable[..., dict[str, Any]]] = {
        GroupedAttention: _grouped_attention,
        GatedFFN: _gated_ffn,
        NoOp: _nothing,
    }

    def family_problems(self, child: Child) -> list[str]:
        """See `Exporter.family_problems`."""
        found = problems(child, "nemotron-nas")
        if has_bias(child, "self_attn.o_proj") and not has_bias(child, "self_attn.q_proj"):
            found.append("it has a bias on the attention's output alone, which nemotron-nas lacks")
        return found

    def config_json(self, child: Child, dtype: str) -> dict[str, Any]:
        """The checkpoint's config.json."""
        config = child.config
        whole = config.to_dict()
        same = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "hidden_act",
            "max_position_embeddings",
            "initializer_range",
            "rms_norm_eps",
            "use_cache",
            "tie_word_embeddings",
            "rope_parameters",
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
        )
        return {
            "architectures": ["DeciLMForCausalLM"],
            "model_type": "nemotron-nas",
            "auto_map": {"AutoConfig": f"{CONFIGURATION_CODE.stem}.DeciLMConfig"},
            "dtype": dtype,
            **{name: whole[name] for name in same},
            "head_dim": head_dim_of(config),
            "mlp_bias": has_bias(child, "mlp.down_proj"),
            "attention_bias": has_bias(child, "self_attn.o_proj"),
            "qkv_bias": has_bias(child, "self_attn.q_proj"),
            "block_configs": [
                {slot: self.writers[type(spec)](spec, config) for slot, spec in block.items()}
                for block in child.architecture.layers
            ],
        }

    def write(self, child: Child, folder: Path, dtype: str) -> None:
        """See `Exporter.write`."""
        weights = {name: w.to(DTYPES[dtype]).contiguous() for name, w in child.model.state_dict().items()}
        if child.config.tie_word_embeddings:
            del weights["lm_head.weight"]
        with explained_disk_errors(folder):
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
            (folder / "config.json").write_text(json.dumps(self.config_json(child, dtype), indent=1) + "\n")
            shutil.copyfile(CONFIGURATION_CODE, folder / CONFIGURATION_CODE.name)
            child.model.generation_config.save_pretrained(folder)
            if child.tokenizer is not None:
                child.tokenizer.save_pretrained(folder)
            spell_for_older_readers(folder)
