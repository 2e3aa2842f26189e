"""What a format cannot hold is refused by name, and search never offers it where the recipe says so."""

import json

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from puzzle_nas.architecture import (
    SPEC_KINDS,
    GatedFFN,
    GroupedAttention,
    LinearAttention,
    NoOpAttention,
    ParentShape,
    build_search_space,
)
from puzzle_nas.errors import ExportError
from puzzle_nas.exporters import EXPORTERS, Child
from puzzle_nas.servable import SERVERS, servable_space
from tests.exporters.children import EVERY_KIND, STOCK_SAFE, child_of, sentencepiece_tokenizer


@pytest.mark.parametrize("name", EXPORTERS)
def test_every_kind_has_a_writer_or_a_refusal(name):
    exporter = EXPORTERS[name]
    server = SERVERS[exporter.server]
    assert set(exporter.writers) == server.kinds
    assert server.kinds <= set(SPEC_KINDS.values())


def test_decilm_names_every_layer_that_it_cannot_hold():
    with pytest.raises(ExportError) as error:
        EXPORTERS["decilm"].refuse(child_of(EVERY_KIND))
    message = str(error.value)
    assert "stock vLLM has no attention.linear (layer 2, 5)" in message
    assert "stock vLLM has no ffn.linear (layer 4, 5, 6)" in message
    assert "stock vLLM needs attention in the first layer (layer 0)" in message
    EXPORTERS["decilm"].refuse(child_of(STOCK_SAFE))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"query_key_norm": True}, "norms on queries and keys"),
        ({"sliding_window": 8, "layer_types": ["sliding_attention"] * 8}, "a sliding window"),
        ({"hidden_act": "gelu"}, "the activation gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "of type yarn"),
    ],
)
def test_gguf_names_what_it_lacks_of_the_family(changes, reason):
    with pytest.raises(ExportError, match=reason):
        EXPORTERS["gguf"].refuse(child_of(**changes))


def test_gguf_names_what_it_lacks_of_a_tokenizer(tmp_path):
    def with_steps(**steps):
        theirs = sentencepiece_tokenizer(True)
        data = {**json.loads(theirs.backend_tokenizer.to_str()), **steps}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)))

    lower_case = with_steps(normalizer={"type": "Lowercase"})
    words = with_steps(model={"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"})
    for theirs, reason in (
        (lower_case, r"reads? spaces as SentencePiece does \(its steps: Lowercase"),
        (words, "is WordLevel"),
    ):
        with pytest.raises(ExportError, match=reason):
            EXPORTERS["gguf"].write(Child(child_of().model, theirs), tmp_path, "float32")


def test_a_servable_space_holds_only_what_every_server_holds():
    shape = ParentShape(3, 64, 96, 4, 4, 16)
    everything = {"attention": True, "ffn": True}
    space = build_search_space(shape, None, [0.5], 16, everything, everything, {})
    stock = servable_space(space, shape, ["llama.cpp", "vllm-stock"])
    assert LinearAttention() in space.options[1]["attention"]
    first, second = (stock.options[layer]["attention"] for layer in (0, 1))
    assert first == (GroupedAttention(4), GroupedAttention(2), GroupedAttention(1))
    assert second == (*first, NoOpAttention())
    assert [spec.id for spec in stock.options[0]["ffn"]] == ["ffn.w96", "ffn.w48", "ffn.no_op"]
    assert servable_space(space, shape, ["llama.cpp", "vllm", "transformers"]) == space
    assert GatedFFN(96) in servable_space(space, shape, ["vllm-stock"]).options[2]["ffn"]
