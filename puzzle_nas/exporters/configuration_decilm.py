"""Configuration of a nemotron-nas checkpoint: Llama's, and `block_configs` that are read by attribute.

This file travels with the checkpoint; it needs transformers only.
"""

from transformers import LlamaConfig


class Fields(dict):
    """A mapping whose entries are attributes too."""

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(name)


class DeciLMConfig(LlamaConfig):
    """One entry of `block_configs` for each layer: `attention` and `ffn`."""

    model_type = "nemotron-nas"
    block_configs: list | None = None
    qkv_bias: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        blocks = self.block_configs or []
        self.block_configs = [Fields({name: Fields(part) for name, part in block.items()}) for block in blocks]


__all__ = ["DeciLMConfig"]
