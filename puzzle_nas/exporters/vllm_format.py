"""The child's own transformers checkpoint: our vLLM plugin serves it as it is."""

from __future__ import annotations

from pathlib import Path

from puzzle_nas.exporters.base import Child, Exporter
from puzzle_nas.exporters.llama_like import FAMILIES
from puzzle_nas.exporters.transformers_format import write_checkpoint
from puzzle_nas.families.loading import entry_of
from puzzle_nas.servable import SERVERS


class VllmExporter(Exporter):
    """Every child that vLLM's transformers backend can be brought to run."""

    name = "vllm"
    server = "vllm"
    engine = "vllm"
    families = FAMILIES
    writers = dict.fromkeys(SERVERS[server].kinds, entry_of)

    def family_problems(self, child: Child) -> list[str]:
        """See `Exporter.family_problems`."""
        if child.model.is_backend_compatible():
            return []
        return [f"{child.family} computes attention by itself, where vLLM exchanges only transformers' interface to it"]

    def write(self, child: Child, folder: Path, dtype: str) -> None:
        """See `Exporter.write`."""
        write_checkpoint(child, folder, dtype)
