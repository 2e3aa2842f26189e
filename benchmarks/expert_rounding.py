"""KL of a working mixture whose experts are in q4_0, by how they were rounded and for how many tokens.

The mixture is that of the benchmark `experts`: glassllm's FFNs divided into 8 experts of 128 channels, 2 for a token.
"""

from __future__ import annotations

from contextlib import ExitStack
from unittest.mock import patch

import torch

from benchmarks.common import report
from benchmarks.experts import EXPERTS, LENGTH, PER_TOKEN, STEPS, kl_nats, texts
from puzzle_nas.families import architecture_of, build, child_config
from puzzle_nas.formats.rounding import damped, round_matrix
from puzzle_nas.training import expert_rounding
from puzzle_nas.training.refitting import rounded
from tests.conftest import glassllm_as_llama
from tests.mixtures import upcycled

FORM = "q4_0"
SEQUENCES = (1, 4, 16, 128)
"""Of text that experts are rounded for, each of `LENGTH` tokens."""


def to_every_expert(mixer, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `experts.route`: all experts for each token, alike."""
    weights = torch.ones(len(x_ND), mixer.experts.num_experts)
    return weights, weights, torch.arange(weights.shape[1]).expand(len(x_ND), -1)


WAYS = {
    "nearest": {"round_matrix": lambda form, weight, _: form.nearest(weight)},
    "scale_search": {"round_matrix": lambda form, weight, _: round_matrix(form, weight)},
    "own_gram": {"damped": lambda gram, _: damped(gram, 0)},
    "gram_of_all_tokens": {"damped": lambda gram, _: damped(gram, 0), "route": to_every_expert},
    "own_gram_pulled": {},
}
"""What of `expert_rounding` is replaced."""


@torch.no_grad()
def main() -> None:
    """Print the table and keep the figures."""
    torch.manual_seed(0)
    dense, tokenizer = glassllm_as_llama()
    teaching, validation = texts(tokenizer)
    width = -(-dense.config.intermediate_size // 3 // 64) * 64
    with torch.enable_grad():
        parent = upcycled(dense, teaching, EXPERTS, PER_TOKEN, width, STEPS)
    architecture = architecture_of(parent.config)
    for layer, block in enumerate(architecture.layers):
        architecture = architecture.replaced(layer, block["experts"].stored(FORM))
    figures = {}
    for sequences in SEQUENCES:
        for name, parts in WAYS.items():
            child = build(child_config(parent.config, architecture), parent.state_dict())
            with ExitStack() as stack:
                for part, other in parts.items():
                    stack.enter_context(patch.object(expert_rounding, part, other))
                rounded(parent, child, teaching[:sequences], {})
            of_each = sequences * LENGTH * PER_TOKEN // EXPERTS
            figures[f"{name}_{of_each}_tokens_kl_nats"] = kl_nats(parent, child, validation)
    report("expert_rounding", figures)
