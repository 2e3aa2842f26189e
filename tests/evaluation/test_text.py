"""Figures on text against what transformers and torch compute themselves."""

import json
import math
import re
import shutil

import gguf
import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from puzzle_nas.errors import CheckpointError, DataError
from puzzle_nas.estimates import estimate
from puzzle_nas.evaluation.evaluate import Asked, evaluate
from puzzle_nas.evaluation.models import Evaluated, Subject, comparable, open_model
from puzzle_nas.evaluation.text import compare_texts, domain_tokens, named_files
from puzzle_nas.exporters.gguf_tokenizer import write_tokenizer
from puzzle_nas.machine import Machine
from tests.conftest import puzzle
from tests.exporters.children import tokenizer as other_tokenizer
from tests.stages.test_bad_input import check_refused
from tests.stages.test_run import independent_kl

FLOAT32 = Machine(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    words = re.split(" ", "the king spoke of love and war while his lords were drinking wine in silence")
    for name in ("prose", "verse"):
        lines = [json.dumps({"text": " ".join(words[i % 7 :] + words[: i % 5] + [name, str(i)])}) for i in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def gpt2(vocabulary):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocabulary, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=2)
    return GPT2LMHeadModel(config).eval()


def test_a_runs_child_on_its_validation_split(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    found = json.loads(puzzle("evaluate", run, "--json").stdout)
    assert json.loads((run / "evaluations/text.json").read_text()) == found["text"]
    figures = found["text"]["all"]
    summary = json.loads((run / "summary.json").read_text())
    assert figures["kl_nats"]["mean"] == pytest.approx(summary["child"]["validation_kl_nats_distilled"], rel=1e-6)
    assert figures["perplexity"]["mean"] == pytest.approx(summary["child"]["validation_perplexity"], rel=1e-6)
    assert figures["parent_perplexity"]["mean"] == pytest.approx(summary["parent"]["validation_perplexity"], rel=1e-6)
    error = summary["child"]["validation_kl_nats_standard_error"]
    assert figures["kl_nats"]["standard_error"] == pytest.approx(error, rel=1e-6)
    increase = math.log(figures["perplexity"]["mean"]) - math.log(figures["parent_perplexity"]["mean"])
    assert figures["lm_loss_increase_nats"]["mean"] == pytest.approx(increase, abs=1e-9)
    out = puzzle("evaluate", run).stdout
    assert "validation" in out and f"{figures['kl_nats']['mean']:.3f}" in out


def test_domains_apart_and_together(tiny_run, tiny_parent, texts):
    arguments = ["--data", texts / "prose.jsonl", "--data", f"{texts / 'verse.jsonl'}=rhyme"]
    lengths = ["--sequence-length", 32, "--tokens", 256]
    out = puzzle("evaluate", tiny_run / "child-gkd", "--parent", tiny_parent, *arguments, *lengths, "--json").stdout
    text = json.loads(out)["text"]
    assert list(text["domains"]) == ["prose", "rhyme"]
    assert [d["sequences"] for d in text["domains"].values()] == [8, 8] and text["all"]["sequences"] == 16
    means = [d["kl_nats"]["mean"] for d in text["domains"].values()]
    assert text["all"]["kl_nats"]["mean"] == pytest.approx(sum(means) / 2) and means[0] != means[1]


def test_figures_are_transformers_own_and_differences_paired(tiny_run, tiny_parent, texts):
    paths = (tiny_parent, tiny_run / "child-gkd")
    tokens = domain_tokens([str(texts / "verse.jsonl")], AutoTokenizer.from_pretrained(tiny_parent), 32, 256, seed=0)
    parent, child = (open_model(path, FLOAT32) for path in paths)
    found = compare_texts(child, parent, {"verse": tokens})["all"]
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in paths]
    assert found["kl_nats"]["mean"] == pytest.approx(independent_kl(*models, tokens), rel=1e-4)
    with torch.no_grad():
        before, after = (torch.stack([m(t[None], labels=t[None]).loss for t in tokens]) for m in models)
    expected = estimate((after - before).double().numpy())
    assert found["lm_loss_increase_nats"]["mean"] == pytest.approx(expected["mean"], abs=1e-5)
    assert found["lm_loss_increase_nats"]["standard_error"] == pytest.approx(expected["standard_error"], abs=1e-5)


def test_a_model_of_another_family_and_one_that_bends_its_logits(tiny_parent, tmp_path):
    """GPT-2's logits are its head's product; Gemma 2's pass through a tanh, so the head alone would be wrong."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_parent)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "final_logit_softcapping": 0.5, "sliding_window": 16}
    torch.manual_seed(0)
    bent = Gemma2ForCausalLM(Gemma2Config(vocab_size=1024, **sizes)).eval()
    tokens = torch.randint(4, 1024, (3, 24))
    for name, model in {"gpt2": gpt2(1024), "gemma2": bent}.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        opened, parent = open_model(tmp_path / name, FLOAT32), open_model(tiny_parent, FLOAT32)
        comparable(opened, parent)
        found = compare_texts(opened, parent, {"random": tokens})["all"]
        assert found["kl_nats"]["mean"] == pytest.approx(independent_kl(parent.whole, model, tokens), rel=1e-4)
        assert (opened.head.cap is None) == (name == "gpt2")


def test_a_padded_vocabulary_is_cut_and_another_tokenizer_refused(tiny_parent, texts, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_parent)
    padded = Evaluated(gpt2(1100), tokenizer)
    parent = open_model(tiny_parent, FLOAT32)
    comparable(padded, parent)
    tokens = torch.randint(4, 1024, (2, 16))
    found = compare_texts(padded, parent, {"random": tokens})["all"]
    with torch.no_grad():
        q = padded.whole(tokens).logits[..., :1024].log_softmax(-1).flatten(0, 1)
        p = parent.whole(tokens).logits.log_softmax(-1).flatten(0, 1)
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item()
    assert found["kl_nats"]["mean"] == pytest.approx(kl, rel=1e-4)
    with pytest.raises(CheckpointError, match="different tokens"):
        comparable(Evaluated(gpt2(331), other_tokenizer()), parent)


def test_a_model_alone_has_a_perplexity_only(tiny_parent, texts):
    data = ["--data", texts / "prose.jsonl", "--sequence-length", 32, "--tokens", 64]
    figures = json.loads(puzzle("evaluate", tiny_parent, *data, "--json").stdout)["text"]["all"]
    assert set(figures) == {"sequences", "lm_loss_nats", "perplexity"}


def test_sequences_are_cut_to_the_positions_of_both_models(tiny_parent, texts, tmp_path, capsys):
    gpt2(1024).save_pretrained(tmp_path / "short")
    AutoTokenizer.from_pretrained(tiny_parent).save_pretrained(tmp_path / "short")
    asked = Asked(data=(str(texts / "prose.jsonl"),), sequence_length=512, tokens=256)
    found = evaluate(tmp_path / "short", tiny_parent, asked)["text"]
    assert found["sequence_length"] == 64 and found["all"]["sequences"] == 4
    assert "Sequences have 64 tokens instead of 512" in capsys.readouterr().out
    assert evaluate(tiny_parent, None, asked)["text"]["sequence_length"] == 128


def test_text_begins_as_the_tokenizer_begins_it(tiny_parent, texts):
    tokenizer = AutoTokenizer.from_pretrained(tiny_parent)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokens = domain_tokens([str(texts / "prose.jsonl")], tokenizer, 32, 256, seed=0)
    assert (tokens[:, 0] == tokenizer.bos_token_id).all() and (tokens[:, 1] != tokenizer.bos_token_id).all()


def llama_gguf(path):
    """A random Llama of one layer as llama.cpp has it."""
    writer = gguf.GGUFWriter(path, "llama")
    theirs = other_tokenizer()
    size, hidden, width, heads = len(theirs), 64, 96, 4
    for add, value in (
        (writer.add_block_count, 1), (writer.add_context_length, 128), (writer.add_embedding_length, hidden),
        (writer.add_feed_forward_length, width), (writer.add_head_count, heads), (writer.add_head_count_kv, heads),
        (writer.add_vocab_size, size), (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_freq_base, 10000.0),
        (writer.add_rope_dimension_count, hidden // heads),
    ):  # fmt: skip
        add(value)
    write_tokenizer(writer, theirs, size)
    square, random = (hidden, hidden), np.random.default_rng(0)
    shapes = {"token_embd": (size, hidden), "output": (size, hidden), "output_norm": (hidden,)}
    layer = {"attn_norm": (hidden,), "ffn_norm": (hidden,), "ffn_gate": (width, hidden), "ffn_up": (width, hidden)}
    layer |= {"ffn_down": (hidden, width), **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), square)}
    for name, shape in {**shapes, **{f"blk.0.{name}": shape for name, shape in layer.items()}}.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.2, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file(texts, tmp_path):
    llama_gguf(tmp_path / "m.gguf")
    opened = open_model(tmp_path / "m.gguf", FLOAT32)
    asked = Asked(data=(str(texts / "prose.jsonl"),), sequence_length=32, tokens=64)
    found = evaluate(tmp_path / "m.gguf", None, asked)["text"]["all"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    tokens = domain_tokens([str(texts / "prose.jsonl")], opened.tokenizer, 32, 64, seed=0)
    with torch.no_grad():
        losses = torch.stack([theirs(t[None], labels=t[None]).loss for t in tokens])
    assert found["lm_loss_nats"]["mean"] == pytest.approx(losses.mean().item(), rel=1e-3)


def test_only_positions_with_enough_context_count(tiny_parent):
    parent = open_model(tiny_parent, FLOAT32)
    tokens = torch.randint(4, 1024, (2, 16))
    found = compare_texts(parent, None, {"random": tokens}, from_position=8)["all"]
    with torch.no_grad():
        log_p = parent.whole(tokens).logits.log_softmax(-1)
    losses = -log_p[:, 8:-1].gather(2, tokens[:, 9:, None])
    assert found["lm_loss_nats"]["mean"] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_a_long_document_leaves_room_for_others(tiny_parent, tmp_path):
    rows = ["long " * 5000, *(f"short number {i} " * 8 for i in range(400))]
    (tmp_path / "mix.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(tiny_parent)
    tokens = domain_tokens([str(tmp_path / "mix.jsonl")], tokenizer, 64, 4096, seed=0)
    assert tokens.shape == (64, 64)
    assert tokenizer.decode(tokens.flatten()).count("long") <= 4096 // 8
    with pytest.raises(DataError, match="less than one sequence"):
        domain_tokens([str(tmp_path / "mix.jsonl")], tokenizer, 1_000_000, 1_000_000, seed=0)


def test_files_and_domains(tmp_path):
    (tmp_path / "a=b.txt").write_text("x")
    assert named_files([f"{tmp_path}/a=b.txt", "c.jsonl.gz", "d.txt=c"]) == {
        "a=b": [f"{tmp_path}/a=b.txt"],
        "c": ["c.jsonl.gz", "d.txt"],
    }


def test_mistakes(tiny_parent, tmp_path):
    check_refused("evaluate", tmp_path / "nothing", "--data", __file__, contains=["no checkpoint"])
    check_refused("evaluate", tiny_parent, contains=["not a run folder", "--data"])
    check_refused("evaluate", tiny_parent, "--data", tmp_path / "no.txt", contains=["There is no file"])


def test_a_run_names_its_own_parent(tiny_run, tiny_parent):
    subject = Subject.of(tiny_run, None)
    assert (subject.checkpoint, subject.parent) == (tiny_run / "child-gkd", tiny_parent)
