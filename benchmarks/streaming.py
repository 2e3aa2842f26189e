"""A parent several times larger than the memory its process may use: library, BLD and scores with memory: stream.

The parent is synthetic (random weights, many layers). Peaks are resident memory above what an idle process with the
same imports holds; the limit is RLIMIT_DATA, above that of the idle process.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAYERS = 80
LIMIT_SHARE = 1 / 4
"""Memory that the process is given above an idle one's, over the parent's bytes."""
STAGES = ["--from", "build-library", "--to", "score-blocks"]
IDLE = """
import re, puzzle_nas.cli, transformers.models.llama.modeling_llama
print(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def make_parent(folder: Path) -> None:
    """Write the checkpoint layer by layer."""
    import safetensors.torch
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(
        vocab_size=257,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        eos_token_id=256,
        bos_token_id=None,
    )
    config.save_pretrained(folder)
    vocabulary = {text: i for i, text in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    files: dict[str, str] = {}

    def write(name: str, weights: dict[str, torch.Tensor]) -> None:
        safetensors.torch.save_file(weights, folder / name, {"format": "pt"})
        files.update(dict.fromkeys(weights, name))

    for index in range(LAYERS):
        weights = LlamaDecoderLayer(config, index).state_dict()
        write(f"layer-{index:02d}.safetensors", {f"model.layers.{index}.{n}": w for n, w in weights.items()})
    shape = (config.vocab_size, config.hidden_size)
    ends = {"model.embed_tokens.weight": torch.randn(shape) * 0.02, "lm_head.weight": torch.randn(shape) * 0.02}
    write("ends.safetensors", ends | {"model.norm.weight": torch.ones(config.hidden_size)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def recipe_of(parent: Path) -> dict:
    """Few tokens and variants: what counts is that all layers are gone through."""
    return {
        "parent": str(parent),
        "precision": "float32",
        "device": "cpu",
        "threads": 1,
        "data": {
            "sources": [{"source": "python-stdlib"}],
            "sequence_length": 64,
            "train_tokens": 2048,
            "calibration_tokens": 2048,
            "scoring_tokens": 64,
            "selection_tokens": 128,
            "validation_tokens": 128,
        },
        "search_space": {
            "kv_heads": [],
            "width_fractions": [0.5],
            "attention_linear": False,
            "ffn_linear": False,
            "ffn_no_op": False,
        },
        "library": {"initialisation": "paper"},
        "bld": {"tokens": 1024, "batch_tokens": 256, "shard_tokens": 512},
    }


def measured(command: list[str], limit_bytes: int | None = None) -> tuple[int, int, float, str]:
    """Exit code, peak resident bytes, seconds and output of a process."""

    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))

    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, preexec_fn=limit)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024, time.perf_counter() - begin, output.read()


def figures() -> dict[str, float]:
    """Printed and returned."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parent = folder / "parent"
        subprocess.run([sys.executable, __file__, str(parent)], check=True)
        parent_bytes = sum(path.stat().st_size for path in parent.glob("*.safetensors"))
        recipe = folder / "recipe.yaml"
        recipe.write_text(json.dumps(recipe_of(parent)))
        _, idle_bytes, _, data_kb = measured([sys.executable, "-c", IDLE])
        limit_bytes = int(data_kb) * 1024 + int(LIMIT_SHARE * parent_bytes)
        puzzle = [sys.executable, "-m", "puzzle_nas", "run", str(recipe)]
        result: dict[str, float] = {
            "parent_bytes": parent_bytes,
            "idle_bytes": idle_bytes,
            "memory_given_over_parent_bytes": LIMIT_SHARE,
        }
        for memory in ("stream", "all"):
            where = ["--run-dir", str(folder / memory), f"memory={memory}"]
            ends = ["--to", "prepare-parent"], ["--from", "prepare-data", "--to", "prepare-data"]
            # Within the limit first: what does not fit there is run again without.
            for stages in (*ends, STAGES):
                code, peak, seconds, output = measured([*puzzle, *where, *stages], limit_bytes)
                if code and memory == "stream":
                    raise SystemExit(f"{' '.join(stages)} failed within the limit:\n{output}")
                if code:
                    result["in_memory_runs_within_limit"] = 0
                    code, peak, seconds, output = measured([*puzzle, *where, *stages])
                    assert code == 0, output
            label = "streamed" if memory == "stream" else "in_memory"
            result[f"{label}_peak_bytes"] = peak - idle_bytes
            result[f"{label}_peak_over_parent_bytes"] = round((peak - idle_bytes) / parent_bytes, 4)
            result[f"{label}_seconds"] = round(seconds, 1)
        result["artifacts_that_differ"] = differences(folder / "stream", folder / "all")
    for name, value in result.items():
        print(f"{name:36s} {value}")
    return {name if name.startswith("streamed") else f"streaming_{name}": value for name, value in result.items()}


def differences(one: Path, other: Path) -> int:
    """Files of library and scores that are not the same bytes, or only in one of the two runs."""
    files = [
        {str(p.relative_to(run)): p.read_bytes() for part in ("library", "scores") for p in (run / part).rglob("*.*")}
        for run in (one, other)
    ]
    names = files[0].keys() | files[1].keys()
    assert names
    return sum(files[0].get(name) != files[1].get(name) for name in names)


if __name__ == "__main__":
    make_parent(Path(sys.argv[1]))
