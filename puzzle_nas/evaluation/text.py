"""KL, perplexity and agreement by domain of text, with standard errors and paired differences.

Shapes: S sequences, T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from puzzle_nas.data.packing import Encoder, in_blocks
from puzzle_nas.data.sources import documents
from puzzle_nas.errors import DataError
from puzzle_nas.estimates import estimate, exponential
from puzzle_nas.evaluation.models import Evaluated
from puzzle_nas.recipe import SourceSettings
from puzzle_nas.scoring.comparison import BATCH_TOKENS, ParentReference
from puzzle_nas.training.losses import Divergence

LARGEST_PART = 8
"""No document gives more than this part of a domain's tokens, where others are to be had."""


def named_files(texts: Iterable[str]) -> dict[str, list[str]]:
    """Files by domain, from FILE or FILE=DOMAIN; without a domain, the file's name up to its first dot is one."""
    found: dict[str, list[str]] = {}
    for text in texts:
        name, sign, domain = text.rpartition("=")
        if not sign or Path(text).exists():
            name, domain = text, Path(text).name.split(".")[0]
        found.setdefault(domain, []).append(name)
    return found


def domain_tokens(
    files: Iterable[str], tokenizer: Any, length: int, num_tokens: int, seed: int, largest: int | None = None
) -> torch.Tensor:
    """Sequences [S, T] from the documents of some files, in an order that `seed` decides, as the parent's own data.

    Args:
        largest: tokens that one document may give as long as there are others; None means an eighth of all.

    Raises:
        DataError: a file is missing or damaged, or all hold less than one sequence.
    """
    files, encoder = list(files), Encoder(tokenizer)
    sequences = max(1, num_tokens // length)
    streams = [documents(SourceSettings(source=file), seed) for file in files]
    pieces: list[list[int]] = []
    rests: list[list[int]] = []
    missing = sequences * length
    largest = largest or max(length, missing // LARGEST_PART)
    for document in filter(None, itertools.chain.from_iterable(itertools.zip_longest(*streams))):
        (ids,) = encoder([document])
        pieces.append(ids[:largest])
        rests.append(ids[largest:])
        missing -= len(pieces[-1])
        if missing <= 0:
            break
    flat = list(itertools.chain(*pieces, *rests))[: sequences * length]
    if len(flat) < length:
        raise DataError(f"{', '.join(files)} hold {len(flat)} tokens, less than one sequence of {length}; name more.")
    return torch.from_numpy(in_blocks(np.asarray(flat[: len(flat) // length * length]), length, encoder.beginning))


def compare_texts(
    child: Evaluated,
    parent: Evaluated | None,
    domains: Mapping[str, torch.Tensor],
    on_batch: Callable[[], None] = lambda: None,
    from_position: int = 0,
) -> dict[str, Any]:
    """Figures of every domain and of all together, as JSON; see `figures`.

    Args:
        domains: tokens [S, T] by domain.
        from_position: positions before it give context and are not counted.
    """
    by_domain = {name: _by_sequence(child, parent, tokens, on_batch, from_position) for name, tokens in domains.items()}
    together = {name: np.concatenate([d[name] for d in by_domain.values()]) for name in next(iter(by_domain.values()))}
    return {"domains": {name: figures(values) for name, values in by_domain.items()}, "all": figures(together)}


def num_batches(tokens_ST: torch.Tensor) -> int:
    """How often `compare_texts` calls `on_batch` for a domain."""
    return -(-len(tokens_ST) // _step(tokens_ST))


def _step(tokens_ST: torch.Tensor) -> int:
    return max(1, BATCH_TOKENS // tokens_ST.shape[1])


def _by_sequence(child, parent, tokens_ST, on_batch, from_position) -> dict[str, np.ndarray]:
    """Means over the counted tokens of each sequence, [S] each. One batch of hidden states exists at a time."""
    parts: list[dict[str, torch.Tensor]] = []
    for batch in tokens_ST.split(_step(tokens_ST)):
        reference = ParentReference(parent or child, batch)
        own = reference.divergence()
        values = {"model_loss": _loss(own, from_position)}
        if parent is not None:
            found = reference.divergence(child)
            values = {
                "model_loss": _loss(found, from_position),
                "parent_loss": _loss(own, from_position),
                "kl": found.kl_nats[:, from_position:].double().mean(1),
                "agreement": found.top1_agrees[:, from_position:].double().mean(1),
            }
        parts.append(values)
        on_batch()
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}


def _loss(divergence: Divergence, from_position: int) -> torch.Tensor:
    # The last position of a sequence has no label.
    return divergence.lm_loss_nats[:, from_position:-1].double().mean(1)


def figures(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """JSON of one domain from its sequences' means: estimates, with standard errors over sequences.

    `lm_loss_increase_nats` is the paired difference, sequence by sequence, of the model from its parent, and
    `perplexity_ratio` its exp. Without a parent, those, KL and agreement are left out.
    """
    loss = estimate(values["model_loss"])
    result: dict[str, Any] = {"sequences": len(values["model_loss"]), "lm_loss_nats": loss}
    result["perplexity"] = exponential(loss)
    if "kl" in values:
        increase = estimate(values["model_loss"] - values["parent_loss"])
        result |= {
            "parent_perplexity": exponential(estimate(values["parent_loss"])),
            "lm_loss_increase_nats": increase,
            "perplexity_ratio": exponential(increase),
            "kl_nats": estimate(values["kl"]),
            "top1_agreement": estimate(values["agreement"]),
        }
    return result
