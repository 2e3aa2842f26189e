"""A Puzzle child: its parent's own transformers model with pieces exchanged. Needs torch and transformers only.

The parent's classes run everything that is not exchanged, and weights keep the parent's names. Exchanged are a layer's
mixers (its attention, its FFN, ...): for the same class with other sizes, for one matrix, or for nothing.

Shapes: B batch, T tokens, D hidden.
"""

import copy
import functools
import inspect
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicSlidingWindowLayer
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .configuration_puzzle import PuzzleConfig, config_class_of

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What this transformers calls the KV cache: renamed in 5.24, the old name goes in 5.40."""
ROUND_WHAT_THEY_RECEIVE = ("int8",)
"""Formats whose products round each token to eight bits first: engines do, so the child does."""
WINDOW_MASKS = "window_masks"
"""The argument, handed on by every layer to its attention, that holds the masks of windows by their size."""


class Linear(nn.Module):
    """One matrix in place of a mixer: tokens do not mix, nothing is cached."""

    last_matrix = "linear"

    def __init__(self, hidden_size, pair):
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size, bias=False)
        self.pair = pair

    def forward(self, hidden_states, *_, **__):
        """[B, T, D] -> [B, T, D]."""
        added = self.linear(hidden_states)
        return (added, None) if self.pair else added


class Nothing(nn.Module):
    """In place of a mixer that was removed: zero, without any shape."""

    last_matrix = None

    def __init__(self, pair):
        super().__init__()
        self.pair = pair

    def forward(self, hidden_states, *_, **__):
        """A scalar, which broadcasts."""
        added = hidden_states.new_zeros(())
        return (added, None) if self.pair else added


@functools.cache
def empty_class_of(layer_class):
    """A layer in which nothing is left: the residual stream passes by."""
    fields = {"__module__": __name__, "forward": lambda self, hidden_states, *_, **__: hidden_states}
    return type(f"Empty{layer_class.__name__}", (layer_class,), fields)


def changed_config(config, changes):
    """A copy of a configuration in which some fields differ; itself where none do."""
    changes = {name: value for name, value in changes.items() if getattr(config, name, None) != value}
    if not changes:
        return config
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def exchanged_layer(layer, config, index, entries, places):
    """A layer of the parent's class with what `entries` (see `PuzzleConfig`) say, by slot. New weights are at random.

    Args:
        layer: the parent's, which is changed, or left where another one is made.
        entries: some or all slots of the layer; the others stay as they are.
    """
    changes = {}
    for entry in entries.values():
        changes |= entry.get("changes", {})
    if (own := changed_config(config, changes)) is not config:
        layer = type(layer)(own, index)
    for slot, entry in entries.items():
        place = places[slot]
        if entry["kind"] == "linear":
            setattr(layer, place["mixer"], Linear(config.hidden_size, place["pair"]))
        elif entry["kind"] == "no_op":
            setattr(layer, place["mixer"], Nothing(place["pair"]))
            for norm in (place["norm"], place["output_norm"]):
                if norm is not None:
                    setattr(layer, norm, nn.Identity())
        elif entry["kind"] == "grouped":
            getattr(layer, place["mixer"]).own_window = entry.get("window")
        elif entry["kind"] == "window":
            attend_within(getattr(layer, place["mixer"]), entry["window"])
        if entry.get("format") in ROUND_WHAT_THEY_RECEIVE:
            for module in getattr(layer, place["mixer"]).modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_pre_hook(_round_what_it_receives)
    if entries and not any(True for _ in layer.parameters()):
        layer.__class__ = empty_class_of(type(layer))
        layer._modules.clear()
    return layer


def rounded_tokens(x):
    """[..., D] -> the same, each token to 255 steps that reach its largest number; gradients pass as if it were not."""
    largest = x.detach().float().abs().amax(-1, keepdim=True).clamp_min(1e-7)
    rounded = ((x.detach().float() * (127 / largest)).round() * (largest / 127)).to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded


def _round_what_it_receives(matrix, args):
    return (rounded_tokens(args[0]),)


def attend_within(attention, window):
    """Let an attention module see the last `window` tokens only."""
    attention.window = window
    # The mask says it, and some implementations of attention want to be told besides: each family from elsewhere.
    if hasattr(attention, "sliding_window"):
        attention.sliding_window = window
    attention.config = changed_config(attention.config, {"sliding_window": window})
    attention.mask_hook = attention.register_forward_pre_hook(_take_window_mask, with_kwargs=True)


@functools.cache
def names_window(attention_class):
    """Whether a family's attention tells its implementation of its window by itself."""
    return "sliding_window" in inspect.getsource(attention_class.forward)


