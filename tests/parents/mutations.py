"""Seeded damage to a tiny checkpoint, and what becomes of it: transformers' own function, one sentence, or a fault."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from puzzle_nas.errors import PuzzleError
from puzzle_nas.families.loading import load_model, stream_model
from puzzle_nas.machine import Machine
from puzzle_nas.parents import examine
from puzzle_nas.parents.fit import quiet
from tests.parents.checkpoints import AWKWARD, byte_tokenizer, edit, logits_of, tiny

CPU = Machine(torch.device("cpu"), torch.float32)
BASES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama in shards": {"family": "llama", "shards": True, "attention_bias": True},
    "qwen2 tied": {"family": "qwen2", "tie_word_embeddings": True, "tokenizer": byte_tokenizer(eos="<|im_end|>")},
    "qwen3": {"family": "qwen3", "head_dim": 32},
    "mistral": {"family": "mistral", "sliding_window": 64},
}
VALUES = (
    None,
    -1,
    0,
    1,
    2,
    3,
    7,
    64,
    10**9,
    1e-5,
    0.5,
    2.0,
    "1e-5",
    "x",
    "",
    "silu",
    True,
    False,
    [],
    {},
    [1],
    {"a": 1},
)
TYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.float8_e4m3fn, torch.bool)


def bases(folder: Path) -> list[Path]:
    """The sound checkpoints."""
    return [tiny(folder / name.replace(" ", "-"), **arguments) for name, arguments in BASES.items()]


def mutate(folder: Path, rng: random.Random) -> str:
    """Damage one file of a checkpoint; what was done, in words."""
    return rng.choice(MUTATIONS)(folder, rng)


def _json_value(value: Any, rng: random.Random) -> Any:
    """Another value in place of one."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    near = [value * 2, value + 1, value - 1, str(value), float(value), int(value)] if number else [str(value), [value]]
    return rng.choice([*near, *rng.sample(VALUES, 3)])


