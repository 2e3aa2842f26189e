"""A Puzzle child as a vLLM model: every variant kind, in any layer.

Layers without softmax attention register no attention with vLLM, which then keeps no KV cache for them.

Shapes: N tokens of the whole batch, D hidden, H query heads and K key-value heads of this process, C head_dim.
"""

# pyright: reportMissingImports=false

from collections.abc import Iterable

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import get_act_and_mul_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.sequence import IntermediateTensors

from puzzle_nas import modeling
from puzzle_nas.modeling import PuzzleConfig


class PuzzleAttention(nn.Module):
    """Grouped-query softmax attention with rotary positions."""

    def __init__(self, config: PuzzleConfig, sliding_window: int | None, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.head_dim = config.head_dim
        quantization = vllm_config.quant_config
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=config.query_key_value_bias,
            quant_config=quantization,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            bias=config.attention_output_bias,
            quant_config=quantization,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm = self.k_norm = None
        if config.query_key_norm:
            self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            self.head_dim, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters
        )
        heads, kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.sizes = [heads * self.head_dim, kv_heads * self.head_dim, kv_heads * self.head_dim]
        self.attn = Attention(
            heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quantization,
            per_layer_sliding_window=sliding_window,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions_N: torch.Tensor, x_ND: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv_proj(x_ND)[0].split(self.sizes, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.reshape(-1, self.head_dim)).view(q.shape)
            k = self.k_norm(k.reshape(-1, self.head_dim)).view(k.shape)
        q, k = self.rotary_emb(positions_N, q, k)
        return self.o_proj(self.attn(q, k, v))[0]


class PuzzleMLP(nn.Module):
    """A gated FFN."""

    def __init__(self, config: PuzzleConfig, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=config.mlp_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=config.mlp_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.down_proj",
        )
        self.act_fn = get_act_and_mul_fn(config.hidden_act)

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_up_proj(x_ND)[0]))[0]


class PuzzleLinear(nn.Module):
    """One matrix in place of a sub-block; `name` is what the checkpoint calls it."""

    def __init__(self, name: str, config: PuzzleConfig, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.name = name
        matrix = RowParallelLinear(
            config.hidden_size,
            config.hidden_size,
            bias=False,
            input_is_parallel=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.{name}",
        )
        self.add_module(name, matrix)

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        return getattr(self, self.name)(x_ND)[0]


def add_and_norm(norm: RMSNorm, delta_ND: torch.Tensor | None, stream_ND: torch.Tensor):
    """(norm of the stream plus delta, that stream), in vLLM's fused kernel where there is something to add."""
    return (norm(stream_ND), stream_ND) if delta_ND is None else norm(delta_ND, stream_ND)


class PuzzleDecoderLayer(nn.Module):
    """One block. Hands on the residual stream and, apart from it, the last sub-block's output: see `add_and_norm`."""

    def __init__(self, layer: int, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        whole = vllm_config.model_config.hf_config
        config = whole.per_layer_config[layer]
        skip = getattr(config, "skip", [])
        self.input_layernorm = self.self_attn = self.post_attention_layernorm = self.mlp = None
        if "attention" not in skip:
            self.input_layernorm = RMSNorm(whole.hidden_size, eps=whole.rms_norm_eps)
            window = whole.sliding_window if whole.layer_types[layer] == "sliding_attention" else None
            self.self_attn = (
                PuzzleLinear("linear_attn", config, vllm_config, f"{prefix}.self_attn")
                if config.attention_linear
                else PuzzleAttention(config, window, vllm_config, f"{prefix}.self_attn")
            )
        if "mlp" not in skip:
            self.post_attention_layernorm = RMSNorm(whole.hidden_size, eps=whole.rms_norm_eps)
            self.mlp = (
                PuzzleLinear("linear_mlp", config, vllm_config, f"{prefix}.mlp")
                if config.mlp_linear
                else PuzzleMLP(config, vllm_config, f"{prefix}.mlp")
            )

    def forward(self, positions_N: torch.Tensor, delta_ND: torch.Tensor | None, stream_ND: torch.Tensor):
        if self.self_attn is not None:
            x_ND, stream_ND = add_and_norm(self.input_layernorm, delta_ND, stream_ND)
            is_softmax = isinstance(self.self_attn, PuzzleAttention)
            delta_ND = self.self_attn(positions_N, x_ND) if is_softmax else self.self_attn(x_ND)
        if self.mlp is not None:
            x_ND, stream_ND = add_and_norm(self.post_attention_layernorm, delta_ND, stream_ND)
            delta_ND = self.mlp(x_ND)
        return delta_ND, stream_ND


@support_torch_compile
class PuzzleModel(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            PuzzleDecoderLayer(layer, vllm_config, f"{prefix}.layers.{layer}")
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[N] -> [N, D]."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states after the final norm, [N, D]."""
        delta, stream = None, self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            delta, stream = layer(positions, delta, stream)
        return add_and_norm(self.norm, delta, stream)[0]


class PuzzleForCausalLM(nn.Module):
    """A Puzzle child with its language-model head."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = self.config = vllm_config.model_config.hf_config
        self.is_quantised = vllm_config.quant_config is not None
        self.model = PuzzleModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[N] -> [N, D]."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states after the final norm, [N, D]."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """[N, D] -> [N, V]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the parameters from the checkpoint; returns the names of those filled.

        Raises:
            ValueError: the checkpoint lacks weights. vLLM itself would leave those of products at random.
        """
        missing = set() if self.is_quantised else checkpoint_names(self.config)

        def noted():
            for name, weight in weights:
                missing.discard(name)
                yield name, weight

        filled = AutoWeightsLoader(self).load_weights(noted(), mapper=self.hf_to_vllm_mapper)
        if missing:
            raise ValueError(f"The checkpoint lacks {len(missing)} weights, {min(missing)} among them.")
        return filled


def checkpoint_names(config: PuzzleConfig) -> set[str]:
    """The weights of a complete, unquantised checkpoint."""
    with torch.device("meta"):
        names = set(modeling.PuzzleForCausalLM(config).state_dict())
    return names - {"lm_head.weight"} if config.tie_word_embeddings else names
