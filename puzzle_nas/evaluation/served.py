"""An export as its engine computes it, weights and activations in the engine's own formats, for comparisons.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from puzzle_nas.artifacts import read_json
from puzzle_nas.engines import SERVING_ENGINES
from puzzle_nas.engines.base import EXPORT_RECORD, ServingEngine
from puzzle_nas.engines.worker import Worker
from puzzle_nas.errors import ExportError
from puzzle_nas.evaluation.models import Evaluated, Same
from puzzle_nas.families import Head


class Served(nn.Module):
    """Stands for `Evaluated`: its final states are the engine's logits."""

    def __init__(self, engine: ServingEngine, worker: Worker, parent: Evaluated, scratch: Path):
        super().__init__()
        self.engine, self.worker, self.scratch = engine, worker, scratch
        self.tokenizer, self.vocab_size, self.max_length = parent.tokenizer, parent.vocab_size, parent.max_length
        self.device = torch.device("cpu")
        self.head = Head(Same(torch.float32))
        self.eval()

    def final_states(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [B, T, V]."""
        path = self.scratch / "logits.bin"
        self.engine.logits(self.worker, tokens_BT.tolist(), path)
        return torch.from_numpy(np.fromfile(path, np.float32)).view(*tokens_BT.shape, -1)


def engine_of(exported: Path) -> ServingEngine | None:
    """The engine that an export is for; None where the folder is none.

    Raises:
        ExportError: its engine gives no logits.
    """
    if not (exported / EXPORT_RECORD).is_file():
        return None
    to = read_json(exported / EXPORT_RECORD)["format"]
    engine = next(engine for engine in SERVING_ENGINES.values() if to in engine.formats)
    if not engine.gives_logits:
        able = ", ".join(name for name, other in SERVING_ENGINES.items() if other.gives_logits)
        raise ExportError(
            f"{engine.name} gives no whole distributions to compare, {able} does: evaluate an export to that, or the "
            "run folder, whose child this is."
        )
    return engine


@contextmanager
def served_model(engine: ServingEngine, exported: Path, parent: Evaluated) -> Iterator[Any]:
    """An export in its engine, loaded as it is served.

    Raises:
        EngineError: the engine is not installed, or cannot load the export.
    """
    precision, loading = engine.precision_of(exported), engine.loading_of(exported)
    with tempfile.TemporaryDirectory() as scratch, engine.load(exported, precision, loading=loading) as worker:
        yield Served(engine, worker, parent, Path(scratch))
