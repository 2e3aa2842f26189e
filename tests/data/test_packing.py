"""Splits are full, disjoint, mixed by weight, spread over the text, and the same every time."""

import copy
import itertools
import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from puzzle_nas.data.conversations import Conversation
from puzzle_nas.data.packing import Encoder, TextSource, in_blocks, pack, shares
from puzzle_nas.errors import DataError
from puzzle_nas.parents.tokenizer import bos_of
from puzzle_nas.recipe import SMALL_SPLITS, SPLITS, DataSettings, SourceSettings

SIZES = {
    "train_tokens": 4000,
    "calibration_tokens": 500,
    "scoring_tokens": 300,
    "selection_tokens": 300,
    "validation_tokens": 400,
}
BLOCKS = {"train": 125, "calibration": 16, "scoring": 10, "selection": 10, "validation": 13}


def settings(**changes):
    return DataSettings(sources=[SourceSettings(source="given")], sequence_length=32, **{**SIZES, **changes})


def texts(count, words=5, name="doc"):
    return [f"{name}{i:04d} " * words for i in range(count)]


def pack_texts(tokenizer, *sources, seed=0, **changes):
    sources = [
        source if isinstance(source, TextSource) else TextSource(f"source{i}", 1.0, source)
        for i, source in enumerate(sources)
    ]
    return pack(sources, tokenizer, len(tokenizer), settings(**changes), seed)


def numbers(tokenizer, split, name="doc"):
    return {int(n) for n in re.findall(rf"{name}(\d{{4}})", tokenizer.decode(split.tokens.ravel()))}


def test_every_split_has_its_tokens_in_whole_blocks(tokenizer):
    splits = pack_texts(tokenizer, texts(500))
    assert {name: split.tokens.shape for name, split in splits.items()} == {n: (b, 32) for n, b in BLOCKS.items()}
    assert all(split.tokens.dtype == np.int32 for split in splits.values())
    for split in splits.values():
        assert split.tokens_by_source == {"source0": split.tokens.size}


def test_no_document_is_in_two_splits(tokenizer):
    # Every document comes three times, and some are longer than a whole split.
    documents = texts(200) * 3 + texts(30, words=200, name="big") * 2
    random.Random(0).shuffle(documents)
    splits = pack_texts(tokenizer, documents, train_tokens=100_000)
    for name in ("doc", "big"):
        seen = [numbers(tokenizer, split, name) for split in splits.values()]
        assert sum(map(len, seen)) == len(set().union(*seen)) > 20
    assert sum(split.documents for split in splits.values()) <= 230


def test_a_document_of_two_sources_counts_once(tokenizer):
    splits = pack_texts(tokenizer, texts(300), texts(300) + texts(300, name="new"), train_tokens=100_000)
    everything = np.concatenate([splits[name].tokens.ravel() for name in SPLITS])
    text = tokenizer.decode(everything)
    assert max(text.count(f"doc{i:04d} " * 5) for i in range(300)) == 1


def test_same_recipe_same_bytes(tokenizer):
    first, again, other = (pack_texts(tokenizer, texts(500), seed=seed) for seed in (3, 3, 4))
    for name in SPLITS:
        assert first[name].tokens.tobytes() == again[name].tokens.tobytes()
        assert first[name].tokens.tobytes() != other[name].tokens.tobytes()


def test_splits_follow_from_content_not_from_order(tokenizer):
    documents = texts(150)
    first = pack_texts(tokenizer, documents, train_tokens=100_000)
    again = pack_texts(tokenizer, documents[::-1], train_tokens=100_000)
    assert all(np.array_equal(first[name].tokens, again[name].tokens) for name in SPLITS)


