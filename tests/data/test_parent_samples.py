"""What the parent writes is its own, the same for a seed, and keeps its control tokens."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from puzzle_nas.data import parent_samples
from puzzle_nas.data.packing import TextSource, pack
from puzzle_nas.data.parent_samples import (
    conversation_script,
    is_degenerate,
    plain_script,
    sample_documents,
    special_ids,
)
from puzzle_nas.errors import DataError
from puzzle_nas.recipe import DataSettings, SourceSettings

LENGTH = 96


@pytest.fixture(scope="module")
def samples(parent, tokenizer):
    return sample_documents(parent, tokenizer, 6000, 0, LENGTH, batch_size=16)


def is_conversation(document, tokenizer):
    return document[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


@pytest.fixture
def base_tokenizer(tokenizer):
    template, tokenizer.chat_template = tokenizer.chat_template, None
    yield tokenizer
    tokenizer.chat_template = template


def test_scripts_follow_the_chat_template(tokenizer):
    script = conversation_script(tokenizer)
    assert script is not None
    assert tokenizer.decode(script.start) == "<|im_start|>user\n"
    assert [tokenizer.decode([*turn.ends]) for turn in script.turns] == ["<|im_end|>"] * 2
    assert tokenizer.decode(script.turns[0].forced) == "\n<|im_start|>assistant\n"
    assert tokenizer.decode(script.turns[1].forced) == "\n<|im_start|>user\n"
    plain = plain_script(tokenizer, script)
    assert plain.start == (tokenizer.eos_token_id,) and plain.turns[0].ends == {tokenizer.eos_token_id}


def test_a_template_without_control_tokens_gives_no_conversations(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    assert conversation_script(tokenizer) is None


def test_a_template_that_fails_leaves_plain_documents(parent, tokenizer, monkeypatch, capsys):
    for template in ("{{ raise_exception('no') }}", "{% for %}"):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        documents = sample_documents(parent, tokenizer, 500, 0, LENGTH)
        assert documents and not any(special_ids(tokenizer) & set(document) for document in documents)
        assert capsys.readouterr().out.count("chat template fails") == 1


DROPS_THOUGHTS = (
    "{% for message in messages %}{% set text = message['content'].split('</think>')[-1].lstrip('\n') %}"
    "<|im_start|>{{ message['role'] }}\n{{ text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_where_earlier_thoughts_are_dropped_a_conversation_has_one_answer(parent, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", DROPS_THOUGHTS)
    assert conversation_script(tokenizer).documents == "rounds"
    documents = sample_documents(parent, tokenizer, 6000, 0, LENGTH)
    texts = [tokenizer.decode(d) for d in documents if is_conversation(d, tokenizer)]
    assert sum("<|im_start|>assistant\n" in text for text in texts) >= 3
    for text in texts:
        assert text.startswith("<|im_start|>user\n") and text.count("<|im_start|>user") == 1
        assert text.count("<|im_start|>assistant") <= 1


def test_amount_length_and_halves(samples, tokenizer):
    sizes = Counter()
    for document in samples:
        assert 8 <= len(document) <= LENGTH
        sizes[is_conversation(document, tokenizer)] += len(document)
    assert sum(sizes.values()) >= 6000 and all(2800 < size < 3300 for size in sizes.values())


def test_conversations_are_what_the_template_would_write(samples, tokenizer):
    answered = 0
    for document in samples:
        text = tokenizer.decode(document)
        if not is_conversation(document, tokenizer):
            assert not special_ids(tokenizer) & set(document)
            continue
        turns = re.split(r"<\|im_start\|>(user|assistant)\n", text)
        assert turns[0] == "" and turns[1::2] == (["user", "assistant"] * 50)[: len(turns) // 2]
        contents = turns[2::2]
        assert all(content.removesuffix("<|im_end|>\n") for content in contents[:-1])
        assert all(content.endswith("<|im_end|>\n") for content in contents[:-1])
        answered += len(contents) > 1
    assert answered >= 3


def test_control_tokens_survive_packing(samples, tokenizer):
    settings = DataSettings(
        sources=[SourceSettings(source="parent-samples")],
        sequence_length=32,
        train_tokens=10_000,
        **{f"{split}_tokens": 32 for split in ("calibration", "scoring", "selection", "validation")},
    )
    splits = pack([TextSource("parent-samples", 1.0, samples)], tokenizer, len(tokenizer), settings, 0)
    packed = np.concatenate([split.tokens.ravel() for split in splits.values()]).tobytes()
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends = [turn_end if is_conversation(document, tokenizer) else tokenizer.eos_token_id for document in samples]
    closed = [[*d, end] if d[-1] != end else d for d, end in zip(samples, ends, strict=True)]
    whole = [np.asarray(document, np.int32).tobytes() in packed for document in closed]
    # Four small splits and the end of train cut a document each.
    assert len(samples) > 60 and whole.count(False) <= 5


def test_every_token_is_in_the_nucleus_that_the_whole_text_gives(samples, parent, tokenizer):
    conversation = conversation_script(tokenizer)
    assert conversation is not None
    end = next(iter(conversation.turns[0].ends))
    checked = 0
    for document in [d for d in samples if is_conversation(d, tokenizer)][:20]:
        until = document.index(end) if end in document else len(document)
        with torch.no_grad():
            logits = parent(torch.tensor([document])).logits[0].double()
        for place in range(len(conversation.start) + 1, until):
            refused = list(special_ids(tokenizer) - {end})
            logits[place - 1, refused] = -torch.inf
            probability = logits[place - 1].softmax(-1)
            likelier = probability[probability > probability[document[place]]].sum()
            assert likelier < parent_samples.TOP_P + 1e-4
            checked += 1
    assert checked > 200


def test_nucleus_frequencies():
    logits = torch.tensor([0.5, 0.3, 0.16, 0.04]).log().expand(20_000, 4).clone()
    chosen = parent_samples._sample_nucleus(logits, torch.Generator().manual_seed(0))
    frequencies = torch.bincount(chosen, minlength=4) / 20_000
    assert frequencies.tolist() == pytest.approx([0.5 / 0.96, 0.3 / 0.96, 0.16 / 0.96, 0], abs=0.015)


def test_same_seed_same_text_and_no_other_randomness_is_touched(parent, tokenizer, samples):
    before = torch.random.get_rng_state()
    told = []
    again = sample_documents(parent, tokenizer, 6000, 0, LENGTH, batch_size=16, on_progress=told.append)
    other = sample_documents(parent, tokenizer, 600, 1, LENGTH)
    assert again == samples and other != samples[: len(other)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert 5900 < sum(told) < 6500


def test_a_base_model_writes_plain_text_only(parent, base_tokenizer):
    documents = sample_documents(parent, base_tokenizer, 500, 0, LENGTH)
    assert sum(map(len, documents)) >= 500
    assert not any(set(document) & special_ids(base_tokenizer) for document in documents)


def test_degenerate_documents():
    assert is_degenerate([]) and is_degenerate([1, 2, 3])
    assert is_degenerate([7] * 30 + list(range(20)))
    assert not is_degenerate(list(range(8)))


def test_a_parent_that_only_repeats_itself(parent, base_tokenizer, monkeypatch):
    def stuck(input_ids, **options):
        logits = torch.zeros(len(input_ids), 1, parent.config.vocab_size)
        logits[..., 5] = 100
        return CausalLMOutputWithPast(logits=logits)

    monkeypatch.setattr(parent, "forward", stuck)
    with pytest.raises(DataError, match="nothing but repeated tokens; take parent-samples out"):
        sample_documents(parent, base_tokenizer, 500, 0, 32)
