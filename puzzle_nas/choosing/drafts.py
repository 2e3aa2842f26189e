"""Which child makes its parent fastest as its draft in speculative decoding. No torch.

The exact program gives the best child at several times per token; of each is predicted

- its cost ratio, from the cost table: decode steps of the draft over those of the parent, on the mix of scenarios;
- what a pass of the parent over k drafts and one token takes: a decode step, and k times what each further token of a
  prompt adds, the head's share on top, which a prompt takes once and a check for every token;
- its KL: the summed score times what measured children of the run had of theirs, rounding added;
- how many drafts greedy decoding accepts: all but s * sqrt(KL), rounding taken off: it moves the distribution at a few
  tokens, and hardly ever which one is most likely. `s` is fitted to what the run has measured.

The square root is Pinsker's: the total variation distance of two distributions is at most sqrt(KL / 2). Sampling
accepts 1 less that distance (Leviathan et al., 2023, corollary 3.6), on average therefore at least 1 - sqrt(KL / 2).
How often the most likely token differs has no such bound, and followed the same root wherever it was measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from puzzle_nas.architecture import Architecture, choice_id
from puzzle_nas.artifacts import RunFolder, read_json
from puzzle_nas.choosing.architecture_search import ArchitectureSearch, position
from puzzle_nas.choosing.costs import CostTable
from puzzle_nas.choosing.frontier import LimitRange, fastest, solve_frontier
from puzzle_nas.choosing.speculation import Verification, best_speculation, break_even_cost_ratio
from puzzle_nas.errors import InfeasibleError, RecipeError
from puzzle_nas.limits import MIX
from puzzle_nas.recipe import Recipe

MOST_KL_NATS = 1.0
"""Of what the fit is made of. Farther from the parent, nearly no draft would pay, and the root no longer holds."""
LEAST_SAVED = 1.05
"""How much faster per token than the parent the slowest draft is that is looked at."""
TOKEN_LIMIT = f"time_per_output_token_ms@{MIX}"


@dataclass(frozen=True)
class Acceptance:
    """From a summed score to the share of drafts that the parent accepts, as measured in one run."""

    disagreement: float
    """Share of tokens at which the most likely one differs, over the square root of KL in nats, rounding taken off."""
    disagreement_error: float
    """Root of the mean squared error of that share, in what it was fitted to."""
    models_compared: int
    """Single replaced sub-blocks, and whole children and baselines: what it was fitted to."""
    kl_over_sum: float
    """KL of a child, rounding taken off, over its summed score."""
    kl_error: float | None
    """Root mean square of ln(KL / what this gives); None where no whole child was measured."""
    children_measured: int
    kl_nats_of_rounding: float

    @classmethod
    def of(cls, run: RunFolder, found: ArchitectureSearch, metric: str) -> Acceptance:
        """Fitted to the scores, the measured candidates and, where there is one, the evaluation of a run.

        Args:
            found: by scores of KL.
            metric: the recipe's, under which scores are filed.
        """
        scores = [read_json(path) for path in _score_files(run, found, metric)]
        scores = [score for score in scores if "problem" not in score]
        rounding = statistics.fmean(score["kl_nats_of_rounding"] or 0.0 for score in scores) if scores else 0.0
        compared = [(score["kl_nats"]["mean"], score["top1_agreement"]["mean"]) for score in scores]
        if (run / "evaluation.json").is_file():
            evaluation = read_json(run / "evaluation.json")
            models = (*evaluation["child"].values(), *evaluation["baselines"].values())
            of_rounding = evaluation.get("kl_nats_of_rounding", 0.0)
            compared += [(model["kl_nats"] - of_rounding, model["top1_agreement"]) for model in models]
        return cls(*fit_disagreement(compared), *fit_kl(_measured_children(run, found), rounding), rounding)

    def kl_nats(self, score_sum: float) -> float:
        """Of a refitted child."""
        return self.kl_over_sum * max(0.0, score_sum) + self.kl_nats_of_rounding

    def greedy(self, score_sum: float) -> tuple[float, float]:
        """Share of drafts that greedy decoding accepts, and its standard error."""
        lost = self.disagreement * math.sqrt(self.kl_nats(score_sum) - self.kl_nats_of_rounding)
        # To first order a root is off by half of what is under it.
        error = math.hypot(self.disagreement_error, lost * (self.kl_error or 0.0) / 2)
        return max(0.0, 1 - lost), error

    def sampled_at_least(self, score_sum: float) -> float:
        """Share of drafts that sampling at temperature 1 accepts, at least, if KL is what it is predicted to be."""
        return max(0.0, 1 - math.sqrt(self.kl_nats(score_sum) / 2))


def fit_disagreement(compared: Sequence[tuple[float, float]]) -> tuple[float, float, int]:
    """`Acceptance`'s first three: the least squares of 1 - agreement on the root of KL.

    Args:
        compared: KL in nats, rounding taken off, and top-1 agreement of models.

    Raises:
        RecipeError: there are none of at most MOST_KL_NATS.
    """
    points = [(math.sqrt(kl), 1 - agreement) for kl, agreement in compared if 0 < kl <= MOST_KL_NATS]
    if not points:
        raise RecipeError(
            f"No variant of this run has a KL of at most {MOST_KL_NATS:g} nats: nothing says what a draft of it would "
            "be accepted for. Offer variants nearer to the parent's own."
        )
    slope = sum(root * lost for root, lost in points) / sum(root**2 for root, _ in points)
    error = math.sqrt(statistics.fmean((lost - slope * root) ** 2 for root, lost in points))
    return slope, error, len(points)


def fit_kl(measured: Sequence[tuple[float, float]], rounding: float) -> tuple[float, float | None, int]:
    """`Acceptance`'s KL of a child from its summed score: the median ratio. Without children, the sum itself.

    Args:
        measured: summed score and KL of children in nats.
        rounding: KL that rounding alone makes.
    """
    points = [(score, kl) for score, kl in measured if score > 0 and kl > 0]
    if not points:
        return 1.0, None, 0
    ratio = statistics.median(max(0.0, kl - rounding) / score for score, kl in points)
    logs = [math.log(kl / (ratio * score + rounding)) for score, kl in points if ratio * score + rounding > 0]
    return ratio, math.sqrt(statistics.fmean(log**2 for log in logs)) if logs else None, len(points)


def _score_files(run: RunFolder, found: ArchitectureSearch, metric: str):
    """Those of variants in the parent's precision, and of the parent's own sub-blocks in formats."""
    for layer, specs in found.scores:
        stored = len([spec for spec in specs if spec.format])
        own = all(spec.plain == found.space.own(layer, spec.slot) for spec in specs)
        path = run.score(layer, choice_id(specs), "main", metric)
        if not found.space.is_parents((layer, specs)) and (not stored or own) and path.is_file():
            yield path


def _measured_children(run: RunFolder, found: ArchitectureSearch) -> list[tuple[float, float]]:
    """Summed score and KL, refitted where that was tried and helped, of the candidates that this search can sum."""
    places = {position(*choice) for choice in found.scores}
    children = []
    for path in sorted(run.candidate("").parent.glob("*.json")):
        candidate = read_json(path)
        if candidate["measured"] != "KL" or candidate["library"] != found.library:
            continue
        architecture = Architecture.from_list(candidate["architecture"])
        held = {position(*choice) for choice in found.scores if found.holds(architecture, *choice)}
        kl = [value for value in candidate["selection_kl_nats"].values() if value is not None]
        if held == places and kl:
            children.append((found.score_of(architecture), min(kl)))
    return children


@dataclass(frozen=True)
class DraftCosts:
    """What drafts cost next to the parent, on the mix of scenarios."""

    costs: CostTable
    parent: Architecture

    def decode_ms(self, architecture: Architecture) -> float:
        """Of all decode steps, prompts left out."""
        return self.costs.total("runtime_ms", architecture) - self.prefill_ms(architecture)

    def cost_ratio(self, draft: Architecture) -> float:
        """Time of a draft's decode step over that of the parent's."""
        return self.decode_ms(draft) / self.decode_ms(self.parent)

    @property
    def per_draft(self) -> float:
        """What each further token adds to a pass of the parent, over its decode step.

        From one prompt token to all is taken as a straight line. Where few tokens wait for the weights and many for the
        arithmetic, the truth is below it.

        Raises:
            RecipeError: the scenarios do not say.
        """
        if not self.decode_ms(self.parent) or any(s.prefill_tokens < 2 for s in self.costs.scenarios):
            raise RecipeError(
                "A draft needs scenarios with prompts and answers of two tokens or more: their times say what a pass "
                "over several tokens takes."
            )
        added = 0.0
        for s in self.costs.scenarios:
            prefill, step = (
                self.costs.total(f"{name}.{s.name}", self.parent) for name in ("prefill_ms", "decode_step_ms")
            )
            added += s.weight * s.decode_steps * (prefill - step) / (s.prefill_tokens - 1)
        head = self.costs.columns_of(len(self.parent.layers), self.parent.head)["parameters"]
        with_head = 1 + head / (self.costs.parameters(self.parent) - head)
        return max(0.0, added * with_head / self.decode_ms(self.parent))

    def prefill_ms(self, architecture: Architecture) -> float:
        """Of all prompts."""
        return self.costs.total("prefill_ms", architecture)

    def request_speedup(self, draft: Architecture, speedup: float) -> float:
        """Of whole requests, whose prompts both models read, if tokens come so many times as fast."""
        prompts = self.prefill_ms(self.parent) + self.prefill_ms(draft)
        return self.costs.mix_ms(self.parent) / (prompts + self.decode_ms(self.parent) / speedup)

    def answers_from(self, draft: Architecture, speedup: float) -> float | None:
        """From which length of answers, over that of the scenarios, whole requests are faster; None: from none."""
        if speedup <= 1:
            return None
        return self.prefill_ms(draft) / (self.decode_ms(self.parent) * (1 - 1 / speedup))


def linear_verification(per_draft: float) -> Verification:
    """Each draft adds as much to a pass."""
    return lambda drafts: 1 + per_draft * drafts


def search_drafts(recipe: Recipe, run: RunFolder, limits: dict[str, float]) -> dict[str, Any]:
    """The best child at each time per token, as a draft, slowest first; as JSON.

    `best` is the row whose requests are fastest and `pays` whether they are faster than the parent's; where they are
    not, `best` is what would pay from the shortest answers, or else the row whose tokens are fastest.

    Args:
        limits: what holds for the draft. The recipe's are of the child that stands in the parent's place.

    Raises:
        RecipeError: scores are of a task; the scenarios or scores do not suffice.
        InfeasibleError: no child of the search space is faster per token than the parent, within the limits.
    """
    if recipe.scoring.by_task:
        raise RecipeError("Scores of a task say nothing about drafts; set scoring.metric=kl and score blocks again.")
    found = ArchitectureSearch.load_with(CostTable.load(run, recipe), recipe, run, by="kl")
    of_drafts = DraftCosts(found.costs, found.parent)
    verification = linear_verification(of_drafts.per_draft)
    acceptance = Acceptance.of(run, found, recipe.scoring.metric)
    prompt = of_drafts.prefill_ms(found.parent) / of_drafts.decode_ms(found.parent)
    slowest = found.costs.total("decode_step_ms", found.parent) / LEAST_SAVED
    shortest = found.costs.total("decode_step_ms", fastest(found, limits, "decode_step_ms"))
    if shortest >= slowest:
        raise InfeasibleError(
            "No child of this search space is much faster per token than its parent; offer cheaper variants."
        )
    search = recipe.search.model_copy(update={"limits": limits})
    # The shortest time is that of a choice: a hair above it, or rounding would rule that choice out.
    times = LimitRange.between(TOKEN_LIMIT, slowest, shortest * (1 + 1e-9))
    walked = solve_frontier(recipe.model_copy(update={"search": search}), found, times, with_baselines=False)
    rows: list[dict[str, Any]] = []
    for row in walked["rows"]:
        if "infeasible" in row or any(row["architecture"] == earlier["architecture"] for earlier in rows):
            continue
        draft = Architecture.from_list(row["architecture"])
        cost_ratio = of_drafts.cost_ratio(draft)
        accepted, error = acceptance.greedy(row["score_sum"])
        speculation = best_speculation(accepted, cost_ratio, verification)
        rows.append(
            {
                TOKEN_LIMIT: row["limit"],
                "cost_ratio": cost_ratio,
                "score_sum": row["score_sum"],
                "kl_nats_predicted": acceptance.kl_nats(row["score_sum"]),
                "acceptance_predicted": accepted,
                "acceptance_error": error,
                "acceptance_sampled_at_least": acceptance.sampled_at_least(row["score_sum"]),
                "drafts": speculation.drafts,
                "speedup_predicted": speculation.speedup,
                "request_speedup_predicted": of_drafts.request_speedup(draft, speculation.speedup),
                "answers_from": of_drafts.answers_from(draft, speculation.speedup),
                "break_even_cost_ratio": break_even_cost_ratio(accepted, verification, prompt),
                "memory_bytes": row["memory_bytes"],
                "architecture": row["architecture"],
            }
        )
    best = max(rows, key=lambda row: row["request_speedup_predicted"])
    pays = best["request_speedup_predicted"] > 1
    if not pays:
        best = max(rows, key=lambda row: (-(row["answers_from"] or math.inf), row["speedup_predicted"]))
    return {
        "limits": limits,
        "pass_cost_per_draft": of_drafts.per_draft,
        "acceptance": asdict(acceptance),
        "rows": rows,
        "best": best,
        "pays": pays,
    }
