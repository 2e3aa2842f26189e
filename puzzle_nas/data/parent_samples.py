"""Text that the parent writes itself: plain documents, and conversations through its chat template.

Every row of a batch is written token by token to its full length, so nothing is padded and no step is wasted:
where a document or a turn ends, the next one begins. Documents are tokens, not text: the control tokens of a
conversation stay what they are.
"""

# B rows, C choices of special tokens that may come, K kept tokens, S special tokens, V vocabulary

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from transformers.modeling_utils import PreTrainedModel

from puzzle_nas.data.decoding import decoding
from puzzle_nas.errors import ChatTemplateError, DataError
from puzzle_nas.modeling import CACHE
from puzzle_nas.parents.chat import MARKS, ChatTemplate, marked_conversation, on_a_fixed_day
from puzzle_nas.parents.tokenizer import bos_of, separator_of
from puzzle_nas.progress import console

TOP_P = 0.95
TOP_K = 256
"""The nucleus is looked for among this many tokens."""
SPARE_ROWS = 1.03
"""More rows than tokens ask for, in place of those that start tokens and dropped documents cost."""
SHORTEST_DOCUMENT = 8
"""Tokens; anything shorter is no document."""


@dataclass(frozen=True)
class Turn:
    """Who writes until when: the parent samples until a token of `ends`; then the tokens `forced` follow."""

    ends: frozenset[int]
    forced: tuple[int, ...] = ()


@dataclass(frozen=True)
class Script:
    """What a row starts with, and the turns that follow one another, from the first again after the last."""

    start: tuple[int, ...]
    turns: tuple[Turn, ...]
    documents: Literal["turns", "rounds", "row"]
    """What a document is: each turn without control tokens (plain text), each round of all turns, or the whole row."""


def special_ids(tokenizer: Any) -> set[int]:
    """Control tokens, which are not text."""
    added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    return added | set(tokenizer.all_special_ids)


def conversation_script(tokenizer: Any) -> Script | None:
    """User and assistant alternating, as the chat template writes them.

    None where there is no chat template, or one whose turns do not end with a control token.

    Raises:
        ChatTemplateError: the template fails.
    """
    template = ChatTemplate.of(tokenizer)
    if template is None:
        return None
    rest = template.render(marked_conversation(), add_generation_prompt=True, strftime_now=on_a_fixed_day)
    parts = []
    for mark in MARKS:
        before, found, rest = rest.partition(mark)
        if not found:
            return None
        parts.append(before)
    start, after_answer, after_question = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (parts[0], parts[2], rest)
    )
    special = special_ids(tokenizer)
    turns = []
    for tokens in (after_question, after_answer):
        end = next((place for place, token in enumerate(tokens) if token in special), None)
        if end is None:
            return None
        turns.append(Turn(frozenset([tokens[end]]), tuple(tokens[end + 1 :])))
    if not start:
        return None
    if not template.drops_thoughts:
        return Script(tuple(start), tuple(turns), "row")
    # What an answer thought would stay in the row: the next question begins another conversation.
    question, answer = turns
    return Script(tuple(start), (question, Turn(answer.ends, tuple(start))), "rounds")


def plain_script(tokenizer: Any, conversation: Script | None) -> Script:
    """Documents one after another: any control token that is not for turns ends one.

    Raises:
        DataError: the tokenizer has no token that a text could start with.
    """
    turns = conversation.turns if conversation else ()
    turn_tokens = {token for turn in turns for token in (*turn.ends, *turn.forced)}
    start = bos_of(tokenizer)
    start = separator_of(tokenizer) if start is None else start
    if start is None:
        raise DataError(
            "The parent's tokenizer has neither a token that begins a text nor one that ends it, so the "
            "parent cannot write; take parent-samples out of data.sources."
        )
    ends = frozenset((special_ids(tokenizer) - turn_tokens) | {start})
    return Script((start,), (Turn(ends, (start,) if len(ends) > 1 else ()),), "turns")


def sample_documents(
    model: PreTrainedModel,
    tokenizer: Any,
    num_tokens: int,
    seed: int,
    sequence_length: int,
    batch_size: int = 64,
    on_progress: Callable[[int], object] = lambda tokens: None,
) -> list[list[int]]:
    """Documents of together at least `num_tokens` tokens, half plain, half conversations where it can.

    Args:
        model: a causal language model in eval mode, on any device.
        sequence_length: longest document, in tokens.
        batch_size: rows that are written together, or up to a half more where that saves a batch.
        on_progress: called with the tokens that were sampled since the last call.

    Returns:
        Token ids of each document, without a separator at its end. The same seed gives the same documents.

    Raises:
        DataError: the parent writes nothing that could be used.
    """
    conversation = _conversation_script_or_none(tokenizer)
    if conversation and len(conversation.start) > sequence_length // 2:
        conversation = None
    scripts = [plain_script(tokenizer, conversation), *([conversation] if conversation else [])]
    generator = torch.Generator(model.device).manual_seed(seed % 2**63)
    documents: list[list[int]] = []
    rows_begun = fruitless = 0
    while num_tokens > 0:
        wanted_rows = math.ceil(SPARE_ROWS * num_tokens / sequence_length)
        num_rows = math.ceil(wanted_rows / max(1, round(wanted_rows / batch_size)))
        rows = [_Row(scripts[(rows_begun + place) % len(scripts)]) for place in range(num_rows)]
        rows_begun += num_rows
        _write_rows(model, rows, special_ids(tokenizer), sequence_length, generator, on_progress)
        useful = [document for row in rows for document in row.documents() if not is_degenerate(document)]
        documents += useful
        num_tokens -= sum(map(len, useful))
        fruitless = 0 if useful else fruitless + 1
        if fruitless == 3:
            raise DataError("The parent writes nothing but repeated tokens; take parent-samples out of data.sources.")
    return documents


