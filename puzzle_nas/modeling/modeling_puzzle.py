"""A Puzzle child as an ordinary transformers model. Needs torch and transformers only.

Shapes: B batch, T tokens, D hidden, H query heads, K key-value heads, C head_dim, F FFN channels, V vocabulary.
"""

import inspect
from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .configuration_puzzle import PuzzleConfig

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What this transformers calls the KV cache: renamed in 5.24, the old name goes in 5.40. Models here take either."""


class PuzzleAttention(nn.Module):
    """Grouped-query softmax attention with rotary positions."""

    def __init__(self, config: PuzzleConfig, cache_slot: int, sliding_window: int | None):
        super().__init__()
        self.config = config
        self.cache_slot = cache_slot
        self.layer_idx = cache_slot
        self.sliding_window = sliding_window
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        query_size, key_value_size = (
            config.num_attention_heads * self.head_dim,
            config.num_key_value_heads * self.head_dim,
        )
        bias = config.query_key_value_bias
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)
        if config.query_key_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def context(self, x_BTD, position_embeddings, attention_mask=None, cache=None, **kwargs):
        """What the output projection receives: the heads' outputs side by side, [B, T, H * C]."""
        shape = (*x_BTD.shape[:-1], -1, self.head_dim)
        q_BTHC, k_BTKC = self.q_proj(x_BTD).view(shape), self.k_proj(x_BTD).view(shape)
        if self.config.query_key_norm:
            q_BTHC, k_BTKC = self.q_norm(q_BTHC), self.k_norm(k_BTKC)
        q_BHTC, k_BKTC = q_BTHC.transpose(1, 2), k_BTKC.transpose(1, 2)
        v_BKTC = self.v_proj(x_BTD).view(shape).transpose(1, 2)
        q_BHTC, k_BKTC = apply_rotary_pos_emb(q_BHTC, k_BKTC, *position_embeddings)
        if cache is not None:
            k_BKTC, v_BKTC = cache.update(k_BKTC, v_BKTC, self.cache_slot)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        out_BTHC, weights = attend(
            self,
            q_BHTC,
            k_BKTC,
            v_BKTC,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return out_BTHC.reshape(*x_BTD.shape[:-1], -1).contiguous(), weights

    def forward(self, x_BTD, position_embeddings, attention_mask=None, cache=None, **kwargs):
        context, weights = self.context(x_BTD, position_embeddings, attention_mask, cache, **kwargs)
        return self.o_proj(context), weights


class PuzzleLinearAttention(nn.Module):
    """One matrix in place of attention: tokens do not mix, nothing is cached."""

    def __init__(self, config: PuzzleConfig):
        super().__init__()
        self.linear_attn = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BTD, *_, **__):
        return self.linear_attn(x_BTD), None


class PuzzleMLP(nn.Module):
    """A gated FFN."""

    def __init__(self, config: PuzzleConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def channels(self, x_BTD):
        """What the down projection receives, [B, T, F]."""
        return self.act_fn(self.gate_proj(x_BTD)) * self.up_proj(x_BTD)

    def forward(self, x_BTD):
        return self.down_proj(self.channels(x_BTD))


class PuzzleLinearMLP(nn.Module):
    """One matrix in place of the FFN."""

    def __init__(self, config: PuzzleConfig):
        super().__init__()
        self.linear_mlp = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BTD):
        return self.linear_mlp(x_BTD)


class PuzzleDecoderLayer(GradientCheckpointingLayer):
    """One block. A skipped sub-block has neither module nor norm; the residual stream passes by."""

    def __init__(self, config: PuzzleConfig, layer_config: PuzzleConfig, layer_type: str, cache_slot: int):
        super().__init__()
        skip = getattr(layer_config, "skip", [])
        self.layer_type = layer_type
        self.input_layernorm = self.self_attn = self.post_attention_layernorm = self.mlp = None
        if "attention" not in skip:
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            window = config.sliding_window if layer_type == "sliding_attention" else None
            self.self_attn = (
                PuzzleLinearAttention(layer_config)
                if layer_config.attention_linear
                else PuzzleAttention(layer_config, cache_slot, window)
            )
        if "mlp" not in skip:
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = PuzzleLinearMLP(layer_config) if layer_config.mlp_linear else PuzzleMLP(layer_config)

    @property
    def caches(self) -> bool:
        """Whether this layer keeps keys and values."""
        return isinstance(self.self_attn, PuzzleAttention)

    def attend(self, x_BTD, attention_mask=None, **kwargs):
        """The residual stream after attention."""
        if self.self_attn is None:
            return x_BTD
        if isinstance(attention_mask, dict):
            attention_mask = attention_mask.get(self.layer_type)
        return x_BTD + self.self_attn(self.input_layernorm(x_BTD), attention_mask=attention_mask, **kwargs)[0]

    def feed_forward(self, x_BTD):
        """The residual stream after the FFN."""
        return x_BTD if self.mlp is None else x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return self.feed_forward(self.attend(hidden_states, attention_mask, **kwargs))


class PuzzlePreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the family."""

    config: PuzzleConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PuzzleDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class PuzzleModel(PuzzlePreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: PuzzleConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        layers, cache_slot = [], 0
        for layer_config, layer_type in zip(config.per_layer_config, config.layer_types, strict=True):
            layers.append(PuzzleDecoderLayer(config, layer_config, layer_type, cache_slot))
            cache_slot += layers[-1].caches
        self.layers = nn.ModuleList(layers)
        self.attending_types = sorted({layer.layer_type for layer in layers if layer.caches})
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def new_cache(self) -> DynamicCache:
        """An empty cache of one layer for each layer with attention.

        transformers' own way reads every layer's configuration, which takes longer than a decoding step.
        """
        cache = DynamicCache()
        windows = [layer.self_attn.sliding_window for layer in self.layers if layer.caches]
        cache.layers = [
            DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=window) for window in windows
        ]
        return cache

    def drop_unused_cache_layers(self, cache: Cache) -> None:
        """Keep one cache layer for each layer with attention, in order.

        transformers makes one for every layer and asks the first how long the sequence is; a layer without
        attention would answer 0 for ever.
        """
        caching = [layer.caches for layer in self.layers]
        if len(cache.layers) == len(caching) and not all(caching):
            cache.layers = [kept for kept, used in zip(cache.layers, caching, strict=True) if used]

    def layer_inputs(self, hidden_states, attention_mask=None, cache=None, position_ids=None):
        """What every layer receives besides the residual stream: masks by layer type, rotary positions, cache."""
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen).unsqueeze(0)
        if not isinstance(attention_mask, dict):
            arguments = {
                "config": self.config,
                "inputs_embeds": hidden_states,
                "attention_mask": attention_mask,
                CACHE: cache,
                "position_ids": position_ids,
            }
            create = {
                "full_attention": create_causal_mask,
                "sliding_attention": create_sliding_window_causal_mask,
            }
            attention_mask = {kind: create[kind](**arguments) for kind in self.attending_types}
        return {
            "attention_mask": attention_mask,
            "position_embeddings": self.rotary_emb(hidden_states, position_ids=position_ids),
            "cache": cache,
        }

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        cache=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Shapes: input_ids [B, T]; last_hidden_state [B, T, D], after the final norm.

        `hidden_states`, when asked for, are the embeddings and the residual stream after each block, all of them
        before the final norm.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        hidden_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = self.new_cache()
        if cache is not None:
            self.drop_unused_cache_layers(cache)
        inputs = self.layer_inputs(hidden_BTD, attention_mask, cache, position_ids)
        every_hidden = [hidden_BTD]
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD, **inputs, **kwargs)
            if output_hidden_states:
                every_hidden.append(hidden_BTD)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_BTD),
            hidden_states=tuple(every_hidden) if output_hidden_states else None,
            **{CACHE: cache if use_cache else None},
        )


class PuzzleForCausalLM(PuzzlePreTrainedModel, GenerationMixin):
    """A Puzzle child with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PuzzleConfig):
        super().__init__(config)
        self.model = PuzzleModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        wants_dynamic = generation_config.use_cache and generation_config.cache_implementation in (None, "dynamic")
        if wants_dynamic and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = self.model.new_cache()
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep: int | torch.Tensor = 0,
        cache=None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Shapes: input_ids [B, T]; logits [B, T, V], or of the last `logits_to_keep` positions only."""
        kwargs.pop("return_dict", None)
        loss_arguments = {"num_items_in_batch": kwargs.pop("num_items_in_batch", None)}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_BTD = outputs.last_hidden_state[:, kept, :]
        if hidden_BTD.shape[1] == 1:
            # A slice of one token keeps strides with which the bfloat16 product on CPUs takes 25 times as long.
            hidden_BTD = hidden_BTD.clone(memory_format=torch.contiguous_format)
        logits = self.lm_head(hidden_BTD)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **loss_arguments)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: outputs.get(CACHE)},
        )


__all__ = ["CACHE", "PuzzleForCausalLM", "PuzzleModel"]