def test_small_splits_are_spread_over_the_whole_text(tokenizer):
    splits = pack_texts(tokenizer, texts(160), train_tokens=100_000)
    for name in SMALL_SPLITS:
        quarters = {number // 40 for number in numbers(tokenizer, splits[name])}
        assert len(quarters) >= 3


def test_long_documents_share_a_split(tokenizer):
    # 32 tokens, one block, are the most that one document gives where there is enough text.
    splits = pack_texts(tokenizer, texts(300, words=40))
    assert all(splits[name].documents == BLOCKS[name] for name in SMALL_SPLITS)


def test_short_text_is_not_wasted_on_variety(tokenizer):
    # Five documents of 4001 tokens: cutting each down to a block would leave nothing to train on.
    splits = pack_texts(tokenizer, texts(5, words=500), train_tokens=100_000)
    assert {name: len(splits[name].tokens) for name in SMALL_SPLITS} == {n: BLOCKS[n] for n in SMALL_SPLITS}
    assert splits["train"].tokens.size == 4001 // 32 * 32


def test_documents_are_joined_by_the_separator(tokenizer):
    splits = pack_texts(tokenizer, texts(500))
    *train, after_last = tokenizer.decode(splits["train"].tokens.ravel()).split("<|endoftext|>")
    whole = [re.fullmatch(r"(doc\d{4} )\1{4}", document) is not None for document in train]
    # The last document that was taken is cut where the split is full; its last token is the separator, too.
    assert after_last == "" and len(whole) == splits["train"].documents and whole.count(False) == 1


def test_sources_are_mixed_by_weight(tokenizer):
    sources = [TextSource("a", 3.0, texts(500)), TextSource("b", 1.0, texts(500, name="log"))]
    for split in pack_texts(tokenizer, *sources).values():
        assert split.tokens_by_source["a"] == pytest.approx(0.75 * split.tokens.size, abs=1)
        assert sum(split.tokens_by_source.values()) == split.tokens.size
    train = tokenizer.decode(pack_texts(tokenizer, *sources)["train"].tokens[:40].ravel())
    assert 0.6 < train.count("doc") / (train.count("doc") + train.count("log")) < 0.9


def test_others_fill_the_place_of_a_source_that_runs_out(tokenizer):
    sources = [TextSource("small", 1.0, texts(50)), TextSource("large", 1.0, texts(500, name="log"))]
    splits = pack_texts(tokenizer, *sources)
    train = splits["train"].tokens_by_source
    assert sum(train.values()) == 4000 and 1000 < train["small"] < 1300
    assert splits["validation"].tokens_by_source == {"small": 208, "large": 208}


def test_train_is_shorter_when_all_text_runs_out(tokenizer):
    splits = pack_texts(tokenizer, texts(60), train_tokens=100_000)
    assert {name: len(splits[name].tokens) for name in SMALL_SPLITS} == {n: BLOCKS[n] for n in SMALL_SPLITS}
    assert 0 < splits["train"].tokens.size < 60 * 41


def test_an_endless_source_is_read_only_as_far_as_needed(tokenizer):
    taken = itertools.count()
    endless = (f"doc{next(taken):06d} " * 100 for _ in itertools.repeat(None))
    pack_texts(tokenizer, endless)
    assert next(taken) < 2 * 200_000 / 1000


def test_control_tokens_survive_in_text_and_in_token_documents(tokenizer):
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids = [[start, *tokenizer.encode(f"user\nQuestion {i:04d}?")] for i in range(200)]
    chats = [f"<|im_start|>user\nIs it {i:04d}?<|im_end|>\n" for i in range(200)]
    splits = pack_texts(tokenizer, ids + chats, train_tokens=100_000)
    train = splits["train"].tokens.ravel()
    assert abs((train == start).sum() - splits["train"].documents) <= 1
    assert abs((train == end).sum() - splits["train"].documents) <= 1
    assert "<|im_start|>user\nQuestion" in tokenizer.decode(train)
    assert not (train == tokenizer.eos_token_id).any()


def test_half_of_a_surrogate_pair_is_no_obstacle(tokenizer):
    assert pack_texts(tokenizer, [f"\ud83d {text}" for text in texts(500)])


def test_too_little_text_for_the_small_splits(tokenizer):
    source = TextSource("few.txt", 1.0, texts(20), "name more text in data.sources")
    message = (
        "The source few.txt gave 820 tokens in 20 documents, but its share of the validation, selection, "
        "scoring and calibration splits is 1568 tokens, and no document may be in two splits; name more text "
        "in data.sources, or lower data.calibration_tokens."
    )
    with pytest.raises(DataError, match=re.escape(message)):
        pack_texts(tokenizer, source)


def test_one_document_cannot_be_split(tokenizer):
    with pytest.raises(DataError, match=r"in 1 documents.*no document may be in two splits"):
        pack_texts(tokenizer, texts(1, words=5000))


def test_nothing_left_to_train_on(tokenizer):
    documents = ["x" * 415, "y" * 319, "z" * 319, "w" * 511]
    with pytest.raises(DataError, match="less than one block of 32 tokens for training; name more text"):
        pack_texts(tokenizer, documents)


def test_tokenizer_of_another_model(tokenizer):
    message = "gives id 258 but the parent's vocabulary has 258 entries: it belongs to another model; put"
    with pytest.raises(DataError, match=message):
        pack([TextSource("a", 1.0, ["<|im_end|>"])], tokenizer, 258, settings(), 0)


def test_tokenizer_without_end_of_text(tokenizer):
    class Endless:
        eos_token = eos_token_id = bos_token_id = chat_template = None

        def get_vocab(self):
            return {"a": 0}

    with pytest.raises(DataError, match=r"no end-of-text token .*; name one of its tokens in data.separator"):
        pack([TextSource("a", 1.0, texts(10))], Endless(), 300, settings(), 0)


# As the parent was trained: what begins a block and a document, and what ends one.


@pytest.fixture
def llama_like(tokenizer):
    """Puts a token of its own before text, as Llama's, Gemma's and Mistral's tokenizers do."""
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"bos_token": "<s>"})
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", changed.bos_token_id)]
    )
    return changed


