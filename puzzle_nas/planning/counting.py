"""What forward passes, training and closed forms compute and move, counted from sizes. No torch.

A product of [N, I] and [I, O] is 2 N I O FLOPs, each of its two gradients as many. Attention counts whole squares of
tokens, as torch's own counter does, whatever its mask. What mixers that are kept whole do besides their matrices is
left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from puzzle_nas.architecture import Choice
from puzzle_nas.planning.sizes import ModelSize, Size
from puzzle_nas.recipe import Recipe
from puzzle_nas.scenario import Scenario
from puzzle_nas.search_space import SearchSpace
from puzzle_nas.specs import Spec

BATCH_TOKENS = 4096
"""That pass through a layer together where the recipe does not say."""
HEAD_ROWS = 512
"""Tokens whose logits exist at once (training/losses.py)."""


@dataclass(frozen=True)
class Work:
    """What is done, in units whose seconds depend on the machine. They add up."""

    flops: float = 0.0
    """Of matrix products in the recipe's precision."""
    float64_flops: float = 0.0
    """Of linear systems."""
    forward_numbers: float = 0.0
    """Numbers that the matrices of forward passes give: what norms, masks and activation functions pass over."""
    trained_numbers: float = 0.0
    """The same where gradients follow."""
    block_numbers: float = 0.0
    """The same in BLD."""
    updates: float = 0.0
    """Parameters that an optimiser updates, counted at each step."""
    scored_logits: float = 0.0
    """Of children, compared with the parent's."""
    distilled_logits: float = 0.0
    """Of a child, compared with the parent's, with their gradient."""
    passed_weights: float = 0.0
    """Weights that products of few tokens read, counted at each."""
    cached_numbers: float = 0.0
    """Keys and values read from caches."""
    layer_calls: float = 0.0
    """Layers run: starting their operations takes time even if there is little to compute."""
    file_bytes: float = 0.0
    """Written to files or read from them."""
    seconds: float = 0.0
    """What depends on none of these."""

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * value for value in vars(self).values()))


