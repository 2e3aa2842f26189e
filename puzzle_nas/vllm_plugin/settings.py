"""What vLLM's settings must be for a child, looked at before any of its processes start."""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.model_executor.models.config import VerifyAndUpdateConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from puzzle_nas.modeling import PuzzleConfig


class PuzzleSettings(VerifyAndUpdateConfig):
    """vLLM calls this by the architecture's name."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse tensor parallelism that does not fit; make a child without attention servable.

        Without any KV cache vLLM does not split prompts, and one longer than a batch would wait for ever.
        """
        model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
        processes = vllm_config.parallel_config.tensor_parallel_size
        if reason := undividable(model.hf_config, processes):
            raise ValueError(f"Tensor parallelism of {processes} does not fit {reason}.")
        if not any(has_attention(layer) for layer in model.hf_config.per_layer_config):
            scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, model.max_model_len)


def has_attention(layer: PuzzleConfig) -> bool:
    """Whether a layer keeps keys and values."""
    return "attention" not in getattr(layer, "skip", []) and not layer.attention_linear


def undividable(config: PuzzleConfig, processes: int) -> str | None:
    """What of a child cannot be shared by so many processes, or None.

    KV heads may be fewer than the processes: each is then kept by several.
    """
    if config.hidden_size % processes:
        return f"the hidden size {config.hidden_size}"
    for number, layer in enumerate(config.per_layer_config):
        if has_attention(layer):
            if layer.num_attention_heads % processes:
                return f"the {layer.num_attention_heads} query heads"
            kv_heads = layer.num_key_value_heads
            if kv_heads % processes and processes % kv_heads:
                return f"the {kv_heads} KV heads of layer {number}"
        if "mlp" not in getattr(layer, "skip", []) and not layer.mlp_linear and layer.intermediate_size % processes:
            return f"the FFN width {layer.intermediate_size} of layer {number}"
    return None
