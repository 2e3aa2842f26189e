"""What a format cannot hold is refused by name, and search never offers it where the recipe says so."""

import json

import gguf
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from puzzle_nas.architecture import Architecture
from puzzle_nas.errors import ExportError
from puzzle_nas.exporters import EXPORTERS, Child
from puzzle_nas.recipe import SearchSpaceSettings
from puzzle_nas.search_space import build_search_space
from puzzle_nas.servable import SERVERS, servable_space
from puzzle_nas.specs import KINDS, GatedFFN, GroupedAttention, Linear, NoOp
from tests.exporters.children import EVERY_KIND, STOCK_SAFE, child_of, sentencepiece_tokenizer, tokenizer


@pytest.mark.parametrize("name", EXPORTERS)
def test_every_kind_has_a_writer_or_a_refusal(name):
    exporter = EXPORTERS[name]
    server = SERVERS[exporter.server]
    assert set(exporter.writers) == server.kinds
    assert server.kinds <= set(KINDS.values())


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
        ({"family": "olmo3"}, "no layers of olmo3"),
        ({"family": "mistral", "sliding_window": 8}, "a sliding window"),
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


def byte_tokenizer_with(normalizer):
    data = {**json.loads(tokenizer().backend_tokenizer.to_str()), "normalizer": normalizer}
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), **names)


def test_normalisers_are_said_or_refused(tmp_path):
    model = child_of().model
    assert EXPORTERS["gguf"].notes(Child(model, tokenizer())) == []
    (note,) = EXPORTERS["gguf"].notes(Child(model, byte_tokenizer_with({"type": "NFC"})))
    assert "(NFC) and llama.cpp does not" in note
    lower_case = byte_tokenizer_with({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]})
    with pytest.raises(ExportError, match=r"changes text before splitting it \(Lowercase\)"):
        EXPORTERS["gguf"].write(Child(model, lower_case), tmp_path, "float32")


def test_every_end_token_is_written(tmp_path):
    child = child_of()
    child.model.generation_config.eos_token_id = [2, 5, 7, 9]
    EXPORTERS["gguf"].write(child, tmp_path, "float32")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    ends = [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot", "eom")]
    assert ends == [2, 5, 7]
    (note,) = EXPORTERS["gguf"].notes(child)
    assert child.tokenizer.convert_ids_to_tokens(9) in note


def test_a_servable_space_holds_only_what_every_server_holds():
    parent = Architecture(({"attention": GroupedAttention(4), "ffn": GatedFFN(96)},) * 3)
    asked = SearchSpaceSettings(width_fractions=[0.5])
    space = build_search_space(parent, asked, parent.slots, parent.slots, {})
    stock = servable_space(space, ["llama.cpp", "vllm-stock"], "llama")
    assert Linear("attention") in space.options[1]["attention"]
    first, second = (stock.options[layer]["attention"] for layer in (0, 1))
    assert first == (GroupedAttention(4), GroupedAttention(2), GroupedAttention(1))
    assert second == (*first, NoOp("attention"))
    assert [spec.id for spec in stock.options[0]["ffn"]] == ["ffn.w96", "ffn.w48", "ffn.no_op"]
    assert servable_space(space, ["llama.cpp", "vllm", "transformers"], "llama") == space
    assert GatedFFN(96) in servable_space(space, ["vllm-stock"], "llama").options[2]["ffn"]
