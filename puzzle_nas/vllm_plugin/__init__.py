"""Teaches vLLM the child's architecture; vLLM calls `register` through the entry point `vllm.general_plugins`.

Runs in vLLM's own environment: needs torch, transformers, vllm and `puzzle_nas.modeling`, nothing else of ours.
"""


def register() -> None:
    """Make the model type and the architecture known. Called once in each of vLLM's processes."""
    from vllm import ModelRegistry

    import puzzle_nas.modeling  # noqa: F401  (registers the configuration with transformers)

    ModelRegistry.register_model("PuzzleForCausalLM", "puzzle_nas.vllm_plugin.model:PuzzleForCausalLM")


__all__ = ["register"]
