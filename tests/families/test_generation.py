"""Answers: through the chat template or without it, and no longer than the model's positions."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from puzzle_nas.errors import CheckpointError, DataError
from puzzle_nas.families import load_with_tokenizer
from puzzle_nas.families.generation import answer
from puzzle_nas.machine import this_machine
from tests.data.conftest import CHAT_TEMPLATE, byte_tokenizer
from tests.parents.checkpoints import CHATML, tiny, write_gguf


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=256)
    config.eos_token_id = None
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(CHAT_TEMPLATE)


def said(model, tokenizer, prompt="Hello?", new=4, chat=True):
    return "".join(answer(model, tokenizer, prompt, new, chat, 0.0))


@pytest.mark.parametrize("template", ["{{ raise_exception('no tools given') }}", "{% for m in messages %}"])
def test_a_template_that_fails_names_the_way_out(model, tokenizer, template):
    broken = copy.deepcopy(tokenizer)
    broken.chat_template = template
    with pytest.raises(CheckpointError, match=r"chat template fails \(.+\); .* puzzle generate --plain"):
        said(model, broken)
    assert said(model, broken, chat=False)


def test_a_template_that_wants_a_system_message_gets_one(model, tokenizer):
    demanding = copy.deepcopy(tokenizer)
    check = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    demanding.chat_template = check + "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert said(model, demanding)


def test_a_gguf_file_answers_as_the_folder_it_was_made_from(tmp_path):
    folder = tiny(tmp_path / "p")
    file = write_gguf(folder, tmp_path / "p.gguf", fields=[("add_chat_template", CHATML)])
    one, other = (said(*load_with_tokenizer(where, this_machine()), new=8) for where in (folder, file))
    assert one == other and one
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*q\.gguf"):
        load_with_tokenizer(tmp_path / "q.gguf", this_machine())


def test_a_prompt_beyond_the_positions(model, tokenizer):
    with pytest.raises(DataError, match=r"The prompt has 64 tokens, but the model has 64 positions; shorten it\."):
        said(model, tokenizer, "x" * 64, chat=False)


def test_an_answer_that_the_positions_cut(model, tokenizer, capsys):
    assert said(model, tokenizer, "x" * 60, new=8, chat=False)
    assert "Cut here: the model has 64 positions" in capsys.readouterr().err
    said(model, tokenizer, "x" * 60, new=4, chat=False)
    assert capsys.readouterr().err == ""
