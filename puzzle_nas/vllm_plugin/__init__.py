"""Teaches vLLM the child's architecture; vLLM calls `register` through the entry point `vllm.general_plugins`.

Runs in vLLM's own environment: needs torch, transformers, vllm and `puzzle_nas.modeling`, nothing else of ours.
"""

# pyright: reportMissingImports=false


def register() -> None:
    """Make the model type and the architecture known. Called once in each of vLLM's processes."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import puzzle_nas.modeling  # noqa: F401  (registers the configuration with transformers)
    from puzzle_nas.vllm_plugin.settings import PuzzleSettings

    ModelRegistry.register_model("PuzzleForCausalLM", "puzzle_nas.vllm_plugin.model:PuzzleForCausalLM")
    MODELS_CONFIG_MAP["PuzzleForCausalLM"] = PuzzleSettings


__all__ = ["register"]
