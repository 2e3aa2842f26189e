"""Checkpoint formats that engines serve. One class in one file each, and one line here."""

from puzzle_nas.exporters.base import Child, Exporter
from puzzle_nas.exporters.decilm_format import DeciLMExporter
from puzzle_nas.exporters.gguf_format import GGUFExporter
from puzzle_nas.exporters.transformers_format import TransformersExporter
from puzzle_nas.exporters.vllm_format import VllmExporter

EXPORTERS: dict[str, Exporter] = {
    exporter.name: exporter() for exporter in (TransformersExporter, DeciLMExporter, VllmExporter, GGUFExporter)
}

__all__ = ["EXPORTERS", "Child", "Exporter"]