def _conversation_script_or_none(tokenizer: Any) -> Script | None:
    try:
        return conversation_script(tokenizer)
    except ChatTemplateError as error:
        console.print(
            f"  The parent's chat template fails ({error}): the parent writes no conversations.", markup=False
        )
        return None


def is_degenerate(document: list[int]) -> bool:
    """Too short to learn from, or one token for most of it."""
    return len(document) < SHORTEST_DOCUMENT or Counter(document).most_common(1)[0][1] > len(document) / 2


@torch.inference_mode()
def _write_rows(
    model: PreTrainedModel,
    rows: list[_Row],
    special: set[int],
    sequence_length: int,
    generator: torch.Generator,
    on_progress: Callable[[int], object],
) -> None:
    """Write rows, which hold one token each, to their full length."""
    special_S = sorted(token for token in special if token < model.config.vocab_size)
    columns_S = torch.tensor(special_S, dtype=torch.int64, device=model.device)
    choices = [frozenset(), *{turn.ends for row in rows for turn in row.script.turns}]
    refused_CS = torch.tensor([[token not in allowed for token in special_S] for allowed in choices])
    refused_CS = refused_CS.to(model.device)
    tokens_B1 = torch.tensor([row.tokens for row in rows], device=model.device)
    with decoding(model, sequence_length) as cache:
        for _ in range(1, sequence_length):
            logits_BV = model(input_ids=tokens_B1, use_cache=True, **{CACHE: cache}).logits[:, -1].float()
            refused_BS = refused_CS[[choices.index(row.allowed) for row in rows]]
            logits_BV[:, columns_S] = logits_BV[:, columns_S].masked_fill(refused_BS, -torch.inf)
            chosen = _sample_nucleus(logits_BV, generator).tolist()
            taken = [[row.add(token)] for row, token in zip(rows, chosen, strict=True)]
            tokens_B1 = torch.tensor(taken, device=model.device)
            on_progress(len(rows))


def _sample_nucleus(logits_BV: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token of each row [B], from the smallest set of most likely tokens that holds TOP_P probability."""
    top_BK, ids_BK = logits_BV.topk(min(TOP_K, logits_BV.shape[-1]), dim=-1)
    probability_BK = (top_BK - logits_BV.logsumexp(-1, keepdim=True)).exp()
    before_BK = probability_BK.cumsum(-1) - probability_BK
    probability_BK = probability_BK.masked_fill(before_BK >= TOP_P, 0.0)
    return ids_BK.gather(-1, torch.multinomial(probability_BK, 1, generator=generator)).squeeze(-1)


class _Row:
    """One row while it is written."""

    def __init__(self, script: Script):
        self.script = script
        self.tokens = [script.start[0]]
        self.waiting = list(script.start[1:])
        self.turn = 0
        self.begins: list[int] = []
        """Place of the first token of each turn."""
        self.ends: list[int] = []
        """Place of the token that ended each turn."""
        self.rounds: list[int] = [0]
        """Place of the first token of each round of all turns."""

    @property
    def allowed(self) -> frozenset[int]:
        """Special tokens that may be sampled now: no turn is empty."""
        in_turn = len(self.begins) > len(self.ends)
        return self.script.turns[self.turn].ends if in_turn else frozenset()

    def add(self, token: int) -> int:
        """Take a sampled token, or the forced one that stands here instead; returns what was taken."""
        if self.waiting:
            token = self.waiting.pop(0)
        elif token in self.allowed:
            self.ends.append(len(self.tokens))
            self.waiting = list(self.script.turns[self.turn].forced)
            self.turn = (self.turn + 1) % len(self.script.turns)
            if self.turn == 0:
                self.rounds.append(len(self.tokens) + 1)
        elif len(self.begins) == len(self.ends):
            self.begins.append(len(self.tokens))
        self.tokens.append(token)
        return token

    def documents(self) -> list[list[int]]:
        """Conversations with their control tokens; plain documents apart, without them."""
        if self.script.documents == "row":
            return [self.tokens]
        if self.script.documents == "rounds":
            return [self.tokens[begin:end] for begin, end in pairwise([*self.rounds, len(self.tokens)])]
        ends = [*self.ends, len(self.tokens)]
        return [self.tokens[begin:end] for begin, end in zip(self.begins, ends, strict=False)]
