"""The child as a transformers model. Importing this registers it, so that `AutoModelForCausalLM` loads children
without `trust_remote_code`. Nothing here imports the rest of the package: the files travel with a checkpoint."""

from transformers import AutoConfig

from .configuration_puzzle import PuzzleConfig, config_class_of
from .modeling_puzzle import (
    CACHE,
    WINDOW_MASKS,
    Linear,
    Nothing,
    PuzzleForCausalLM,
    caching_mixers,
    contiguous_last_token,
    exchanged_layer,
    model_class_of,
    window_masks,
)

AutoConfig.register(PuzzleConfig.model_type, PuzzleConfig, exist_ok=True)
PuzzleConfig.register_for_auto_class()
PuzzleForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "CACHE",
    "WINDOW_MASKS",
    "Linear",
    "Nothing",
    "PuzzleConfig",
    "PuzzleForCausalLM",
    "caching_mixers",
    "config_class_of",
    "contiguous_last_token",
    "exchanged_layer",
    "model_class_of",
    "window_masks",
]
