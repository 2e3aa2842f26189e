"""Tokenizers as their own file says, against embeddings, templates, and what ends a document."""

import json

import pytest
from tokenizers import Tokenizer, pre_tokenizers, processors

from puzzle_nas.data.packing import Encoder
from puzzle_nas.families import load_tokenizer
from puzzle_nas.parents import describe, examine
from tests.parents.checkpoints import AWKWARD, CHATML, SPECIALS, byte_tokenizer, edit, tiny

DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
BYTES = {"Ġ": " ", "Ċ": "\n"}


def pieces(tokenizer, text):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)
    return ["".join(BYTES.get(letter, letter) for letter in token) for token in tokens]


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer", "TokenizersBackend", None])
def test_the_file_is_used_whatever_class_is_named(name, tmp_path):
    folder = tiny(tmp_path / "p", tokenizer=byte_tokenizer(DIGITS))
    edit(folder / "tokenizer_config.json", tokenizer_class=name)
    examined = examine(folder)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for tokenizer in (examined.tokenizer, load_tokenizer(folder)):
        assert tokenizer(AWKWARD, add_special_tokens=False).input_ids == own.encode(AWKWARD).ids
        assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.chat_template == CHATML
        assert pieces(tokenizer, "a 23") == ["a", " ", "2", "3"]
    changes = {"GPT2Tokenizer": "pre-tokenizer", "Qwen2Tokenizer": "normalizer, pre-tokenizer"}
    said = [f"transformers' {name} would change the {changes.get(name)} of tokenizer.json; the file is used."]
    assert list(examined.warnings) == (said if name in changes else [])


def test_settings_of_the_merging_are_the_files(tmp_path):
    folder = tiny(tmp_path / "p")
    data = json.loads((folder / "tokenizer.json").read_text())
    edit(folder / "tokenizer.json", model={**data["model"], "ignore_merges": True, "merges": []})
    edit(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    examined = examine(folder)
    assert "model of tokenizer.json" in examined.warnings[0]
    assert pieces(examined.tokenizer, "23") == ["23"]


def test_a_pad_token_added_without_resizing(tmp_path):
    tokenizer = byte_tokenizer(extra=[f"w{i}" for i in range(10)])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    folder = tiny(tmp_path / "p", tokenizer=tokenizer)
    assert len(tokenizer) == 273
    (warning,) = examine(folder).warnings
    assert "1 more entries ([PAD])" in warning and "272" in warning


def test_bos_is_what_stands_before_text(tmp_path):
    tokenizer = byte_tokenizer(bos="<|im_start|>")
    assert examine(tiny(tmp_path / "without", tokenizer=tokenizer)).bos is None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert examine(tiny(tmp_path / "with", tokenizer=tokenizer)).bos == 1


@pytest.mark.parametrize(
    ("specials", "eos", "template", "separator"),
    [
        (SPECIALS, "<|im_end|>", CHATML, "<|endoftext|>"),
        (SPECIALS, "<|endoftext|>", CHATML, "<|endoftext|>"),
        (SPECIALS, "<|im_end|>", None, "<|endoftext|>"),
        (["<s>", "</s>", "<|im_end|>", "<pad>"], "</s>", "{{ messages[0]['content'] }}</s>", "</s>"),
        (["<x>", "<y>", "<|im_end|>", "<pad>"], "<|im_end|>", CHATML, "<|im_end|>"),
        (["<|end_of_text|>", "<|eot_id|>", "<z>", "<pad>"], "<|eot_id|>", CHATML, "<|end_of_text|>"),
        # gpt-oss: only the last answer of all ends so.
        (["<|endoftext|>", "<|end|>", "<|return|>", "<pad>"], "<|return|>", None, "<|endoftext|>"),
        (
            ["<|endoftext|>", "<end>", "<z>", "<pad>"],
            "<end>",
            "{{ messages[0]['content'] + eos_token }}",
            "<|endoftext|>",
        ),
    ],
)
def test_documents_are_not_ended_as_turns_are(specials, eos, template, separator, tmp_path):
    tokenizer = byte_tokenizer(specials=specials, eos=eos, template=template)
    found = examine(tiny(tmp_path / "p", tokenizer=tokenizer)).separator
    assert tokenizer.convert_ids_to_tokens(found) == separator and Encoder(tokenizer).separator == found


def test_all_end_tokens(tmp_path):
    folder = tiny(tmp_path / "p", tokenizer=byte_tokenizer(eos="<|im_end|>"))
    edit(folder / "generation_config.json", eos_token_id=[0, 1])
    examined = examine(folder)
    assert examined.end_tokens == (0, 1, 2)
    texts = [token["text"] for token in describe(examined)["end_tokens"]]
    assert texts == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "found", "part"),
    [
        (CHATML, "works", None),
        (None, "none", None),
        ("{{ raise_exception('a system message is needed') }}", "fails", "a system message is needed"),
        ("{% for m in messages %}{{ m['content'] }", "fails", "chat template"),
        ("{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}", "works given content in parts", None),
        (
            "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system message') }}{% endif %}" + CHATML,
            "works given a system message",
            None,
        ),
        ("{{ tools[0]['name'] }}", "fails", "chat template"),
        ("always the same", "fails", "it leaves messages out"),
    ],
)
def test_templates_are_tried_once(template, found, part, tmp_path):
    examined = examine(tiny(tmp_path / "p", tokenizer=byte_tokenizer(template=template)))
    assert examined.template == found
    assert part is None or part in examined.warnings[-1]