def _take_window_mask(attention, args, kwargs):
    masks = kwargs.pop(WINDOW_MASKS)
    kwargs["attention_mask"] = masks[attention.window]
    if not names_window(type(attention)):
        kwargs["sliding_window"] = attention.window
    return args, kwargs


def window_of(attention):
    """Tokens that an attention module of a child sees at most; None for all."""
    return getattr(attention, "window", getattr(attention, "own_window", None))


def window_masks(config, windows, example_BTD, attention_mask=None, cache=None, position_ids=None):
    """The causal mask of each window, by its size, as this model's attention wants them.

    Args:
        windows: by size, the cache layer of an attention with that window (None without a cache).
        example_BTD: of the pass's batch size, tokens, dtype and device.
        attention_mask: [B, all tokens], 0 where there is padding.
    """
    masks = {}
    for window, cache_layer in windows.items():
        seen = cache
        if cache is not None:
            # Masks are sized by the first sliding layer of a cache, and windows may differ.
            seen = copy.copy(cache)
            seen.layers = [cache_layer]
        arguments = {"inputs_embeds": example_BTD, "attention_mask": attention_mask, "position_ids": position_ids}
        own = copy.copy(config)
        own.sliding_window = window
        masks[window] = create_sliding_window_causal_mask(config=own, **arguments, **{CACHE: seen})
    return masks


def contiguous_last_token(head, args):
    """A slice of one token keeps strides with which the bfloat16 product on CPUs takes 25 times as long."""
    hidden = args[0]
    if hidden.ndim == 3 and hidden.shape[1] == 1:
        return (hidden.clone(memory_format=torch.contiguous_format),)
    return None


