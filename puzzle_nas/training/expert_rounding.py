"""Rounding the experts of a mixture in closed form, each for the tokens that the router sends to it.

`rounding.round_matrix` knows a matrix's inputs by their Gram matrix. An expert's is that of its own tokens, each
counted by the weight that the router gives the expert. These are few, often fewer than an expert has inputs, and error
feedback would fit the rounding to them alone. So each Gram matrix is pulled towards that of inputs which are alike and
independent, as strongly as one token for each input would pull. Nothing else is needed where an expert received few
tokens: KL in nats, on other text, of a mixture whose experts are in q4_0 (benchmarks/expert_rounding.py):

| tokens of an expert | nearest | scale search | own Gram matrix | of all tokens | own, pulled |
|---|---|---|---|---|---|
| 16 | 0.0117 | 0.0096 | 0.0147 | 0.0211 | **0.0078** |
| 64 | 0.0117 | 0.0096 | 0.0137 | 0.0160 | **0.0069** |
| 256 | 0.0117 | 0.0096 | 0.0117 | 0.0104 | **0.0057** |
| 2048 | 0.0117 | 0.0096 | 0.0033 | 0.0051 | **0.0031** |

Shapes: N tokens, E experts, K experts of a token, D hidden, I inputs of a matrix, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from puzzle_nas.families import SubBlock
from puzzle_nas.formats.base import Rounded
from puzzle_nas.formats.registry import format_of
from puzzle_nas.formats.rounding import damped, round_matrix
from puzzle_nas.formats.stored import Matrices, Matrix, Stack, parameter_of
from puzzle_nas.subblocks.experts import channels_of, route
from puzzle_nas.subblocks.statistics import fast_products


def round_experts(subblock: SubBlock, form: str, read_ND: torch.Tensor, importance_N: torch.Tensor) -> Matrices:
    """Round all experts of a mixture in place; the router stays as it is.

    Last matrices are rounded for what the others give once these are rounded.

    Args:
        read_ND: what the mixture reads.
        importance_N: how much an error of each token's output counts.

    Returns:
        By names relative to the layer.

    Raises:
        FormatError: the format does not hold a matrix.
    """
    mixer: Any = subblock.mixer
    experts = mixer.experts
    _, gates_NK, numbers_NK = route(mixer, read_ND)
    inputs: dict[str, Callable[[int, torch.Tensor], torch.Tensor]] = {
        "gate_up_proj": lambda _, tokens: read_ND[tokens],
        "down_proj": lambda expert, tokens: channels_of(experts, expert, read_ND[tokens]),
    }
    stored: Matrices = {}
    for name, inputs_of in inputs.items():
        weight = getattr(experts, name)
        stack = Stack.of(experts, weight)
        assert stack is not None
        parts = []
        for expert, rows_OI in enumerate(stack.rows(weight).chunk(stack.experts)):
            tokens, place = (numbers_NK == expert).nonzero(as_tuple=True)
            counts = importance_N[tokens] * gates_NK[tokens, place].float()
            parts.append(round_matrix(format_of(form), rows_OI, pulled_gram(inputs_of(expert, tokens), counts)))
        made = Matrix(form, Rounded.joined(parts), stack)
        stored[f"{subblock.place.mixer}.experts.{name}"] = made
        setattr(experts, name, parameter_of(made, weight))
    return stored


def pulled_gram(x_NI: torch.Tensor, counts_N: torch.Tensor) -> torch.Tensor | None:
    """The Gram matrix of tokens, [I, I], as `round_experts` takes it; None without tokens."""
    if not len(x_NI):
        return None
    x = x_NI.float()
    with fast_products(x_NI):
        gram = ((x * counts_N[:, None]).T @ x).double()
    return damped(gram, x.shape[1] / len(x))
