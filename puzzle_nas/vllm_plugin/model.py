"""A Puzzle child in vLLM: its own transformers model, run by vLLM's transformers backend.

The backend exchanges projections, norms and embeddings for vLLM's. By itself it makes an attention for every layer, all
of one size; here one is made where the child has one, of its own size and window. Other layers keep no KV cache.
"""

# pyright: reportMissingImports=false

from collections.abc import Iterable

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.transformers.base import VLLM_ATTN_ATTR
from vllm.model_executor.models.transformers.fusers import AttentionFuser
from vllm.model_executor.models.utils import maybe_prefix
from vllm.platforms import current_platform

from puzzle_nas import modeling
from puzzle_nas.modeling.modeling_puzzle import window_of
from puzzle_nas.vllm_plugin.products import mend_products_on_cpu

PARTS = {
    "int-quantized": ("weight", "weight_scale"),
    "pack-quantized": ("weight_packed", "weight_scale", "weight_shape"),
}
"""By compressed-tensors' formats, what a checkpoint holds of a matrix."""


class PuzzleModel(PreTrainedModel):
    """A child without its head, as the backend asks for it."""

    config_class = modeling.PuzzleConfig

    @classmethod
    def _from_config(cls, config, **kwargs):
        return modeling.PuzzleForCausalLM._from_config(config, **kwargs).base_model


class PuzzleForCausalLM(TransformersForCausalLM):
    """A child with its language-model head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        if vllm_config.quant_config is not None and current_platform.is_cpu():
            mend_products_on_cpu()
        AutoModel.register(type(vllm_config.model_config.hf_config), PuzzleModel, exist_ok=True)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # Granite divides logits, by a field that the backend does not know.
        if (divisor := getattr(self.text_config, "logits_scaling", None)) is not None and self.pp_group.is_last_rank:
            self.logits_processor.scale /= divisor

    def recursive_replace(self):
        """See vLLM's `Base`. Before it, weights have the checkpoint's names."""
        self.checkpoint_names = {f"{self.model.base_model_prefix}.{name}" for name in self.model.state_dict()}
        if not self.config.tie_word_embeddings:
            self.checkpoint_names.add("lm_head.weight")
        for group in (getattr(self.config, "quantization_config", None) or {}).get("config_groups", {}).values():
            for module in group["targets"]:
                self.checkpoint_names.remove(f"{module}.weight")
                self.checkpoint_names |= {f"{module}.{part}" for part in PARTS[group["format"]]}
        super().recursive_replace()

    def _create_attention_instances(self, prefix: str = ""):
        names = {module: name for name, module in self.named_modules()}
        for index, layer in enumerate(self.model.layers):
            for mixer in modeling.caching_mixers(layer):
                fusers = self.fusers.get(names[mixer], ())
                fuser = next((fuser for fuser in fusers if isinstance(fuser, AttentionFuser)), None)
                if fuser is None:
                    raise ValueError(
                        f"vLLM cannot serve layer {index} of this child: its transformers backend does not know what "
                        f"{type(mixer).__name__} keeps of earlier tokens."
                    )
                setattr(mixer, VLLM_ATTN_ATTR, self._attention(mixer, fuser, maybe_prefix(prefix, names[mixer])))

    def _attention(self, mixer: nn.Module, fuser: AttentionFuser, prefix: str) -> Attention:
        """vLLM's attention, which a layer's own calls."""
        if hasattr(mixer, "mask_hook"):
            # vLLM masks by itself.
            mixer.mask_hook.remove()
        config, processes, sinks = mixer.config, self.parallel_config.tensor_parallel_size, fuser.sinks(mixer)
        return Attention(
            config.num_attention_heads // processes,
            mixer.head_dim,
            fuser.scale(mixer),
            num_kv_heads=max(1, config.num_key_value_heads // processes),
            cache_config=self.cache_config,
            quant_config=self.quant_config,
            logits_soft_cap=getattr(config, "attn_logit_softcapping", None),
            per_layer_sliding_window=window_of(mixer),
            prefix=f"{prefix}.{VLLM_ATTN_ATTR}",
            **({} if sinks is None else {"sinks": sinks}),
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the parameters from the checkpoint; returns the names of those filled.

        Raises:
            ValueError: the checkpoint lacks weights. vLLM itself would leave those of products at random.
        """
        missing = set(self.checkpoint_names)

        def noted():
            for name, weight in weights:
                missing.discard(name)
                yield name, weight

        filled = super().load_weights(noted())
        if missing:
            raise ValueError(f"The checkpoint lacks {len(missing)} weights, {min(missing)} among them.")
        return filled
