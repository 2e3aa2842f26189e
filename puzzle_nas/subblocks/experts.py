"""Variants of mixtures of experts: fewer experts, fewer of them for a token, narrower ones.

Router and experts are the family's own modules, each run alone: nothing of their arithmetic is written here.

Shapes: N tokens, E experts, K experts of a token, D hidden, I channels of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from puzzle_nas.families.anatomy import SubBlock
from puzzle_nas.specs import Mixture
from puzzle_nas.subblocks.base import Context, Origin, Variant, damped, like
from puzzle_nas.subblocks.layers import Weights, made_subblock
from puzzle_nas.subblocks.statistics import Activations, Moments, inverse_norm

MOST_TOKENS = 8192
"""Of the calibration text: what an expert does is not a sum over tokens."""
MOST_BYTES = 1 << 30
"""Of products between experts' outputs, from which rankings are computed."""
SWEEPS = 2
"""How often each expert's last matrix is solved for what the others leave."""
SHARE_REMOVED_TOGETHER = 1 / 32
"""Of a mixture's experts, between two looks at what each of the others is worth."""


@dataclass
class Tokens(Moments):
    """Tokens instead of their sums: what the mixture read as `gram`, [N, D], and gave as `cross`, [N, D]."""

    def __iadd__(self, other: Moments) -> Moments:
        room = MOST_TOKENS - len(self.gram)
        if room > 0 and self.cross is not None and other.cross is not None:
            self.gram = torch.cat([self.gram, other.gram[:room]])
            self.cross = torch.cat([self.cross, other.cross[:room]])
        return self


class Experts(Variant[Mixture]):
    """A mixture with some of its experts, the router's rows going with them; experts that all tokens share stay.

    Which experts are kept is tried in three ways (`RANKINGS`), and held-back KL says which; the last candidate solves
    the kept experts' last matrices again as well, for the whole mixture's output.
    """

    def observations(self, spec, origin):
        """Tokens, as many as are needed."""

        def tokens(batch: Activations) -> Moments:
            return Tokens(batch.read_ND[:MOST_TOKENS].clone(), batch.mixed_ND[:MOST_TOKENS].clone())

        return {"tokens": tokens}

    def paper(self, spec, context):
        """Whole experts by REAP's ranking, channels by the paper's for FFNs."""
        return self._cut(spec, context, "reap")

    def least_squares(self, spec, context):
        """By each ranking, and from the last one with matrices that are solved again."""
        is_smaller = spec.num_experts < _size(context.origin)
        candidates = {name: self._cut(spec, context, name) for name in (RANKINGS if is_smaller else ["elimination"])}
        candidates["least_squares"] = solved(spec, context, candidates["elimination"])
        return candidates

    @staticmethod
    def _cut(spec: Mixture, context: Context, ranking: str) -> Weights:
        origin, tokens = context.origin, context.statistics["tokens"]
        weights = origin.weights
        if spec.num_experts < _size(origin):
            if ranking not in context.statistics:
                # One order serves every count.
                order = RANKINGS[ranking](Routed.of(origin.subblock, tokens))
                context.statistics[ranking] = Moments(order)
            weights = with_experts(origin, context.statistics[ranking].gram[: spec.num_experts])
        width = origin.weights[origin.name("experts.down_proj")].shape[1 if _transposed(origin.mixer) else 2]
        if spec.moe_intermediate_size < width:
            weights = with_channels(origin, weights, tokens.gram, spec.moe_intermediate_size)
        return weights


def _size(origin: Origin) -> int:
    return len(origin.mixer.experts.down_proj)


def _transposed(mixer: Any) -> bool:
    """Whether matrices of experts are [inputs, outputs]."""
    return mixer.experts.is_transposed


def router_name(mixer: nn.Module) -> str:
    """Families call it one or the other."""
    return "gate" if hasattr(mixer, "gate") else "router"


