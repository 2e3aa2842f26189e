"""The child as a transformers model. Importing this registers it, so that `AutoModelForCausalLM` loads children
without `trust_remote_code`. Nothing here imports the rest of the package: the files travel with a checkpoint."""

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_puzzle import PuzzleConfig
from .modeling_puzzle import CACHE, PuzzleForCausalLM

AutoConfig.register(PuzzleConfig.model_type, PuzzleConfig, exist_ok=True)
AutoModelForCausalLM.register(PuzzleConfig, PuzzleForCausalLM, exist_ok=True)
PuzzleConfig.register_for_auto_class()
PuzzleForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["CACHE", "PuzzleConfig", "PuzzleForCausalLM"]
