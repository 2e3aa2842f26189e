"""Engines that run and time models. One class in one file each, and one line here."""

from puzzle_nas.engines.base import Engine, Loading, RequestTime, ServingEngine, Tolerance
from puzzle_nas.engines.llama_cpp import LlamaCppEngine
from puzzle_nas.engines.timing import interleaved_times, relative_standard_error, speedups, undisturbed
from puzzle_nas.engines.torch_engine import TorchEngine
from puzzle_nas.engines.transformers_engine import TransformersEngine
from puzzle_nas.engines.vllm import EagerVllmEngine, StockVllmEngine, VllmEngine
from puzzle_nas.errors import EngineError

SERVING_ENGINES: dict[str, ServingEngine] = {
    engine.name: engine()
    for engine in (TransformersEngine, VllmEngine, EagerVllmEngine, StockVllmEngine, LlamaCppEngine)
}
ENGINES: dict[str, Engine] = {TorchEngine.name: TorchEngine(), **SERVING_ENGINES}


def serving_engine(name: str) -> ServingEngine:
    """A serving engine by name.

    Raises:
        EngineError: there is none of that name.
    """
    if name not in SERVING_ENGINES:
        raise EngineError(f"There is no serving engine '{name}'; engines: {', '.join(SERVING_ENGINES)}.")
    return SERVING_ENGINES[name]


__all__ = [
    "ENGINES",
    "SERVING_ENGINES",
    "Engine",
    "Loading",
    "RequestTime",
    "ServingEngine",
    "Tolerance",
    "TorchEngine",
    "interleaved_times",
    "relative_standard_error",
    "serving_engine",
    "speedups",
    "undisturbed",
]