def route(mixer: nn.Module, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [N, E]; weights [N, K] and numbers [N, K] of each token's experts."""
    return getattr(mixer, router_name(mixer))(x_ND)


def route_logits(mixer: nn.Module, logits_NE: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """Every expert's weight, [N, E], if the router had computed these logits; -inf for experts that are gone."""
    router = getattr(mixer, router_name(mixer))
    experts = logits_NE.shape[1]
    # Behind a unit matrix the router chooses among what it is given. Minus infinity times zero would be NaN.
    finite = logits_NE.clamp_min(torch.finfo(torch.float32).min / 4)
    padded = nn.functional.pad(finite, (0, hidden_size - experts))
    own = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in router.named_parameters()}
    own["weight"] = torch.eye(experts, hidden_size, device=logits_NE.device)
    _, weights, numbers = functional_call(router, own, (padded,))
    return torch.zeros_like(finite).scatter(1, numbers, weights.float())


@contextmanager
def _one_after_another(experts: Any) -> Iterator[None]:
    """Experts as their family wrote them, and not as one product over all of them."""
    config = experts.config
    before = config._experts_implementation
    config._experts_implementation = "eager"
    try:
        yield
    finally:
        config._experts_implementation = before


def one_expert(experts: Any, number: int, x_ND: torch.Tensor, changed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What a single expert gives for each token, [N, D], with some of its weights `changed`."""
    own = {name: w[number : number + 1] for name, w in experts.named_parameters()}
    own |= {name: w.unsqueeze(0) for name, w in changed.items()}
    everywhere = torch.zeros(len(x_ND), 1, dtype=torch.long, device=x_ND.device)
    with _one_after_another(experts):
        return functional_call(experts, own, (x_ND, everywhere, torch.ones_like(everywhere, dtype=x_ND.dtype)))


def channels_of(experts: Any, number: int, x_ND: torch.Tensor) -> torch.Tensor:
    """What the last matrix of an expert receives, [N, I]: its output with unit vectors in that matrix's place."""
    down = experts.down_proj[number]
    width, hidden = down.shape[0 if experts.is_transposed else 1], x_ND.shape[1]
    parts = []
    for start in range(0, width, hidden):
        pick = torch.eye(hidden, width - start, dtype=down.dtype, device=down.device)
        pick = nn.functional.pad(pick, (start, 0))
        changed = {"down_proj": pick.T if experts.is_transposed else pick}
        if experts.has_bias:
            changed["down_proj_bias"] = torch.zeros_like(experts.down_proj_bias[number])
        parts.append(one_expert(experts, number, x_ND, changed)[:, : width - start])
    return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Routed:
    """What a mixture does with tokens, for rankings of its experts."""

    mixer: Any
    hidden_size: int
    logits_NE: torch.Tensor
    weights_NE: torch.Tensor
    """Zero where a token does not go."""
    products_NEE: torch.Tensor
    """Scalar products of the experts' outputs for a token."""
    importance_N: torch.Tensor
    """1 / |output|^2: errors count relative to the mixture's output."""

    @classmethod
    def of(cls, subblock: SubBlock, tokens: Moments) -> Routed:
        """As many tokens as `MOST_BYTES` allows."""
        assert tokens.cross is not None
        mixer: Any = subblock.mixer
        experts = len(mixer.experts.down_proj)
        most = max(1, MOST_BYTES // (4 * experts**2))
        x, mixed = tokens.gram[:most], tokens.cross[:most]
        logits, weights, numbers = route(mixer, x)
        dense = torch.zeros_like(logits, dtype=torch.float32).scatter(1, numbers, weights.float())
        products = []
        for part in x.split(max(1, MOST_BYTES // (8 * experts * x.shape[1]))):
            outputs = torch.stack([one_expert(mixer.experts, e, part, {}).float() for e in range(experts)], dim=1)
            products.append(outputs @ outputs.mT)
        return cls(mixer, x.shape[1], logits.float(), dense, torch.cat(products), inverse_norm(mixed, 2))

    def error(self, weights_NE: torch.Tensor) -> torch.Tensor:
        """Relative squared error of every token, [N], with other weights."""
        change = weights_NE - self.weights_NE
        return torch.einsum("ne,nef,nf->n", change, self.products_NEE, change) * self.importance_N

    def harm(self, gone_E: torch.Tensor) -> torch.Tensor:
        """By how much the error grows when one more expert goes and its tokens go elsewhere, [E]; inf for those gone.

        Args:
            gone_E: which ones are gone already.
        """
        logits = self.logits_NE.masked_fill(gone_E, -torch.inf)
        now = route_logits(self.mixer, logits, self.hidden_size)
        present = self.error(now)
        harm = torch.zeros_like(gone_E, dtype=torch.float32)
        if torch.allclose(now.sum(1), torch.ones_like(now[:, 0])):
            # Each token without one of its experts; the loss of any other does not concern it.
            lost = list(now.topk(int((now > 0).sum(1).max())).indices.T)
        else:
            # Where chosen weights are not normalised, all tokens' weights grow when any expert goes.
            lost = [torch.full_like(now[:, 0], e, dtype=torch.long) for e in (~gone_E).nonzero().flatten().tolist()]
        for expert in lost:
            without = route_logits(self.mixer, logits.scatter(1, expert[:, None], -torch.inf), self.hidden_size)
            harm.index_add_(0, expert, self.error(without) - present)
        return harm.masked_fill(gone_E, torch.inf)


def by_reap(routed: Routed) -> torch.Tensor:
    """Experts by the mean of weight x norm of output over their tokens (REAP, arXiv 2510.13999), best first, [E]."""
    norms = routed.products_NEE.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    taken = (routed.weights_NE > 0).sum(0).clamp_min(1)
    return ((routed.weights_NE * norms).sum(0) / taken).argsort(descending=True, stable=True)


def by_displacement(routed: Routed) -> torch.Tensor:
    """Experts by the error that each one's tokens suffer when they must go to others, most first, [E]."""
    gone = torch.zeros(routed.logits_NE.shape[1], dtype=torch.bool, device=routed.logits_NE.device)
    return routed.harm(gone).argsort(descending=True, stable=True)


def by_elimination(routed: Routed) -> torch.Tensor:
    """Experts from the most to the least worth keeping, [E], where each is judged without those removed before it.

    Two experts that stand in for each other are both dispensable alone, and not together. Ours.
    """
    experts = routed.logits_NE.shape[1]
    per_token = int((routed.weights_NE > 0).sum(1).max())
    gone = torch.zeros(experts, dtype=torch.bool, device=routed.logits_NE.device)
    together = max(1, int(experts * SHARE_REMOVED_TOGETHER))
    removed: list[torch.Tensor] = []
    # A token needs as many experts as it goes to; below that, all of them see every token.
    while experts - int(gone.sum()) > per_token:
        harm = routed.harm(gone)
        worst = harm.argsort(stable=True)[: min(together, experts - int(gone.sum()) - per_token)]
        gone[worst] = True
        removed.append(worst)
    last = (~gone).nonzero().flatten()
    last = last[routed.harm(gone)[last].argsort(descending=True, stable=True)] if len(last) > 1 else last
    return torch.cat([last, *reversed([part.flip(0) for part in removed])])


RANKINGS = {"reap": by_reap, "displacement": by_displacement, "elimination": by_elimination}


def with_experts(origin: Origin, kept: torch.Tensor) -> Weights:
    """The parent's mixture with some of its experts, in their old order."""
    kept = kept.sort().values
    weights = origin.weights
    for name, weight in weights.items():
        if name.startswith((origin.name("experts."), origin.name(f"{router_name(origin.mixer)}."))):
            weights[name] = weight[kept].contiguous()
    return weights


def with_channels(origin: Origin, weights: Weights, x_ND: torch.Tensor, width: int) -> Weights:
    """Every expert with the `width` channels of highest Channel Contribution (Puzzle, section 2) on its tokens."""
    subblock = made_subblock(origin.parent, origin.layer, _as_it_is(origin, weights), weights)
    experts: Any = subblock.mixer.experts
    _, gates, numbers = route(subblock.mixer, x_ND)
    of_channel: dict[str, list[torch.Tensor]] = {}
    for expert in range(len(experts.down_proj)):
        token, place = (numbers == expert).nonzero(as_tuple=True)
        # An expert without tokens here keeps the channels of largest columns.
        seen = channels_of(experts, expert, x_ND[token]).float().abs() * gates[token, place, None].float()
        down = experts.down_proj[expert].float()
        norms = down.norm(dim=1 if experts.is_transposed else 0)
        contribution = norms * (seen.mean(0) if len(seen) else 1.0)
        kept = contribution.argsort(descending=True, stable=True)[:width].sort().values
        for name, weight in experts.named_parameters():
            of_channel.setdefault(name, []).append(_cut_channels(experts, name, weight[expert], kept))
    return weights | {origin.name(f"experts.{name}"): torch.stack(parts) for name, parts in of_channel.items()}


def _cut_channels(experts: Any, name: str, weight: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """One weight of one expert with some of its channels."""
    if name == "down_proj_bias":
        return weight
    if name == "down_proj":
        return weight.index_select(0 if experts.is_transposed else 1, kept)
    dim = weight.ndim - 1 if experts.is_transposed or weight.ndim == 1 else 0
    channels = weight.shape[dim] // 2
    rows = torch.cat([kept, channels + kept]) if experts.is_concatenated else torch.stack([2 * kept, 2 * kept + 1], 1)
    return weight.index_select(dim, rows.flatten())


def _as_it_is(origin: Origin, weights: Weights) -> Mixture:
    """The spec of weights whose experts are the parent's own."""
    router: Any = getattr(origin.mixer, router_name(origin.mixer))
    down = weights[origin.name("experts.down_proj")]
    width = down.shape[1 if _transposed(origin.mixer) else 2]
    return Mixture(len(down), min(router.top_k, len(down)), width, slot=origin.slot)


def solved(spec: Mixture, context: Context, weights: Weights) -> Weights:
    """Weights whose experts' last matrices are solved for the parent's output, one expert after another.

    Each is the ridge regression of what the mixture still misses on the expert's weighted channels, pulled towards the
    present matrix as strongly as one token for each channel would.
    """
    origin, tokens = context.origin, context.statistics["tokens"]
    assert tokens.cross is not None
    subblock = made_subblock(origin.parent, origin.layer, spec, weights)
    mixer: Any = subblock.mixer
    x, importance = tokens.gram, inverse_norm(tokens.cross)
    output = mixer(x.unsqueeze(0))
    missing = tokens.cross.float() - (output[0] if subblock.place.pair else output).squeeze(0).float()
    _, gates, numbers = route(mixer, x)
    taken = [(numbers == expert).nonzero(as_tuple=True) for expert in range(spec.num_experts)]
    down = weights[origin.name("experts.down_proj")].to(torch.float32, copy=True)
    for _ in range(SWEEPS):
        for expert, (token, place) in enumerate(taken):
            if not len(token):
                continue
            channels = channels_of(mixer.experts, expert, x[token]).float() * gates[token, place, None].float()
            change = _missing_matrix(channels, missing[token], importance[token], context.ridge)
            missing[token] -= channels @ change
            down[expert] += change if mixer.experts.is_transposed else change.T
    name = origin.name("experts.down_proj")
    return weights | {name: like(down, weights[name])}


def _missing_matrix(
    channels_NI: torch.Tensor, missing_ND: torch.Tensor, importance_N: torch.Tensor, ridge: float
) -> torch.Tensor:
    """[I, D]."""
    weighted = (channels_NI * importance_N[:, None]).T
    damping = ridge + channels_NI.shape[1] / len(channels_NI)
    gram = damped((weighted @ channels_NI).double(), damping)
    return torch.linalg.solve(gram, (weighted @ missing_ND).double()).float()
