"""llama.cpp, through llama-cpp-python in an environment of its own."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFReader
from transformers import PreTrainedConfig

from puzzle_nas.artifacts import explained_disk_errors
from puzzle_nas.engines.base import LOOPBACK, ServingEngine, Tolerance
from puzzle_nas.engines.worker import Worker
from puzzle_nas.errors import EngineError
from puzzle_nas.exporters import Child
from puzzle_nas.exporters.gguf_deci import idle_ffn, idle_ffns
from puzzle_nas.machine import usable_cores
from puzzle_nas.servable import SERVERS
from puzzle_nas.specs import Spec

WORKERS = Path(__file__).parent / "workers"
GELU = Tolerance(mean_nats=5e-3, max_nats=5e-2)


class LlamaCppEngine(ServingEngine):
    """Runs GGUF files on the CPU."""

    name = "llama.cpp"
    worker_bytes = 1 << 27
    formats = ("gguf",)
    requirements = ("llama-cpp-python[server]==0.3.36", "gguf>=0.17")
    worker_script = WORKERS / "llama_cpp_worker.py"
    gives_logits = True
    reads_tokenizer = True
    rounds_activations = "q8_0"
    quantised = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")
    vector_itemsize = 4
    kv_formats = tuple(SERVERS["llama.cpp"].kv_formats)
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

    def tolerance(self, child: Child, dtype: str) -> Tolerance:
        """See `ServingEngine.tolerance`; GELU comes from a table in 16 bits, whatever the precision."""
        known = super().tolerance(child, dtype)
        activation = getattr(child.config, "hidden_activation", None) or child.config.hidden_act
        return max(known, GELU, key=lambda one: one.mean_nats) if activation.startswith("gelu") else known

    def filler_bytes(self, spec: Spec, config: PreTrainedConfig) -> int:
        """See `Engine.filler_bytes`: FFNs of zeros where a layer of the file would have none."""
        return idle_ffns(spec) * sum(w.numel() * (4 if w.ndim == 1 else 2) for w in idle_ffn(config).tensors.values())

    def quantise(self, exported: Path, kind: str) -> dict[str, int]:
        """See `ServingEngine.quantise`."""
        whole, smaller = exported / "model.gguf", exported / f"{kind}.gguf"
        with explained_disk_errors(exported):
            with Worker(self.name, self.python(), self.worker_script, self.environment()) as worker:
                worker.ask("quantise", source=str(whole), target=str(smaller), kind=kind)
            os.replace(smaller, whole)
        return self.tensor_types(exported)

    def tensor_types(self, exported: Path) -> dict[str, int]:
        """See `ServingEngine.tensor_types`."""
        types = Counter(tensor.tensor_type.name for tensor in GGUFReader(exported / "model.gguf").tensors)
        return dict(types.most_common())

    def server_command(self, exported: Path, port: int, context: int | None) -> list[str]:
        """See `ServingEngine.server_command`."""
        if context is not None and context > (positions := _positions(exported)):
            raise EngineError(f"The model has {positions} positions; serve it with --context {positions} or less.")
        threads = str(usable_cores())
        kv_format = self.loading_of(exported).kv_format
        kind = str(GGMLQuantizationType[kv_format.upper()].value) if kv_format else ""
        # A rounded cache of values needs flash attention.
        cache = ["--type_k", kind, "--type_v", kind, "--flash_attn", "true"] if kv_format else []
        return [
            *(str(self.python()), str(WORKERS / "llama_cpp_server.py")),
            *("--model", str(exported / "model.gguf"), "--host", LOOPBACK, "--port", str(port)),
            # 0 is the model's own context.
            *("--n_ctx", str(context or 0), "--n_threads", threads, "--n_threads_batch", threads),
            *cache,
        ]

    def last_words(self, lines: list[str]) -> str:
        """See `ServingEngine.last_words`. A KV cache too large for memory is the context's fault."""
        said = super().last_words(lines)
        too_large = any("failed to allocate" in line or "Failed to create llama_context" in line for line in lines)
        return f"{said}; a shorter --context needs less memory" if too_large else said


def _positions(exported: Path) -> int:
    reader = GGUFReader(exported / "model.gguf")
    architecture = reader.fields["general.architecture"].contents()
    return int(reader.fields[f"{architecture}.context_length"].contents())
