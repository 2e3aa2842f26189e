"""The child's own transformers checkpoint: our vLLM plugin serves it as it is."""

from __future__ import annotations

from pathlib import Path

from puzzle_nas.architecture import SPEC_KINDS
from puzzle_nas.exporters.base import Child, Exporter
from puzzle_nas.exporters.transformers_format import write_checkpoint


class VllmExporter(Exporter):
    """Everything that a child can be."""

    name = "vllm"
    server = "vllm"
    engine = "vllm"
    writers = {kind: kind.layer_config for kind in SPEC_KINDS.values()}

    def write(self, child: Child, folder: Path, dtype: str) -> None:
        """See `Exporter.write`."""
        write_checkpoint(child, folder, dtype)
