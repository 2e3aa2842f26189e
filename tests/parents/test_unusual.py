"""What is said twice in two ways, or in words that nobody reads, gets a line."""

import pytest
import torch
from tokenizers import processors

from puzzle_nas.data.packing import Encoder
from puzzle_nas.parents import examine
from puzzle_nas.parents.tokenizer import prompt_ids
from puzzle_nas.scoring.likelihood import encode_pair
from tests.parents.checkpoints import byte_tokenizer, edit, tiny


def lines_of(folder):
    return list(examine(folder).warnings)


def test_a_usual_folder_has_none(tmp_path):
    folder = tiny(tmp_path / "p")
    edit(folder / "config.json", rope_theta=10000.0, rope_scaling=None, torch_dtype="float32", my_note="made by me")
    assert lines_of(folder) == []


def test_a_misspelt_field(tmp_path):
    folder = tiny(tmp_path / "p", rms_norm_eps=1e-5)
    edit(folder / "config.json", drop=("rms_norm_eps",), rms_norm_epsilon=1e-5)
    assert lines_of(folder) == [
        "config.json says rms_norm_epsilon, which is not read; rms_norm_eps is taken to be 1e-06."
    ]


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_a_rope_parameter_that_is_not_read(name, tmp_path):
    folder = tiny(tmp_path / "p")
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "attn_factor": 2.0}
    edit(folder / "config.json", drop={"rope_parameters"} - {name}, **{name: rope})
    assert lines_of(folder) == ["config.json gives rope_parameters of type yarn a attn_factor, which is not read."]


def test_another_precision_than_is_stored(tmp_path):
    folder = tiny(tmp_path / "p", dtype=torch.bfloat16)
    assert lines_of(folder) == []
    edit(folder / "config.json", dtype="float16")
    assert lines_of(folder) == ["config.json says dtype float16, but 21 of 21 tensors are stored as bfloat16."]


@pytest.mark.parametrize("said", [True, False])
def test_bos_that_two_files_say_otherwise(said, tmp_path):
    tokenizer = byte_tokenizer(bos="<|im_start|>")
    if not said:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    folder = tiny(tmp_path / "p", tokenizer=tokenizer)
    edit(folder / "tokenizer_config.json", add_bos_token=said)
    (line,) = lines_of(folder)
    assert line.startswith(f"tokenizer_config.json says add_bos_token: {str(said).lower()}, but")


def test_two_chat_templates(tmp_path):
    folder = tiny(tmp_path / "p")
    edit(folder / "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}")
    examined = examine(folder)
    assert examined.warnings == (
        "tokenizer_config.json has another chat_template than chat_template.jinja; the latter is used.",
    )
    assert "im_start" in examined.tokenizer.chat_template


def test_code_of_its_own(tmp_path):
    """Such as long contexts' ways of rotating, in files that say model_type: llama all the same."""
    folder = tiny(tmp_path / "p")
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_yarn.LlamaForCausalLM"})
    assert lines_of(folder) == []
    (folder / "modeling_yarn.py").write_text("raise SystemExit")
    assert lines_of(folder) == [
        "It brings code of its own (modeling_yarn.py), which is not run: transformers' LlamaForCausalLM is used in its "
        "place."
    ]


def test_a_tokenizer_that_ends_text(tmp_path):
    tokenizer = byte_tokenizer(bos="<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>", special_tokens=[("<|im_start|>", 1), ("<|endoftext|>", 0)]
    )
    examined = examine(tiny(tmp_path / "p", tokenizer=tokenizer))
    assert examined.warnings == ("The tokenizer ends every text with <|endoftext|>; prompts are given without it.",)
    text = examined.tokenizer("ab").input_ids
    assert text[-1] == 0 and prompt_ids(examined.tokenizer, "ab") == text[:-1]
    # Else a continuation would begin one token late.
    start, rest = encode_pair(examined.tokenizer, "ab", " c")
    assert [*start, *rest] == prompt_ids(examined.tokenizer, "ab c") and start == text[:-1]


def test_several_chat_templates(tmp_path):
    folder = tiny(tmp_path / "p", tokenizer=byte_tokenizer(eos="<|im_end|>"))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    named = [{"name": name, "template": template} for name in ("default", "tool_use")]
    edit(folder / "tokenizer_config.json", chat_template=named)
    examined = examine(folder)
    assert examined.template == "works" and examined.separator == 0
    edit(folder / "tokenizer_config.json", chat_template=[*named[1:], {"name": "rag", "template": template}])
    assert examine(folder).template == "fails"


def test_lengths_that_tokenizer_json_keeps_are_not_applied(tmp_path):
    folder = tiny(tmp_path / "p")
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    pad |= {"pad_id": 3, "pad_type_id": 0, "pad_token": "<pad>"}
    edit(folder / "tokenizer.json", truncation=cut, padding=pad)
    rows = Encoder(examine(folder).tokenizer)(["abcdefgh", "ab"])
    assert [len(row) for row in rows] == [9, 3]
