"""Llama 1 to 3, SmolLM2 and everything else that loads as `LlamaForCausalLM`."""

from puzzle_nas.families.base import Family


class Llama(Family):
    """The shape that others differ from."""

    model_type = "llama"
