"""A transformers checkpoint that carries its modelling code: loads anywhere with `trust_remote_code=True`."""

from __future__ import annotations

from pathlib import Path

from puzzle_nas.architecture import SPEC_KINDS
from puzzle_nas.exporters.base import DTYPES, Child, Exporter
from puzzle_nas.families.loading import build, child_config, save_model
from puzzle_nas.modeling import PuzzleConfig


class TransformersExporter(Exporter):
    """Everything that a child can be; the checkpoint's own `per_layer_config` describes it."""

    name = "transformers"
    server = "transformers"
    engine = "transformers"
    writers = {kind: kind.layer_config for kind in SPEC_KINDS.values()}

    def write(self, child: Child, folder: Path, dtype: str) -> None:
        """See `Exporter.write`."""
        write_checkpoint(child, folder, dtype)


def write_checkpoint(child: Child, folder: Path, dtype: str) -> None:
    """The child as transformers saves it, weights in `dtype` (a key of `DTYPES`)."""
    config: PuzzleConfig = child_config(child.config, child.architecture)
    config.dtype = DTYPES[dtype]
    weights = {name: weight.to(DTYPES[dtype]) for name, weight in child.model.state_dict().items()}
    model = build(config, weights)
    model.generation_config = child.model.generation_config
    save_model(model, child.tokenizer, folder)
