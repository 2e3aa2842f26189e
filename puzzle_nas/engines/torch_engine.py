"""Time models in torch, by transformers' own forward pass and dynamic cache."""

from __future__ import annotations

import itertools
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from puzzle_nas.engines.base import Engine, RequestTime
from puzzle_nas.families import head_dim_of
from puzzle_nas.machine import Machine, describe
from puzzle_nas.modeling import CACHE, PuzzleForCausalLM, caching_mixers
from puzzle_nas.scenario import Scenario


class _Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors made within, and the most that lived at once."""

    def __init__(self):
        super().__init__()
        self.held_bytes = self.most_bytes = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        known = {t.untyped_storage() for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in known and storage not in self._known:
                    self._known.add(storage)
                    self.held_bytes += storage.nbytes()
                    weakref.finalize(storage, self._free, storage.nbytes())
        self.most_bytes = max(self.most_bytes, self.held_bytes)
        return made

    def _free(self, num_bytes: int) -> None:
        self.held_bytes -= num_bytes


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache, as `generate` would make it."""
    return model.new_cache() if isinstance(model, PuzzleForCausalLM) else DynamicCache(config=model.config)


def _bytes_in(cache_layer: Any) -> int:
    """Keys and values, or the states of a mixer that has such."""
    states = (getattr(cache_layer, name, {}).values() for name in ("conv_states", "recurrent_states"))
    held = (getattr(cache_layer, "keys", None), getattr(cache_layer, "values", None), *itertools.chain(*states))
    return sum(tensor.nbytes for tensor in held if tensor is not None)


class TorchEngine(Engine[PreTrainedModel]):
    """Wall times on the model's own device and precision."""

    name = "torch"

    def python(self) -> Path:
        """See `Engine.python`: our own."""
        return Path(sys.executable)

    def describe(self, machine: Machine) -> dict[str, Any]:
        """See `Engine.describe`."""
        return {"engine": self.name, **describe(machine), "torch": torch.__version__}

    def holds(self, models: Mapping[str, PreTrainedModel]) -> bool:
        """See `Engine.holds`: they are in memory as it is."""
        return True

    @contextmanager
    def loaded(
        self, models: Mapping[str, PreTrainedModel], scratch: Path, kv_format: str | None = None
    ) -> Iterator[Mapping[str, PreTrainedModel]]:
        """See `Engine.loaded`: the models themselves."""
        for model in models.values():
            self.prepare(model)
        yield models

    @torch.inference_mode()
    def prepare(self, model: PreTrainedModel) -> None:
        """Run once, so that kernels are chosen and memory is touched."""
        self._request(model, Scenario("warm-up", 1, 8, 3))

    @torch.inference_mode()
    def time_request(self, model: PreTrainedModel, scenario: Scenario) -> RequestTime:
        """A whole request batch, every decode step included."""
        return self._request(model, scenario)

    @torch.inference_mode()
    def time_parts(self, model: PreTrainedModel, scenario: Scenario, decode_steps: int) -> RequestTime:
        """A whole prefill, and some decode steps around the middle of the decode."""
        prompt = self._tokens(model, scenario, scenario.prefill_tokens)
        prefill = self._clock(model, lambda: model(prompt, use_cache=True, logits_to_keep=1))
        steps = min(decode_steps, scenario.decode_steps)
        if steps == 0:
            return RequestTime(prefill, 0.0)
        length = scenario.prefill_tokens + (scenario.decode_steps - steps) // 2
        cache = self._filled_cache(model, scenario.batch_size, length)
        decode = self._clock(model, lambda: self._decode(model, cache, scenario.batch_size, steps))
        return RequestTime(prefill, decode / steps)

    @torch.inference_mode()
    def working_bytes(self, model: PreTrainedModel, scenario: Scenario) -> int:
        """The most memory that a prefill holds at once, its KV cache and the model's weights not counted."""
        prompt = self._tokens(model, scenario, scenario.prefill_tokens)
        cache = new_cache(model)
        with _Allocations() as allocations:
            model(prompt, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        return max(0, allocations.most_bytes - sum(map(_bytes_in, cache.layers)))

    def _request(self, model: PreTrainedModel, scenario: Scenario) -> RequestTime:
        prompt = self._tokens(model, scenario, scenario.prefill_tokens)
        cache = new_cache(model)
        prefill = self._clock(model, lambda: model(prompt, **{CACHE: cache}, use_cache=True, logits_to_keep=1))
        steps = scenario.decode_steps
        decode = self._clock(model, lambda: self._decode(model, cache, scenario.batch_size, steps))
        return RequestTime(prefill, decode / max(1, steps))

    @staticmethod
    def _decode(model: PreTrainedModel, cache: DynamicCache, batch_size: int, steps: int) -> None:
        token = torch.zeros(batch_size, 1, dtype=torch.long, device=model.device)
        for _ in range(steps):
            logits = model(token, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits
            token = logits[:, -1].argmax(-1, keepdim=True)

    @staticmethod
    def _tokens(model: PreTrainedModel, scenario: Scenario, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        shape = (scenario.batch_size, length)
        return torch.randint(0, model.config.vocab_size, shape, generator=generator).to(model.device)

    @staticmethod
    def _filled_cache(model: PreTrainedModel, batch_size: int, length: int) -> DynamicCache:
        cache = new_cache(model)
        layers: Any = model.base_model.layers
        heads_of = {mixer.layer_idx: mixer for layer in layers for mixer in caching_mixers(layer)}
        for place, mixer in heads_of.items():
            if not hasattr(mixer, "k_proj") and not hasattr(mixer, "qkv_proj"):
                continue
            shape = (batch_size, mixer.config.num_key_value_heads, length, head_dim_of(model.config))
            states = torch.randn(shape, device=model.device).to(model.dtype)
            cache.update(states, states.clone(), place)
        return cache

    @staticmethod
    def _clock(model: PreTrainedModel, work: Callable[[], object]) -> float:
        synchronise = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
        synchronise()
        start = time.perf_counter()
        work()
        synchronise()
        return 1e3 * (time.perf_counter() - start)
