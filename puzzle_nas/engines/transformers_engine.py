"""transformers itself, in a process that cannot import our package: the child as its users load it."""

from __future__ import annotations

from pathlib import Path

from puzzle_nas.engines.base import Engine, ServingEngine, Tolerance
from puzzle_nas.errors import EngineError


class TransformersEngine(ServingEngine):
    """`from_pretrained(..., trust_remote_code=True)`, without any code of ours but what the checkpoint carries."""

    name = "transformers"
    worker_bytes = 1 << 30
    formats = ("transformers",)
    requirements = ()
    dtypes = ("float32", "bfloat16", "float16")
    weights_dtype = Engine.weights_dtype
    worker_script = Path(__file__).parent / "workers" / "transformers_worker.py"
    tolerances = {
        "float32": Tolerance(mean_nats=1e-5, max_nats=5e-4),
        "bfloat16": Tolerance(mean_nats=1e-5, max_nats=1e-4),
        "float16": Tolerance(mean_nats=1e-5, max_nats=1e-4),
    }

    def server_command(self, exported: Path, port: int, context: int | None) -> list[str]:
        """See `ServingEngine.server_command`."""
        raise EngineError("transformers is not a server; use another engine: puzzle serve EXPORT --engine llama.cpp")
