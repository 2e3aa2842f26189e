"""Documents -> fixed blocks of tokens for the five splits. No document is in two splits or comes twice.

Where the tokenizer puts a token before text, every document and every block begins with it: so the parent was trained,
and so it is prompted. Which split a document goes to and where it stands there follow from a hash of its content and
the seed, so each split is spread over all the text that was read. Only as much text is read as the splits need.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from puzzle_nas.data.conversations import Conversation
from puzzle_nas.data.parent_samples import conversation_script, special_ids
from puzzle_nas.errors import ChatTemplateError, DataError
from puzzle_nas.parents.chat import ChatTemplate, on_a_fixed_day
from puzzle_nas.parents.tokenizer import bos_of, separator_of
from puzzle_nas.progress import console
from puzzle_nas.recipe import SMALL_SPLITS, SPLITS, DataSettings

BATCH_CHARACTERS = 200_000
"""Text tokenised in one call."""
LARGEST_PARTS = (32, 8, 1)
"""No document gives more than this part of a split, tried in turn until the text suffices: the rest of a
longer document is left out, so that a split holds many documents."""
SMALLEST_REST = 0.9
"""Where text is short, leaving it out may cost `train` no more than a tenth of what it could have."""

Document = str | Conversation | Sequence[int]
"""Text, messages, or tokens where text would lose control tokens."""


@dataclass(frozen=True)
class TextSource:
    """One source of documents, already in an order that is spread over the source."""

    name: str
    weight: float
    documents: Iterable[Document]
    more: str = "name more text in data.sources"
    """What a user can do who needs more tokens of it."""


@dataclass(frozen=True)
class PackedSplit:
    """Blocks of one split."""

    tokens: np.ndarray
    """int32, [blocks, sequence_length]"""
    documents: int
    tokens_by_source: Mapping[str, int]


@dataclass(frozen=True)
class _Piece:
    """A document's tokens, or a stretch of them."""

    key: bytes
    """Hash of seed and content."""
    tokens: np.ndarray
    """int32, [tokens]; ends with what ends a document, and begins with `beginning`"""
    beginning: int | None = None
    """The token that every document begins with, if any."""

    def __len__(self) -> int:
        return len(self.tokens)

    def cut(self, length: int) -> _Piece:
        """At most `length` tokens, begun and ended as the document is; a small part is cut from anywhere."""
        if length >= len(self):
            return self
        places = len(self) - length + 1 if 2 * length <= len(self) else 1
        start = int.from_bytes(self.key[:4]) % places
        tokens = self.tokens[start : start + length].copy()
        tokens[-1] = self.tokens[-1]
        if self.beginning is not None:
            tokens[0] = self.beginning
        return _Piece(self.key, tokens, self.beginning)


