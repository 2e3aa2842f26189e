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
        if not any("num_key_value_heads" in entry for _, entry in sub_blocks(model.hf_config)):
            scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, model.max_model_len)


def sub_blocks(config: PuzzleConfig) -> list[tuple[int, dict]]:
    """The layer and the entry (see `PuzzleConfig`) of everything in a child."""
    return [(layer, entry) for layer, entries in enumerate(config.puzzle_layers) for entry in entries.values()]


def undividable(config: PuzzleConfig, processes: int) -> str | None:
    """What of a child cannot be shared by so many processes, or None.

    KV heads may be fewer than the processes: each is then kept by several.
    """
    for layer, entry in sub_blocks(config):
        if "num_key_value_heads" in entry:
            if config.num_attention_heads % processes:
                return f"the {config.num_attention_heads} query heads"
            kv_heads = entry["num_key_value_heads"]
            if kv_heads % processes and processes % kv_heads:
                return f"the {kv_heads} KV heads of layer {layer}"
        if entry.get("intermediate_size", 0) % processes:
            return f"the FFN width {entry['intermediate_size']} of layer {layer}"
    return None
