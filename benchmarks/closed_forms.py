"""Closed forms for attention that could have been the default: mean replace-1-block KL of each, untrained.

Which KV heads to merge: the mean of all, or one of them kept. How to weight tokens. And whether to solve for the
sub-block's own output or for the block's, that is, with the error that the unchanged FFN carries on (fixed-point
steps). Reads runs/quickstart, made by `make quickstart`. python benchmarks/closed_forms.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from results import save

from puzzle_nas.architecture import GroupedAttention, LinearAttention, Spec
from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import load_parent
from puzzle_nas.subblocks import Weights, observe_layer, subblock_layer
from puzzle_nas.subblocks.attention import grouped_weights
from puzzle_nas.subblocks.base import solve_ridge
from puzzle_nas.subblocks.statistics import Activations, inverse_norm, moments
from puzzle_nas.training.replacement import ReplacementWalk

LAYERS = (2, 5, 11, 14, 17, 22, 28)
RIDGE = 1e-3
CARRIED_STEPS = 3
WEIGHTINGS = {
    "by_output": lambda batch: inverse_norm(batch.attention_out_ND),
    "by_block_output": lambda batch: inverse_norm(batch.out_ND),
}


class LayerTrial:
    """One parent layer, its activations on calibration text, and closed forms for it."""

    def __init__(self, layer, config, activations: list[Activations], batches_BTD: list[torch.Tensor]):
        self.layer, self.config, self.activations, self.batches_BTD = layer, config, activations, batches_BTD

    def solve(self, features, targets, weigh=None) -> torch.Tensor:
        """The output matrix that takes features [N, I] nearest to targets [N, D]."""
        sums = None
        for x, y, batch in zip(features, targets, self.activations, strict=True):
            new = moments(x, y, None if weigh is None else weigh(batch))
            sums = new if sums is None else sums.__iadd__(new)
        return solve_ridge(sums, RIDGE)

    def carried(self, features, matrix: torch.Tensor) -> list[torch.Tensor]:
        """What attention should add so that the block's output, FFN included, is the parent's."""
        targets = []
        for x, batch, hidden in zip(features, self.activations, self.batches_BTD, strict=True):
            middle = hidden.flatten(0, 1) + x @ matrix.to(x).T
            ffn_out = self.layer.mlp(self.layer.post_attention_layernorm(middle))
            targets.append(batch.attention_out_ND + batch.ffn_out_ND - ffn_out)
        return targets

    def closed_forms(self, spec: Spec, weights: Weights, features, name: str) -> dict[str, Weights]:
        """Initialisations of one variant by the way they were solved."""
        plain = [batch.attention_out_ND for batch in self.activations]
        matrices = {"plain": self.solve(features, plain)}
        matrices |= {key: self.solve(features, plain, weigh) for key, weigh in WEIGHTINGS.items()}
        matrix = matrices["plain"]
        for step in range(CARRIED_STEPS):
            matrix = self.solve(features, self.carried(features, matrix))
            matrices[f"carried_{step + 1}"] = matrix
        return {key: {**weights, name: w.to(features[0]).contiguous()} for key, w in matrices.items()}

    def candidates(self, heads: int) -> dict[str, tuple[Spec, Weights]]:
        """Everything that is tried, by name."""
        forms: dict[str, tuple[Spec, Weights]] = {}
        spec = GroupedAttention(1)
        merges = {"pooled": lambda h: h.mean(1)} | {f"head_{i}": lambda h, i=i: h[:, i] for i in range(heads)}
        for merge_name, merge in merges.items():
            weights = grouped_weights(spec, self.layer, merge)
            block = subblock_layer(self.config, self.layer.layer_type, spec, weights)
            features = [
                block.self_attn.context(b.attention_in_BTD, **b.inputs)[0].flatten(0, 1) for b in self.activations
            ]
            for key, solved in self.closed_forms(spec, weights, features, "self_attn.o_proj.weight").items():
                forms[f"kv1_{merge_name}_{key}"] = spec, solved
        norm = {n: w for n, w in self.layer.state_dict().items() if n.startswith("input_layernorm.")}
        features = [batch.attention_in_ND for batch in self.activations]
        solved_linear = self.closed_forms(LinearAttention(), norm, features, "self_attn.linear_attn.weight")
        return forms | {f"linear_{key}": (LinearAttention(), w) for key, w in solved_linear.items()}


@torch.inference_mode()
def main() -> None:
    """Print the KL of every closed form in each of LAYERS; keep the means."""
    run = RunFolder(Path("runs/quickstart"))
    parent, shape = load_parent(run)
    tokens = load_tokens(run, "calibration")
    walk = ReplacementWalk(parent, tokens[-16:], 4096)
    batches = list(parent.model.embed_tokens(tokens[:48]).split(16))
    found: dict[str, list[float]] = {}
    for index, layer in enumerate(parent.model.layers):
        activations = [observe_layer(layer, batch, walk.inputs) for batch in batches]
        if index in LAYERS:
            forms = LayerTrial(layer, parent.config, activations, batches).candidates(shape.num_key_value_heads)
            blocks = [subblock_layer(parent.config, layer.layer_type, spec, w) for spec, w in forms.values()]
            results = walk.try_variants([{"attention": block} for block in blocks])
            for name, result in zip(forms, results, strict=True):
                found.setdefault(name, []).append(float(result.kl_nats.mean()))
        batches = [a.out_ND.view_as(b) for a, b in zip(activations, batches, strict=True)]
        if index + 1 < shape.num_hidden_layers:
            walk.advance()
    print(f"{'KL, nats; layer':32}" + "".join(f"{i:8d}" for i in LAYERS) + "    mean")
    figures = {}
    kept = [name for name in found if name.startswith("kv1_head_") and name.endswith("_plain")]
    found["kv1_best_head_plain"] = [min(values) for values in zip(*(found[name] for name in kept), strict=True)]
    for name, values in found.items():
        figures[f"kl_nats_{name}"] = sum(values) / len(values)
        print(f"{name:32}" + "".join(f"{v:8.4f}" for v in values) + f"{figures[f'kl_nats_{name}']:8.4f}")
    print(f"kept in {save('closed_forms', figures)}")


if __name__ == "__main__":
    main()
