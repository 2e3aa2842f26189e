"""Configuration of a Puzzle child: a Llama-like model whose layers differ from each other."""

from typing import ClassVar

from transformers import PreTrainedConfig


class PuzzleConfig(PreTrainedConfig):
    """A decoder whose layers may each have their own KV heads and FFN width, or a matrix or nothing instead.

    Layers differ through transformers' `per_layer_config`: `num_key_value_heads`, `intermediate_size`, and
    `skip: ["attention", "mlp"]`. Two keys are ours: `attention_linear` and `mlp_linear`, one matrix in place of
    the sub-block.
    """

    model_type = "puzzle"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_dropout: float | int = 0.0
    query_key_value_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    attention_linear: bool = False
    mlp_linear: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        super().__post_init__(**kwargs)


__all__ = ["PuzzleConfig"]