class Encoder:
    """Documents as the tokens of which the parent has seen such documents.

    Raises:
        DataError: no token ends a document, or `separator` is not one token.
    """

    def __init__(self, tokenizer: Any, separator: str | None = None):
        self.tokenizer = tokenizer
        self.template: ChatTemplate | None = None
        self.no_template = "it has none"
        """Why conversations cannot be written, where they cannot."""
        script = None
        try:
            self.template = ChatTemplate.of(tokenizer)
            script = conversation_script(tokenizer)
        except ChatTemplateError as error:
            self.no_template = f"its own fails: {error}"
        self.turn_end = min(script.turns[-1].ends) if script else None
        """The token that ends an answer, and so a conversation."""
        turn_tokens = {t for turn in script.turns for t in (*turn.ends, *turn.forced)} if script else set()
        self.separator = self._separator(separator)
        """The token that ends a document of plain text."""
        self.beginning = bos_of(tokenizer)
        """The token that begins a block, and a document unless the one before it ended with the same."""
        self._special = special_ids(tokenizer)
        self._turn_marks = (turn_tokens & self._special) - {self.separator, self.beginning}
        self.without_tools = 0
        """Conversations whose tools the template does not write."""
        self.left_out: Counter[str] = Counter()
        """Conversations that the template refused, by its reason."""

    def _separator(self, asked: str | None) -> int:
        if asked is not None:
            known = self.tokenizer.get_vocab()
            if asked not in known:
                raise DataError(f"The parent's tokenizer has no token {asked!r}; correct data.separator.")
            return known[asked]
        if (found := separator_of(self.tokenizer)) is None:
            raise DataError(
                "The parent's tokenizer has no end-of-text token to put between documents; name one of its tokens "
                "in data.separator."
            )
        return found

    def __call__(self, documents: Sequence[Document]) -> list[list[int]]:
        """The tokens of each document; none for one without text, and for a conversation that the template refuses."""
        texts = [self._text(document) for document in documents if isinstance(document, str | Conversation)]
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        encoded = iter(self.tokenizer(texts, **options)["input_ids"] if texts else [])
        return [
            self._framed(next(encoded) if isinstance(document, str | Conversation) else list(document))
            for document in documents
        ]

    def _text(self, document: str | Conversation) -> str:
        """As the tokenizer reads it."""
        if isinstance(document, str):
            return document
        if self.template is None:
            raise DataError(
                f"The text holds conversations, and the parent has no chat template to write them with "
                f"({self.no_template}); put a chat_template.jinja into its checkpoint, or give plain text."
            )
        render = partial(self.template.render, document.messages, strftime_now=on_a_fixed_day)
        try:
            text = render(tools=document.tools) if document.tools else render()
            self.without_tools += bool(document.tools) and text == render()
        except ChatTemplateError as error:
            self.left_out[str(error)] += 1
            return ""
        return text

    def _framed(self, ids: list[int]) -> list[int]:
        """With what begins and ends such a document."""
        if not ids:
            return ids
        end = self.separator
        if not self._turn_marks.isdisjoint(ids):
            assert self.turn_end is not None
            end = self.turn_end
            ids = self._up_to_the_last_turn(ids, end)
        if ids[-1] != end:
            ids.append(end)
        if self.beginning not in (None, self.separator, ids[0]):
            ids.insert(0, self.beginning)
        return ids

    def _up_to_the_last_turn(self, ids: list[int], end: int) -> list[int]:
        """Without the white space that a template writes after it."""
        last = next(place for place in reversed(range(len(ids))) if ids[place] in self._special)
        closed = ids[last] == end and not self.tokenizer.decode(ids[last + 1 :]).strip()
        return ids[: last + 1] if closed else ids


