"""Does an engine compute, from an export, what the child computes in torch?"""

# V vocabulary, T tokens of one prompt

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from puzzle_nas.engines.base import VERIFICATION_CHUNK_TOKENS, ServingEngine, Tolerance
from puzzle_nas.errors import ExportError
from puzzle_nas.exporters import Child, Exporter
from puzzle_nas.exporters.base import DTYPES
from puzzle_nas.progress import console
from puzzle_nas.specs import GroupedAttention, WindowAttention

PROMPT_LENGTHS = (
    2,
    VERIFICATION_CHUNK_TOKENS - 1,
    VERIFICATION_CHUNK_TOKENS,
    VERIFICATION_CHUNK_TOKENS + 1,
    100,
    2 * VERIFICATION_CHUNK_TOKENS + 1,
    200,
)
"""Tokens of the prompts; those that a short context cannot hold are cut to what it can."""
LEAST_TOKENS = 512
AWKWARD_TEXT = "Zwölf 12345 naïve's  \n\n\tdef f(x): return x**2  # 日本語 🙂\r\n  end"
"""What tokenizers split differently: digits, accents, apostrophes, white space, scripts."""
CONTINUED_TOKENS = 16
"""Tokens by which every prompt is continued greedily."""


@dataclass(frozen=True)
class Difference:
    """How far an engine is from torch on a set of prompts."""

    num_tokens: int
    mean_nats: float
    """Mean distance of the log-probabilities of the prompts' tokens."""
    max_nats: float
    continued_tokens: int
    continuation_nats: float
    """By how much, at worst, torch finds another token likelier than the one the engine continued with."""
    continued_likewise: int
    """Continued tokens that are torch's first choice too."""

    def within(self, tolerance: Tolerance) -> bool:
        """Whether the engine computes the child. Its choice may differ from torch's where two tokens are as likely."""
        return (
            self.mean_nats <= tolerance.mean_nats
            and self.max_nats <= tolerance.max_nats
            and self.continuation_nats <= 2 * tolerance.max_nats
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def cut_prompts(tokens: Sequence[int], max_position_embeddings: int) -> list[list[int]]:
    """Prompts of `PROMPT_LENGTHS` from running text, again from the first length until `LEAST_TOKENS` are reached.

    Raises:
        ExportError: the text is too short.
    """
    longest = max_position_embeddings - CONTINUED_TOKENS
    prompts: list[list[int]] = []
    used = 0
    while used < LEAST_TOKENS or len(prompts) < len(PROMPT_LENGTHS):
        length = min(PROMPT_LENGTHS[len(prompts) % len(PROMPT_LENGTHS)], longest)
        if used + length > len(tokens):
            raise ExportError(f"Verification needs more text than the {len(tokens)} tokens given.")
        prompts.append(list(tokens[used : used + length]))
        used += length
    return prompts


@torch.inference_mode()
def difference(engine: ServingEngine, loaded, child: Child, prompts: Sequence[Sequence[int]]) -> Difference:
    """Compare a loaded export with the child in torch, prompt by prompt and without padding or cache."""
    theirs = engine.log_probabilities(loaded, prompts)
    continuations = engine.continue_greedily(loaded, prompts, CONTINUED_TOKENS)
    distances, regrets = [], []
    for prompt, given, continuation in zip(prompts, theirs, continuations, strict=True):
        tokens_T = torch.tensor([*prompt, *continuation], device=child.model.device)
        ours_TV = child.model(tokens_T[None, :-1]).logits[0].float().log_softmax(-1)
        chosen_T = ours_TV.gather(-1, tokens_T[1:, None])[:, 0]
        distances.append((torch.tensor(given) - chosen_T[: len(prompt) - 1].cpu()).abs())
        regrets.append((ours_TV.max(-1).values - chosen_T)[len(prompt) - 1 :].cpu())
    # A NaN must not pass as small.
    distance, regret = (torch.cat(parts).nan_to_num(nan=float("inf")) for parts in (distances, regrets))
    return Difference(
        num_tokens=sum(map(len, prompts)),
        mean_nats=distance.mean().item(),
        max_nats=distance.max().item(),
        continued_tokens=len(regret),
        continuation_nats=regret.max().item(),
        continued_likewise=int((regret == 0).sum()),
    )


def verify(
    exporter: Exporter,
    engine: ServingEngine,
    child: Child,
    exported: Path,
    dtype: str,
    prompts: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """Check an export against the child with its weights rounded to `dtype`; what was measured, as JSON.

    Raises:
        ExportError: it differs; names the first layer that does where that can be found.
        EngineError: the engine is not installed or fails.
    """
    tolerance = engine.tolerance(child, dtype)
    rounded = child.rounded(DTYPES[dtype], as_served=True)
    with engine.load(exported, dtype, exact=True) as loaded:
        found = difference(engine, loaded, rounded, prompts)
        if engine.reads_tokenizer:
            _compare_tokenizers(engine, loaded, child, prompts)
        version = engine.version(loaded)
    if not found.within(tolerance):
        raise ExportError(
            _complaint(exporter, engine, found, tolerance, _place(exporter, engine, child, dtype, tolerance, prompts))
        )
    if windows := _not_reached(child, prompts):
        console.print(f"  No prompt is longer than windows of {', '.join(map(str, windows))} tokens: not verified.")
    facts = {"engine": engine.name, "version": version, "windows_not_reached": windows}
    return {**facts, "tolerance": asdict(tolerance), **found.to_dict()}


def _not_reached(child: Child, prompts: Sequence[Sequence[int]]) -> list[int]:
    """Windows, in tokens, that no prompt is longer than: with them a layer sees what it would see without."""
    windows = {spec.window for _, _, spec in child.architecture if isinstance(spec, GroupedAttention | WindowAttention)}
    return sorted(window for window in windows if window is not None and window >= max(map(len, prompts)))


def _compare_tokenizers(engine: ServingEngine, loaded, child: Child, prompts: Sequence[Sequence[int]]) -> None:
    # SentencePiece puts a space before text; before one that is there already, its implementations differ.
    for text in [AWKWARD_TEXT, *(child.tokenizer.decode(prompt).lstrip(" ") for prompt in prompts)]:
        theirs, ours = engine.tokenize(loaded, text), child.tokenizer(text).input_ids
        if theirs != ours:
            at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), len(ours))
            raise ExportError(
                f"{engine.name} reads text otherwise than the child's tokenizer, after "
                f"{child.tokenizer.decode(ours[:at])[-40:]!r}. Nothing was left behind."
            )