def _change_json(file: Path, rng: random.Random) -> str:
    """Change or drop one value, one level down where there is an object and chance has it."""
    data = json.loads(file.read_text())
    place, path = data, []
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        path.append(key)
        inner = place[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.8:
            place = inner
            continue
        break
    if rng.random() < 0.25:
        del place[key]
        change = "dropped"
    else:
        place[key] = _json_value(inner, rng)
        change = f"{inner!r} -> {place[key]!r}"[:80]
    file.write_text(json.dumps(data))
    return f"{file.name} {'.'.join(map(str, path))}: {change}"


def config_value(folder: Path, rng: random.Random) -> str:
    """One value of config.json."""
    return _change_json(folder / "config.json", rng)


def small_file_value(folder: Path, rng: random.Random) -> str:
    """One value of another small file."""
    names = ["generation_config.json", "tokenizer_config.json", "model.safetensors.index.json"]
    return _change_json(rng.choice([folder / name for name in names if (folder / name).is_file()]), rng)


def tokenizer_value(folder: Path, rng: random.Random) -> str:
    """One value of tokenizer.json."""
    return _change_json(folder / "tokenizer.json", rng)


def tokenizer_class(folder: Path, rng: random.Random) -> str:
    """Another class for the same tokenizer."""
    names = ("GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast")
    name = rng.choice((*names, "GemmaTokenizer", "T5Tokenizer", "BertTokenizer", "NoSuchTokenizer"))
    edit(folder / "tokenizer_config.json", tokenizer_class=name)
    return f"tokenizer_class: {name}"


def tensor(folder: Path, rng: random.Random) -> str:
    """One tensor dropped, renamed, reshaped, retyped, repeated."""
    file = rng.choice(sorted(folder.glob("*.safetensors")))
    weights = {name: weight.clone() for name, weight in load_file(file).items()}
    name = rng.choice(sorted(weights))
    weight = weights.pop(name)
    renamed = rng.choice([f"{name}x", name.replace("layers.1", "layers.7"), name.removeprefix("model."), f"a.{name}"])
    added = f"{name.rsplit('.', 1)[0]}.{rng.choice(['bias', 'scale', 'inv_freq'])}"
    kind = rng.choice(["dropped", "renamed", "transposed", "shortened", "flattened", "retyped", "repeated", "added"])
    dtype = rng.choice(TYPES)
    weights |= {
        "dropped": {},
        "renamed": {renamed: weight},
        "transposed": {name: weight.T.contiguous() if weight.ndim == 2 else weight[None]},
        "shortened": {name: weight[:-1].clone()},
        "flattened": {name: weight.flatten()},
        "retyped": {name: weight.to(dtype)},
        "repeated": {name: weight, renamed: weight.clone()},
        "added": {name: weight, added: weight[0].clone()},
    }[kind]
    save_file(weights, file, metadata={"format": "pt"})
    return f"{name} {kind}" + (f" to {dtype}" if kind == "retyped" else f" to {renamed}" if kind == "renamed" else "")


def bytes_of_a_file(folder: Path, rng: random.Random) -> str:
    """A file cut, emptied, filled with other bytes, or one byte of its beginning changed."""
    file = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    data = bytearray(file.read_bytes())
    kind = rng.choice(["cut", "emptied", "noise", "a byte", "a pointer", "longer"])
    if kind == "cut":
        data = data[: rng.randrange(len(data))]
    elif kind == "a byte":
        data[rng.randrange(min(len(data), 2000))] = rng.randrange(256)
    elif kind == "longer":
        data += rng.randbytes(100)
    else:
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        data = {"emptied": b"", "noise": rng.randbytes(500), "a pointer": pointer}[kind]
    file.write_bytes(data)
    return f"{file.name}: {kind}"


def missing_file(folder: Path, rng: random.Random) -> str:
    """A file that is not there, or lies there under another's name."""
    file = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    if rng.random() < 0.5:
        file.unlink()
        return f"{file.name} missing"
    names = ("adapter_config.json", "pytorch_model.bin", "model.safetensors.index.json", "chat_template.json")
    name = rng.choice([name for name in names if name != file.name])
    shutil.copy(file, folder / name)
    return f"{file.name} copied to {name}"


MUTATIONS: tuple[Callable[[Path, random.Random], str], ...] = (
    *(config_value, config_value, small_file_value, tokenizer_value, tokenizer_class),
    *(tensor, tensor, tensor, bytes_of_a_file, missing_file),
)


def outcome(folder: Path) -> tuple[str, str]:
    """What becomes of a damaged checkpoint, and why.

    Returns:
        `same_function` (logits whole and streamed, and ids, are those of transformers and of tokenizer.json),
        `refused_in_one_sentence`, `tracebacks` or `silently_different`.
    """
    try:
        examined = examine(folder)
        loads = [load_model] if examined.stored.format != "safetensors" else [load_model, stream_model]
        logits = [logits_of(load(folder, CPU)) for load in loads]
        ids = examined.tokenizer(AWKWARD, add_special_tokens=False).input_ids
    except PuzzleError as error:
        sentence = str(error)
        return ("refused_in_one_sentence" if len(sentence.splitlines()) == 1 else "tracebacks"), sentence
    except Exception as error:  # any other is the fault that is looked for
        return "tracebacks", f"{type(error).__name__}: {error}"
    try:
        with quiet():
            model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises nothing more specific
        return "silently_different", f"transformers refuses it: {error}"
    left = {kind: names for kind, names in found.items() if names and kind != "error_msgs"}
    wanted = logits_of(model)
    same_logits = all(torch.allclose(ours, wanted, rtol=0, atol=1e-4, equal_nan=True) for ours in logits)
    # tokenizer_config.json may name special tokens that tokenizer.json has only as ordinary ones.
    own.add_tokens(list(examined.tokenizer.added_tokens_decoder.values()))
    same_ids = ids == own.encode(AWKWARD, add_special_tokens=False).ids
    if left or not same_logits or not same_ids:
        return "silently_different", f"left {left}, same logits {same_logits}, same ids {same_ids}"
    return "same_function", ""
