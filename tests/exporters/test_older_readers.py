"""Exports in both spellings: what transformers 5 reads is what older readers read."""

import json

import pytest
from transformers import AutoConfig, AutoTokenizer

from puzzle_nas.exporters.decilm_format import DeciLMExporter
from puzzle_nas.exporters.older_readers import old_config, old_tokenizer_config
from puzzle_nas.exporters.transformers_format import TransformersExporter
from tests.exporters.children import FAMILIES, STOCK_SAFE, Child, child_of, tokenizer

LLAMA3 = FAMILIES["Llama 3's rotary positions"]


@pytest.mark.parametrize("exporter", [DeciLMExporter(), TransformersExporter()])
@pytest.mark.parametrize("changes", [{}, LLAMA3])
def test_rope_and_dtype_under_both_spellings(exporter, changes, tmp_path):
    child = child_of(STOCK_SAFE, **changes)
    exporter.write(child, tmp_path, "bfloat16")
    written = json.loads((tmp_path / "config.json").read_text())
    rope = child.config.rope_parameters
    assert written["rope_parameters"] == rope and written["rope_theta"] == 10000.0
    assert written["rope_scaling"] == ({k: v for k, v in rope.items() if k != "rope_theta"} if changes else None)
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    if exporter.name == "transformers":
        assert AutoConfig.from_pretrained(tmp_path).rope_parameters == rope


def test_names_that_transformers_4_reads(tmp_path):
    own = tokenizer()
    own.add_special_tokens({"additional_special_tokens": ["<|more|>"]})
    child = Child(child_of().model, own)
    TransformersExporter().write(child, tmp_path, "float32")
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<|more|>"] and "extra_special_tokens" not in written
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):  <|more|>\n 12</s>"
    assert again(text).input_ids == own(text).input_ids and "<|more|>" in again.all_special_tokens


def test_what_has_no_old_spelling_stays():
    by_kind = {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}
    assert old_config(dict(by_kind)) == by_kind
    assert old_tokenizer_config({"tokenizer_class": "GemmaTokenizer"}) == {"tokenizer_class": "GemmaTokenizer"}