def verify_quantised(
    exporter: Exporter,
    engine: ServingEngine,
    child: Child,
    exported: Path,
    kind: str,
    prompts: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """Check that a quantised export still resembles the child. What it was quantised from has been verified.

    Raises:
        ExportError: it differs by more than this type should.
        EngineError: the engine is not installed or fails.
    """
    tolerance = engine.tolerances[kind]
    with engine.load(exported, kind, exact=True) as loaded:
        found = difference(engine, loaded, child, prompts)
    return _within(tolerance, exporter, engine, found, "")


def verify_served(
    exporter: Exporter,
    engine: ServingEngine,
    child: Child,
    exported: Path,
    dtype: str,
    prompts: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """Check that a child in formats, verified in float32, is computed by the products that serve it too.

    Raises:
        ExportError: it differs by more than `dtype` should.
        EngineError: the engine is not installed or fails.
    """
    assert engine.served_in_16_bits is not None
    tolerance = engine.tolerances[engine.served_in_16_bits]
    with engine.load(exported, dtype) as loaded:
        found = difference(engine, loaded, child.rounded(DTYPES[dtype], as_served=True), prompts)
    return _within(tolerance, exporter, engine, found, f" as it is served in {dtype}")


def _within(tolerance: Tolerance, exporter, engine, found: Difference, place: str) -> dict[str, Any]:
    """What was measured, as JSON; raises ExportError where it is more than the tolerance."""
    if not found.within(tolerance):
        raise ExportError(_complaint(exporter, engine, found, tolerance, place))
    return {"engine": engine.name, "tolerance": asdict(tolerance), **found.to_dict()}


def _complaint(exporter, engine, found: Difference, tolerance: Tolerance, place: str) -> str:
    return (
        f"{engine.name} does not compute this child from its export to {exporter.name}: log-probabilities differ by "
        f"{found.mean_nats:.2g} nats on average and {found.max_nats:.2g} at most ({tolerance.mean_nats:g} and "
        f"{tolerance.max_nats:g} are allowed){place}. Nothing was left behind."
    )


def _place(exporter, engine, child: Child, dtype: str, tolerance: Tolerance, prompts) -> str:
    """The first layer whose presence makes the export differ, by exporting ever fewer layers."""

    def differs(num_layers: int) -> bool:
        part = child.truncated(num_layers)
        with tempfile.TemporaryDirectory() as folder:
            exporter.write(part, Path(folder), dtype)
            with engine.load(Path(folder), dtype, exact=True) as loaded:
                found = difference(engine, loaded, part.rounded(DTYPES[dtype], as_served=True), prompts)
        return not found.within(tolerance)

    good, bad = 0, child.config.num_hidden_layers
    if not differs(bad):
        return "; written again it does not differ, so the file was damaged"
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if differs(middle) else (middle, bad)
    return f"; the first layer that differs is {bad - 1}" + (" (or the embeddings)" if bad == 1 else "")
