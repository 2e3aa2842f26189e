"""Engines that run and time models. One class in one file each."""

from puzzle_nas.engines.torch_engine import RequestTime, TorchEngine, speedups

ENGINES = {TorchEngine.name: TorchEngine}

__all__ = ["ENGINES", "RequestTime", "TorchEngine", "speedups"]
