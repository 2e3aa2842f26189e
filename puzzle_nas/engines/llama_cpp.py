"""llama.cpp, through llama-cpp-python in an environment of its own."""

from __future__ import annotations

import os
from pathlib import Path

from puzzle_nas.artifacts import explained_disk_errors
from puzzle_nas.engines.base import LOOPBACK, ServingEngine, Tolerance
from puzzle_nas.engines.worker import Worker

WORKERS = Path(__file__).parent / "workers"
SERVED_CONTEXT_TOKENS = 4096


class LlamaCppEngine(ServingEngine):
    """Runs GGUF files on the CPU."""

    name = "llama.cpp"
    formats = ("gguf",)
    requirements = ("llama-cpp-python[server]==0.3.36", "gguf>=0.17")
    worker_script = WORKERS / "llama_cpp_worker.py"
    reads_tokenizer = True
    quantised = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")
    kv_dtypes = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
    # Products with 16-bit weights round the activations to 16 bits too, with quantised weights to 8.
    tolerances = {
        "float32": Tolerance(mean_nats=1e-4, max_nats=1e-3),
        "float16": Tolerance(mean_nats=2e-2, max_nats=2e-1),
        "bfloat16": Tolerance(mean_nats=0.15, max_nats=1.5),
        # Only a damaged file goes beyond these: what quantisation costs is the model's own affair. SmolLM2-135M
        # loses 0.07 nats on average to q8_0 and 0.6 to q4_0, children of it up to twice that.
        "q8_0": Tolerance(mean_nats=0.5, max_nats=6.0),
        "q6_k": Tolerance(mean_nats=0.5, max_nats=8.0),
        "q5_k_m": Tolerance(mean_nats=2.0, max_nats=12.0),
        "q4_k_m": Tolerance(mean_nats=2.0, max_nats=12.0),
        "q4_0": Tolerance(mean_nats=3.0, max_nats=14.0),
    }

    def quantise(self, exported: Path, kind: str) -> None:
        """See `ServingEngine.quantise`."""
        whole, smaller = exported / "model.gguf", exported / f"{kind}.gguf"
        with explained_disk_errors(exported):
            with Worker(self.name, self.python(), self.worker_script, self.environment()) as worker:
                worker.ask("quantise", source=str(whole), target=str(smaller), kind=kind)
            os.replace(smaller, whole)

    def server_command(self, exported: Path, port: int) -> list[str]:
        """See `ServingEngine.server_command`."""
        threads = str(len(os.sched_getaffinity(0)))
        return [
            *(str(self.python()), str(WORKERS / "llama_cpp_server.py")),
            *("--model", str(exported / "model.gguf"), "--host", LOOPBACK, "--port", str(port)),
            *("--n_ctx", str(SERVED_CONTEXT_TOKENS), "--n_threads", threads, "--n_threads_batch", threads),
        ]
