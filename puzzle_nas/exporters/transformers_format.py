"""A transformers checkpoint that carries its modelling code: loads anywhere with `trust_remote_code=True`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from puzzle_nas.exporters.base import DTYPES, Child, Exporter
from puzzle_nas.exporters.older_readers import spell_for_older_readers
from puzzle_nas.families import build, child_config, save_model
from puzzle_nas.families.loading import entry_of
from puzzle_nas.specs import KINDS


class TransformersExporter(Exporter):
    """Everything that a child can be; the checkpoint's own `per_layer_config` describes it."""

    name = "transformers"
    server = "transformers"
    engine = "transformers"
    writers = dict.fromkeys(KINDS.values(), entry_of)

    def write(self, child: Child, folder: Path, dtype: str) -> None:
        """See `Exporter.write`."""
        write_checkpoint(child, folder, dtype)


def write_checkpoint(
    child: Child, folder: Path, dtype: str, instead: Mapping[str, Mapping[str, torch.Tensor]] | None = None
) -> None:
    """The child as transformers saves it, weights in `dtype` (a key of `DTYPES`).

    Args:
        instead: by the names of weights, the tensors that are written in their place, by theirs.
    """
    config = child_config(child.config, child.architecture)
    config.dtype = DTYPES[dtype]
    weights = {name: weight.to(DTYPES[dtype]) for name, weight in child.model.state_dict().items()}
    model = build(config, weights)
    model.generation_config = child.model.generation_config
    tensors = None
    if instead:
        tensors = {name: weight for name, weight in model.state_dict().items() if name not in instead}
        for replacing in instead.values():
            tensors |= replacing
    save_model(model, child.tokenizer, folder, tensors)
    spell_for_older_readers(folder)
