"""torch.compile for GKD: its losses, and the layers one by one, so that those that are alike share kernels."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from puzzle_nas.errors import RecipeError
from puzzle_nas.families import Anatomy

COMPILERS = ("g++", "clang++")
MOST_KINDS = 4096
"""Of layers that torch may compile before it gives up and runs the rest as they are: more than any model has."""


def compile_layers(model: PreTrainedModel) -> None:
    """Have every layer compiled when it first runs.

    Raises:
        RecipeError: there is no C++ compiler, which torch needs for it.
    """
    if not (os.environ.get("CXX") or any(map(shutil.which, COMPILERS))):
        raise RecipeError("gkd.compile needs a C++ compiler, and there is none here; install g++ or leave compile out.")
    limits = torch._dynamo.config
    limits.recompile_limit = limits.accumulated_recompile_limit = MOST_KINDS
    for layer in Anatomy(model).layers:
        # From one in which nothing runs torch concludes that nothing is to be compiled in any.
        if any(True for _ in layer.parameters()):
            layer.compile()


@functools.cache
def compiled_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as compiled; asked for again, the same one."""
    return torch.compile(function)
