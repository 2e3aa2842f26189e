"""Whether scores of formats add up: sub-blocks of SmolLM2-135M-Instruct in 8 and 4 bits, alone and mixed.

KL is measured on one text, as a library's scores are: each sub-block alone in a format; embeddings and head alone; real
mixtures, against the sum of their parts; and narrower FFNs in a format, against the score of the narrower FFN plus the
score of the parent's FFN in the format. Rounding is the best of the benchmark `rounding`, with the parent's Gram
matrices.
"""

from __future__ import annotations

import random
import statistics

import torch

from benchmarks.common import report, spearman
from benchmarks.rounding import BEST, Grams, Roundings, Subject, all_calibration, gram_matrices
from puzzle_nas.formats.registry import FORMATS
from puzzle_nas.formats.rounding import damped, round_matrix

SCORING_SEQUENCES = 1
"""Of each of the two kinds."""
SUB_BLOCKS = ("self_attn", "mlp")
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
"""Of the sub-blocks of a mixture that are in the narrower format."""
METHODS = {"q8_0": "nearest", "q4_0": BEST}
"""In 8 bits all methods are within what the text can tell apart."""
NARROWED_LAYERS = (1, 8, 15, 22)
WIDTHS = (1152, 768)
RIDGE = 1e-3

Weights = dict[str, torch.Tensor]
Scores = dict[tuple[int, str, str], float]
"""Replace-1 scores by layer, part and format."""


class Scorer:
    """KL of the parent with some of its matrices exchanged, on the scoring text, from the first exchanged layer on."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.tokens = torch.cat([subject.compared_on[kind][:SCORING_SEQUENCES] for kind in subject.calibration])
        model = subject.model.model
        self.hidden = [model.embed_tokens(self.tokens)]
        self.positions = model.rotary_emb(self.hidden[0], position_ids=torch.arange(self.tokens.shape[1]).unsqueeze(0))
        for layer in model.layers:
            self.hidden.append(layer(self.hidden[-1], position_embeddings=self.positions))
        self.parent = self._log_probabilities(self.hidden[-1])

    def _log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        model = self.subject.model
        return model.lm_head(model.model.norm(hidden)).flatten(0, 1).log_softmax(-1)

    def kl(self, weights: Weights, first_layer: int | None = None) -> float:
        """Nats per token with these matrices exchanged, by their names below `layers`."""
        matrices = self.subject.matrices
        with self.subject.changed():
            for name, weight in weights.items():
                matrices[name].weight.data = weight
            if first_layer is None:
                first_layer = min(int(name.split(".")[0]) for name in weights)
            hidden = self.hidden[first_layer]
            for layer in self.subject.layers[first_layer:]:
                hidden = layer(hidden, position_embeddings=self.positions)
            q = self._log_probabilities(hidden)
        return ((self.parent.exp() * (self.parent - q)).sum() / self.tokens.numel()).item()


def sub_block(roundings: Roundings, layer: int, part: str) -> Weights:
    """All matrices of a sub-block in a format, as engines read them."""
    names = [name for name in roundings.weights if name.startswith(f"{layer}.{part}.")]
    return {name: roundings.of(name, METHODS[roundings.form.name]).dequantised() for name in names}


def scores_of_formats(scorer: Scorer, roundings: dict[str, Roundings]) -> Scores:
    """Each sub-block alone in each format."""
    scores = {}
    for form in METHODS:
        for layer in range(len(scorer.subject.layers)):
            for part in SUB_BLOCKS:
                scores[layer, part, form] = scorer.kl(sub_block(roundings[form], layer, part))
        print(form, {part: [round(scores[i, part, form], 4) for i in range(30)] for part in SUB_BLOCKS}, flush=True)
    return scores


def mixtures(scores: Scores) -> list[dict[tuple[int, str], str]]:
    """A format for each sub-block: a share of them in q4_0, the least sensitive first, or drawn at random."""
    order = sorted({key[:2] for key in scores}, key=lambda key: scores[*key, "q4_0"])
    generator = random.Random(0)
    found = []
    for share in SHARES:
        count = round(share * len(order))
        for chosen in [order[:count]] + [generator.sample(order, count)] * (share < 1):
            found.append({key: "q4_0" if key in chosen else "q8_0" for key in order})
    return found


def spread(name: str, values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {f"{name}_median": statistics.median(values), f"{name}_least": min(values), f"{name}_most": max(values)}


def mixture_figures(scorer: Scorer, roundings: dict[str, Roundings], scores: Scores) -> dict[str, float]:
    """Sums of scores against real mixtures."""
    sums, reals = [], []
    for mixture in mixtures(scores):
        weights: Weights = {}
        for (layer, part), form in mixture.items():
            weights |= sub_block(roundings[form], layer, part)
        sums.append(sum(scores[*key, form] for key, form in mixture.items()))
        reals.append(scorer.kl(weights))
        in_4_bits = sum(form == "q4_0" for form in mixture.values())
        print(f"{in_4_bits:3d} of {len(mixture)} in q4_0: sum {sums[-1]:.4f}, real {reals[-1]:.4f}", flush=True)
    figures = {"mixtures": len(sums), "spearman_sum_vs_real": spearman(sums, reals)}
    figures |= spread("real_over_sum", [real / total for total, real in zip(sums, reals, strict=True)])
    return figures | {"kl_all_in_q4_0": reals[-1], "sum_all_in_q4_0": sums[-1]}


def narrowed(subject: Subject, grams: Grams, layer: int, width: int) -> tuple[Weights, Grams]:
    """An FFN of fewer channels, the largest contributions kept, down projection by least squares; and its Grams."""
    gate, up, down = (f"{layer}.mlp.{name}_proj" for name in ("gate", "up", "down"))
    weights, gram = subject.parent_weights, grams[down]
    size = gram.diagonal() * weights[down].double().square().sum(0)
    kept = size.argsort(descending=True)[:width].sort().values
    solved = torch.linalg.solve(damped(gram[kept][:, kept], RIDGE), gram[kept] @ weights[down].double().T).T
    narrow = {gate: weights[gate][kept], up: weights[up][kept], down: solved.float()}
    return narrow, {gate: grams[gate], up: grams[gate], down: gram[kept][:, kept]}


def pair_figures(scorer: Scorer, scores: Scores, grams: Grams) -> dict[str, float]:
    """Narrower FFNs in 4 bits against the sum of the two scores, that of the format as it is or by the FFN's width."""
    figures: dict[str, float] = {}
    predicted: dict[str, list[float]] = {"sum": [], "sum_by_width": []}
    reals, increments = [], []
    for width in WIDTHS:
        for layer in NARROWED_LAYERS:
            narrow, its_grams = narrowed(scorer.subject, grams, layer, width)
            made = {name: round_matrix(FORMATS["q4_0"], w, its_grams[name]).dequantised() for name, w in narrow.items()}
            alone, real, of_format = scorer.kl(narrow), scorer.kl(made), scores[layer, "mlp", "q4_0"]
            print(f"{layer} w{width}@q4_0: {alone:.4f} + {of_format:.4f}, real {real:.4f}", flush=True)
            figures |= {f"kl_layer{layer}_w{width}": alone, f"kl_layer{layer}_w{width}_q4_0": real}
            predicted["sum"].append(alone + of_format)
            predicted["sum_by_width"].append(alone + of_format * width / scorer.subject.model.config.intermediate_size)
            reals.append(real)
            increments.append((real - alone) / of_format)
    figures |= spread("format_adds_over_its_score", increments)
    for way, values in predicted.items():
        errors = [abs(value - real) / real for value, real in zip(values, reals, strict=True)]
        figures[f"pairs_{way}_relative_error_median"] = statistics.median(errors)
        figures[f"pairs_{way}_relative_error_most"] = max(errors)
        figures[f"pairs_{way}_spearman"] = spearman(values, reals)
    return figures