def test_blocks_and_documents_begin_as_the_tokenizer_begins_text(llama_like):
    bos, end = llama_like.bos_token_id, llama_like.eos_token_id
    assert llama_like("a")["input_ids"][0] == bos
    splits = pack_texts(llama_like, texts(500))
    for split in splits.values():
        assert (split.tokens[:, 0] == bos).all() and (split.tokens[:, 1] != bos).all()
    after_an_end = splits["train"].tokens.ravel()[1:][splits["train"].tokens.ravel()[:-1] == end]
    assert (after_an_end == bos).all() and len(after_an_end) > 90
    assert {name: len(split.tokens) for name, split in splits.items()} == BLOCKS


def test_a_tokenizer_that_begins_text_with_nothing_adds_nothing(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    train = pack_texts(tokenizer, texts(500))["train"].tokens
    assert bos_of(tokenizer) is None and not (train == tokenizer.bos_token_id).any()


def test_a_block_that_begins_at_a_document_begins_once():
    tokens = np.asarray([9, 1, 2, 0, 9, 3, 4, 5, 0, 9, 6, 0])
    assert in_blocks(tokens, 4, 9).tolist() == [[9, 1, 2, 0], [9, 3, 4, 5], [9, 6, 0, 0]]
    assert in_blocks(tokens, 4, None).tolist() == [[9, 1, 2, 0], [9, 3, 4, 5], [0, 9, 6, 0]]


@pytest.mark.parametrize(
    ("eos", "asked", "separator"),
    [
        ("<|im_end|>", None, "<|endoftext|>"),  # it ends a turn, as in SmolLM2-Instruct
        ("<|endoftext|>", None, "<|endoftext|>"),
        ("<|im_end|>", "<|im_start|>", "<|im_start|>"),
    ],
)
def test_plain_text_is_separated_by_the_token_of_documents(tokenizer, eos, asked, separator):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = eos
    train = tokenizer.decode(pack_texts(tokenizer, texts(500), separator=asked)["train"].tokens.ravel())
    counts = {token: train.count(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}
    assert counts.pop(separator) > 90 and not any(counts.values())


def test_a_separator_that_is_not_a_token(tokenizer):
    with pytest.raises(DataError, match=r"no token '<end>'; correct data.separator"):
        pack_texts(tokenizer, texts(500), separator="<end>")


def chats(count):
    asked = [{"role": "user", "content": f"Is it {i:04d}?"} for i in range(count)]
    return [Conversation([question, {"role": "assistant", "content": "It is."}]) for question in asked]


def test_conversations_are_written_by_the_template_and_end_with_their_last_turn(tokenizer):
    split = pack_texts(tokenizer, chats(300))["train"]
    train = tokenizer.decode(split.tokens.ravel())
    one = r"<\|im_start\|>user\nIs it \d{4}\?<\|im_end\|>\n<\|im_start\|>assistant\nIt is\.<\|im_end\|>"
    # One conversation is cut where the split is full.
    assert len(re.findall(one, train)) == split.documents - 1 > 90
    assert train.endswith("<|im_end|>") and "<|im_end|><|im_start|>user" in train and "<|endoftext|>" not in train


def test_conversations_without_a_template(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"no chat template to write them with \(it has none\); put a chat_template"):
        pack_texts(tokenizer, chats(300))
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(DataError, match=r"\(its own fails: never\)"):
        pack_texts(tokenizer, chats(300))
    assert pack_texts(tokenizer, texts(500))["train"].tokens.size == 4000


def test_conversations_that_the_template_refuses_are_counted(tokenizer, capsys):
    tokenizer = copy.deepcopy(tokenizer)
    check = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user begins') }}{% endif %}"
    tokenizer.chat_template = check + tokenizer.chat_template
    backwards = [Conversation([{"role": "assistant", "content": f"Well {i}."}]) for i in range(7)]
    pack_texts(tokenizer, backwards + chats(300), train_tokens=100_000)
    assert "refuses 7 conversations: the user begins" in capsys.readouterr().out


def test_tools_are_written_where_the_template_writes_them(tokenizer, capsys):
    with_tools = [Conversation(chat.messages, [{"name": f"tool {i}"}]) for i, chat in enumerate(chats(300))]
    without = pack_texts(tokenizer, with_tools)["train"]
    assert "writes no tools; 300 conversations that have some lose them" in capsys.readouterr().out
    assert "tool" not in tokenizer.decode(without.tokens.ravel())
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% if tools %}{{ tools[0]['name'] }}{% endif %}" + tokenizer.chat_template
    assert "tool 2<|im_start|>user" in decoded(tokenizer, with_tools[2])
    pack_texts(tokenizer, with_tools + chats(300))
    assert "lose them" not in capsys.readouterr().out


def test_a_template_that_wants_a_system_message_or_parts(tokenizer):
    wants_system = copy.deepcopy(tokenizer)
    check = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    wants_system.chat_template = check + tokenizer.chat_template
    assert "<|im_start|>system\nYou are a helpful" in decoded(wants_system, chats(1)[0])
    wants_parts = copy.deepcopy(tokenizer)
    wants_parts.chat_template = tokenizer.chat_template.replace(
        "{{ message['content'] }}", "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}"
    )
    assert decoded(wants_parts, chats(1)[0]) == decoded(tokenizer, chats(1)[0])


def decoded(tokenizer, document):
    (ids,) = Encoder(tokenizer)([document])
    return tokenizer.decode(ids)


@given(st.integers(0, 10**7), st.lists(st.floats(0.01, 100), min_size=1, max_size=12))
def test_shares_add_up_and_are_fair(total, weights):
    parts = shares(total, weights)
    assert sum(parts) == total
    assert all(abs(p - total * w / sum(weights)) <= 1.01 for p, w in zip(parts, weights, strict=True))