class PuzzleForCausalLM(PreTrainedModel, GenerationMixin):
    """What all children have in common; `model_class_of` makes one class for each kind of parent."""

    config_class = PuzzleConfig

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        body: Any = self.base_model
        for index, entries in enumerate(config.puzzle_layers):
            body.layers[index] = exchanged_layer(body.layers[index], config, index, entries, config.puzzle_places)
        self._number_caches()
        body.register_forward_pre_hook(_prepare_pass, with_kwargs=True)
        self.get_output_embeddings().register_forward_pre_hook(contiguous_last_token)
        self.init_weights()

    @classmethod
    def from_pretrained(cls, path, *args, config=None, **kwargs):
        """See `PreTrainedModel.from_pretrained`; the result is of the class that belongs to the parent."""
        if cls is not PuzzleForCausalLM:
            return super().from_pretrained(path, *args, config=config, **kwargs)
        if config is None:
            config = PuzzleConfig.from_pretrained(path)
        return model_class_of(config.parent_type).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):
        if cls is not PuzzleForCausalLM:
            return super()._from_config(config, **kwargs)
        return model_class_of(config.parent_type)._from_config(config, **kwargs)

    def _number_caches(self):
        """Number the mixers that cache from 0 on, so that the first layer of a cache always holds something.

        transformers asks that one how long the sequence is.
        """
        body: Any = self.base_model
        body.cached_layers, windows = [], {}
        body.windows = windows
        for index, layer in enumerate(body.layers):
            for mixer in caching_mixers(layer):
                mixer.layer_idx = len(body.cached_layers)
                if hasattr(mixer, "window"):
                    windows.setdefault(mixer.window, mixer.layer_idx)
                body.cached_layers.append((index, getattr(mixer, "window", None)))
        if windows:
            self._give_parents_windows_masks()

    def _give_parents_windows_masks(self):
        """Beside other windows, the parent's own no longer fit the one mask that it makes for all of its windows."""
        body: Any = self.base_model
        windows = body.windows
        for layer in body.layers:
            for mixer in caching_mixers(layer):
                if not hasattr(mixer, "window") and (window := window_of(mixer)) is not None:
                    attend_within(mixer, window)
                    windows.setdefault(window, mixer.layer_idx)

    def new_cache(self):
        """An empty cache, with a layer for each mixer that caches."""
        cache = DynamicCache(config=self.config)
        keep_used_layers(self.base_model, cache)
        return cache

    def set_attn_implementation(self, *args, **kwargs):
        """See `PreTrainedModel`; layers whose sizes differ have configurations of their own."""
        super().set_attn_implementation(*args, **kwargs)
        for module in self.base_model.layers.modules():
            if isinstance(own := getattr(module, "config", None), PuzzleConfig):
                own._attn_implementation = self.config._attn_implementation

    def create_masks_for_generate(self, attention_mask=None, **kwargs):
        """Windows have masks of their own, made in each pass from the padding alone."""
        if self.base_model.windows:
            return attention_mask
        inherited = getattr(super(), "create_masks_for_generate", None)
        if inherited is None:
            from transformers.masking_utils import create_masks_for_generate as inherited
        return inherited(attention_mask=attention_mask, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if (cache := model_kwargs.get(CACHE)) is not None:
            keep_used_layers(self.base_model, cache)
        return result


def caching_mixers(layer):
    """Those parts of a layer that keep something of earlier tokens."""
    return [module for module in layer.children() if hasattr(module, "layer_idx")]


def keep_used_layers(body, cache):
    """Of a cache with a layer for each of the model's, keep those that are used; windows get layers of theirs."""
    if len(cache.layers) != len(body.layers) or getattr(cache, "holds_used_layers", False):
        return
    cache.holds_used_layers = True
    kept = []
    for index, window in body.cached_layers:
        layer = cache.layers[index]
        if window is not None and type(cache) is DynamicCache:
            layer = DynamicSlidingWindowLayer(sliding_window=window)
        kept.append(layer)
    if not any(isinstance(layer, CacheLayerMixin) for layer in kept):
        # transformers asks attention's layers how long the sequence is: without any, one is there and stays empty.
        kept.append(next(layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)))
    cache.layers = kept


@functools.cache
def argument_names(body_class):
    """What a body's forward pass takes, in order."""
    return list(inspect.signature(body_class.forward).parameters)[1:]


def _prepare_pass(body, args, kwargs):
    """Before a pass through the body: its cache has a layer for each mixer that caches, its windows have masks."""
    kwargs |= dict(zip(argument_names(type(body)), args, strict=False))
    cache = kwargs.get("cache") if kwargs.get("cache") is not None else kwargs.get("past_key_values")
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        use_cache = body.config.use_cache and not body.training
    if cache is None and use_cache:
        cache = kwargs[CACHE] = DynamicCache(config=body.config)
    if cache is not None:
        keep_used_layers(body, cache)
    if body.windows and WINDOW_MASKS not in kwargs:
        tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        dtype = next(body.parameters()).dtype
        example = torch.empty(*tokens.shape[:2], 1, dtype=dtype, device=tokens.device)
        layers = {w: None if cache is None else cache.layers[place] for w, place in body.windows.items()}
        arguments = (kwargs.get("attention_mask"), cache, kwargs.get("position_ids"))
        kwargs[WINDOW_MASKS] = window_masks(body.config, layers, example, *arguments)
    return (), kwargs


@functools.cache
def model_class_of(parent_type):
    """The class of children of such a parent."""
    base = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[parent_type]]
    fields = {"__module__": __name__, "config_class": config_class_of(parent_type), "__doc__": base.__doc__}
    return type("PuzzleForCausalLM", (PuzzleForCausalLM, base), fields)


__all__ = ["CACHE", "PuzzleForCausalLM"]