@dataclass(frozen=True)
class Counts:
    """A recipe on a parent."""

    recipe: Recipe
    space: SearchSpace
    size: ModelSize
    itemsize: int
    """Bytes of a number in the precision of forward passes."""
    is_on_gpu: bool = False
    device_bytes: float = math.inf
    """Free memory of the device; some stages take the more the more there is."""
    processes: int = 1
    """Of the run; each has a device of its own."""

    @property
    def length(self) -> int:
        """Tokens in a sequence of training and scoring."""
        return self.recipe.data.sequence_length

    @property
    def layers(self) -> range:
        """Of the parent."""
        return range(len(self.size.architecture.layers))

    @property
    def streams(self) -> bool:
        """Whether stages that go through the layers in order read them one by one."""
        return self.recipe.memory != "all"

    @property
    def formats(self) -> tuple[str, ...]:
        """That the search may store sub-blocks in, besides the recipe's precision."""
        return self.space.formats

    @property
    def child_share(self) -> float:
        """Of the parent's layers in the child. Limits other than `speedup` mean nothing before costs are measured."""
        return min(1.0, 1 / self.recipe.search.limits.get("speedup", 1.0))

    @cached_property
    def choices(self) -> list[Choice]:
        """What is scored in layers."""
        every = self.space.scored(by_block=self.recipe.scoring.unit == "block")
        return [choice for choice in every if choice[0] in self.layers]

    def tokens(self, split: str) -> int:
        """Of a split, in whole sequences."""
        return self.recipe.data.blocks(split) * self.length

    def variants(self, layer: int) -> list[tuple[Spec, Size]]:
        """What is made for a layer, besides its own sub-blocks in formats."""
        return [(spec, self.size.of(layer, spec)) for spec in self.space.variants(layer) if spec.format is None]

    # Work

    def passed(self, tokens: float, size: Size, layers: float) -> Work:
        """Sub-blocks, added up, run on tokens in sequences; they are those of so many layers."""
        flops = 2 * tokens * size.multiplied + 4 * tokens * self.length * size.attended
        calls = layers * math.ceil(tokens / BATCH_TOKENS)
        return Work(flops=flops, forward_numbers=tokens * size.made, layer_calls=calls)

    def forward(self, tokens: float) -> Work:
        """All layers of the parent."""
        return self.passed(tokens, self.size.body, len(self.layers))

    def head(self, tokens: float) -> Work:
        """Products with the LM head."""
        return Work(flops=2.0 * tokens * self.size.hidden * self.size.vocabulary)

    def compared(self, tokens: float) -> Work:
        """Logits of a child, and how far they are from the parent's."""
        return self.head(tokens) + Work(scored_logits=tokens * self.size.vocabulary)

    def child_compared(self, tokens: float) -> Work:
        """A child run on a split and compared with the parent, whose final states are kept."""
        return self.forward(tokens) * self.child_share + self.head(tokens) + self.compared(tokens)

    def replacement(self, tokens: float, layer: int, specs: Sequence[Spec]) -> Work:
        """Sub-blocks of a layer replaced together: that layer, those above it, and the logits."""
        block = {**self.size.architecture.layers[layer], **{spec.slot: spec for spec in specs}}
        changed = sum((self.size.of(layer, spec) for spec in block.values()), Size())
        above = len(self.layers) - layer - 1
        return self.passed(tokens, changed + self.size.above[layer], 1 + above) + self.compared(tokens)

    def decode_step(self, rows: int, cached_tokens: float) -> Work:
        """One token of each row through the parent, its LM head included."""
        body, head = self.size.body, self.size.hidden * self.size.vocabulary
        weights = sum(min(size.parameters, rows * size.multiplied) for size in self.size.layers)
        return Work(
            flops=2 * rows * (body.multiplied + head) + 4 * rows * cached_tokens * body.attended,
            forward_numbers=rows * body.made,
            passed_weights=weights + head,
            cached_numbers=rows * cached_tokens * body.cached,
            layer_calls=len(self.layers),
        )

    def request(self, scenario: Scenario, steps: int | None = None) -> Work:
        """A batch of requests through the parent; of the decode, so many steps around its middle."""
        tokens = scenario.batch_size * scenario.prefill_tokens
        prefill = self.forward(tokens) + self.head(scenario.batch_size)
        prefill += Work(passed_weights=self.size.body.parameters, layer_calls=len(self.layers))
        middle = scenario.prefill_tokens + scenario.decode_tokens / 2
        taken = scenario.decode_steps if steps is None else min(steps, scenario.decode_steps)
        return prefill + self.decode_step(scenario.batch_size, middle) * taken

    def requests(self, steps: int | None = None) -> Work:
        """Each scenario once."""
        return sum((self.request(scenario, steps) for scenario in self.recipe.traffic()), Work())

    def gram(self, tokens: float, width: int, outputs: int = 0) -> Work:
        """The Gram matrix of a sub-block's inputs, and their products with its outputs."""
        return Work(flops=2.0 * tokens * width * (width + outputs))

    def solved(self, width: int, outputs: int) -> Work:
        """A linear system of a Gram matrix, for so many columns."""
        return Work(float64_flops=2 / 3 * width**3 + 2.0 * width * width * outputs)

    # Bytes

    @property
    def ends(self) -> int:
        """Weights of the LM head, and as many of the embeddings, which may be the same."""
        return self.size.hidden * self.size.vocabulary

    @property
    def parent_bytes(self) -> int:
        """All weights."""
        return self.itemsize * self.size.parameters

    @property
    def child_parameters(self) -> float:
        """As far as is known before the search."""
        return self.size.fixed_parameters + self.child_share * self.size.body.parameters

    @property
    def child_bytes(self) -> float:
        """All weights."""
        return self.itemsize * self.child_parameters

    @property
    def one_layer_bytes(self) -> int:
        """Embeddings, head and the largest layer."""
        return self.itemsize * (self.size.fixed_parameters + max(size.parameters for size in self.size.layers))

    @property
    def walked_bytes(self) -> int:
        """What there is of the parent in memory while a stage goes through its layers in order."""
        return self.one_layer_bytes if self.streams else self.parent_bytes

    @cached_property
    def library_bytes(self) -> float:
        """All variants of all layers."""
        return self.itemsize * sum(size.parameters for layer in self.layers for _, size in self.variants(layer))

    def stream_bytes(self, tokens: float) -> float:
        """A residual stream of so many tokens."""
        return self.itemsize * tokens * self.size.hidden

    def running_bytes(self, tokens: float) -> float:
        """What the widest layer makes of tokens that pass through it together."""
        return self.itemsize * tokens * (max(size.made for size in self.size.layers) + 2 * self.size.hidden)

    def logit_bytes(self, models: int, tokens: float = HEAD_ROWS) -> float:
        """Logits of so many models at once, and a few in float32."""
        return min(HEAD_ROWS, tokens) * self.size.vocabulary * (models * self.itemsize + 3 * 4)
