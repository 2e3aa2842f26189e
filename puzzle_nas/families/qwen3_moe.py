"""Qwen3 with mixtures of experts: some layers may be dense."""

from puzzle_nas.families.mixtures import MixtureFamily


class Qwen3Moe(MixtureFamily):
    """Norms on queries and keys; head_dim is free of hidden_size / heads."""

    model_type = "qwen3_moe"

    def is_sparse(self, config, layer):
        """See `MixtureFamily.is_sparse`."""
        return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
