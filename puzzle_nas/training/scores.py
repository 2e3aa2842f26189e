"""Replace-1-block scores as they are stored.

Shapes: S sequences.
"""

from __future__ import annotations

import math

import torch

from puzzle_nas.training.losses import Divergence


def summarise(values_S: torch.Tensor) -> dict[str, float | None]:
    """Mean and standard error over sequences; None for what is not finite."""
    count = len(values_S)
    error = (values_S.std() / count**0.5).item() if count > 1 else 0.0
    return {"mean": _finite(values_S.mean().item()), "standard_error": _finite(error)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def score_of(divergence: Divergence, parent: Divergence) -> dict:
    """The JSON of one variant. All figures are means over the tokens of a sequence, then over sequences."""
    kl = divergence.kl_nats.double().mean(1)
    # The last position of a sequence has no label.
    lm_loss = divergence.lm_loss_nats[:, :-1].double().mean(1)
    increase = lm_loss - parent.lm_loss_nats[:, :-1].double().mean(1)
    return {
        "kl_nats": summarise(kl),
        "lm_loss_increase_nats": summarise(increase),
        "top1_agreement": summarise(divergence.top1_agrees.double().mean(1)),
        "kl_nats_by_sequence": [_finite(round(v, 8)) for v in kl.tolist()],
        "lm_loss_increase_nats_by_sequence": [_finite(round(v, 8)) for v in increase.tolist()],
    }


def problem_of(score: dict, adds_nothing: bool = False) -> dict[str, str]:
    """Why something must not be chosen, as `problem`; empty for what may."""
    if score["kl_nats"]["mean"] is None or score["lm_loss_increase_nats"]["mean"] is None:
        return {"problem": "its score is not a finite number"}
    return {"problem": "it has weights and adds nothing"} if adds_nothing else {}
