"""The ids of GGUF tokenizers against llama.cpp's own, on awkward text, for every way of cutting."""

import json
import random
import subprocess

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from puzzle_nas.data.sources import documents
from puzzle_nas.engines import serving_engine
from puzzle_nas.families import load_tokenizer, open_parent
from puzzle_nas.parents import examine
from puzzle_nas.parents.gguf_tokenizer import SPLITTINGS
from puzzle_nas.recipe import SourceSettings
from tests.parents.checkpoints import SPECIALS, tiny, write_gguf
from tests.parents.test_gguf import FAMILIES, LLAMA3, ROPES, THETA, llama3_table

PIECES = [" ", "  ", "\n", "\t", "\r\n", "1", "23", "456", "'s", "'LL", "a", "Ab", "É", "ß", "中", "ฉัน", "½", "²"]
PIECES += ["٣", "_", ".", "…", "!?", "=", "—", "\u00a0", "\u200b", "<|", ">", "`", "x=1", "Ⅷ", "word", " the"]
WORKER = """
import json, sys, llama_cpp
texts, files = json.load(sys.stdin)
ids = {}
for name, file in files.items():
    model = llama_cpp.Llama(file, vocab_only=True, verbose=False)
    ids[name] = [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
print(json.dumps(ids))
"""
SCORER = """
import json, sys, llama_cpp, numpy
ids, files = json.load(sys.stdin)
found = {}
for name, file in files.items():
    model = llama_cpp.Llama(file, n_ctx=256, n_batch=256, logits_all=True, verbose=False)
    model.eval(ids)
    found[name] = model.scores[: len(ids)].tolist()
print(json.dumps(found))
"""
ASCII_CASES = ("tekken", "gpt-4o")
"""llama.cpp knows only ASCII's cases there: letters with combining marks are cut otherwise than in training."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    source = documents(SourceSettings(source="python-stdlib"), seed=0)
    mixed = random.Random(1)
    pieces = ["".join(mixed.choices(PIECES, k=20)) for _ in range(300)]
    raw.train_from_iterator([*(next(source) for _ in range(20)), *pieces], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>", pad_token="<pad>")
    return tiny(tmp_path_factory.mktemp("gguf") / "p", tokenizer=tokenizer, vocab_size=600)


def test_ids_are_llama_cpps(folder):
    by_splitting = {splitting: name for name, splitting in SPLITTINGS.items()}
    files = {name: str(write_gguf(folder, folder.parent / f"{name}.gguf", name)) for name in by_splitting.values()}
    mixed = random.Random(0)
    texts = ["".join(mixed.choices(PIECES, k=mixed.randint(1, 25))) for _ in range(300)]
    command = [str(serving_engine("llama.cpp").python()), "-c", WORKER]
    found = subprocess.run(command, input=json.dumps([texts, files]), capture_output=True, text=True, check=True)
    cut_otherwise = tuple(by_splitting[SPLITTINGS[name]] for name in ASCII_CASES)
    for name, ids in json.loads(found.stdout).items():
        tokenizer = examine(folder.parent / f"{name}.gguf").tokenizer
        assert len({tuple(line) for line in ids}) > 200
        for text, wanted in zip(texts, ids, strict=True):
            if name not in cut_otherwise or "ฉัน" not in text:
                assert tokenizer(text, add_special_tokens=False).input_ids == wanted, (name, text)


def log_probabilities(files, tokens=200):
    """llama.cpp's and ours of the same random tokens, by name."""
    ids = torch.randint(4, 600, (tokens,), generator=torch.Generator().manual_seed(0))
    command = [str(serving_engine("llama.cpp").python()), "-c", SCORER]
    asked = json.dumps([ids.tolist(), {name: str(file) for name, file in files.items()}])
    found = subprocess.run(command, input=asked, capture_output=True, text=True, check=True)
    for name, scores in json.loads(found.stdout).items():
        model, _ = open_parent(files[name])
        with torch.no_grad():
            ours = model.eval()(ids[None], use_cache=False).logits[0].log_softmax(-1)
        yield name, torch.tensor(scores).log_softmax(-1), ours


def test_logits_are_llama_cpps(folder):
    """Of 200 positions, stretched in every way that is read."""
    fields = {name: {"fields": fields} for name, (_, fields) in ROPES.items()}
    fields["llama3"] = {"tensors": {"rope_freqs.weight": llama3_table(THETA | LLAMA3)}}
    files = {name: write_gguf(folder, folder.parent / f"rope {name}.gguf", **more) for name, more in fields.items()}
    plain = None
    for name, theirs, ours in log_probabilities(files):
        plain = theirs if plain is None else plain
        # llama.cpp keeps keys and values in float16.
        assert (theirs - ours).abs().max() < 0.01, name
        assert name in ("plain", "linear as before") or (plain - ours).abs().max() > 0.1, name


def test_logits_of_other_families_are_llama_cpps(folder):
    """Of 200 positions, beyond windows of 16."""
    tokenizer = load_tokenizer(folder)
    files = {}
    for family, changes in FAMILIES.items():
        source = tiny(folder.parent / family, family, tokenizer, vocab_size=600, **changes)
        files[family] = write_gguf(source, folder.parent / f"{family}.gguf")
    for family, theirs, ours in log_probabilities(files):
        by_position = (theirs - ours).abs().amax(-1)
        # A router whose choice is close takes another expert after rounding, and later positions see what it made.
        worst = by_position.median() if family == "qwen3_moe" else by_position.max()
        assert worst < 0.02, (family, by_position)