def in_blocks(tokens: np.ndarray, length: int, beginning: int | None) -> np.ndarray:
    """Tokens [n * length] as blocks [n, length]; `beginning`, if any, takes the place of each block's first token.

    Where a document's own stands second, the block is taken from there, so that it does not come twice.
    """
    blocks_NT = tokens.reshape(-1, length)
    if beginning is None:
        return blocks_NT
    from_second_NT = np.append(tokens[1:], tokens[-1]).reshape(-1, length)
    begins_second_N1 = (blocks_NT[:, 1] == beginning)[:, None]
    blocks_NT = np.where(begins_second_N1, from_second_NT, blocks_NT)
    blocks_NT[:, 0] = beginning
    return blocks_NT


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to `weights` that add up to `total`."""
    edges = np.cumsum([0.0, *weights]) / sum(weights) * total
    return [int(share) for share in np.diff(np.rint(edges))]


def pack(
    sources: Sequence[TextSource],
    tokenizer: Any,
    vocab_size: int,
    settings: DataSettings,
    seed: int,
    on_progress: Callable[[int], object] = lambda tokens: None,
) -> dict[str, PackedSplit]:
    """Tokenise, deal out to the five splits, and cut into blocks.

    Sources are mixed by weight, in tokens. A source with too little text for its share of `train` gives what
    it has and the others fill its place; when all run out, `train` is shorter.

    Args:
        vocab_size: entries of the parent's vocabulary.
        on_progress: called with the tokens that were read since the last call.

    Returns:
        By split: tokens int32 [blocks, sequence_length].

    Raises:
        DataError: too little text for one of the splits, or a tokenizer of another model.
    """
    encoder = Encoder(tokenizer, settings.separator)
    reader = _Tokenised(encoder, vocab_size, seed, on_progress)
    streams = [_Stream(source, reader) for source in sources]
    weights = [source.weight for source in sources]
    length = settings.sequence_length
    by_split = {split: shares(settings.blocks(split) * length, weights) for split in SPLITS}
    quotas = [{split: by_split[split][i] for split in SPLITS} for i in range(len(streams))]
    dealt = [_deal(stream, quota, length) for stream, quota in zip(streams, quotas, strict=True)]
    for stream, pieces in zip(streams, dealt, strict=True):
        used = {piece.key for split in SMALL_SPLITS for piece in pieces[split]}
        stream.pieces = [piece for piece in stream.pieces if piece.key not in used]
    train = _train_quotas(streams, weights, by_split["train"], length)
    if not any(train):
        names = ", ".join(source.name for source in sources)
        raise DataError(
            f"After the other splits, {names} left less than one block of {length} tokens for training; "
            f"{sources[0].more}, or lower data.calibration_tokens."
        )
    for stream, pieces, quota in zip(streams, dealt, train, strict=True):
        pieces["train"] = _take(iter(stream.pieces), quota, quota)
    for reason, count in encoder.left_out.items():
        console.print(f"  The parent's chat template refuses {count} conversations: {reason}", markup=False)
    if encoder.without_tools:
        count = encoder.without_tools
        console.print(f"  The parent's chat template writes no tools; {count} conversations that have some lose them.")
    return {
        split: _join(
            {source.name: pieces[split] for source, pieces in zip(sources, dealt, strict=True)},
            length,
            encoder.beginning,
        )
        for split in SPLITS
    }


@dataclass
class _Tokenised:
    """Tokenises documents of all sources, each content only once."""

    encoder: Encoder
    vocab_size: int
    seed: int
    on_progress: Callable[[int], object]
    seen: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._check(self.encoder.separator)
        self.salt = hashlib.blake2b(str(self.seed).encode(), digest_size=16).digest()

    def _check(self, token: int) -> None:
        if not 0 <= token < self.vocab_size:
            raise DataError(
                f"The tokenizer gives id {token} but the parent's vocabulary has {self.vocab_size} "
                "entries: it belongs to another model; put the parent's own tokenizer into its checkpoint."
            )

    def __call__(self, documents: Iterable[Document]) -> Iterator[list[_Piece]]:
        batch: list[tuple[bytes, Document]] = []
        size = 0
        for document in documents:
            content = document
            if isinstance(document, str):
                # JSON can hold halves of surrogate pairs, which no encoding can.
                content = document.encode("utf-8", "replace")
                document = content.decode()
            elif isinstance(document, Conversation):
                content = b"\0messages" + document.to_json().encode("utf-8", "replace")
            else:
                content = b"\0tokens" + np.asarray(document, np.int64).tobytes()
            key = hashlib.blake2b(content, digest_size=16, key=self.salt).digest()
            if key in self.seen or not len(document):
                continue
            self.seen.add(key)
            batch.append((key, document))
            size += len(document)
            if size >= BATCH_CHARACTERS:
                yield self._pieces(batch)
                batch, size = [], 0
        if batch:
            yield self._pieces(batch)

    def _pieces(self, batch: list[tuple[bytes, Document]]) -> list[_Piece]:
        pieces = []
        for (key, _), ids in zip(batch, self.encoder([document for _, document in batch]), strict=True):
            if not ids:
                continue
            tokens = np.asarray(ids, np.int64)
            self._check(int(tokens.max()))
            self._check(int(tokens.min()))
            beginning = self.encoder.beginning
            begins = beginning is not None and ids[0] == beginning
            pieces.append(_Piece(key, tokens.astype(np.int32), beginning if begins else None))
        self.on_progress(sum(map(len, pieces)))
        return pieces


class _Stream:
    """What was read of one source, and what is still to come."""

    def __init__(self, source: TextSource, reader: _Tokenised):
        self.source = source
        self.pieces: list[_Piece] = []
        self.exhausted = False
        self._batches = reader(source.documents)

    @property
    def tokens(self) -> int:
        """Tokens read and not yet dealt out."""
        return sum(map(len, self.pieces))

    def read(self, num_tokens: int) -> None:
        """Read until `num_tokens` are there, or the source runs out."""
        missing = num_tokens - self.tokens
        while missing > 0 and not self.exhausted:
            batch = next(self._batches, None)
            self.exhausted = batch is None
            self.pieces += batch or []
            missing -= sum(map(len, batch or []))


def _deal(stream: _Stream, quota: Mapping[str, int], length: int) -> dict[str, list[_Piece]]:
    """Fill a source's share of the small splits; `stream.pieces` end up in the order of their hashes."""
    wanted = sum(quota.values())
    needed = wanted - quota["train"]
    while True:
        stream.read(wanted)
        stream.pieces.sort(key=lambda piece: piece.key)
        rest = min(quota["train"], SMALLEST_REST * (stream.tokens - needed))
        for part in LARGEST_PARTS if stream.exhausted else LARGEST_PARTS[:1]:
            pieces = iter(stream.pieces)
            dealt = {split: _take(pieces, quota[split], max(length, quota[split] // part)) for split in SMALL_SPLITS}
            full = all(sum(map(len, dealt[split])) == quota[split] for split in SMALL_SPLITS)
            if full and (not stream.exhausted or part == LARGEST_PARTS[-1] or sum(map(len, pieces)) >= rest):
                return dealt
        if stream.exhausted:
            break
        wanted = 2 * max(wanted, stream.tokens)
    largest = max(SMALL_SPLITS, key=lambda split: quota[split])
    raise DataError(
        f"The source {stream.source.name} gave {stream.tokens} tokens in {len(stream.pieces)} documents, but "
        f"its share of the {', '.join(SMALL_SPLITS[:-1])} and {SMALL_SPLITS[-1]} splits is {needed} tokens, "
        f"and no document may be in two splits; {stream.source.more}, or lower data.{largest}_tokens."
    )


def _take(pieces: Iterator[_Piece], quota: int, largest: int) -> list[_Piece]:
    """Pieces of up to `largest` tokens that add up to `quota`, or to less when they run out."""
    taken: list[_Piece] = []
    while quota > 0 and (piece := next(pieces, None)) is not None:
        taken.append(piece.cut(min(largest, quota)))
        quota -= len(taken[-1])
    return taken


def _train_quotas(
    streams: Sequence[_Stream], weights: Sequence[float], quotas: Sequence[int], length: int
) -> list[int]:
    """Tokens of `train` by source: by weight, but no more than a source has; the sum is whole blocks."""
    total = sum(quotas)
    quotas = list(quotas)
    short: set[int] = set()
    while True:
        for stream, quota in zip(streams, quotas, strict=True):
            stream.read(quota)
        newly_short = {i for i, stream in enumerate(streams) if i not in short and stream.tokens < quotas[i]}
        short |= newly_short
        for i in newly_short:
            quotas[i] = streams[i].tokens
        ample = [i for i in range(len(streams)) if i not in short]
        if not newly_short or not ample:
            break
        remaining = shares(total - sum(quotas[i] for i in short), [weights[i] for i in ample])
        for i, quota in zip(ample, remaining, strict=True):
            quotas[i] = quota
    excess = sum(quotas) % length
    for i in sorted(range(len(quotas)), key=lambda i: -quotas[i]):
        cut = min(excess, quotas[i])
        quotas[i] -= cut
        excess -= cut
    return quotas


def _join(pieces_by_source: Mapping[str, list[_Piece]], length: int, beginning: int | None) -> PackedSplit:
    """One split's blocks. Documents are ordered by their hash read backwards: forwards it chose the split."""
    pieces = sorted((piece for pieces in pieces_by_source.values() for piece in pieces), key=lambda p: p.key[::-1])
    return PackedSplit(
        tokens=in_blocks(np.concatenate([piece.tokens for piece in pieces]), length, beginning),
        documents=len(pieces),
        tokens_by_source={name: sum(map(len, pieces)) for name, pieces in pieces_by_source.items()},
    )