def table_figures(scorer: Scorer, grams: Grams) -> dict[str, float]:
    """The tied table in a format, as embeddings and head, and as head alone. The parent's own is in q8_0."""
    model = scorer.subject.model
    table, of_tokens = model.lm_head.weight, scorer.hidden[0]
    parent = table.data
    ways = {
        "q8_0": FORMATS["q8_0"].nearest,
        "q4_0": lambda rows: round_matrix(FORMATS["q4_0"], rows, grams["head"]),
    }
    figures = {}
    for name, way in ways.items():
        table.data = torch.cat([way(rows).dequantised() for rows in parent.split(8192)])
        figures[f"kl_head_alone_{name}"] = scorer.kl({}, first_layer=len(scorer.subject.layers))
        scorer.hidden[0] = model.model.embed_tokens(scorer.tokens)
        figures[f"kl_table_{name}"] = scorer.kl({}, first_layer=0)
        scorer.hidden[0], table.data = of_tokens, parent
    return figures


@torch.no_grad()
def main() -> None:
    """Print each score, keep the figures."""
    torch.set_num_threads(1)
    subject = Subject()
    grams = gram_matrices(subject, all_calibration(subject))
    roundings = {form: Roundings(subject, form, grams) for form in METHODS}
    scorer = Scorer(subject)
    scores = scores_of_formats(scorer, roundings)
    figures = {f"score_{part}_{layer}_{form}": score for (layer, part, form), score in scores.items()}
    figures |= mixture_figures(scorer, roundings, scores)
    report("compose", figures | pair_figures(scorer, scores, grams) | table_figures(scorer, grams))
